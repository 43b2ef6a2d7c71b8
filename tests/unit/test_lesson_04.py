"""Notebook 04 calls the libraries itself, and what its text says of the settings is so."""

import ast
import dataclasses
import re

import nbformat
import pytest

from helpers.config import ALL_LINEAR_TARGETS, Config
from helpers.training import safety
from tests.faults.train_tiny import build, tiny_config
from tests.notebook_code import cell_source, notebook_path, notebook_source


@pytest.mark.parametrize(
    "call",
    [
        *("AutoTokenizer.from_pretrained(", "BitsAndBytesConfig(", "LoraConfig(", "SFTConfig("),
        *("AutoModelForCausalLM.from_pretrained(", "callbacks=safety(", "loss.backward()"),
        *("Trainer = FastTrainer if config.fast_path else SFTTrainer", "trainer.train(resume_from"),
        *("@time_decorator", "@memory_decorator", ".generate(", "tokenizer.decode("),
        "trainer.save_model(",
    ],
)
def test_the_call_that_a_reader_came_for_stands_in_a_cell(call):
    assert call in notebook_source(notebook_path("04"))


@pytest.mark.parametrize(
    ("cell", "name", "count"), [("lora-config", "LoraConfig", 6), ("sft-config", "SFTConfig", 15)]
)
def test_each_argument_has_its_reason_beside_it(cell, name, count):
    source = cell_source("04", cell)
    (call,) = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == name
    ]
    named = [keyword for keyword in call.keywords if keyword.arg]
    lines = source.splitlines()
    assert len(named) >= count
    assert all("  # " in lines[keyword.value.end_lineno - 1] for keyword in named)


def in_the_table(value) -> str:
    """A setting as the table writes it."""
    if value in (None, ()):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value == ALL_LINEAR_TARGETS:
        return "all seven"
    if isinstance(value, tuple):
        return ", ".join(name.removesuffix("_proj") for name in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def rows_of_the_table() -> list[list[str]]:
    cells = nbformat.read(notebook_path("04"), as_version=4).cells
    (text,) = [cell.source for cell in cells if cell.id == "settings-table"]
    return [re.split(r" *\| *", line)[1:-1] for line in text.splitlines() if line[:3] == "| `"]


@pytest.mark.parametrize("row", rows_of_the_table(), ids=lambda row: row[0])
def test_the_table_of_settings_says_what_the_profiles_have(row):
    name, demo, article, why, change = row
    field = name.strip("`").lower()
    for profile, said in (("demo", demo), ("article", article)):
        assert said == in_the_table(getattr(Config.from_profile(profile), field)), profile
    assert why and change


@pytest.mark.parametrize("packing", [False, True])
def test_a_rung_gives_the_arguments_that_the_cells_give(tmp_path, tiny_model_dir, packing):
    rung = {"per_device_train_batch_size": 2, "grad_acc_steps": 4, "activation_checkpointing": True}
    config = tiny_config(tmp_path, tiny_model_dir, packing=packing, max_length=128)
    config = dataclasses.replace(config, per_device_train_batch_size=8)
    taken = safety.made_anew(build(config), rung).args.to_dict()
    given = build(dataclasses.replace(config, **rung)).args.to_dict()
    assert taken == given
