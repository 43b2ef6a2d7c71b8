"""Figures: each has alt text, leaves nothing open, and can be read without colour."""

import matplotlib.pyplot as plt
import pytest
from matplotlib.colors import to_rgb

from helpers.runs.lessons import notebooks
from helpers.view import plots


@pytest.fixture
def shown(monkeypatch):
    """What is displayed: (figure, alt text) of each."""
    found = []
    monkeypatch.setattr(
        plots, "display", lambda figure, metadata: found.append((figure, metadata["image/png"]))
    )
    return found


def darkness(patch) -> float:
    """0 for white, 1 for black, as a grey print has it."""
    red, green, blue = to_rgb(patch.get_fc())
    return 1 - 0.3 * red - 0.59 * green - 0.11 * blue


def test_the_road_has_a_box_for_each_lesson_and_the_current_one_is_dark(shown):
    open_before = plt.get_fignums()
    plots.road("03")
    [(figure, metadata)] = shown
    dark = [darkness(box) > 0.4 for box in figure.axes[0].patches if box.get_width() > 0.5]
    assert dark == [number == "03" for number in plots.STOPS]
    assert metadata["alt"].endswith("You are at 03.")
    assert plt.get_fignums() == open_before
    assert list(plots.STOPS) == [path.name[:2] for path in notebooks()]


def test_the_road_alone_marks_no_lesson(shown):
    plots.road()
    assert "You are at" not in shown[0][1]["alt"]


def test_a_lesson_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="no lesson is numbered '07': choose one of 01, 02"):
        plots.road("07")


def test_alt_text_that_says_too_little_is_refused():
    with pytest.raises(ValueError, match="'a figure' says too little"):
        plots.show(plt.figure(), "a figure")
    plt.close()
