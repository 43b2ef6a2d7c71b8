"""What a run comes to: its headline numbers, and report.html, one page to send to a colleague.

The page holds everything it shows: pictures are taken from the executed notebooks, numbers from
metrics/, every text is escaped, and its policy forbids scripts and anything from elsewhere. Beside
it lie the executed notebooks as pages of their own.
"""

import base64
import dataclasses
import html
from collections.abc import Iterable, Sequence
from pathlib import Path

import nbformat
from nbconvert import HTMLExporter

from helpers.config import PROJECT_DIR, Config
from helpers.runs import folders
from helpers.runs.environment import environment
from helpers.runs.inventory import read_metrics
from helpers.runs.scores import score_rows
from helpers.view.safe_text import visible

README_PICTURE = PROJECT_DIR / "notebooks" / "images" / "base_and_tuned.png"

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
    """Write report.html into the run folder, and each executed notebook as a page beside it.

    `stopped` says why the run did not end, if it did not.
    """
    metrics, pages = read_metrics(config), _notebook_pages(config)
    numbers = _table(("notebook", "what", "value"), headline_rows(config))
    merges = _table(("merged into", "KL to the unmerged model (nats)"), _merge_rows(metrics))
    shares = ("share of answers that", "base", "tuned")
    links = "".join(
        f'<li><a href="executed/{_text(p.name)}">{_text(p.stem)}</a></li>' for p in pages
    )
    sections = {
        "Headline numbers": numbers,
        "Recipe": _table(("setting", "article", "this run"), recipe_rows(config)),
        "Data": _counts(metrics.get("02", {})) + _figures(config, "02"),
        "Training": _figures(config, "04"),
        "Merging": merges + _figures(config, "05"),
        "Scores, with 95 % intervals": _table(shares, score_rows(metrics.get("06", {}))),
        "Answers": _figures(config, "06") + _answers(config),
        "Environment": _table(("what", "value"), environment().items()),
        "The executed notebooks, in the run folder": f"<ol>{links}</ol>" if links else "",
    }
    body = "".join(f"<h2>{_text(title)}</h2>{part}" for title, part in sections.items() if part)
    if stopped:
        body = f"<p><strong>The run stopped:</strong> {_text(stopped)}</p>{body}"
    page = PAGE.replace("PROFILE", _text(config.profile)).replace("BODY", body)
    return folders.write_text(config.run_dir / "report.html", page)


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Run report: profile PROFILE</title>
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>
body{font:16px/1.5 sans-serif;max-width:50rem;margin:2rem auto;padding:0 1rem;color:#000;
 background:#fff}
table{border-collapse:collapse}th,td{text-align:left;padding:.1rem .8rem .1rem 0;
 border-bottom:1px solid #ddd;vertical-align:top}
figure{margin:1rem 0}img{max-width:100%}figcaption{font-size:.9rem;color:#444}
@media(max-width:40rem){td{overflow-wrap:anywhere}}
pre{white-space:pre-wrap;overflow-wrap:anywhere;font-size:.85rem}
@media print{body{font-size:11pt;margin:0}figure,tr{break-inside:avoid}h2{break-after:avoid}}
</style></head><body><h1>Run report: profile PROFILE</h1>
BODY</body></html>
"""


def _text(value) -> str:
    return html.escape(visible(str(value)))


def _table(heads: Sequence[str], rows: Iterable[Sequence]) -> str:
    """An HTML table of text; "" when there are no rows."""
    lines = ["".join(f"<td>{_text(value)}</td>" for value in row) for row in rows]
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in heads)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><tr>{head}</tr>{body}</table>" if lines else ""


def recipe_rows(config: Config) -> list[tuple]:
    """(setting, the article's value, this run's value) for every setting that differs."""
    article = dataclasses.asdict(Config.from_profile("article"))
    mine = dataclasses.asdict(config)
    names = [name for name in mine if name not in ("profile", "run_dir")]
    return [(name, article[name], mine[name]) for name in names if article[name] != mine[name]]


def _counts(metrics: dict) -> str:
    names = ("raw_questions", "raw_answers", "kept_pairs", "train_rows", "validation_rows")
    return _table(
        ("data", "count"),
        [(name.replace("_", " "), f"{metrics[name]:,}") for name in names if name in metrics],
    )


def _merge_rows(metrics: dict) -> list[tuple]:
    found = {
        name.removeprefix("kl_merged_"): value
        for name, value in metrics.get("05", {}).items()
        if name.startswith("kl_merged_")
    }
    return [(name, f"{value:.4f}") for name, value in found.items()]


def _outputs(config: Config, number: str) -> list[tuple[str, dict, dict]]:
    """(source of the cell, data, metadata) of every displayed output of an executed notebook."""
    cells = [
        cell
        for path in config.executed_dir.glob(f"{number}_*.ipynb")
        if not path.name.endswith(".failed.ipynb")
        for cell in nbformat.read(path, as_version=4).cells
    ]
    return [
        (cell.source, output.data, output.metadata)
        for cell in cells
        for output in cell.get("outputs", [])
        if "data" in output
    ]


def _figures(config: Config, number: str) -> str:
    """Every figure of an executed notebook, with its alternative text as the caption."""
    figures = []
    for _, data, metadata in _outputs(config, number):
        if "image/png" in data:
            alt = _text(metadata.get("image/png", {}).get("alt", ""))
            address = _text(f"data:image/png;base64,{data['image/png'].strip()}")
            figures.append(f'<figure><img alt="{alt}" src="{address}">')
            figures.append(f"<figcaption>{alt}</figcaption></figure>")
    return "".join(figures)


def _answers(config: Config) -> str:
    """The first question of notebook 06 with the answers of both models, as text."""
    for source, data, _ in _outputs(config, "06"):
        if "side_by_side(" in source and "text/html" in data:
            return f"<pre>{_text(data['text/plain'])}</pre>"
    return ""


def _notebook_pages(config: Config) -> list[Path]:
    """Each executed notebook as a page of its own; those that are up to date stay."""
    pages = []
    exporter = HTMLExporter(template_name="lab", embed_images=True)
    for path in sorted(config.executed_dir.glob("[0-9][0-9]_*.ipynb")):
        page = path.with_suffix(".html")
        if not page.exists() or page.stat().st_mtime < path.stat().st_mtime:
            body, _ = exporter.from_notebook_node(nbformat.read(path, as_version=4))
            folders.write_text(page, body)
        pages.append(page)
    return pages


def readme_picture() -> bytes:
    """The first figure that is recorded in notebook 06, as PNG: the result that README shows."""
    (path,) = (PROJECT_DIR / "notebooks").glob("06_*.ipynb")
    outputs = [
        o for cell in nbformat.read(path, as_version=4).cells for o in cell.get("outputs", [])
    ]
    figures = [o.data["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    return base64.b64decode(figures[0])


if __name__ == "__main__":
    README_PICTURE.write_bytes(readme_picture())
