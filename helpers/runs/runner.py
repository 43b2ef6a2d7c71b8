"""Runs the notebooks in order through papermill, but for those that are finished.

A notebook is finished when `executed/<name>.ipynb` ran with the settings and the files that there
are now, what it wrote is still there, and no later attempt at it stopped half-way.
"""

import logging
import signal
from pathlib import Path

import nbformat
import papermill
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config as Traits

from helpers.config import Config
from helpers.runs import folders, provenance
from helpers.runs.lessons import executed_paths, notebooks
from helpers.runs.report import write_report

# papermill warns of each parameter that a notebook's own cell does not list, such as MAX_STEPS in
# 01. Config knows which exist. And asyncio adds a traceback to the sentence of a run that stopped.
logging.getLogger("papermill").setLevel(logging.ERROR)
logging.getLogger("asyncio").setLevel(logging.CRITICAL)

CELL_TIMEOUT_SECONDS = 6 * 60 * 60
# How long a kernel that is told to stop may take, to write a checkpoint for example.
SHUTDOWN_SECONDS = 60
BAR = "{desc:34} {percentage:3.0f}% |{bar:24}| {elapsed}"
ENDINGS = (PapermillExecutionError, DeadKernelError, CellTimeoutError, KeyboardInterrupt)


class RunStopped(RuntimeError):
    """A notebook did not end. The message names it, the cell and the error."""

    exit_code = 1  # after a signal 128 and its number, as shells have it


def run(profile, run_dir=None, only=None, first=None, parameters=None, timeout=None) -> Config:
    """Execute the notebooks that are not finished, write report and manifest, return the Config.

    `only` runs one notebook, `first` runs it and all after it, whether finished or not. Raises
    ConfigError or InUse before anything starts, RunStopped when a notebook does not end.
    """
    parameters = {"PROFILE": profile, "RUN_DIR": run_dir, **(parameters or {})}
    config = Config.from_parameters(parameters)
    given = {name: value for name, value in parameters.items() if value is not None}
    chosen = notebooks(only)
    forced = [path for path in chosen if only or (first and path >= notebooks(first)[0])]
    with folders.writing_in(config.run_dir):
        try:
            _run_in_order(config, chosen, forced, given, timeout or CELL_TIMEOUT_SECONDS)
            write_report(config)
        except RunStopped as stop:
            write_report(config, str(stop))
            raise
        finally:
            provenance.write_manifest(config.run_dir)
    return config


def _run_in_order(config: Config, chosen, forced, parameters: dict, timeout: float) -> None:
    folders.writable(config.executed_dir)
    for source in chosen:
        reason = provenance.why_unfinished(config, source)
        if not reason and source not in forced:
            print(f"{source.stem}: finished already")
            continue
        if source not in forced and executed_paths(config, source)[0].exists():
            print(f"{source.stem} runs again: {reason}")
        with folders.full_disk_said(executed_paths(config, source)[0]):
            _execute(config, source, parameters, timeout)


def _execute(config: Config, source: Path, parameters: dict, timeout: float) -> None:
    """Run one notebook into executed/: under its own name if it succeeds, else as <name>.failed."""
    final, draft, failed = executed_paths(config, source)
    failed.unlink(missing_ok=True)
    record, error = provenance.taken_before(config, source, parameters), None
    try:
        _papermill(source, draft, parameters, timeout)
    except ENDINGS as ended:
        if not draft.exists():
            raise
        error = ended
    notebook = nbformat.read(draft, as_version=4)
    # sys.exit(0) in a cell is a success to papermill, and the cells after it never run.
    if error or not all(c.execution_count for c in notebook.cells if c.cell_type == "code"):
        place = _settle(notebook, source)
        notebook.metadata[provenance.KEY] = record
        nbformat.write(notebook, draft)
        draft.replace(failed)
        stop = RunStopped(f"{source.stem}, {place}: {_why(error, timeout)}")
        if isinstance(error, KeyboardInterrupt):
            stop.exit_code = 128 + _signal(error)
        raise stop from error
    notebook.metadata[provenance.KEY] = provenance.completed(record, config, source, notebook)
    nbformat.write(notebook, draft)
    draft.replace(final)


def _papermill(source: Path, draft: Path, parameters: dict, timeout: float) -> None:
    papermill.execute_notebook(
        source,
        draft,
        parameters=parameters,
        progress_bar={"desc": source.stem, "bar_format": BAR},
        execution_timeout=timeout,
        config=Traits(KernelManager={"shutdown_wait_time": SHUTDOWN_SECONDS}),
        # Else each kernel warns that its connection here is not encrypted, and prints a traceback
        # when it is told to leave a cell.
        extra_arguments=["--IPKernelApp.log_level=50"],
    )


def _settle(notebook, source: Path) -> str:
    """Mark what never ran as pending, where papermill says completed; in words, the last that ran.

    That is its number in the source notebook and its first line. papermill gives the cells that
    ran a start time, and no others.
    """
    cells = [cell for cell in notebook.cells if "papermill" in cell.metadata]
    started = [cell for cell in cells if cell.metadata.papermill.get("start_time")]
    for cell in cells:
        if cell not in started:
            cell.metadata.papermill["status"] = "pending"
    if not started:
        return "before its first cell"
    last = started[-1]
    last.metadata.papermill["status"] = "failed"
    identifiers = [cell.id for cell in nbformat.read(source, as_version=4).cells]
    # The cell that papermill injects is in no source; it follows the one tagged "parameters".
    number = identifiers.index(last.id) if last.id in identifiers else "of parameters"
    return f"cell {number} ({last.source.strip().splitlines()[0]})"


def _why(error: BaseException | None, timeout: float) -> str:
    """What happened to the cell that was running."""
    if isinstance(error, PapermillExecutionError):
        return f"{error.ename}: {error.evalue}"
    if isinstance(error, CellTimeoutError):
        return f"it ran longer than the limit of {timeout:.0f} seconds"
    if isinstance(error, KeyboardInterrupt):
        name = _signal(error).name
        return f"stopped by {name}; the same command goes on from this notebook"
    if error is None:
        return "it left the notebook by sys.exit"
    return "its kernel died, most likely for want of memory"


def _signal(stop: KeyboardInterrupt) -> signal.Signals:
    return signal.Signals(stop.args[0] if stop.args else signal.SIGINT)
