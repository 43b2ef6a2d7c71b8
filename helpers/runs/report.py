"""What a run comes to: its headline numbers, and report.html, one page to send to a colleague.

The page holds everything it shows: pictures are taken from the executed notebooks, numbers from
metrics/, every text is escaped, and its policy forbids scripts and anything from elsewhere.
"""

import base64
from pathlib import Path

import jinja2
import nbformat
from markupsafe import Markup, escape

from helpers.config import PROJECT_DIR, Config
from helpers.runs import folders
from helpers.runs.inventory import read_metrics
from helpers.runs.provenance import records_in, settings_of
from helpers.runs.scores import models_asked, score_rows
from helpers.view.safe_text import visible

DRAWN = {"02": "Data", "04": "Training", "05": "Merging", "06": "Answers of all models"}
ROAD = "The six lessons"  # begins the alternative text of the drawing that each lesson has
README_PICTURE = PROJECT_DIR / "notebooks" / "images" / "base_and_tuned.png"

# Lesson, metric, what a reader calls it: the headline numbers of a run, in order.
HEADLINES = (
    ("02", "kept_pairs", "question-and-answer pairs kept"),
    ("04", "trainable_percent", "percent of the weights trained"),
    ("04", "eval_loss_before", "validation loss before training"),
    ("04", "eval_loss_after", "validation loss after training"),
    ("05", "eval_loss_merged", "validation loss of the merged model"),
    ("06", "pass_rate_level1_base_chat", "level 1 passed, base in its own template"),
    ("06", "pass_rate_level1_base_chat_4bit", "level 1 passed, the same, all layers in 4 bits"),
    ("06", "pass_rate_level1_tuned", "level 1 passed, tuned"),
    ("06", "pass_rate_level1_held_back_tuned", "level 1 passed, tuned, problems held back"),
    ("06", "pass_rate_level2_tuned", "level 2 passed, tuned"),
    ("06", "pass_rate_level3_tuned", "level 3 passed, tuned"),
    ("06", "stop_rate_base_chat", "answers that stop by themselves, base"),
    ("06", "stop_rate_tuned", "answers that stop by themselves, tuned"),
)


def headline_rows(config: Config) -> list[tuple[str, str, str]]:
    """(lesson, what it is, value as text) for every headline number that has been recorded."""
    metrics = read_metrics(config)
    return [
        (lesson, label, _number(metrics[lesson][name]))
        for lesson, name, label in HEADLINES
        if name in metrics.get(lesson, {})
    ]


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def write_report(config: Config, stopped: str = "") -> Path:
    """Write report.html; `stopped` says why a run ended."""
    page = TEMPLATE.render(profile=config.profile, stopped=stopped, sections=sections(config))
    return folders.write_text(config.run_dir / "report.html", page + "\n")


def _shown(value) -> Markup:
    """A value of the page, with what acts in it written out and its HTML escaped."""
    return value if isinstance(value, Markup) else escape(visible(str(value)))


PAGE = Path(__file__).with_name("report.html.jinja")
TEMPLATE = jinja2.Template(PAGE.read_text("utf-8"), finalize=_shown, autoescape=True)


def sections(config: Config) -> list[dict]:
    """The parts of the page, in order, each with a title; the page leaves out those without more.

    That is `heads` and `rows` of a table, `figures` as (alternative text, PNG), or a `text`.
    """
    folder, metrics = config.executed_dir, read_metrics(config)
    models = models_asked(metrics.get("06", {}))
    heads = ("share of answers that", *models)
    scores = score_rows(metrics.get("06", {}), models)
    pairs = [
        output["text/plain"]
        for source, output, _ in _outputs(folder, "06")
        if "side_by_side(" in source and "text/html" in output
    ]
    numbers = [(n, name, _number(v)) for n in metrics for name, v in metrics[n].items()]
    ran = [record["environment"].items() for record in records_in(config.run_dir).values()]
    return [
        _table("Headline numbers", ("notebook", "what", "value"), headline_rows(config)),
        _table("Recipe", ("setting", "article", "this run"), recipe_rows(config)),
        *({"title": title, "figures": _figures(folder, n)} for n, title in DRAWN.items()),
        _table("Scores, with 95 % intervals", heads, scores),
        {"title": "Answers", "text": (pairs or [""])[0]},
        _table("All numbers", ("notebook", "name", "value"), numbers),
        _table("Environment", ("what", "value"), (ran or [[]])[-1]),
    ]


def _table(title: str, heads: tuple, rows) -> dict:
    return {"title": title, "heads": heads, "rows": [*rows]}


def recipe_rows(config: Config) -> list[tuple]:
    """(setting, the article's value, this run's) for each that differs."""
    article, mine = settings_of(Config.from_profile("article")), settings_of(config)
    return [(name, article[name], mine[name]) for name in mine if mine[name] != article[name]]


def _outputs(folder: Path, number: str) -> list[tuple[str, dict, dict]]:
    """(source of the cell, data, metadata) of every displayed output of a notebook in a folder."""
    return [
        (cell.source, output.data, output.metadata)
        for path in folder.glob(f"{number}_*.ipynb")
        if not path.name.endswith(".failed.ipynb")
        for cell in nbformat.read(path, as_version=4).cells
        for output in cell.get("outputs", [])
        if "data" in output
    ]


def _figures(folder: Path, number: str) -> list[tuple[str, str]]:
    """(alternative text, PNG in base 64) of every figure of a notebook, but for the course's."""
    return [
        (metadata["image/png"]["alt"], data["image/png"].strip())
        for _, data, metadata in _outputs(folder, number)
        if "image/png" in data and not metadata["image/png"]["alt"].startswith(ROAD)
    ]


def readme_picture() -> bytes:
    """The pass rates as notebook 06 has drawn them, as PNG: the result that README shows."""
    drawn = _figures(PROJECT_DIR / "notebooks", "06")
    return base64.b64decode(next((png for alt, png in drawn if alt.startswith("Pass rates")), b""))


if __name__ == "__main__":
    README_PICTURE.write_bytes(readme_picture())
