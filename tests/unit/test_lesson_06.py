"""Lesson 06: the statistics that the notebook defines, against known values."""

import dataclasses

import pytest

from helpers.answers.evaluation import Score
from tests.notebook_code import cell_source, definitions_from


@pytest.fixture(scope="module")
def lesson():
    return definitions_from("06")


def scores(passed):
    return [Score(True, True, True, bool(value)) for value in passed]


@pytest.mark.parametrize(
    ("right", "of", "ends"), [(81, 263, (0.2553, 0.3662)), (0, 20, (0, 0.1611))]
)
def test_the_interval_is_wilsons(lesson, right, of, ends):
    # Newcombe (1998), Statistics in Medicine 17, 857-872, table I, method 3.
    rate, *found = lesson["with_interval"]([True] * right + [False] * (of - right))
    assert rate == right / of and found == pytest.approx(ends, abs=1e-4)


def test_the_paired_test_counts_only_the_problems_that_changed(lesson):
    lesson["verdict"] = "passes"
    lesson["parts"], lesson["judged"] = (
        ["level1"],
        {"base": scores([0] * 8 + [1] * 4), "tuned": scores([1] * 12)},
    )
    row = lesson["paired"]("base", "tuned")
    assert (row["gained"], row["lost"]) == (8, 0) and row["p"] == pytest.approx(2 / 2**8)
    assert lesson["paired"]("tuned", "base")["lost"] == 8
    assert lesson["paired"]("tuned", "tuned")["p"] == 1.0


def test_a_model_that_answered_fewer_problems_is_compared_on_those(lesson):
    lesson["verdict"] = "passes"
    lesson["parts"], lesson["judged"] = (
        ["level1"],
        {"tuned": scores([1, 1, 0, 0]), "merged": scores([1, 0])},
    )
    row = lesson["paired"]("tuned", "merged")
    assert (row["gained"], row["lost"]) == (0, 1)


def test_rows_of_ones_own_are_compared_without_the_ladder_beside_them(lesson):
    own, ladder = Score(True, True, True, True, "own"), Score(True, True, True, True, "level1")
    lost = dataclasses.replace(ladder, passes=False)
    lesson["verdict"], lesson["parts"] = "passes", ["own", "level1"]
    lesson["judged"] = {"base": [own, ladder, ladder], "tuned": [own, lost, lost]}
    assert lesson["paired"]("base", "tuned")["lost"] == 0
    lesson["parts"] = ["level1"]
    lesson["judged"] = {which: found[1:] for which, found in lesson["judged"].items()}
    assert lesson["paired"]("base", "tuned")["lost"] == 2


def test_holms_correction_is_that_of_the_books(lesson):
    """Four tests, sorted 0.005, 0.01, 0.03, 0.04: times 4, 3, 2, 1, and never below one before."""
    source = cell_source("06", "p-values")
    lesson["paired"], compared = lambda before, after: {"p": after}, source.index("tests = pd.Data")
    lesson["scores"], lesson["compared"] = "x", [("x", p) for p in (0.01, 0.04, 0.03, 0.005)]
    exec(source[compared:], lesson)
    corrected = lesson["tests"].sort_index()["p, corrected"]
    assert list(corrected) == pytest.approx([0.03, 0.06, 0.06, 0.02])
