"""What is committed of one real run: the notebooks' outputs, and what lesson 01 opens with."""

import json
import re
from pathlib import Path

import nbformat

from helpers.config import PROJECT_DIR, Config, ConfigError
from helpers.runs import folders, provenance
from helpers.runs.inventory import read_metrics
from helpers.runs.lessons import code_hash, notebooks

FIRST_LOOK = PROJECT_DIR / "benchmarks" / "results" / "first_look.json"
# As notebook 06 names them in its metrics, and as a reader of lesson 01 meets them.
ASKED = {
    "base_chat": "base in 16 bits, asked in its own form",
    "base": "base in 4 bits, asked in Llama 2's form",
    "tuned": "tuned: base in 4 bits with the adapter",
}
# The text twin of text_views.show_side_by_side, without scores.
PAIR = r"(?P<question>.*?)\n\n-- base\n(?P<base>.*?)\n\n-- tuned\n(?P<tuned>.*)"


def record(config: Config) -> None:
    """Put the outputs of a finished run into the committed notebooks, cleaned.

    Kept: results, figures, printed text. Removed: stderr, widget views, papermill's traces.
    Raises ConfigError, before any is written, when one of them would run again today.
    """
    for source in notebooks():
        if reason := provenance.why_unfinished(config, source):
            said = f"{source.name} would not be recorded as it ran ({reason}), so none is"
            raise ConfigError(f"{said}: run it again first")
    for source in notebooks():
        notebook = nbformat.read(source, as_version=4)
        executed = nbformat.read(config.executed_dir / source.name, as_version=4)
        ran = {cell.id: cell for cell in executed.cells}
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        for count, cell in enumerate(code, start=1):
            cell.execution_count = count
            cell.outputs = list(filter(_is_kept, ran[cell.id].outputs))
            for output in cell.outputs:
                if "execution_count" in output:
                    output.execution_count = count
        notebook.metadata.pop("widgets", None)
        notebook.metadata["recorded"] = {
            "code_sha256": code_hash(source),
            "profile": config.profile,
            **executed.metadata[provenance.KEY]["environment"],
        }
        nbformat.validate(notebook)
        folders.write_text(source, nbformat.writes(notebook) + "\n")


def _is_kept(output) -> bool:
    widget = "application/vnd.jupyter.widget-view+json" in output.get("data", {})
    return not widget and output.get("name") != "stderr"


def first_look() -> dict:
    """What `write_first_look` wrote and is committed: what lesson 01 opens with."""
    return json.loads(FIRST_LOOK.read_text(encoding="utf-8"))


def write_first_look(config: Config, path: Path = FIRST_LOOK) -> Path:
    """Write a pair of answers and the rates that notebook 06 of a finished run shows.

    Raises ConfigError when it shows no pair, or has not recorded a rate.
    """
    executed = config.executed_dir / notebooks("06")[0].name
    metrics, shown = read_metrics(config).get("06", {}), _first_pair(executed)
    names = {f"passes, level {level}": f"pass_rate_level{level}" for level in (1, 2, 3)}
    names["stops by itself"] = "stop_rate"
    wanted = [f"{name}_{who}" for who in ASKED for name in names.values()]
    missing = [name for name in wanted if name not in metrics]
    if missing or not shown:
        said = ", no ".join(missing) or "pair of answers"
        raise ConfigError(
            f"notebook 06 of {config.run_dir} shows no {said}: run it to its end first"
        )
    rows = [
        {"who": words, **{column: metrics[f"{name}_{who}"] for column, name in names.items()}}
        for who, words in ASKED.items()
    ]
    record = provenance.record_in(executed)
    look = {**shown, "rates": rows, "model": record["settings"]["model_name"]}
    look |= {name: record["environment"][name] for name in ("hardware", "date")}
    return folders.write_text(path, json.dumps(look, indent=1) + "\n")


def _first_pair(executed: Path) -> dict[str, str]:
    """The question and both answers that notebook 06 shows side by side first; or {}."""
    cells = nbformat.read(executed, as_version=4).cells if executed.exists() else []
    for cell in cells:
        for output in cell.get("outputs", []) if "side_by_side(" in cell.source else []:
            text = output.get("data", {}).get("text/plain", "")
            if found := re.fullmatch(PAIR, text, re.DOTALL):
                return found.groupdict()
    return {}
