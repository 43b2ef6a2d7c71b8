"""Two runs in one folder: the second stops and says who is there; a dead one's lock is taken."""

import re
import signal
import subprocess
import sys
import time

import filelock
import psutil
import pytest

from helpers.config import PROJECT_DIR
from helpers.model import loading
from helpers.runs import folders
from tests.faults.staging import (
    folder_hashes,
    left_over,
    record_cell,
    run_notebooks,
    write_notebook,
)
from tests.faults.test_training import start
from tests.faults.train_tiny import build, tiny_config, write_dataset
from tests.notebook_code import curate, fine_tune, save_adapter, save_merged

HOLD = """
import sys, time
from pathlib import Path
from helpers.runs import folders
with folders.writing_in(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the run folder."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(command, cwd=PROJECT_DIR, stdout=subprocess.PIPE, encoding="utf-8")
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def notebooks(tmp_path):
    write_notebook(tmp_path / "notebooks", "01_one.ipynb", record_cell("01"))
    return tmp_path / "notebooks"


def test_the_second_run_stops_with_pid_and_start_of_the_first(holder, notebooks, tmp_path):
    with pytest.raises(folders.InUse) as caught:
        run_notebooks(notebooks, tmp_path / "run")
    found = re.fullmatch(
        r".*/run is being written by process (\d+), which started at ([-\d]+ [:\d]+): "
        r"wait until it ends, stop it, or give this run another folder by RUN_DIR",
        str(caught.value),
    )
    assert int(found[1]) == holder.pid
    started = time.mktime(time.strptime(found[2], "%Y-%m-%d %H:%M:%S"))
    assert abs(started - psutil.Process(holder.pid).create_time()) < 2
    assert not (tmp_path / "run" / "executed").exists()
    assert holder.poll() is None


def test_the_lock_of_a_killed_run_is_taken_over(holder, notebooks, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    config = run_notebooks(notebooks, tmp_path / "run")
    assert (config.metrics_dir / "01.json").exists()


def test_a_lock_is_given_back_when_a_run_fails(tmp_path):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), folders.writing_in(tmp_path):
            raise ZeroDivisionError
    assert left_over(tmp_path) == []


# -- Outside of the runner: a notebook in JupyterLab, the script of several processes.

SAVE = """from pathlib import Path
from helpers.runs import folders
with folders.whole_folder(Path(RUN_DIR) / "dataset") as draft:
    (draft / "rows").write_text("from a kernel", encoding="utf-8")"""


def curates(config):
    curate(config)


def trains(config):
    fine_tune(build(config))


def saves_an_adapter(config):
    save_adapter(build(config), config)


def merges(config):
    model = loading.load_model(config, quantized=False)
    save_merged(model, loading.load_tokenizer(config.model_name), config)


@pytest.mark.parametrize("writes", [curates, trains, saves_an_adapter, merges])
def test_nobody_else_writes_where_a_run_goes_on(holder, tmp_path, tiny_model_dir, writes):
    config = tiny_config(tmp_path / "run", tiny_model_dir)
    write_dataset(config)
    before = folder_hashes(tmp_path / "run", "[!.c]*")  # rows that were tokenized are a cache-*
    with pytest.raises(folders.InUse, match=rf"run is being written by process {holder.pid},"):
        writes(config)
    assert folder_hashes(tmp_path / "run", "[!.c]*") == before
    assert not list(config.checkpoints_dir.rglob("checkpoint-*"))


def test_a_training_holds_the_folder_against_a_run_and_another_training(
    notebooks, tmp_path, tiny_model_dir
):
    other = start(tmp_path / "run", tiny_model_dir, max_steps=10_000)
    try:
        while not other.stdout.readline().startswith("step    1/"):
            assert other.poll() is None
        message = rf"run is being written by process {other.pid},"
        with pytest.raises(folders.InUse, match=message):
            run_notebooks(notebooks, tmp_path / "run")
        with pytest.raises(folders.InUse, match=message):
            trains(tiny_config(tmp_path / "run", tiny_model_dir))
        assert other.poll() is None
    finally:
        other.kill()
        other.communicate()
    run_notebooks(notebooks, tmp_path / "run")


def test_the_kernels_of_a_run_write_where_it_goes_on(tmp_path):
    write_notebook(tmp_path / "notebooks", "02_two.ipynb", SAVE)
    config = run_notebooks(tmp_path / "notebooks", tmp_path / "run")
    assert (config.dataset_dir / "rows").read_text("utf-8") == "from a kernel"


def test_who_held_a_folder_before_is_not_let_in(tmp_path):
    """The next holder may not have written its name yet; then the last one's must not stand."""
    with folders.writing_in(tmp_path):
        pass
    lock = filelock.FileLock(tmp_path / ".run.lock")
    with lock, pytest.raises(folders.InUse, match="being written by another process"):
        with folders.writing_in(tmp_path):
            pass


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file/run cannot be written .*set RUN_DIR to"):
        run_notebooks(PROJECT_DIR / "notebooks", tmp_path / "file" / "run")
