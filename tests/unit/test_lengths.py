"""Rows that are longer than MAX_LENGTH: left out, counted and said, and none that trains is cut."""

import dataclasses

import pytest
from datasets import Dataset, DatasetDict

from helpers import prompts
from helpers.config import SYSTEM_MESSAGE, Config, ConfigError
from helpers.training import training_rows
from tests.faults.train_tiny import build, tiny_config
from tests.notebook_code import examples_of

ROWS, HELD_OUT = 16, 4


@pytest.fixture
def config(tmp_path, tiny_model_dir):
    """On rows of some 60 to 150 tokens each, as long as their number says, and four held out."""
    config = tiny_config(tmp_path, tiny_model_dir, max_steps=2, per_device_train_batch_size=2)
    splits = {
        "train": [row(number) for number in range(ROWS)],
        "validation": [row(number) for number in range(0, ROWS, ROWS // HELD_OUT)],
    }
    dataset = DatasetDict({name: Dataset.from_list(rows) for name, rows in splits.items()})
    dataset.save_to_disk(config.dataset_dir)
    return config


def row(number: int) -> dict:
    return {
        "prompt": prompts.render_prompt(f"Count to {number}.", SYSTEM_MESSAGE),
        "completion": prompts.render_completion("1. Add one.\n" * (number + 1)),
    }


def length(number: int, tokenizer) -> int:
    return len(prompts.encode(tokenizer, **row(number))["input_ids"])


def graded_by(loader) -> list[list[int]]:
    """The tokens on which the loss falls, of every row that a loader gives."""
    return [graded.tolist() for batch in loader for _, graded in examples_of(batch)]


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("completion_only", [True, False], ids=["answers", "whole rows"])
def test_every_row_that_trains_keeps_its_end(config, tokenizer, capsys, packing, completion_only):
    changes = {"packing": packing, "completion_only_loss": completion_only}
    config = dataclasses.replace(config, max_length=length(9, tokenizer), **changes)
    trainer = build(config)
    said = capsys.readouterr().out
    assert (
        f"MAX_LENGTH = {config.max_length}: 6 of 16 train rows and 1 of 4 validation rows are "
        "longer and left out\n" in said
    )
    for loader, rows in (
        (trainer.get_train_dataloader(), range(10)),
        (trainer.get_eval_dataloader(), range(0, 10, 4)),
    ):
        found = graded_by(loader)
        assert all(tokens[-1] == tokenizer.eos_token_id for tokens in found)
        whole = [prompts.encode(tokenizer, **row(number)) for number in rows]
        if completion_only:
            graded = [[n for n in each["labels"] if n != prompts.IGNORED_LABEL] for each in whole]
        else:  # packed, no row's first token is the next one of the row before
            graded = [each["input_ids"][1:] if packing else each["input_ids"] for each in whole]
        assert sorted(found) == sorted(graded)


def test_rows_that_fit_are_all_taken_and_nothing_is_said(config, tokenizer, capsys):
    fits = dataclasses.replace(config, max_length=length(ROWS - 1, tokenizer))
    dataset = training_rows.load_dataset(fits, tokenizer)
    assert dataset.num_rows == {"train": ROWS, "validation": HELD_OUT}
    assert capsys.readouterr().out == ""
    shorter = dataclasses.replace(fits, max_length=fits.max_length - 1)
    dataset = training_rows.load_dataset(shorter, tokenizer)
    assert dataset.num_rows == {"train": ROWS - 1, "validation": HELD_OUT}
    assert "1 of 16 train rows and 0 of 4 validation rows" in capsys.readouterr().out


def test_rows_that_train_may_be_limited_further(config, tokenizer, capsys):
    shorter = dataclasses.replace(config, max_train_length=length(9, tokenizer))
    dataset = training_rows.load_dataset(shorter, tokenizer)
    assert dataset.num_rows == {"train": 10, "validation": HELD_OUT - 1}
    limit = shorter.max_train_length
    assert f"MAX_TRAIN_LENGTH = {limit}: 6 of 16 train rows" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="MAX_TRAIN_LENGTH is 16, and 16 of 16 train rows"):
        training_rows.load_dataset(dataclasses.replace(shorter, max_train_length=16), tokenizer)


def test_a_profiles_limit_is_for_its_own_data():
    assert Config.from_profile("demo").max_train_length == 200
    assert Config.from_profile("demo", data_source="mine.jsonl").max_train_length is None
    given = Config.from_profile("demo", data_source="mine.jsonl", max_train_length=64)
    assert given.max_train_length == 64


def test_a_length_that_no_row_has_is_refused(config, tokenizer):
    short = dataclasses.replace(config, max_length=20)
    said = "MAX_LENGTH is 20, and 16 of 16 train rows and 4 of 4 validation rows"
    said += rf" are longer: raise it \(the longest has {length(ROWS - 1, tokenizer)} tokens"
    with pytest.raises(ConfigError, match=said):
        training_rows.load_dataset(short, tokenizer)


def test_validation_needs_a_row(config, tokenizer):
    dataset = training_rows.load_dataset(config)
    dataset["validation"] = dataset["validation"].select([HELD_OUT - 1])
    short = dataclasses.replace(config, max_length=length(9, tokenizer))
    with pytest.raises(ConfigError, match="6 of 16 train rows and 1 of 1 validation rows are"):
        training_rows.rows_that_fit(short, tokenizer, dataset)
