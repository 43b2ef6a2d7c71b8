"""Jobs in processes of their own, under a fault: killed at a write, or with a full disk.

And what several files need: small notebooks, a hash of a folder, the names that must not be left.
"""

import hashlib
import multiprocessing
import os
import resource
import signal
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from helpers.runs import lessons, runner

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["helpers.data.curation", "helpers.merging.merging", "helpers.runs.runner"]
)
WRITES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def start(function, *arguments):
    """The exit code of a process that runs function(*arguments); -9 when it was killed."""
    process = CONTEXT.Process(target=function, args=arguments)
    process.start()
    process.join(300)
    assert process.exitcode is not None, f"{function.__name__} did not end"
    return process.exitcode


def die_at(number: int, folder: Path, log: Path, function, *arguments) -> None:
    """Run a function, and die by SIGKILL just before its write number `number` below `folder`.

    Writes are what Python announces to audit hooks: every open for writing, rename, removal and
    new folder. Their names go to the file `log`, one a line, and number 0 lets all of them happen.
    """
    names = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    count = 0

    def hook(event, given):
        nonlocal count
        if (name := _write_below(str(folder), event, given)) is None:
            return
        count += 1
        os.write(names, f"{event} {name}\n".encode())
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    function(*arguments)


def _write_below(folder: str, event: str, given) -> str | None:
    """What a write of an audit event concerns, if it happens below a folder."""
    if event == "open" and not (given[2] or 0) & WRITE_FLAGS:
        return None
    if event != "open" and event not in WRITES:
        return None
    path = given[1] if event == "os.rename" else given[0]
    path = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else ""
    if path.startswith(folder):
        return os.path.relpath(path, folder)
    # rmtree removes by the name in an open folder.
    in_open_folder = event in ("os.remove", "os.rmdir") and given[1] not in (-1, None)
    return path if in_open_folder else None


def first_of_each(log: Path) -> dict[str, int]:
    """The number of the first write of each name in a log, by name."""
    found = {}
    for number, name in enumerate(log.read_text("utf-8").splitlines(), 1):
        found.setdefault(name, number)
    return found


def with_file_limit(size: int, function, *arguments) -> None:
    """Run a function while no file may grow beyond `size` bytes, as on a disk that is full."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then the write fails, and nothing is killed
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    function(*arguments)


def folder_hashes(folder: Path, pattern: str = "*") -> dict[str, str]:
    """SHA-256 of each file below a folder, by its path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob(pattern))
        if path.is_file()
    }


def left_over(folder: Path) -> list[str]:
    """Names below a folder that only an unfinished write has; locks may stay."""
    hidden = [path.name for path in folder.rglob(".*")]
    return [name for name in hidden if not name.endswith((".lock", ".lock.pid"))]


def write_notebook(folder: Path, name: str, *sources: str) -> None:
    """A notebook with a parameters cell and the given code cells."""
    parameters = new_code_cell('PROFILE = "demo"\nRUN_DIR = None\nMAX_STEPS = None')
    parameters.metadata["tags"] = ["parameters"]
    cells = [new_markdown_cell(f"# {name}"), parameters, *map(new_code_cell, sources)]
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number}"  # the same in every run
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    folder.mkdir(exist_ok=True)
    nbformat.write(new_notebook(cells=cells, metadata=kernel), folder / name)


def record_cell(number: str, value: str = "1") -> str:
    """Code that records one number as a lesson."""
    return (
        "from helpers.config import Config\nfrom helpers.runs.inventory import record_metrics\n"
        f"record_metrics(Config.from_notebook(globals()), '{number}', {{'value': {value}}})"
    )


def run_notebooks(notebooks: Path, run_dir: Path, **options):
    """runner.run with profile smoke over the notebooks of a folder, for this once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lessons, "NOTEBOOKS_DIR", notebooks)
        return runner.run("smoke", str(run_dir), **options)
