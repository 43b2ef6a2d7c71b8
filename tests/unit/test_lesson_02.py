"""Lesson 02: its cells join, render and mask as the package does, with the libraries alone."""

import datasets
import pandas as pd
import pytest

from helpers import prompts
from helpers.config import SYSTEM_MESSAGE, Config
from helpers.data import curation
from helpers.data.markdown import html_to_markdown
from helpers.data.sources import SAMPLE_DIR
from tests.notebook_code import cell_source


def run(names, *cells):
    """The cells of the notebook, run one after the other in a namespace of these names."""
    for cell in cells:
        exec(cell_source("02", cell), names)
    return names


@pytest.fixture(scope="module")
def report_and_rows(tokenizer, tmp_path_factory):
    """What `curate` makes of the sample: its report, and its rows by question."""
    config = Config.from_profile("demo", run_dir=tmp_path_factory.mktemp("run"))
    report = curation.curate(config, tokenizer)
    dataset = datasets.load_from_disk(str(config.dataset_dir))
    return report, {row["question_id"]: row for split in dataset.values() for row in split}


@pytest.fixture(scope="module")
def joined():
    """The tables after the cells that read and join, and find pairs with code."""
    return run({"sample_dir": SAMPLE_DIR}, "7f5d9fa6", "join-code", "one-code")


def test_the_join_takes_the_answers_that_the_curation_takes(joined, report_and_rows):
    best = dict(zip(joined["pairs"].Id, joined["pairs"].Id_answer, strict=True))
    _, rows = report_and_rows
    assert len(rows) > 400
    assert {name: row["answer_id"] for name, row in rows.items()} == {n: best[n] for n in rows}
    tags = dict(zip(joined["pairs"].Id, joined["pairs"].Tags, strict=True))
    assert all(sorted(row["tags"]) == sorted(tags[name]) for name, row in rows.items())


def test_of_level_answers_the_older_is_the_best():
    answers = pd.DataFrame(
        [(3, 1, 5), (2, 1, 5), (4, 1, 4), (5, 2, -1)], columns=["Id", "ParentId", "Score"]
    )
    questions = pd.DataFrame({"Id": [1, 2, 3], "Title": "t", "Score": 0})
    tags = pd.DataFrame({"Id": [1], "Tag": ["python"]})
    found = run({"answers": answers, "questions": questions, "tags": tags}, "join-code")["pairs"]
    assert found.Id_answer.tolist() == [2, 5]


@pytest.fixture
def shown(joined, tokenizer, monkeypatch):
    """The names after the cells that render and mask a pair, in a project without helpers."""
    one = joined["one"]
    names = {**joined, "html_to_markdown": html_to_markdown, "tokenizer": tokenizer}
    names["answer"] = html_to_markdown(one.Body_answer, [])
    names = run(names, "template-code")
    chat = cell_source("02", "chat-code").splitlines()
    exec("\n".join(line for line in chat if "loading" not in line), names)
    mask = cell_source("02", "f3e3b15c").splitlines()
    exec("\n".join(line for line in mask if "helpers" not in line and "HTML" not in line), names)
    return names


def test_the_pair_of_the_lesson_is_a_row_of_the_dataset(shown, report_and_rows):
    row = report_and_rows[1][int(shown["one"].Id)]
    assert (shown["prompt"], shown["completion"]) == (row["prompt"], row["completion"])
    assert shown["system"] == SYSTEM_MESSAGE


def test_the_template_in_jinja_writes_what_the_three_lines_write(shown, tokenizer):
    both = shown["prompt"] + shown["completion"]
    assert shown["text"] == tokenizer.bos_token + both + tokenizer.eos_token
    conversation = prompts.Conversation(SYSTEM_MESSAGE, ((shown["question"], shown["answer"]),))
    assert prompts.render(conversation) == both


def test_the_mask_is_that_of_the_trainer(shown, tokenizer):
    row = prompts.encode(tokenizer, shown["prompt"], shown["completion"])
    assert (shown["input_ids"], shown["labels"]) == (row["input_ids"], row["labels"])


def test_a_text_with_its_marks_gets_a_second_bos(shown, tokenizer):
    twice = tokenizer(shown["text"]).input_ids
    once = tokenizer(shown["text"], add_special_tokens=False).input_ids
    assert twice[:2] == [tokenizer.bos_token_id] * 2 and once == twice[1:] == shown["input_ids"]


@pytest.mark.parametrize(("asked", "names"), [(True, ["set"]), (False, [])])
def test_a_dataset_is_uploaded_only_when_asked(asked, names):
    pushed = []

    class Splits(datasets.DatasetDict):
        def push_to_hub(self, name, private):
            assert private
            pushed.append(name)

    columns = "question_id answer_id question_author answer_author licence".split()
    dataset = Splits(train=datasets.Dataset.from_dict({name: [1] for name in columns}))
    config = Config.from_profile("demo", push_to_hub=asked, new_dataset_name="someone/set")
    run({"config": config, "dataset": dataset, "pd": pd}, "42-credit")
    assert pushed == names


def test_ten_rows_of_ones_own_are_shown_as_they_are_trained_on(tokenizer, capsys):
    config = Config.from_profile("demo")
    run({"Config": Config, "config": config, "tokenizer": tokenizer}, "own-code")
    told = capsys.readouterr().out
    assert "trams.jsonl: 10 rows" in told and "of 10 rows 10 stay" in told
    two_turns = told.split("-- row 10, what is learned between « and »:")[1]
    assert two_turns.count(f" {tokenizer.eos_token}»") == 2 and "« Line 3 too. " in two_turns
    assert "Python" not in told
