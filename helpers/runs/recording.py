"""The committed notebooks get the outputs of one real run."""

import functools

import nbformat

from helpers.config import Config, ConfigError
from helpers.runs import folders, provenance
from helpers.runs.inventory import sha256
from helpers.runs.lessons import code_hash, notebooks


def record(config: Config) -> None:
    """Put the outputs of a finished run into the committed notebooks, cleaned.

    Kept: results, figures, printed text. Removed: stderr, widget views, papermill's traces.
    Raises ConfigError, before any is written, when one of them would run again today.
    """
    once = functools.cache(sha256)  # most notebooks read the same model and helpers
    for source in notebooks():
        if reason := provenance.why_unfinished(config, source, once):
            raise ConfigError(
                f"{source.name} would not be recorded as it ran ({reason}), so none is: run it "
                "again first"
            )
    for source in notebooks():
        notebook = nbformat.read(source, as_version=4)
        executed = nbformat.read(config.executed_dir / source.name, as_version=4)
        ran = {cell.id: cell for cell in executed.cells}
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        for count, cell in enumerate(code, start=1):
            cell.execution_count = count
            outputs = [_cleaned(output, count) for output in ran[cell.id].outputs]
            cell.outputs = [output for output in outputs if output is not None]
        notebook.metadata.pop("widgets", None)
        notebook.metadata["recorded"] = {
            "code_sha256": code_hash(source),
            "profile": config.profile,
            **executed.metadata[provenance.KEY]["environment"],
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
