"""Every profile, with every recipe, walks notebooks 02 to 06 on a CPU with a tiny random Llama.

The settings are the profile's own, but for sizes (tests/walking.py) and what a CPU cannot have. And
the numbers by which the lessons teach are what the lessons say.
"""

import gc
import importlib
import json
import shutil

import pytest
import torch
from safetensors import safe_open

from helpers.config import RECIPES, Config
from helpers.runs import inventory
from tests.notebooks.test_smoke import NAMES
from tests.walking import SHORT, first_tokens, save_random_model, walk, write_corpus

PROFILES = ("demo", "colab_t4")  # those of Llama 2 7B: test_walk_7b.py
# What a CPU cannot have at all. Without the fast path and without pages for the optimizer's states
# it goes on unasked, and in float16 and bfloat16 it computes, slowly.
NOT_ON_A_CPU = {
    "DEVICE_MAP": ({"": "cpu"}, "there is no GPU"),
    "FP16": (False, "Config refuses autocast to float16 on a CPU"),
}


@pytest.fixture(scope="module")
def given(tmp_path_factory, tokenizer):
    """Parameters of all walks: a tiny model, a few questions, SHORT, and NOT_ON_A_CPU."""
    model, corpus = (tmp_path_factory.mktemp(name) for name in ("tiny-llama", "corpus"))
    save_random_model("LlamaConfig", first_tokens(tokenizer, 2000, model), model)
    write_corpus(corpus)
    overridden = {name: value for name, (value, _) in NOT_ON_A_CPU.items()}
    # Notebooks collect garbage dozens of times. What the libraries hold is looked through but once.
    importlib.import_module("helpers.training.safety")
    gc.collect()
    gc.freeze()
    yield {"MODEL_NAME": str(model), "DATA_SOURCE": str(corpus), **SHORT, **overridden}
    gc.unfreeze()


def pytest_generate_tests(metafunc):
    """Tests that walk do so once for each of the PROFILES of their module."""
    profiles = metafunc.module.PROFILES
    metafunc.parametrize("curated", profiles, indirect=True, scope="module")


@pytest.fixture(scope="module")
def curated(request, given, tmp_path_factory):
    """A profile's parameters, whose RUN_DIR holds what notebook 02 writes, and 02's variables."""
    folder = tmp_path_factory.mktemp(request.param)
    parameters = {**given, "PROFILE": request.param, "RUN_DIR": str(folder)}
    return parameters, walk("02", **parameters)


@pytest.fixture
def parameters(curated, tmp_path):
    """Those of a profile, with a run folder of their own."""
    shutil.copytree(curated[0]["RUN_DIR"], tmp_path, dirs_exist_ok=True)
    return {**curated[0], "RUN_DIR": str(tmp_path)}


def missing_names(config: Config, *numbers: str) -> dict[str, set[str]]:
    """What these notebooks promise to record and did not."""
    metrics = inventory.read_metrics(config)
    return {number: {*NAMES[number].split()} - set(metrics[number]) for number in numbers}


def test_02_teaches_what_it_says(curated):
    parameters, found = curated
    assert missing_names(Config.from_notebook(parameters), "02") == {"02": set()}
    assert sum(found["passed"]) >= 0.8 * len(found["passed"])
    assert found["kept"] >= 0.98 > found["kept_flat"]
    assert abs(found["leaks"] - 0.18 * len(found["i"])) < 1
    assert found["report"].validation_leaks == 0 and found["failing"] == []
    assert found["learned"][-1] and found["pieces"][-1] == found["tokenizer"].eos_token
    assert [bool(problems) for problems in found["verdicts"]] == [False] + 4 * [True]


@pytest.mark.parametrize("recipe", ["article", "recommended"])  # all that 03 reads differs in them
def test_03_walks_and_teaches_what_it_says(parameters, recipe):
    found = walk("03", **parameters, RECIPE=recipe)
    assert missing_names(Config.from_notebook(parameters), "03") == {"03": set()}
    # Not `difference`: on a CPU bitsandbytes unpacks rows of less than 64 weights wrongly.
    assert torch.equal(found["packed"], found["theirs"].flatten())
    assert found["predicted"] == found["measured"]
    assert found["shares"].shape == (4, 3) and found["shares"].max().max() < 100
    assert len(found["table"]) in (7, 8) and found["plans"]["Llama 2 7B"]["8 GB"].fits
    assert set(found["recorded"]) == {"16bit", "fp4", "4bit"}


@pytest.mark.parametrize("recipe", (None, *RECIPES), ids=str)
def test_every_recipe_walks_04_to_06(parameters, recipe):
    parameters["RECIPE"] = recipe
    config = Config.from_notebook(parameters)
    if recipe is None:
        walk("04", **parameters, MAX_STEPS=1)  # ends before the first log line
    found = walk("04", **parameters, MAX_STEPS=config.log_steps + 1)
    assert found["change"] == 0
    assert found["trainable"][0] == found["predicted_parameters"]
    assert found["part"][-1] == found["tokenizer"].eos_token_id
    assert found["loss"].item() < 11 and found["needed"]["learnt"] <= config.lora_r
    check_adapter(config)
    walk("05", **parameters)
    check_merged(config)
    walk("06", **parameters)
    assert missing_names(config, "04", "05", "06") == {"04": set(), "05": set(), "06": set()}


def check_adapter(config):
    """What was trained is what the Config says."""
    trained = json.loads((config.adapter_dir / "adapter_config.json").read_text(encoding="utf-8"))
    assert set(trained["target_modules"]) == set(config.target_modules)
    assert trained["r"] == config.lora_r
    assert trained["lora_alpha"] == config.lora_alpha
    assert trained["lora_dropout"] == config.lora_dropout


def check_merged(config):
    """What was saved has the format that the profile computes in: 16 bits, or packed besides.

    No merge of a tiny random model is right, so the rule of lesson 05 may take the packed one.
    """
    with safe_open(config.merged_dir / "model.safetensors", "pt") as weights:
        kinds = {weights.get_tensor(name).dtype for name in weights.keys()}
    half = torch.float16 if config.profile in ("article", "colab_t4") else torch.bfloat16
    record = json.loads((config.merged_dir / "merge.json").read_text(encoding="utf-8"))
    assert half in kinds and (kinds == {half}) == (record["merged_into"] != "4bit")
