"""What a run comes to: its headline numbers, and report.html, one page to send to a colleague.

The page holds everything it shows: pictures are taken from the executed notebooks, numbers from
metrics/, every text is escaped, and its policy forbids scripts and anything from elsewhere. Beside
it lie the executed notebooks as pages of their own.
"""

import base64
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jinja2
import nbformat
from markupsafe import Markup, escape
from nbconvert import HTMLExporter

from helpers.config import PROJECT_DIR, Config
from helpers.runs import folders
from helpers.runs.inventory import read_metrics
from helpers.runs.provenance import records_in, settings_of
from helpers.runs.scores import models_asked, score_rows
from helpers.view.safe_text import visible

KL = "kl_merged_"  # begins the metrics of notebook 05 that compare merges
COUNTS = ("raw_questions", "raw_answers", "kept_pairs", "train_rows", "validation_rows")
ROAD = "The six lessons"  # begins the alternative text of the drawing that each lesson has
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
    ("06", "pass_rate_level1_base_chat", "level 1 passed, base in its own template"),
    ("06", "pass_rate_level1_base_chat_4bit", "level 1 passed, the same, all layers in 4 bits"),
    ("06", "pass_rate_level1_tuned", "level 1 passed, tuned"),
    ("06", "pass_rate_level1_held_back_tuned", "level 1 passed, tuned, problems held back"),
    ("06", "pass_rate_level2_tuned", "level 2 passed, tuned"),
    ("06", "pass_rate_level3_tuned", "level 3 passed, tuned"),
    ("06", "stop_rate_base_chat", "answers that stop by themselves, base"),
    ("06", "stop_rate_tuned", "answers that stop by themselves, tuned"),
    ("06", "parse_rate_tuned", "answers with code that parses, tuned"),
    ("06", "steps_rate_tuned", "answers explained in steps, tuned"),
)


def headline_rows(config: Config) -> list[tuple[str, str, str]]:
    """(lesson, what it is, value as text) for every headline number that has been recorded."""
    metrics = read_metrics(config)
    found = [
        (lesson, label, metrics[lesson][name])
        for lesson, name, label in HEADLINES
        if name in metrics.get(lesson, {})
    ]
    return [
        (lesson, label, f"{value:,}" if isinstance(value, int) else f"{value:.4g}")
        for lesson, label, value in found
    ]


def write_report(config: Config, stopped: str = "") -> Path:
    """Write report.html, and each executed notebook as a page; `stopped` says why a run ended."""
    shown = {"sections": sections(config), "pages": _notebook_pages(config)}
    text = TEMPLATE.render(profile=config.profile, stopped=stopped, **shown)
    return folders.write_text(config.run_dir / "report.html", text + "\n")


def _shown(value) -> Markup:
    """A value of the page, with what acts in it written out and its HTML escaped."""
    return value if isinstance(value, Markup) else escape(visible(str(value)))


PAGE = Path(__file__).with_name("report.html.jinja").read_text("utf-8")
TEMPLATE = jinja2.Template(PAGE, finalize=_shown, autoescape=True)


@dataclasses.dataclass
class Section:
    """A part of the page. What is empty is left out, and a part with nothing in it too."""

    title: str
    heads: Sequence[str] = ()
    rows: Sequence[Sequence] = ()
    figures: Sequence[tuple[str, str]] = ()  # (alternative text, PNG in base 64)
    text: str = ""


def sections(config: Config) -> list[Section]:
    """The parts of the page, in order."""
    metrics, records = read_metrics(config), [*records_in(config.run_dir).values()]
    environment = _over_all([record["environment"] for record in records])
    data, kl, scores = (metrics.get(lesson, {}) for lesson in ("02", "05", "06"))
    counts = [(name.replace("_", " "), f"{data[name]:,}") for name in COUNTS if name in data]
    merges = [(n.removeprefix(KL), f"{kl[n]:.4f}") for n in kl if n.startswith(KL)]
    merged, models = ("merged into", "KL to the unmerged model (nats)"), models_asked(scores)
    rated = score_rows(scores, models)
    shown = (
        output["text/plain"]
        for source, output, _ in _outputs(config.executed_dir, "06")
        if "side_by_side(" in source and "text/html" in output
    )
    figures = {number: _figures(config.executed_dir, number) for number in ("02", "04", "05", "06")}
    return [
        Section("Headline numbers", ("notebook", "what", "value"), headline_rows(config)),
        Section("Recipe", ("setting", "article", "this run"), recipe_rows(records)),
        Section("Data", ("data", "count"), counts, figures["02"]),
        Section("Training", figures=figures["04"]),
        Section("Merging", merged, merges, figures["05"]),
        Section("Scores, with 95 % intervals", ("share of answers that", *models), rated),
        Section("Answers", figures=figures["06"], text=next(shown, "")),
        Section("Environment", ("what", "value"), [*environment.items()]),
    ]


def _over_all(found: list[dict]) -> dict[str, str]:
    """Each name with its value; where notebooks ran with different ones, with all of them."""
    names = dict.fromkeys(name for values in found for name in values)
    return {
        name: ", ".join(dict.fromkeys(str(values[name]) for values in found if name in values))
        for name in names
    }


def recipe_rows(records: list[dict]) -> list[tuple]:
    """(setting, the article's value, that of the notebooks' records) for each that differs."""
    article = _over_all([settings_of(Config.from_profile("article"))])
    mine = _over_all([record["settings"] for record in records])
    names = [name for name in mine if name != "profile" and mine[name] != article.get(name)]
    return [(name, article.get(name, ""), mine[name]) for name in names]


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


def _notebook_pages(config: Config) -> list[Path]:
    """Each executed notebook as a page of its own; those that are up to date stay."""
    exporter = HTMLExporter(template_name="lab", embed_images=True)
    executed = sorted(config.executed_dir.glob("[0-9][0-9]_*.ipynb"))
    for path in executed:
        page = path.with_suffix(".html")
        if not page.exists() or page.stat().st_mtime < path.stat().st_mtime:
            body, _ = exporter.from_notebook_node(nbformat.read(path, as_version=4))
            folders.write_text(page, body)
    return [path.with_suffix(".html") for path in executed]


def readme_picture() -> bytes:
    """The pass rates as notebook 06 has drawn them, as PNG: the result that README shows."""
    drawn = _figures(PROJECT_DIR / "notebooks", "06")
    return base64.b64decode(next((png for alt, png in drawn if alt.startswith("Pass rates")), b""))


if __name__ == "__main__":
    README_PICTURE.write_bytes(readme_picture())
