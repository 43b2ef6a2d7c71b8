"""Each notebook says what it ran with: one that would run with other files is not finished.

And manifest.json, gathered from that, is what `python -m helpers verify` checks.
"""

import json
import os
import shutil
import time

import nbformat
import pytest

from helpers.__main__ import main
from helpers.config import PROJECT_DIR, Config, ConfigError
from helpers.runs import inventory, lessons, provenance, recording, runner
from tests.faults.staging import folder_hashes, record_cell, run_notebooks, write_notebook

CURATE = """from helpers.config import Config
config = Config.from_notebook(globals())
path = config.dataset_dir / "train" / "data.arrow"
path.parent.mkdir(parents=True, exist_ok=True)
path.write_text(open(config.data_source).read())"""
TRAIN = """from helpers.config import Config
config = Config.from_notebook(globals())
config.adapter_dir.mkdir(exist_ok=True)
(config.adapter_dir / "adapter_model.safetensors").write_text(f"{config.max_steps} steps")"""


class Stage:
    """A folder with three notebooks, a user's rows and model, and a run of all that."""

    def __init__(self, folder):
        self.notebooks, self.run_dir = folder / "notebooks", folder / "run"
        self.rows, self.model = folder / "questions.jsonl", folder / "model"
        self.given = {"DATA_SOURCE": str(self.rows), "MODEL_NAME": str(self.model)}

    def write(self):
        self.rows.write_text("the rows", encoding="utf-8")
        self.model.mkdir()
        (self.model / "model.safetensors").write_text("the weights", encoding="utf-8")
        write_notebook(self.notebooks, "01_one.ipynb", record_cell("01"))
        write_notebook(self.notebooks, "02_two.ipynb", CURATE, record_cell("02"))
        write_notebook(self.notebooks, "04_four.ipynb", TRAIN, record_cell("04"))

    def run(self, parameters=None, **options):
        given = {**self.given, **(parameters or {})}
        return run_notebooks(self.notebooks, self.run_dir, parameters=given, **options)

    def manifest(self):
        return json.loads((self.run_dir / "manifest.json").read_text("utf-8"))["notebooks"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that ended, never changed: its folder is copied for each test."""
    folder = tmp_path_factory.mktemp("finished")
    stage = Stage(folder)
    stage.write()
    stage.run({"MAX_STEPS": 7})
    return folder


@pytest.fixture
def stage(finished, tmp_path, monkeypatch):
    """The run in another folder, its user's files where they were."""
    stage = Stage(finished)
    stage.run_dir = shutil.copytree(finished / "run", tmp_path / "moved")
    stage.notebooks = shutil.copytree(finished / "notebooks", tmp_path / "notebooks")
    stage.given["MAX_STEPS"] = 7
    monkeypatch.setattr(lessons, "NOTEBOOKS_DIR", stage.notebooks)
    return stage


@pytest.fixture
def edit(finished):
    """Change a file of the user, which is put back afterwards."""
    before = {}

    def change(path, text="edited"):
        before[path] = path.read_text("utf-8")
        path.write_text(text, encoding="utf-8")

    yield change
    for path, text in before.items():
        path.write_text(text, encoding="utf-8")


@pytest.fixture
def ran(stage, monkeypatch):
    """Numbers of the notebooks that a call would execute; none is."""
    numbers = []
    monkeypatch.setattr(
        runner, "_execute", lambda config, source, *rest: numbers.append(source.name[:2])
    )
    return numbers


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A copy of the project whose files can be edited."""
    folder = tmp_path / "project"
    for name in ("helpers", "benchmarks/results"):
        shutil.copytree(PROJECT_DIR / name, folder / name)
    (folder / "data").mkdir()
    for name in ("data/problems.jsonl", "requirements.txt"):
        shutil.copy(PROJECT_DIR / name, folder / name)
    monkeypatch.setattr(provenance, "PROJECT_DIR", folder)
    return folder


# -- What is finished.


def test_a_moved_run_is_finished(stage, ran, capsys):
    stage.run()
    assert ran == [] and capsys.readouterr().out.count("finished already") == 3


def test_edited_rows_of_the_user_run_the_notebook_that_reads_them_again(stage, ran, edit, capsys):
    edit(stage.rows)
    stage.run()
    assert ran == ["02"]
    assert "02_two runs again: DATA_SOURCE/questions.jsonl has changed\n" in capsys.readouterr().out


def test_rows_of_a_benchmark_are_read_too(stage, tmp_path):
    rows = tmp_path / "own.jsonl"
    rows.write_text("{}", encoding="utf-8")
    given = {**stage.given, "BENCHMARKS": ["problems", str(rows)]}
    config = Config.from_parameters({"PROFILE": "smoke", **given})
    source = stage.notebooks / "02_two.ipynb"
    found = provenance.read_by(provenance.settings_of(config), config.run_dir, source)
    assert found["BENCHMARKS/own.jsonl"] == inventory.sha256(rows)


def test_edited_helpers_run_all_again(stage, ran, project, capsys):
    stage.run()
    assert ran == []
    path = project / "helpers" / "prompts.py"
    path.write_text(path.read_text("utf-8") + "# edited\n", encoding="utf-8")
    stage.run()
    assert ran == ["01", "02", "04"]
    assert "01_one runs again: helpers/prompts.py has changed\n" in capsys.readouterr().out


def test_an_edited_file_of_the_project_runs_the_lessons_that_read_it(stage, ran, project):
    (project / "data" / "problems.jsonl").write_text("{}", encoding="utf-8")
    (project / "README.md").write_text("edited", encoding="utf-8")
    stage.run()
    assert ran == ["02"]


def test_an_edited_model_runs_again_what_loads_it(stage, ran, edit, capsys):
    edit(stage.model / "model.safetensors")
    stage.run()
    assert ran == ["02", "04"]
    assert "04_four runs again: MODEL_NAME/model.safetensors has ch" in capsys.readouterr().out


def test_a_dataset_edited_by_hand_runs_again_what_reads_it(stage, ran, capsys):
    (stage.run_dir / "dataset" / "train" / "data.arrow").write_text("edited", encoding="utf-8")
    stage.run()
    assert ran == ["04"]
    assert "04_four runs again: dataset/train/data.arrow has changed" in capsys.readouterr().out


def test_a_result_that_is_gone_is_written_again(stage, ran, capsys):
    (stage.run_dir / "adapter" / "adapter_model.safetensors").unlink()
    stage.run()
    assert ran == ["04"]
    assert "adapter/adapter_model.safetensors is gone" in capsys.readouterr().out


def test_another_setting_runs_all_again(stage, ran, capsys):
    stage.run({"MAX_STEPS": 3})
    assert ran == ["01", "02", "04"]
    assert "04_four runs again: MAX_STEPS was 7 and is 3\n" in capsys.readouterr().out


def test_another_text_or_output_in_a_notebook_runs_nothing(stage, ran):
    path = stage.notebooks / "02_two.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[0].source = "# Another title"
    notebook.cells[1].execution_count = 9
    nbformat.write(notebook, path)
    stage.run()
    assert ran == []


def test_other_code_runs_again_with_all_after_it(stage, ran):
    write_notebook(stage.notebooks, "02_two.ipynb", "print('other')")
    stage.run()
    assert ran == ["02", "04"]


def test_what_was_interrupted_runs_again_and_what_was_before_it_does_not(stage, ran):
    executed = stage.run_dir / "executed"
    (executed / "04_four.ipynb").rename(executed / "04_four.failed.ipynb")
    stage.run()
    assert ran == ["04"]


def test_a_notebook_of_an_earlier_edition_runs_again(stage, ran, capsys):
    path = stage.run_dir / "executed" / "01_one.ipynb"
    notebook = nbformat.read(path, as_version=4)
    del notebook.metadata["ran_with"]
    nbformat.write(notebook, path)
    stage.run()
    assert ran == ["01"]
    assert "01_one runs again: nothing says what it ran with\n" in capsys.readouterr().out


def test_a_model_that_the_notebook_fetches_is_in_its_record(stage, monkeypatch):
    """Before it runs the Hub's commit is not known; that is no difference afterwards."""
    known = iter(["not on this disk", "commit", "commit"])
    monkeypatch.setattr(provenance, "identity", lambda name: {name: next(known)})
    config = Config.from_parameters({"PROFILE": "smoke", **stage.given})
    source = stage.notebooks / "02_two.ipynb"
    record = provenance.taken_before(config, source, {})
    executed = nbformat.read(stage.run_dir / "executed" / source.name, as_version=4)
    record = provenance.completed(record, config, source, executed)
    assert record["read"][f"MODEL_NAME/{config.model_name}"] == "commit"


def test_a_data_source_of_the_hub_is_known_by_its_name_before_and_after(stage):
    stage.given["DATA_SOURCE"] = "somebody/rows"
    config = Config.from_parameters({"PROFILE": "smoke", **stage.given})
    source = stage.notebooks / "02_two.ipynb"
    record = provenance.taken_before(config, source, {})
    executed = nbformat.read(stage.run_dir / "executed" / source.name, as_version=4)
    record = provenance.completed(record, config, source, executed)
    assert record["read"]["DATA_SOURCE/somebody/rows"] == "not on this disk"


# -- Hashes that are remembered.


def test_a_file_is_read_again_only_when_its_marks_changed(tmp_path, monkeypatch):
    read, path, sha256 = [], tmp_path / "weights", inventory.sha256
    monkeypatch.setattr(inventory, "sha256", lambda path: read.append(path.name) or sha256(path))
    path.write_text("one", encoding="utf-8")
    monkeypatch.setattr(time, "time_ns", lambda: path.stat().st_ctime_ns + 3_000_000_000)
    assert inventory.remembered(path) == inventory.remembered(path) == sha256(path)
    assert read == ["weights"]
    status = path.stat()
    time.sleep(0.01)  # a step of the clock of most disks
    path.write_text("two", encoding="utf-8")  # of the same size, and its time set back
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert inventory.remembered(path) == sha256(path)


def test_what_was_changed_a_moment_ago_is_not_remembered(tmp_path, monkeypatch):
    read, path, sha256 = [], tmp_path / "weights", inventory.sha256
    monkeypatch.setattr(inventory, "sha256", lambda path: read.append(path.name) or sha256(path))
    path.write_text("one", encoding="utf-8")
    inventory.remembered(path), inventory.remembered(path)
    assert read == ["weights", "weights"]


# -- The manifest.


def test_it_holds_what_each_notebook_ran_with(stage):
    found = stage.manifest()
    assert found.keys() == {"01_one.ipynb", "02_two.ipynb", "04_four.ipynb"}
    record = found["04_four.ipynb"]
    assert record["parameters"] == {"PROFILE": "smoke", **stage.given}
    assert record["settings"]["max_steps"] == 7 and record["settings"]["lora_r"] == 64
    assert "CPU cores" in record["environment"]["hardware"]
    assert record["environment"]["torch"].startswith("2.") and "trl" in record["environment"]
    assert record["read"].keys() >= {
        *("notebooks/01_one.ipynb", "notebooks/04_four.ipynb", "helpers/training/safety.py"),
        *("dataset/train/data.arrow", "MODEL_NAME/model.safetensors"),
    }
    assert record["wrote"].keys() == {
        *("adapter/adapter_model.safetensors", "metrics/04.json", "executed/04_four.ipynb")
    }
    read = found["02_two.ipynb"]["read"]
    assert read["DATA_SOURCE/questions.jsonl"] == inventory.sha256(stage.rows)
    assert read["data/problems.jsonl"] and "notebooks/04_four.ipynb" not in read
    assert "DATA_SOURCE/questions.jsonl" not in record["read"]


def test_a_call_that_runs_nothing_changes_neither_manifest_nor_report(stage):
    names = ("manifest.json", "report.html")
    before = {name: (stage.run_dir / name).read_bytes() for name in names}
    stage.run()
    assert {name: (stage.run_dir / name).read_bytes() for name in names} == before


def test_one_notebook_with_a_parameter_leaves_the_others_theirs(stage):
    others = {name: record for name, record in stage.manifest().items() if name[:2] != "04"}
    stage.run({"MAX_STEPS": 3}, only="04")
    found = stage.manifest()
    assert found.pop("04_four.ipynb")["settings"]["max_steps"] == 3 and found == others


def test_a_failed_notebook_has_its_record_too_and_is_not_in_the_manifest(stage):
    write_notebook(stage.notebooks, "01_one.ipynb", "1 / 0")
    with pytest.raises(runner.RunStopped):
        stage.run({"MAX_STEPS": 3}, only="01")
    failed = provenance.record_in(stage.run_dir / "executed" / "01_one.failed.ipynb")
    assert failed["settings"]["max_steps"] == 3 and "wrote" not in failed
    assert stage.manifest()["01_one.ipynb"]["settings"]["max_steps"] == 7


# -- python -m helpers verify.


def test_an_untouched_run_is_verified(stage, capsys):
    assert main(["verify", str(stage.run_dir)]) == 0
    assert capsys.readouterr().out == "8 files as the manifest records them\n"


def test_everything_that_differs_is_named_at_once(stage, edit, capsys):
    edit(stage.rows)
    with (stage.run_dir / "adapter" / "adapter_model.safetensors").open("ab") as file:
        file.write(b"!")
    (stage.run_dir / "metrics" / "01.json").unlink()
    (stage.run_dir / "dataset" / "planted.pkl").write_bytes(b"new")
    assert main(["verify", str(stage.run_dir)]) == 1
    message = capsys.readouterr().err
    assert message.startswith(f"stopped: {stage.run_dir} differs from its manifest: metrics/01.j")
    for text in (
        "metrics/01.json is gone",
        "DATA_SOURCE/questions.jsonl has changed",
        "dataset/planted.pkl is new",
        "adapter/adapter_model.safetensors has changed",
    ):
        assert message.count(text) == 1
    assert "dataset/train/data.arrow" not in message


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        ("read", "helpers/prompts.py", "0" * 64, "helpers/prompts.py has changed"),
        ("environment", "torch", "1.0", "torch was 1.0 and is 2."),
        ("read", "MODEL_NAME/model.safetensors", "0" * 64, "MODEL_NAME/model.safetensors has chan"),
    ],
)
def test_other_code_versions_or_weights_are_named(stage, part, name, value, message):
    path = stage.run_dir / "manifest.json"
    record = json.loads(path.read_text("utf-8"))
    record["notebooks"]["04_four.ipynb"][part][name] = value
    path.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(provenance.ManifestError, match=message):
        provenance.verify(stage.run_dir)


def test_an_edited_output_is_named(stage):
    path = stage.run_dir / "executed" / "01_one.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[-1].outputs = []
    notebook.cells[0].source = "# Better"
    nbformat.write(notebook, path)
    with pytest.raises(provenance.ManifestError, match="executed/01_one.ipynb has changed"):
        provenance.verify(stage.run_dir)


def test_what_datasets_caches_and_an_upload_adds_is_no_difference(stage):
    (stage.run_dir / "dataset" / "train" / "cache-1a2b.arrow").touch()
    (stage.run_dir / "merged").mkdir()
    (stage.run_dir / "merged" / "README.md").touch()
    assert provenance.verify(stage.run_dir) == 8


def test_a_folder_without_a_manifest_says_what_writes_it(tmp_path):
    with pytest.raises(inventory.ArtefactError, match="manifest.json cannot .*`python -m helpers"):
        provenance.verify(tmp_path)


# -- Recording.


def test_nothing_is_recorded_when_one_would_run_again(stage, ran, edit):
    config = stage.run()
    before = folder_hashes(stage.notebooks)
    edit(stage.model / "model.safetensors")
    with pytest.raises(ConfigError, match=r"02_two.ipynb would not .* \(MODEL_NAME/model.safete"):
        recording.record(config)
    assert folder_hashes(stage.notebooks) == before


def test_what_is_recorded_has_the_date_and_hardware_of_its_run(stage, ran):
    config = stage.run()
    path = config.executed_dir / "04_four.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata["ran_with"]["environment"]["date"] = "2026-01-02"
    nbformat.write(notebook, path)
    recording.record(config)
    recorded = nbformat.read(stage.notebooks / path.name, as_version=4).metadata.recorded
    assert recorded.date == "2026-01-02" and "CPU cores" in recorded.hardware
