"""Scores of answers on texts whose score is known, and the statistics against known values."""

import pytest

from helpers import evaluation
from helpers.config import LINKED_LIST_PROMPT, Config
from helpers.evaluation import Problem, Score
from helpers.inference import Answer

GOOD = """1. Add the two numbers.
2. Return the sum.

```python
def add(a, b):
    return a + b
```

It works for any two numbers."""
PROBLEM = Problem("p", "Write add(a, b).", "add", "assert add(1, 2) == 3\nassert add(0, 0) == 0")


def config(level="limits-only"):
    return Config.from_profile("smoke", sandbox=level)


def scored(text, stopped=True, level="limits-only"):
    return evaluation.score(Answer("q", text, 9, stopped), PROBLEM, config(level))


def test_a_good_answer_has_every_score():
    assert scored(GOOD) == Score(stops=True, parses=True, steps=True, passes=True)


def test_each_score_can_be_lost_alone():
    assert scored(GOOD, stopped=False).stops is False
    assert scored(GOOD.replace("a + b", "a + ")).parses is False
    assert scored(GOOD.replace("1. ", "").replace("2. ", "")).steps is False
    assert scored(GOOD.replace("a + b", "a - b")) == Score(True, True, True, passes=False)


def test_code_that_does_not_parse_does_not_pass_and_is_not_run():
    assert scored("```python\ndef add(a, b:\n```").passes is False


def test_with_the_sandbox_off_nothing_runs_and_passing_is_unknown():
    assert scored(GOOD, level="off").passes is None


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("no code", None),
        ("```python\nx = 1\n", None),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```python\nx = 1\n```\ntext\n```python\ny = 2\n```", "x = 1\n\ny = 2\n"),
    ],
)
def test_code_is_taken_from_closed_blocks(text, code):
    assert evaluation.code_of(text) == code


@pytest.mark.parametrize("code", [None, "", "  \n", "def f(:", "x = \0"])
def test_what_python_cannot_read_does_not_parse(code):
    assert not evaluation.parses(code)


def test_steps_in_code_do_not_count():
    assert not evaluation.explains_in_steps("```python\n# 1. a\n# 2. b\n1. x\n2. y\n```")
    assert evaluation.explains_in_steps("First, sort it. Then take the last one.")
    assert not evaluation.explains_in_steps("First of all, the first one is the first.")


def test_rates_have_the_names_of_the_metrics_file():
    scores = [Score(True, True, False, None), Score(False, True, False, None)]
    assert evaluation.rates(scores, "base") == {
        "stop_rate_base": 0.5,
        "parse_rate_base": 1.0,
        "steps_rate_base": 0.0,
    }


def test_interval_is_wilsons():
    # Newcombe (1998), Statistics in Medicine 17, 857-872, table I, method 3.
    assert evaluation.interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert evaluation.interval(0, 20) == pytest.approx((0, 0.1611), abs=1e-4)


def test_paired_test_counts_only_the_problems_that_changed():
    before, after = [False] * 8 + [True] * 4, [True] * 8 + [True] * 4
    assert evaluation.paired_p_value(before, after) == pytest.approx(2 / 2**8)
    assert evaluation.paired_p_value(after, after) == 1.0


def test_losses_come_the_most_lost_first():
    before = [Score(True, False, False, False), Score(True, True, True, True)]
    after = [Score(False, True, True, True), Score(False, False, True, True)]
    assert evaluation.losses(before, after) == [(1, ["stops", "parses"]), (0, ["stops"])]


def test_compare_leaves_out_a_score_that_was_not_taken():
    scores = [Score(True, True, True, None)]
    assert [row["score"] for row in evaluation.compare(scores, scores)] == [
        "stops",
        "parses",
        "steps",
    ]


def test_problems_begin_with_the_articles_and_are_spread_over_the_topics():
    problems = evaluation.load_problems(Config.from_profile("demo"))
    assert problems[0].prompt == LINKED_LIST_PROMPT
    assert len({problem.id for problem in problems}) == 32
    assert len({problem.id.rsplit("_", 1)[0] for problem in problems}) >= 12


def test_more_problems_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="EVALUATION_PROBLEMS is 5000"):
        evaluation.load_problems(Config.from_profile("demo", evaluation_problems=5000))
