"""Runs the notebooks in order through papermill, and makes the report and the committed outputs.

A notebook is finished when `executed/<name>.ipynb` carries the fingerprint of what would run now
(its code, its parameters, and the fingerprint of the one before) and no later attempt at it stopped
half-way. A run goes on from the first other.
"""

import datetime
import hashlib
import html
import json
import os
import platform
import re
import signal
from importlib.metadata import version
from pathlib import Path

import nbformat
import papermill
import psutil
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from nbconvert import HTMLExporter
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config as Traits

from helpers import artefacts, manifest
from helpers.config import PROJECT_DIR, Config, ConfigError
from helpers.manifest import code_hash

NOTEBOOKS_DIR = PROJECT_DIR / "notebooks"
CELL_TIMEOUT_SECONDS = 6 * 60 * 60
# How long a kernel that is told to stop may take, to write a checkpoint for example.
SHUTDOWN_SECONDS = 60
# What a run of `demo` leaves (600 MB, measured) and its drafts. A large model's weights are counted
# when they are saved.
RUN_BYTES = 1_000_000_000
RECORDED_VERSIONS = ("torch", "transformers", "peft", "trl", "bitsandbytes", "datasets")

# Lesson, metric, what a reader calls it: the headline numbers of a run, in order.
HEADLINES = (
    ("01", "lora_parameters", "numbers that LoRA trains in one layer"),
    ("01", "full_parameters", "numbers in that layer"),
    ("02", "kept_pairs", "question-and-answer pairs kept"),
    ("03", "bits_per_parameter", "bits per 4-bit parameter"),
    ("04", "trainable_percent", "percent of the weights trained"),
    ("04", "eval_loss_before", "validation loss before training"),
    ("04", "eval_loss_after", "validation loss after training"),
    ("05", "eval_loss_merged", "validation loss of the merged model"),
    ("06", "stop_rate_base", "answers that stop by themselves, base"),
    ("06", "stop_rate_tuned", "answers that stop by themselves, tuned"),
    ("06", "parse_rate_base", "answers with code that parses, base"),
    ("06", "parse_rate_tuned", "answers with code that parses, tuned"),
    ("06", "steps_rate_base", "answers explained in steps, base"),
    ("06", "steps_rate_tuned", "answers explained in steps, tuned"),
    ("06", "pass_rate_base", "answers that pass their tests, base"),
    ("06", "pass_rate_tuned", "answers that pass their tests, tuned"),
)


class RunStopped(RuntimeError):
    """A notebook did not end. The message names it, the cell and the error.

    `exit_code` is 1, and for a signal 128 and its number, as shells have it.
    """

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code


def notebooks(only: str | None = None) -> list[Path]:
    """The numbered notebooks in order, or the one with a number. ConfigError for an unknown one."""
    found = sorted(NOTEBOOKS_DIR.glob("[0-9][0-9]_*.ipynb"))
    chosen = [path for path in found if only is None or path.name.startswith(f"{only}_")]
    if not chosen:
        raise ConfigError(f"no notebook is numbered {only!r}: {', '.join(p.name for p in found)}")
    return chosen


def run(profile, run_dir=None, only=None, first=None, parameters=None, timeout=None) -> Config:
    """Execute the notebooks that are not finished, write report and manifest, return the Config.

    `only` runs one notebook, `first` runs it and all after it, whether finished or not. Raises
    ConfigError, DiskFull or InUse before anything starts, RunStopped when a notebook does not end.
    """
    parameters = {"PROFILE": profile, "RUN_DIR": run_dir, **(parameters or {})}
    _refuse_names(parameters)
    config = Config.from_notebook(parameters)
    given = {name: value for name, value in parameters.items() if value is not None}
    chosen = notebooks(only)
    forced = [path for path in notebooks() if only or (first and path >= notebooks(first)[0])]
    artefacts.need_space(config.run_dir, RUN_BYTES, "a run")
    with artefacts.alone(config.run_dir, "run"):
        try:
            _run_in_order(config, chosen, forced, given, timeout or CELL_TIMEOUT_SECONDS)
        except RunStopped as stop:
            _sum_up(config, given, str(stop))
            raise
        _sum_up(config, given)
    return config


def _refuse_names(parameters: dict) -> None:
    """Raise ConfigError for a name in small letters, and for anything that looks like a token."""
    for name, value in parameters.items():
        secret = re.search(r"(?i)(token|password|secret|key)s?$", name)
        known = name.lower() in Config.__dataclass_fields__  # MAX_NEW_TOKENS is one
        if (secret and not known) or re.match(r"hf_\w{16}", str(value)):
            raise ConfigError(
                f"parameter {name} looks like a token, and parameters are written into notebooks "
                "and reports: leave it out and run `hf auth login`"
            )
        if not re.fullmatch(r"[A-Z][A-Z0-9_]+", name):
            raise ConfigError(f"parameter {name} is not in capitals: write {name.upper()}")


def _run_in_order(config: Config, chosen, forced, parameters: dict, timeout: float) -> None:
    previous = ""
    for source in notebooks():
        previous = _fingerprint(source, parameters, previous)
        if source not in chosen:
            continue
        if source in forced or not _is_finished(config, source, previous):
            _execute(config, source, parameters, previous, timeout)
        else:
            print(f"{source.stem}: finished already")


def _sum_up(config: Config, parameters: dict, stopped: str = "") -> None:
    write_report(config, stopped)
    manifest.write(config, parameters, environment())


def _fingerprint(source: Path, parameters: dict, previous: str) -> str:
    text = previous + json.dumps(parameters, sort_keys=True, default=str) + code_hash(source)
    return hashlib.sha256(text.encode()).hexdigest()


def _paths(config: Config, source: Path) -> tuple[Path, Path, Path]:
    """Where the executed notebook lies: finished, while it runs, and after it failed."""
    final = config.executed_dir / source.name
    draft = final.with_name(f".{source.stem}.partial.ipynb")
    return final, draft, final.with_name(f"{source.stem}.failed.ipynb")


def _is_finished(config: Config, source: Path, fingerprint: str) -> bool:
    executed, *unfinished = _paths(config, source)
    if not executed.exists() or any(path.exists() for path in unfinished):
        return False
    return nbformat.read(executed, as_version=4).metadata.get("run_fingerprint") == fingerprint


def _execute(config: Config, source: Path, parameters: dict, fingerprint: str, timeout: float):
    """Run one notebook into executed/: under its own name if it succeeds, else as <name>.failed."""
    final, draft, failed = _paths(config, source)
    artefacts.writable(config.executed_dir)
    for stale in (failed, failed.with_suffix(".html")):
        stale.unlink(missing_ok=True)
    bar = {"desc": source.stem, "bar_format": "{desc:34} {percentage:3.0f}% |{bar:24}| {elapsed}"}
    try:
        with artefacts.full_disk_said(final):
            papermill.execute_notebook(
                source,
                draft,
                parameters=parameters,
                progress_bar=bar,
                execution_timeout=timeout,
                config=Traits(KernelManager={"shutdown_wait_time": SHUTDOWN_SECONDS}),
                # Else each kernel warns that its connection here is not encrypted, and prints a
                # traceback when it is told to leave a cell.
                extra_arguments=["--IPKernelApp.log_level=50"],
            )
            notebook = nbformat.read(draft, as_version=4)
            _check_reached_the_end(notebook, source)
            notebook.metadata["run_fingerprint"] = fingerprint
            nbformat.write(notebook, draft)
    except (PapermillExecutionError, DeadKernelError, CellTimeoutError, KeyboardInterrupt) as error:
        if not draft.exists():
            raise
        _settle(draft)
        draft.replace(failed)
        raise _stop(source, failed, error, timeout) from error
    draft.replace(final)


def _started(cells) -> list:
    """The code cells that ran, in order; papermill gives those a start time, and no others."""
    return [c for c in cells if c.metadata.get("papermill", {}).get("start_time")]


def _settle(path: Path) -> None:
    """Correct what papermill wrote of an ended run: it marks cells that never ran as completed."""
    notebook = nbformat.read(path, as_version=4)
    started = _started(notebook.cells)
    for cell in notebook.cells:
        if "papermill" in cell.metadata and cell not in started:
            cell.metadata.papermill["status"] = "pending"
    if started:
        started[-1].metadata.papermill["status"] = "failed"
    nbformat.write(notebook, path)


def _stop(source: Path, path: Path, error: BaseException, timeout: float) -> RunStopped:
    """RunStopped with the notebook, the cell that was running, and what happened to it."""
    exit_code = 1
    if isinstance(error, PapermillExecutionError):
        reason = f"{error.ename}: {error.evalue}"
    elif isinstance(error, CellTimeoutError):
        reason = f"it ran longer than the limit of {timeout:.0f} seconds"
    elif isinstance(error, KeyboardInterrupt):
        number = error.args[0] if error.args else signal.SIGINT
        exit_code = 128 + number
        reason = (
            f"stopped by {signal.Signals(number).name}; the same command goes on from this notebook"
        )
    else:
        reason = "its kernel died, most likely for want of memory"
    return RunStopped(f"{source.stem}, {_last_cell(source, path)}: {reason}", exit_code)


def _last_cell(source: Path, path: Path) -> str:
    """Number (in the source notebook) and first line of the cell that was running."""
    started = _started(nbformat.read(path, as_version=4).cells)
    if not started:
        return "before its first cell"
    identifiers = [cell.id for cell in nbformat.read(source, as_version=4).cells]
    # The cell that papermill injects is in no source; it follows the one tagged "parameters".
    place = identifiers.index(started[-1].id) if started[-1].id in identifiers else "of parameters"
    return f"cell {place} ({started[-1].source.strip().splitlines()[0]})"


def _check_reached_the_end(notebook, source: Path) -> None:
    """Raise RunStopped if a cell called sys.exit(0), which papermill takes for success."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    missing = [cell for cell in cells if cell.execution_count is None]
    if missing:
        first_line = missing[0].source.strip().splitlines()[0]
        raise RunStopped(f"{source.stem} ended before its cell ({first_line}) ran")


def read_metrics(config: Config) -> dict[str, dict]:
    """The named numbers of every lesson that has recorded some, by lesson number."""
    files = sorted(config.metrics_dir.glob("[0-9][0-9].json"))
    return {path.stem: json.loads(path.read_text()) for path in files}


def headline_rows(config: Config) -> list[tuple[str, str, str]]:
    """(lesson, what it is, value as text) for every headline number that has been recorded."""
    metrics = read_metrics(config)
    return [
        (lesson, label, _as_text(metrics[lesson][name]))
        for lesson, name, label in HEADLINES
        if name in metrics.get(lesson, {})
    ]


def _as_text(value: int | float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def write_report(config: Config, stopped: str = "") -> Path:
    """report.html in the run folder: the headline numbers, and each executed notebook as a page.

    `stopped` says why the run did not end, if it did not.
    """
    pages = []
    exporter = HTMLExporter(template_name="lab", embed_images=True)
    for path in sorted(config.executed_dir.glob("[0-9][0-9]_*.ipynb")):
        page = path.with_suffix(".html")
        if not page.exists() or page.stat().st_mtime < path.stat().st_mtime:
            body, _ = exporter.from_notebook_node(nbformat.read(path, as_version=4))
            artefacts.write_text(page, body)
        pages.append(page)
    links = "".join(
        f'<li><a href="executed/{p.name}">{html.escape(p.stem)}</a></li>' for p in pages
    )
    rows = "".join(
        f"<tr><td>{lesson}</td><td>{html.escape(label)}</td><td>{value}</td></tr>"
        for lesson, label, value in headline_rows(config)
    )
    text = REPORT.format(
        profile=html.escape(config.profile),
        stopped=f"<p><strong>The run stopped:</strong> {html.escape(stopped)}</p>" * bool(stopped),
        links=links,
        rows=rows,
        facts="".join(f"<li>{html.escape(f'{k}: {v}')}</li>" for k, v in environment().items()),
    )
    return artefacts.write_text(config.run_dir / "report.html", text)


REPORT = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Run report: {profile}</title>
<style>body{{font:16px/1.5 sans-serif;max-width:48rem;margin:2rem auto;padding:0 1rem}}
td{{padding:.1rem .8rem;border-bottom:1px solid #ddd}}td:last-child{{text-align:right}}</style>
</head><body><h1>Run report: profile {profile}</h1>{stopped}
<h2>Headline numbers</h2><table>{rows}</table>
<h2>Executed notebooks</h2><ol>{links}</ol>
<h2>Environment</h2><ul>{facts}</ul></body></html>
"""


def environment() -> dict[str, str]:
    """Date, hardware and versions, for a reader who wants to know where numbers come from."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    memory = f"{psutil.virtual_memory().total / 2**30:.0f} GiB of memory"
    return {
        "date": datetime.date.today().isoformat(),
        "hardware": f"{os.cpu_count()} {platform.machine()} CPU cores, {memory}, {gpu}",
        "python": platform.python_version(),
        **{name: version(name) for name in RECORDED_VERSIONS},
    }


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
        artefacts.write_text(source, nbformat.writes(notebook) + "\n")


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
