"""The views: each redraws when its control moves, and its static twin draws the same settings."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from helpers import widgets

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def picture():
    return np.random.default_rng(0).normal(size=(12, 16))


def truncate(matrix, rank):
    U, s, V = np.linalg.svd(matrix, full_matrices=False)
    return (U[:, :rank] * s[:rank]) @ V[:rank]


def test_slider_redraws_the_picture_and_leaves_no_figure_open(picture):
    open_before = plt.get_fignums()
    view = widgets.rank_slider(picture, truncate, start=3)
    slider, image = view.children
    before = bytes(image.value)
    slider.value = 9
    assert before.startswith(PNG_SIGNATURE) and bytes(image.value).startswith(PNG_SIGNATURE)
    assert image.value != before
    assert plt.get_fignums() == open_before
    assert (slider.min, slider.max) == (1, 12)


def test_slider_moved_back_shows_the_same_picture(picture):
    slider, image = widgets.rank_slider(picture, truncate, start=3).children
    before = bytes(image.value)
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
        "Spectrum",
        "Error after truncation",
    ]
    predicted, marks = figure.axes[-1].lines
    assert np.allclose(marks.get_ydata(), predicted.get_ydata()[[1, 4, 8]])
    plt.close(figure)


def test_spectra_figure_draws_one_line_for_each_name_from_the_whole_norm_down():
    figure = widgets.spectra_figure({"a": np.array([4.0, 3.0]), "b": np.array([2.0, 1.0, 1.0])})
    left, right = figure.axes
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["a", "b"]
    assert np.allclose(right.lines[0].get_ydata(), [100, 60])
    plt.close(figure)


@pytest.mark.parametrize("rank", [0, 13])
def test_rank_out_of_range_is_named(picture, rank):
    with pytest.raises(ValueError, match=rf"\[{rank}\] must lie in 1..12"):
        widgets.rank_figure(picture, truncate, [rank])
