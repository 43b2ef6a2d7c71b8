"""Two runs in one folder: the second stops and says who is there; a dead one's lock is taken."""

import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

from helpers import artefacts
from helpers.config import PROJECT_DIR
from tests.faults.staging import left_over, record_cell, run_notebooks, write_notebook

HOLD = """
import sys, time
from pathlib import Path
from helpers import artefacts
with artefacts.alone(Path(sys.argv[1]), "run"):
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
    with pytest.raises(artefacts.InUse) as caught:
        run_notebooks(notebooks, tmp_path / "run")
    found = re.fullmatch(
        r".*/run: run is being written by process (\d+), which started at ([-\d]+ [:\d]+): "
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
        with pytest.raises(ZeroDivisionError), artefacts.alone(tmp_path, "run"):
            raise ZeroDivisionError
    assert left_over(tmp_path) == []


def test_two_writers_of_one_artefact(tmp_path):
    """Also outside of the runner: two notebooks that save to one folder."""
    with artefacts.whole_folder(tmp_path / "dataset") as draft:
        (draft / "rows").write_text("first", encoding="utf-8")
        with pytest.raises(artefacts.InUse, match=rf"dataset is being .* process {os.getpid()},"):
            with artefacts.whole_folder(tmp_path / "dataset"):
                pass
    assert (tmp_path / "dataset" / "rows").read_text("utf-8") == "first"


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(artefacts.Unwritable, match="file/run cannot be written .*set RUN_DIR to"):
        run_notebooks(PROJECT_DIR / "notebooks", tmp_path / "file" / "run")
