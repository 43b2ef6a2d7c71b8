"""Scores of answers on texts whose score is known, and the statistics against known values."""

import dataclasses
import weakref

import pytest
from datasets import Dataset, DatasetDict
from peft import get_peft_model

from helpers import prompts
from helpers.answers import evaluation, inference, problem_sets, sandbox
from helpers.answers.evaluation import Score
from helpers.answers.inference import Answer
from helpers.answers.problem_sets import Problem, load_ladder, load_problems
from helpers.config import LINKED_LIST_PROMPT, PROBLEMS_FILE, SYSTEM_MESSAGE, Config, ConfigError
from helpers.data import curation_note
from helpers.model import loading
from tests.conftest import fill_adapters, lora_of

GOOD = """1. Add the two numbers.
2. Return the sum.

```python
def add(a, b):
    return a + b
```

It works for any two numbers."""
LOSSES = {
    "held-out rows": {"base": [2.0, 3.0, 4.0], "tuned": [1.0, 4.0, 1.0]},
    "general text": {"base": [2.0, 4.0], "tuned": [3.0, 4.0]},
}
PROBLEM = Problem("p", "Write add(a, b).", "assert add(1, 2) == 3\nassert add(0, 0) == 0")


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


def test_a_loaded_model_is_asked_in_either_template(tiny_config, tokenizer, monkeypatch):
    asked = []

    def answer_all(model, tokenizer, asked_texts, config, temperature):
        asked.extend([*asked_texts, temperature])
        return [Answer(text, GOOD, 9, True) for text in asked_texts], 1.0

    monkeypatch.setattr(inference, "answer_all", answer_all)
    config = dataclasses.replace(tiny_config, sandbox="limits-only")
    problem = dataclasses.replace(PROBLEM, part="level1")
    for template in ("chat", "llama2"):
        scores = evaluation.ask_ladder(None, tokenizer, config, [problem], template, 0.7)
        assert scores == [made(part="level1")]
    assert asked[0].startswith("system\n") and asked[2].startswith("[INST]")
    assert asked[1] == asked[3] == 0.7


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
    answer = evaluation.answerer(tiny_config, "base")
    assert loaded == [], "nothing is loaded before it is asked"
    for _ in range(2):
        text, score = answer("Why <|im_end|>?")
        assert text.strip() and isinstance(score, Score) and score.passes is None
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
    with pytest.raises(ValueError, match="39 problems of level1_held_back, not 5000"):
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


def test_a_problem_that_stands_in_the_training_data_is_refused(tiny_config):
    asked = load_ladder(tiny_config.evaluation_problems)[1]
    row = {
        "prompt": prompts.render_prompt(asked.prompt, "Be brief."),
        "completion": prompts.render_completion("1. Think."),
    }
    rows = Dataset.from_list([row])
    DatasetDict(train=rows, validation=rows).save_to_disk(tiny_config.dataset_dir)
    with pytest.raises(ValueError, match=f"'{asked.id}'.* in the training data.*run notebook 02"):
        problem_sets.unseen_problems(tiny_config)
    other = {"prompt": prompts.render_prompt("Sort it.", "Be brief."), "completion": " 1. Think. "}
    DatasetDict(train=Dataset.from_list([other]), validation=rows).save_to_disk(
        tiny_config.dataset_dir
    )
    problems = problem_sets.unseen_problems(tiny_config)
    assert problems == load_ladder(tiny_config.evaluation_problems)


def test_a_model_is_asked_and_scored_in_one_call(tiny_config, monkeypatch):
    def answer_alone(config, which, texts, rows):
        return [Answer(text, GOOD, 9, True) for text in texts], 2.0

    monkeypatch.setattr(inference, "answer_alone", answer_alone)
    config = dataclasses.replace(tiny_config, sandbox="limits-only")
    problem = dataclasses.replace(PROBLEM, part="level2")
    answers, scores, seconds = evaluation.ask(config, "tuned", [problem] * 2)
    assert [answer.prompt for answer in answers] == [problem.prompt] * 2
    assert (scores, seconds) == ([made(part="level2")] * 2, 2.0)


def test_the_metrics_name_each_model_and_what_it_was_asked():
    answer = Answer("q", GOOD, 30, True)
    three = [made(part="level1"), made(part="level1"), made(passes=False, part="level3")]
    found = evaluation.metrics(
        {"base": [answer] * 3, "tuned": [answer] * 3, "merged": [answer] * 2},
        {"base": three, "tuned": three, "merged": three[:2]},
        {"base": 9.0, "tuned": 3.0, "merged": 1.0},
        [{"from": "base", "to": "tuned", "p": 0.5}, {"from": "tuned", "to": "merged", "p": 1.0}],
        LOSSES,
    )
    counts = {name: value for name, value in found.items() if name.startswith("problems")}
    assert counts == {
        "problems": 3,
        "problems_level1": 2,
        "problems_level3": 1,
        "problems_merged": 2,
    }
    assert found["pass_rate_level3_tuned"] == 0 and found["pass_rate_level1_merged"] == 1
    assert "pass_rate_level3_merged" not in found, "it was not asked that"
    assert found["tuned_tokens_per_second"] == 30 and found["base_tokens_per_second"] == 10
    assert [name for name in found if "p_value" in name] == ["pass_p_value_base"]
    assert (found["forgetting_loss_before"], found["forgetting_loss_after"]) == (3.0, 3.5)
    assert not [name for name in found if name.startswith("own_")]


def test_without_a_sandbox_no_pass_is_recorded():
    scores = {"tuned": [made(passes=None, part="level1")]}
    answers = {"tuned": [Answer("q", GOOD, 30, True)]}
    tests = [{"from": "base", "to": "tuned", "p": 0.5}]
    found = evaluation.metrics(answers, scores, {"tuned": 1.0}, tests, LOSSES)
    assert found["parse_rate_tuned"] == 1 and not [name for name in found if "pass" in name]


def test_a_sandbox_that_cannot_be_had_is_turned_off_in_words(monkeypatch, capsys):
    config = Config.from_profile("smoke", sandbox="limits-only")
    assert evaluation.usable_sandbox(config) == config
    assert "generated code runs at level: limits-only" in capsys.readouterr().out

    def refuse(wanted):
        raise sandbox.SandboxUnavailable("no namespaces here")

    monkeypatch.setattr(sandbox, "method", refuse)
    assert evaluation.usable_sandbox(config).sandbox == "off"
    assert "no answer is tested. no namespaces here" in capsys.readouterr().out


# -- Rows of one's own


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Paris", "paris.", True),
        ("  the  Seine ", "The Seine!", True),
        ("北京。", "北京", True),
        ("1.5", "15", False),
        ("Paris", "Paris, France", False),
        ("...", "!", False),
        ("", "Paris", False),
    ],
)
def test_an_answer_is_the_rows_whatever_case_spaces_and_punctuation(one, other, same):
    assert evaluation.same_text(one, other) == same


def own_dataset(config, answers, **more):
    """A run's dataset of rows of one's own, all of them held out as well."""
    rows = [
        {
            "prompt": prompts.render_prompt(f"What is tram {number}?", "You know our trams."),
            "completion": prompts.render_completion(answer),
            "question_score": None,
            **more,
        }
        for number, answer in enumerate(answers)
    ]
    DatasetDict(train=Dataset.from_list(rows), validation=Dataset.from_list(rows)).save_to_disk(
        str(config.dataset_dir)
    )


def test_held_out_rows_of_ones_own_are_asked_beside_level_1(tiny_config, capsys):
    own_dataset(tiny_config, ["red", "blue", "green"])
    config = dataclasses.replace(tiny_config, evaluation_problems=(2, 1, 1, 1))
    asked = problem_sets.unseen_problems(config)
    assert [problem.part for problem in asked] == ["own", "own", "level1", "level1"]
    assert (asked[0].prompt, asked[0].answer) == ("What is tram 0?", "red")
    assert "2 of your 3 held-out rows; 0 are judged by their tests, 2 by" in capsys.readouterr().out
    texts, rows = [p.prompt for p in asked], [p.row for p in asked]
    tokenizer = loading.load_tokenizer(config.model_name)
    trained = inference.asked_of(config, "tuned", tokenizer, texts, rows)
    best = inference.asked_of(config, "base_chat", tokenizer, texts, rows)
    assert trained[0] == asked[0].row and "You know our trams." in best[0]
    assert SYSTEM_MESSAGE in trained[2] and SYSTEM_MESSAGE in best[2]
    right, wrong = (Answer("", text, 1, True) for text in ("Red.", "It is red"))
    assert evaluation.score(right, asked[0], "off").passes
    assert evaluation.score(wrong, asked[0], "off").passes is False


def test_rows_that_bring_tests_are_judged_by_them(tiny_config, capsys):
    own_dataset(tiny_config, ["```python\nadd = sum\n```"] * 2, tests="assert add([1, 2]) == 3")
    asked = problem_sets.own_problems(tiny_config, 1)[0]
    assert (asked.tests, asked.answer) == ("assert add([1, 2]) == 3", "")
    assert "; 1 are judged by their tests, 0 by their short" in capsys.readouterr().out
    right, wrong = (Answer("", f"```python\nadd = {name}\n```", 1, True) for name in ("sum", "max"))
    assert evaluation.score(right, asked, "limits-only").passes
    assert evaluation.score(wrong, asked, "limits-only").passes is False


def test_long_answers_of_ones_own_are_compared_by_their_loss(tiny_config, capsys):
    own_dataset(
        tiny_config, ["It is the tram that goes to the harbour, every six minutes. " * 2] * 2
    )
    asked = problem_sets.own_problems(tiny_config, 9)
    assert [problem.answer for problem in asked] == ["", ""]
    assert "0 by their short answer" in capsys.readouterr().out
    assert evaluation.score(Answer("", "x", 1, True), asked[0], "isolated").passes is None


def test_level_1_beside_own_rows_must_not_stand_in_the_training_data(tiny_config):
    own_dataset(tiny_config, ["red", "blue"])
    asked = load_problems(1, 2)[0]
    row = {"prompt": prompts.render_prompt(asked.prompt, "Be brief."), "completion": " 1. Think. "}
    held = Dataset.from_list(problem_sets.held_out(tiny_config))
    rows = DatasetDict(train=Dataset.from_list([row]), validation=held)
    folder = tiny_config.run_dir.with_name("other")
    rows.save_to_disk(str(folder / "dataset"))
    with pytest.raises(ValueError, match=f"'{asked.id}'.* in the training data"):
        problem_sets.unseen_problems(dataclasses.replace(tiny_config, run_dir=folder))


def test_the_articles_rows_are_not_ones_own(tiny_config):
    own_dataset(tiny_config, ["red", "blue"])
    assert len(problem_sets.own_problems(tiny_config, 9)) == 2
    curation_note.write_curation({"source": Config.data_source}, tiny_config.dataset_dir)
    assert problem_sets.own_problems(tiny_config, 9) == []


def test_own_rows_have_metrics_of_their_own():
    before = [made(passes=False, part="own")] * 3 + [made(part="level1")]
    after = [made(part="own")] * 2 + [made(passes=False, part=part) for part in ("own", "level1")]
    answers = {which: [Answer("q", GOOD, 30, True)] * 4 for which in ("base", "tuned")}
    tests, timed = [{"from": "base", "to": "tuned", "p": 0.25}], {"base": 9.0, "tuned": 3.0}
    found = evaluation.metrics(answers, {"base": before, "tuned": after}, timed, tests, LOSSES)
    own = {name: value for name, value in found.items() if name.startswith("own_")}
    assert own == pytest.approx(
        {
            "own_rows": 3,
            "own_match_rate_base": 0,
            "own_match_rate_tuned": 2 / 3,
            "own_loss_base": 3.0,
            "own_loss_tuned": 2.0,
            "own_win_rate": 2 / 3,
            "own_p_value": 0.25,
        }
    )
    assert (found["pass_rate_base"], found["pass_rate_tuned"]) == (1, 0)
    long = [dataclasses.replace(score, passes=None) for score in after]
    found = evaluation.metrics(answers, {"base": long, "tuned": long}, timed, tests, LOSSES)
    assert found["own_p_value"] == 1.0 and "own_match_rate_tuned" not in found  # 2 of 3 by loss


@pytest.mark.parametrize("name", ["held-out rows", "general text"])
def test_losses_are_those_of_the_base_and_of_the_tuned_model(tiny_config, name, monkeypatch):
    own_dataset(tiny_config, ["red", "blue", "green"])
    base = loading.load_model(tiny_config)
    tuned = get_peft_model(base, lora_of(tiny_config)).eval()
    monkeypatch.setattr(inference, "load", lambda config, which: tuned)
    same = evaluation.losses(tiny_config)[name]
    assert same["base"] == same["tuned"] and len(same["base"]) == (2 if "rows" in name else 10)
    fill_adapters(tuned, 0.5)
    changed = evaluation.losses(tiny_config)[name]
    assert changed["base"] == same["base"] and changed["tuned"] != same["tuned"]


def test_a_rate_leaves_out_what_was_not_judged():
    scores = [made(passes=passes, part="level1") for passes in (True, None, False)]
    assert evaluation.rates(scores, "base")["pass_rate_level1_base"] == 0.5
