"""Ctrl-C, SIGTERM, a kernel that dies, a cell without end: named, put away, and gone on from."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import nbformat
import psutil
import pytest

from helpers.config import PROJECT_DIR
from helpers.runs import runner
from helpers.training.checkpoints import SafeCheckpoints
from helpers.training.export import export_training
from tests.faults.staging import record_cell, run_notebooks, write_notebook
from tests.faults.train_tiny import tiny_config, write_dataset

COMMAND = """
import signal
import sys
from pathlib import Path
from helpers.runs import lessons
from helpers.__main__ import main
lessons.NOTEBOOKS_DIR = Path(sys.argv[1])
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits "ignored"
sys.exit(main(["run", "--profile", "smoke", "--run-dir", sys.argv[2]]))
"""
# Says which process runs it, then waits, unless it is to go through.
WAITING_CELL = """import os, pathlib, time
pathlib.Path({mark!r}).write_text(str(os.getpid()))
time.sleep(0 if pathlib.Path({go!r}).exists() else 100)"""


@pytest.fixture
def notebooks(tmp_path):
    """Two notebooks: the first ends at once, the second waits in its second cell."""
    folder = tmp_path / "notebooks"
    write_notebook(folder, "01_one.ipynb", record_cell("01"))
    waiting = WAITING_CELL.format(mark=str(tmp_path / "kernel"), go=str(tmp_path / "go"))
    write_notebook(folder, "02_two.ipynb", "print('before')", waiting, record_cell("02"))
    return folder


def start_runner(tmp_path):
    """The runner as a process, once it is in the waiting cell; and the kernel's process id."""
    command = [sys.executable, "-c", COMMAND, str(tmp_path / "notebooks"), str(tmp_path / "run")]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    runner = subprocess.Popen(command, cwd=PROJECT_DIR, **options)
    deadline = time.monotonic() + 60
    while not (tmp_path / "kernel").exists() or not (tmp_path / "kernel").read_text("utf-8"):
        assert runner.poll() is None and time.monotonic() < deadline, runner.stderr.read()
        time.sleep(0.1)
    return runner, int((tmp_path / "kernel").read_text("utf-8"))


def is_gone(pid, seconds=10):
    """Whether a process has ended, or does so in the given time."""
    deadline = time.monotonic() + seconds
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def statuses(path):
    cells = nbformat.read(path, as_version=4).cells
    return [cell.metadata.papermill.status for cell in cells if cell.cell_type == "code"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_with_one_sentence_and_the_next_run_goes_on(notebooks, tmp_path, number):
    runner, kernel = start_runner(tmp_path)
    runner.send_signal(number)
    out, err = runner.communicate(timeout=60)
    assert runner.returncode == 128 + number
    last = err.strip().splitlines()[-1]
    assert last == (
        f"stopped: 02_two, cell 3 (import os, pathlib, time): stopped by {number.name}; "
        "the same command goes on from this notebook"
    )
    assert "Traceback" not in err and is_gone(kernel)
    run = tmp_path / "run"
    assert last.removeprefix("stopped: ") in (run / "report.html").read_text("utf-8")
    assert statuses(run / "executed" / "02_two.failed.ipynb")[-2:] == ["failed", "pending"]
    (tmp_path / "go").touch()
    done = subprocess.run(runner.args, cwd=PROJECT_DIR, capture_output=True, encoding="utf-8")
    assert done.returncode == 0 and "01_one: finished already" in done.stdout
    assert sorted(path.name for path in (run / "executed").glob("*.ipynb")) == [
        "01_one.ipynb",
        "02_two.ipynb",
    ]


@pytest.mark.slow
def test_a_killed_runner_leaves_no_kernel_behind(notebooks, tmp_path):
    runner, kernel = start_runner(tmp_path)
    runner.kill()
    runner.communicate()
    assert is_gone(kernel)


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_training_by_its_script_ends_at_a_signal_with_a_checkpoint(
    tmp_path, tiny_model_dir, number
):
    config = tiny_config(tmp_path / "run", tiny_model_dir)
    write_dataset(config)
    settings = {"MODEL_NAME": config.model_name, "USE_4BIT": False, "MAX_STEPS": 10_000}
    script = export_training({"PROFILE": "smoke", "RUN_DIR": str(config.run_dir), **settings})
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    training = subprocess.Popen([sys.executable, str(script)], **options)
    while not training.stdout.readline().startswith("step    1/"):
        assert training.poll() is None, training.stderr.read()
    training.send_signal(number)
    _, err = training.communicate(timeout=60)
    assert training.returncode == 1
    assert f"TrainingInterrupted: {number.name} ended training after step " in err.splitlines()[-1]
    assert list(config.checkpoints_dir.rglob("checkpoint-*"))


def test_a_dead_kernel_is_named_and_no_later_cell_looks_done(tmp_path):
    kill = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"
    write_notebook(tmp_path / "notebooks", "01_one.ipynb", "print(1)", kill, "print(2)", "print(3)")
    write_notebook(tmp_path / "notebooks", "02_two.ipynb", record_cell("02"))
    message = r"^01_one, cell 3 \(import os, signal\): its kernel died, most likely for want"
    with pytest.raises(runner.RunStopped, match=message) as caught:
        run_notebooks(tmp_path / "notebooks", tmp_path / "run")
    assert caught.value.exit_code == 1
    executed = tmp_path / "run" / "executed"
    assert [path.name for path in executed.glob("*.ipynb")] == ["01_one.failed.ipynb"]
    # The parameters, the ones that papermill injects, and the four cells.
    done = ["completed"] * 3
    assert statuses(executed / "01_one.failed.ipynb") == [*done, "failed", "pending", "pending"]
    report = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "The run stopped:" in report and "01_one, cell 3 (import os, signal)" in report


def test_a_cell_over_its_limit_is_named_and_its_kernel_is_gone(tmp_path):
    mark = tmp_path / "kernel"
    waiting = WAITING_CELL.format(mark=str(mark), go=str(tmp_path / "go"))
    write_notebook(tmp_path / "notebooks", "01_one.ipynb", waiting, "print('later')")
    message = r"cell 2 \(import os, pathlib, time\): it ran longer than the limit of 3 seconds"
    with pytest.raises(runner.RunStopped, match=message):
        run_notebooks(tmp_path / "notebooks", tmp_path / "run", timeout=3)
    assert is_gone(int(mark.read_text("utf-8")))
    failed = tmp_path / "run" / "executed" / "01_one.failed.ipynb"
    assert statuses(failed)[-2:] == ["failed", "pending"]


def test_a_failed_second_run_keeps_what_the_first_one_executed(tmp_path):
    fail = tmp_path / "fail"
    cell = f"import pathlib\nassert not pathlib.Path({str(fail)!r}).exists(), 'told to'"
    write_notebook(tmp_path / "notebooks", "01_one.ipynb", cell)
    config = run_notebooks(tmp_path / "notebooks", tmp_path / "run")
    before = (config.executed_dir / "01_one.ipynb").read_bytes()
    fail.touch()
    with pytest.raises(runner.RunStopped, match="AssertionError: told to"):
        run_notebooks(tmp_path / "notebooks", tmp_path / "run", first="01")
    assert (config.executed_dir / "01_one.ipynb").read_bytes() == before
    fail.unlink()
    # It is not taken for finished: what it left in the run folder may be half of the second run.
    run_notebooks(tmp_path / "notebooks", tmp_path / "run")
    assert (config.executed_dir / "01_one.ipynb").read_bytes() != before
    assert sorted(os.listdir(config.executed_dir)) == ["01_one.ipynb"]


def test_a_training_in_a_thread_hears_no_signal_and_runs():
    def listen():
        with SafeCheckpoints().listens():
            return signal.getsignal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(listen).result() == before
    assert listen() != before
