"""The runner, on small notebooks made here: order, resume, and every way a cell can end."""

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from helpers.config import ConfigError
from helpers.runs import inventory, lessons, recording, report, runner


def write_notebook(folder, name, *sources):
    parameters = new_code_cell('PROFILE = "demo"\nRUN_DIR = None\nMAX_STEPS = None')
    parameters.metadata["tags"] = ["parameters"]
    cells = [new_markdown_cell(f"# {name}"), parameters, *map(new_code_cell, sources)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=cells, metadata=kernel), folder / name)


def record_cell(number, value="1"):
    return (
        "from helpers.config import Config\nfrom helpers.runs.inventory import record_metrics\n"
        f"record_metrics(Config.from_notebook(globals()), '{number}', {{'value': {value}}})"
    )


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with two notebooks that record a number each, in place of the real ones."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    write_notebook(folder, "01_one.ipynb", "print('first')", record_cell("01"))
    write_notebook(folder, "02_two.ipynb", record_cell("02", "MAX_STEPS or 0"))
    monkeypatch.setattr(lessons, "NOTEBOOKS_DIR", folder)
    return folder


@pytest.fixture
def run(folder, tmp_path):
    def start(**options):
        return runner.run("smoke", run_dir=str(tmp_path / "run"), **options)

    return start


def executed(config):
    return sorted(path.name for path in config.executed_dir.glob("*.ipynb"))


def start_times(config):
    read = [nbformat.read(path, 4) for path in sorted(config.executed_dir.glob("[0-9]*.ipynb"))]
    return [notebook.metadata.papermill.start_time for notebook in read]


def test_a_parameter_that_only_other_notebooks_list_is_not_called_unknown(run, caplog):
    run(only="01", parameters={"SEED": 7})
    assert "unknown" not in caplog.text


def test_runs_in_order_and_writes_the_report(run):
    config = run(parameters={"MAX_STEPS": 7})
    assert executed(config) == ["01_one.ipynb", "02_two.ipynb"]
    assert inventory.read_metrics(config) == {"01": {"value": 1}, "02": {"value": 7}}
    assert (config.run_dir / "report.html").exists()


def test_headlines_show_counts_whole_and_rates_short(run):
    config = run()
    inventory.record_metrics(config, "02", {"kept_pairs": 16_777_216})
    inventory.record_metrics(config, "06", {"stop_rate_tuned": 0.15625})
    assert [value for _, _, value in report.headline_rows(config)] == ["16,777,216", "0.1562"]


def test_a_second_run_does_nothing_and_a_changed_parameter_runs_again(run, capsys):
    before = start_times(run())
    assert start_times(run()) == before
    assert "01_one: finished already" in capsys.readouterr().out
    after = start_times(run(parameters={"MAX_STEPS": 3}))
    assert all(new != old for new, old in zip(after, before, strict=True))


def test_a_changed_notebook_runs_again_with_all_after_it(run, folder):
    first, second = start_times(run())
    write_notebook(folder, "02_two.ipynb", record_cell("02", "5"))
    assert start_times(run())[0] == first
    write_notebook(folder, "01_one.ipynb", record_cell("01", "5"))
    assert start_times(run())[1] != second


def test_only_and_from_run_what_they_name(run):
    first, second = start_times(run())
    again = start_times(run(first="02"))
    assert again[0] == first and again[1] != second
    assert start_times(run(only="01"))[1] == again[1]


def test_goes_on_from_the_notebook_that_failed(run, folder):
    write_notebook(folder, "02_two.ipynb", "x = 1 / 0")
    with pytest.raises(runner.RunStopped, match=r"02_two, cell \d+ \(x = 1 / 0\): ZeroDivision"):
        run()
    write_notebook(folder, "02_two.ipynb", record_cell("02"))
    config = run()
    assert executed(config) == ["01_one.ipynb", "02_two.ipynb"]


def test_a_failed_notebook_is_kept_under_another_name(run, folder, tmp_path):
    write_notebook(folder, "02_two.ipynb", "raise ValueError('why')")
    with pytest.raises(runner.RunStopped, match="ValueError: why"):
        run()
    names = sorted(path.name for path in (tmp_path / "run" / "executed").iterdir())
    assert "02_two.failed.ipynb" in names and "02_two.ipynb" not in names


def test_a_dead_kernel_is_named_with_the_cell_it_died_in(run, folder):
    kill = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"
    write_notebook(folder, "01_one.ipynb", "print('before')", kill, "print('after')")
    with pytest.raises(
        runner.RunStopped, match=r"01_one, cell \d \(import os, signal\): its kernel died"
    ):
        run()


def test_a_cell_over_its_time_is_named(run, folder):
    write_notebook(folder, "01_one.ipynb", "import time; time.sleep(60)")
    with pytest.raises(runner.RunStopped, match="time.sleep.*longer than the limit of 2 seconds"):
        run(timeout=2)


def test_sys_exit_0_is_no_success(run, folder):
    write_notebook(folder, "01_one.ipynb", "import sys; sys.exit(0)", record_cell("01"))
    with pytest.raises(runner.RunStopped, match=r"01_one, cell 2 \(import sys.*by sys.exit"):
        run()


def test_a_wrong_parameter_stops_before_anything_runs(run, tmp_path):
    with pytest.raises(ConfigError, match="did you mean MAX_STEPS"):
        run(parameters={"MAX_STPES": 3})
    with pytest.raises(ConfigError, match="no notebook is numbered '07'"):
        run(only="07")
    assert not (tmp_path / "run").exists()


def test_record_copies_outputs_and_drops_what_must_not_be_committed(run, folder):
    noisy = "import sys\nprint('kept')\nprint('dropped', file=sys.stderr)"
    write_notebook(folder, "01_one.ipynb", noisy, record_cell("01"))
    config = run()
    recording.record(config)
    notebook = nbformat.read(folder / "01_one.ipynb", 4)
    text = str([cell.get("outputs") for cell in notebook.cells])
    assert "kept" in text and "'text': 'dropped" not in text and "stderr" not in text
    assert notebook.metadata.recorded.code_sha256 == lessons.code_hash(folder / "01_one.ipynb")
    assert "papermill" not in str(notebook.cells[1].metadata)


def test_record_refuses_a_notebook_that_changed_since(run, folder):
    config = run()
    write_notebook(folder, "01_one.ipynb", "print('other')")
    with pytest.raises(
        ConfigError,
        match=r"01_one.ipynb would not .*01_one.ipynb has changed",
    ):
        recording.record(config)
