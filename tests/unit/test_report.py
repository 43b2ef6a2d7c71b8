"""report.html: everything of a run on one page, self-contained, with every text as text."""

import base64
import re
from html.parser import HTMLParser

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from helpers.config import PROJECT_DIR, Config
from helpers.runs import inventory, report
from helpers.runs.provenance import settings_of

HOSTILE = '"></pre><img src=x onerror=alert(1)><script>alert(1)</script>'
PNG = base64.b64encode(b"\x89PNG picture").decode()
ENVIRONMENT = {"date": "2026-01-02", "hardware": "64 CPU cores"}
METRICS = {
    "02": {"raw_questions": 780, "train_rows": 566},
    "05": {"kl_merged_16bit": 0.11928, "kl_merged_4bit": 0.76399},
    "06": {
        "problems": 32,
        "problems_level1": 20,
        "stop_rate_base": 0.15625,
        "stop_rate_tuned": 0.84375,
        "pass_rate_level1_tuned": 0.25,
    },
}


def displayed(source, data, **metadata):
    return new_code_cell(source, outputs=[new_output("display_data", data, metadata=metadata)])


@pytest.fixture
def config(tmp_path):
    """A run folder with some metrics, a figure in each of two notebooks, and a pair of answers."""
    config = Config.from_profile("demo", run_dir=tmp_path)
    config.executed_dir.mkdir()
    for lesson, metrics in METRICS.items():
        inventory.record_metrics(config, lesson, metrics)
    road = {"image/png": {"alt": f"{report.ROAD} in order: ..."}}
    drawn = displayed("plots.road()", {"image/png": "the road"}, **road)
    figure = displayed("plots.show(figure)", {"image/png": PNG}, **{"image/png": {"alt": HOSTILE}})
    texts = {"text/html": "<table></table>", "text/plain": f"Reverse a list.\n\n-- base\n{HOSTILE}"}
    answers = displayed("text_views.show_side_by_side(question, base, tuned)", texts)
    for name, cells in {"02_dataset": [drawn, figure], "06_answers": [figure, answers]}.items():
        record = {"settings": settings_of(config), "environment": ENVIRONMENT}
        notebook = new_notebook(cells=cells, metadata={"ran_with": record})
        nbformat.write(notebook, config.executed_dir / f"{name}.ipynb")
    return config


@pytest.fixture
def page(config):
    return report.write_report(config).read_text("utf-8")


class Tags(HTMLParser):
    """Collects (tag, attributes) as a browser's parser finds them."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def test_shows_figures_answers_and_the_recipe(page):
    assert page.count(PNG) == 2 and "the road" not in page
    assert "Reverse a list." in page
    assert "<td>learning_rate</td><td>0.0002</td><td>0.003</td>" in page
    assert "<td>raw_questions</td><td>780</td>" in page
    assert "<td>kl_merged_4bit</td><td>0.764</td>" in page


def test_scores_come_with_wilson_intervals(page):
    # The values that notebook 06 prints for 5 and 27 of 32.
    row = "<td>stop by themselves</td><td>0.16 [0.07, 0.32]</td><td>0.84 [0.68, 0.93]</td>"
    assert row in page
    row = "<td>pass their tests, level 1</td><td>-</td><td>0.25 [0.11, 0.47]</td>"
    assert row in page, "of 20 problems, and of a model that was asked none"
    assert "explain in steps" not in page, "a score that was not taken is left out"


def test_every_text_is_text(page):
    tags = Tags(page).found
    assert not [tag for tag, _ in tags if tag == "script"]
    images = [attributes for tag, attributes in tags if tag == "img"]
    assert len(images) == 2
    assert all(image["alt"] == HOSTILE and "onerror" not in image for image in images)


def test_loads_nothing_from_elsewhere(page):
    tags = Tags(page).found
    assert not [tag for tag, _ in tags if tag in ("link", "iframe", "object")]
    sources = [attributes["src"] for _, attributes in tags if "src" in attributes]
    assert all(source.startswith("data:") for source in sources)
    assert "default-src 'none'" in page and not re.search(r"url\(|@import", page)


def test_date_and_hardware_are_those_of_the_run(page):
    assert "<td>date</td><td>2026-01-02</td>" in page
    assert "<td>hardware</td><td>64 CPU cores</td>" in page


def test_a_run_that_stopped_at_once_has_a_page_too(tmp_path):
    config = Config.from_profile("smoke", run_dir=tmp_path)
    page = report.write_report(config, "01 <b> said why").read_text("utf-8")
    assert "<strong>The run stopped:</strong> 01 &lt;b&gt; said why" in page
    assert "Merging" not in page and "Scores" not in page and "Environment" not in page


def test_readme_shows_the_recorded_result():
    text = (PROJECT_DIR / "README.md").read_text("utf-8")
    assert report.README_PICTURE.relative_to(PROJECT_DIR).as_posix() in text
    message = "recorded anew: run `make picture`"
    assert report.README_PICTURE.read_bytes() == report.readme_picture(), message
    assert len(text.splitlines()) < 250
