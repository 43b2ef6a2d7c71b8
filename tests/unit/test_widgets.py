"""The views: each redraws when its control moves, and its static twin draws the same settings."""

import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
from selectolax.lexbor import LexborHTMLParser

from benchmarks.llama2 import llama2_config
from helpers.answers.evaluation import Score
from helpers.model import predict, steps
from helpers.model.plan import for_card
from helpers.view import text_views, widgets

PNG_AS_DATA = 'src="data:image/png;base64,iVBORw0KGgo'
HOSTILE = "</pre><img src=x onerror=alert(1)>"


@pytest.fixture
def picture():
    return np.random.default_rng(0).normal(size=(12, 16))


def truncate(matrix, rank):
    U, s, V = np.linalg.svd(matrix, full_matrices=False)
    return (U[:, :rank] * s[:rank]) @ V[:rank]


def test_slider_redraws_the_picture_and_leaves_no_figure_open(picture):
    open_before = plt.get_fignums()
    slider, image = widgets.rank_slider(picture, truncate, start=3).children
    before = image.value
    slider.value = 9
    assert PNG_AS_DATA in before and PNG_AS_DATA in image.value
    assert image.value != before
    assert 'alt="The picture cut to rank 9' in image.value
    assert plt.get_fignums() == open_before
    assert (slider.min, slider.max) == (1, 12)


def test_slider_moved_back_shows_the_same_picture(picture):
    slider, image = widgets.rank_slider(picture, truncate, start=3).children
    before = image.value
    slider.value, slider.value = 9, 3
    assert image.value == before


def test_twin_marks_the_measured_error_on_the_predicted_line(picture):
    figure = widgets.rank_figure(picture, truncate, [1, 4, 8])
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == [
        "original",
        "rank 1",
        "rank 4",
        "rank 8",
        "The singular values fall",
        "So a low rank loses little",
    ]
    predicted, marks = figure.axes[-1].lines
    assert np.allclose(marks.get_ydata(), predicted.get_ydata()[[1, 4, 8]])
    plt.close(figure)


def test_every_part_of_a_step_has_a_bar_of_its_own_and_its_size_beside_it():
    parts = {"weights": 3 * predict.GIB, "logits": 0, "activations": predict.GIB // 2}
    axis = widgets.plan_figure("small", parts, 4 * predict.GIB).axes[0]
    assert [label.get_text() for label in axis.texts] == ["3.00", "0.00", "0.50"]
    assert [bar.get_width() for bar in axis.patches] == [3, 0, 0.5]
    assert axis.get_title() == "small: 3.5 of 4 GiB"
    plt.close(axis.figure)


def test_will_it_fit_follows_its_sliders():
    shapes = {size: llama2_config(size) for size in ("7B", "70B")}
    cards = {f"{size} GB": size * predict.GIB for size in (8, 24)}
    view = widgets.will_it_fit(shapes, cards, lambda *pair: for_card(pair[0], steps.Run(), pair[1]))
    model, card, page = view.children
    before = page.value
    assert before.startswith("<p>7B on 8 GB fits: ")
    model.value, card.value = "70B", "24 GB"
    assert page.value.startswith("<p>70B on 24 GB does not fit: ")
    assert PNG_AS_DATA in page.value and "memory of 70B" in page.value


def test_browser_pages_and_shows_markup_as_text(tokenizer):
    rows = [{"prompt": f"row {number}", "completion": f" {HOSTILE}"} for number in range(2)]
    slider, page = widgets.dataset_browser(rows, [HOSTILE, ""], tokenizer).children
    assert "row 0" in page.value and "<img" not in page.value
    slider.value = 1
    assert "row 1" in page.value and "row 0" not in page.value


def test_side_by_side_streams_every_answer_as_text():
    seen = []

    def stream(question):
        for piece in ("You asked: ", question, HOSTILE):
            seen.append(right.value)
            yield piece

    answerers = {"base": lambda question: ["short"], "tuned": stream}
    field, button, columns = widgets.side_by_side(answerers).children
    left, right = columns.children
    field.value = "Why <b>?"
    button.click()
    assert "base" in left.value and "short" in left.value
    assert "You asked: Why &lt;b&gt;?" in right.value and "<img" not in right.value
    assert len(set(seen)) == 3, "each piece is shown as it comes"


def luminance(colour):
    """Relative luminance of #rrggbb, as WCAG 2 defines it."""
    parts = (int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.fixture
def shown(monkeypatch):
    """What show_side_by_side displays, by MIME type."""
    bundles = []
    monkeypatch.setattr(text_views, "display", lambda data, raw: bundles.append(data))

    def show(*arguments):
        text_views.show_side_by_side(*arguments)
        return bundles[-1]

    return show


def test_scores_stand_under_each_answer_in_words(shown):
    bad = Score(False, False, False, False)
    good = Score(True, True, True, None)
    bundle = shown("Why?", "because", "so", [bad, good])
    left, right = LexborHTMLParser(bundle["text/html"]).css("td")
    lacking = "\u2717 hit the limit, \u2717 no code that parses, \u2717 no steps, "
    lacking += "\u2717 fails its tests"
    having = "\u2713 stops by itself, \u2713 code that parses, \u2713 explains in steps, "
    having += "- not tested"
    assert left.text().endswith(lacking) and right.text().endswith(having)
    base, tuned = bundle["text/plain"].split("\n\n-- tuned\n")
    assert base == f"Why?\n\n-- base\nbecause\n\n{lacking}"
    assert tuned == f"so\n\n{having}"
    assert "\u2717" not in shown("Why?", "because", "so")["text/html"], "none without scores"


def test_both_answers_get_half_the_width_whatever_is_in_them(shown):
    table = LexborHTMLParser(shown("Why?", "short", "a long line " * 40)["text/html"]).css_first(
        "table"
    )
    assert "table-layout:fixed" in table.attributes["style"]
    assert [cell.attributes["width"] for cell in table.css("td")] == ["50%", "50%"]


def test_learned_tokens_are_told_without_colour():
    html = text_views.tokens_html(["read", "learned"], [False, True])
    read, learned = LexborHTMLParser(html).css("span, b")
    assert (read.text(), learned.text(), learned.tag) == ("read", "learned", "b")
    ground, line = re.findall(r"#\w{6}", learned.attributes["style"])
    assert abs(luminance(ground) - luminance(line)) > 0.5, "the underline is seen in grey"
    ground, line = re.findall(r"#\w{6}", read.attributes["style"])
    assert ground == line, "and there is none"


def test_side_by_side_ends_with_the_score():
    score = Score(True, True, False, None)
    _, button, columns = widgets.side_by_side({"tuned": lambda question: ["so", score]}).children
    button.click()
    text = LexborHTMLParser(columns.children[0].value).body.text()
    assert text.startswith("tuned\n\nso\n\n\u2713 stops")
    assert text.endswith("\u2717 no steps, - not tested")


def test_side_by_side_shows_an_error_and_can_be_used_again():
    def broken(question):
        raise RuntimeError("no model")

    _, button, columns = widgets.side_by_side({"base": broken}).children
    button.click()
    assert "base gave no answer: no model" in columns.children[0].value
    assert not button.disabled
