"""The committed notebooks get the outputs of one real run."""

import nbformat

from helpers.config import Config, ConfigError
from helpers.runs import folders, runner
from helpers.runs.environment import environment
from helpers.runs.manifest import code_hash


def record(config: Config) -> None:
    """Put the outputs of a finished run into the committed notebooks, cleaned.

    Kept: results, figures, printed text. Removed: stderr, widget views, papermill's traces.
    Raises ConfigError when a notebook's code is no longer the code that was run.
    """
    for source in runner.notebooks():
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
        folders.write_text(source, nbformat.writes(notebook) + "\n")


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
