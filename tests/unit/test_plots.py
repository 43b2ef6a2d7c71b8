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
