"""Runs the notebooks in order through papermill, and makes the committed outputs.

A notebook is finished when `executed/<name>.ipynb` carries the fingerprint of what would run now:
its code, its parameters, and the fingerprint of the one before. A run goes on from the first other.
"""

import hashlib
import json
from pathlib import Path

import nbformat
import papermill
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from papermill.exceptions import PapermillExecutionError

from helpers.config import PROJECT_DIR, Config, ConfigError
from helpers.report import environment, headline_rows, read_metrics, write_report  # noqa: F401

NOTEBOOKS_DIR = PROJECT_DIR / "notebooks"
CELL_TIMEOUT_SECONDS = 6 * 60 * 60


class RunStopped(RuntimeError):
    """A notebook failed. The message names the notebook, the cell and the error."""


def notebooks(only: str | None = None) -> list[Path]:
    """The numbered notebooks in order, or the one with a number. ConfigError for an unknown one."""
    found = sorted(NOTEBOOKS_DIR.glob("[0-9][0-9]_*.ipynb"))
    chosen = [path for path in found if only is None or path.name.startswith(f"{only}_")]
    if not chosen:
        raise ConfigError(f"no notebook is numbered {only!r}: {', '.join(p.name for p in found)}")
    return chosen


def run(profile, run_dir=None, only=None, first=None, parameters=None, timeout=None) -> Config:
    """Execute the notebooks that are not finished, write the report, return the run's Config.

    `only` runs one notebook, `first` runs it and all after it, whether finished or not.
    Raises ConfigError before anything starts when a parameter is wrong, RunStopped at a failure.
    """
    parameters = {"PROFILE": profile, "RUN_DIR": run_dir, **(parameters or {})}
    config = Config.from_notebook(parameters)
    given = {name: value for name, value in parameters.items() if value is not None}
    if first is not None:
        notebooks(first)
    forced, previous = only is not None, ""
    for source in notebooks():
        previous = _fingerprint(source, given, previous)
        forced = forced or (first is not None and source.name.startswith(f"{first}_"))
        if only is not None and source not in notebooks(only):
            continue
        if forced or not _is_finished(config, source, previous):
            _execute(config, source, given, previous, timeout or CELL_TIMEOUT_SECONDS)
        else:
            print(f"{source.stem}: finished already")
    write_report(config)
    return config


def _fingerprint(source: Path, parameters: dict, previous: str) -> str:
    text = previous + json.dumps(parameters, sort_keys=True, default=str) + code_hash(source)
    return hashlib.sha256(text.encode()).hexdigest()


def code_hash(path: Path) -> str:
    """SHA-256 over the sources of a notebook's code cells, in order."""
    cells = nbformat.read(path, as_version=4).cells
    code = "\0".join(cell.source for cell in cells if cell.cell_type == "code")
    return hashlib.sha256(code.encode()).hexdigest()


def _is_finished(config: Config, source: Path, fingerprint: str) -> bool:
    executed = config.executed_dir / source.name
    if not executed.exists():
        return False
    return nbformat.read(executed, as_version=4).metadata.get("run_fingerprint") == fingerprint


def _execute(config: Config, source: Path, parameters: dict, fingerprint: str, timeout: float):
    """Run one notebook into executed/: under its own name if it succeeds, else as <name>.failed."""
    config.executed_dir.mkdir(parents=True, exist_ok=True)
    final = config.executed_dir / source.name
    draft = final.with_name(f".{source.stem}.partial.ipynb")
    failed = final.with_name(f"{source.stem}.failed.ipynb")
    for stale in (final, failed):
        stale.unlink(missing_ok=True)
    bar = {"desc": source.stem, "bar_format": "{desc:34} {percentage:3.0f}% |{bar:24}| {elapsed}"}
    try:
        papermill.execute_notebook(
            source,
            draft,
            parameters=parameters,
            progress_bar=bar,
            execution_timeout=timeout,
            # Without this each kernel warns that its connection, on this machine, is not encrypted.
            extra_arguments=["--IPKernelApp.log_level=40"],
        )
    except (PapermillExecutionError, DeadKernelError, CellTimeoutError) as error:
        draft.replace(failed)
        raise RunStopped(_what_failed(failed, error, timeout)) from error
    _check_reached_the_end(draft, source)
    notebook = nbformat.read(draft, as_version=4)
    notebook.metadata["run_fingerprint"] = fingerprint
    nbformat.write(notebook, draft)
    draft.replace(final)


def _what_failed(path: Path, error: Exception, timeout: float) -> str:
    """One sentence: the notebook, the cell that was running, and what happened to it."""
    # After a dead kernel papermill marks every later cell as completed; only those that ran have
    # a start time.
    cells = nbformat.read(path, as_version=4).cells
    started = [
        (number, cell)
        for number, cell in enumerate(cells)
        if cell.cell_type == "code" and cell.metadata.get("papermill", {}).get("start_time")
    ]
    number, cell = started[-1]
    if isinstance(error, PapermillExecutionError):
        reason = f"{error.ename}: {error.evalue}"
    elif isinstance(error, CellTimeoutError):
        reason = f"it ran longer than the limit of {timeout:.0f} seconds"
    else:
        reason = "its kernel died, most likely for want of memory"
    first_line = cell.source.strip().splitlines()[0]
    return f"{path.name.removesuffix('.failed.ipynb')}, cell {number} ({first_line}): {reason}"


def _check_reached_the_end(path: Path, source: Path) -> None:
    """Raise RunStopped if a cell called sys.exit(0), which papermill takes for success."""
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    missing = [cell for cell in cells if cell.execution_count is None]
    if missing:
        first_line = missing[0].source.strip().splitlines()[0]
        raise RunStopped(f"{source.stem} ended before its cell ({first_line}) ran")


def record(config: Config) -> None:
    """Put the outputs of a finished run into the committed notebooks, cleaned.

    Kept: results, figures, printed text. Removed: stderr, widget views, papermill's traces.
    Raises ConfigError when a notebook's code is no longer the code that was run.
    """
    for source in notebooks():
        executed = config.require(config.executed_dir / source.name, source.stem)
        ran = {cell.id: cell for cell in nbformat.read(executed, as_version=4).cells}
        notebook = nbformat.read(source, as_version=4)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        for count, cell in enumerate(code, start=1):
            if cell.id not in ran or ran[cell.id].source != cell.source:
                raise ConfigError(f"{source.name} has changed since it ran: run it again first")
            cell.execution_count = count
            cell.outputs = [_cleaned(output, count) for output in ran[cell.id].outputs]
            cell.outputs = [output for output in cell.outputs if output is not None]
        notebook.metadata.pop("widgets", None)
        notebook.metadata["recorded"] = {
            "code_sha256": code_hash(source),
            "profile": config.profile,
            **environment(),
        }
        nbformat.validate(notebook)
        nbformat.write(notebook, source)


def _cleaned(output, count: int):
    """The output as it is committed, or None for one that is not."""
    if output.get("name") == "stderr":
        return None
    data = output.get("data", {})
    if "application/vnd.jupyter.widget-view+json" in data:
        return None
    if "execution_count" in output:
        output.execution_count = count
    return output
