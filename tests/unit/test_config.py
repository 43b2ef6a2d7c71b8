"""Config: the article's values, the profiles, and parameters that are wrong."""

import dataclasses
import json

import pytest

from helpers.config import PROFILES, RECIPES, SYSTEM_MESSAGE, Config, ConfigError
from helpers.runs import inventory

# Name and value of the constants of the article's Config class, in its code's own words, but for
# those that nothing reads, which docs/article.md lists. Its GROUP_BY_LENGTH = 3 is the one value
# that differs: transformers read it as True.
ARTICLE = {
    "MODEL_NAME": "meta-llama/Llama-2-7b-hf",
    "NEW_DATASET_NAME_COMPLETE": "luisroque/instruct-python-500k",
    "NEW_DATASET_NAME": "luisroque/instruct-python-llama2-20k",
    "NEW_MODEL_NAME": "Llama-2-7b-minipython-instruct",
    "HF_HUB_MODEL_NAME": "luisroque/Llama-2-7b-minipython-instruct",
    "NUM_EPOCHS": 1,
    "GRAD_ACC_STEPS": 1,
    "SAVE_STEPS": 50,
    "LOG_STEPS": 5,
    "LEARNING_RATE": 2e-4,
    "WEIGHT_DECAY": 0.001,
    "MAX_GRAD_NORM": 0.3,
    "SCHEDULER_TYPE": "cosine",
    "PER_DEVICE_TRAIN_BATCH_SIZE": 4,
    "PER_DEVICE_EVAL_BATCH_SIZE": 4,
    "OPTIM": "paged_adamw_32bit",
    "FP16": False,
    "BF16": False,
    "MAX_STEPS": 1000,
    "WARMUP_RATIO": 0.03,
    "GROUP_BY_LENGTH": True,
    "LORA_ALPHA": 16,
    "LORA_DROPOUT": 0.1,
    "LORA_R": 64,
    "DEVICE_MAP": {"": 0},
    "USE_4BIT": True,
    "BNB_4BIT_COMPUTE_DTYPE": "float16",
    "BNB_4BIT_COMPUTE_QUANT_TYPE": "nf4",
    "USE_NESTED_QUANT": False,
}
# What the article's functions hold as literals.
ARTICLE |= {"EVAL_STEPS": 50, "MAX_LENGTH": 512, "EARLY_STOPPING_PATIENCE": 4}


@pytest.mark.parametrize("name", ARTICLE)
def test_profile_article_has_the_articles_value(name):
    assert getattr(Config.from_profile("article"), name.lower()) == ARTICLE[name]


def test_the_articles_system_message_is_the_one_that_is_written_where_none_is_given():
    assert Config.from_profile("article").system_message is None
    assert SYSTEM_MESSAGE == (
        "Given a puzzle-like code question, provide a well-reasoned, step-by-step Python solution."
    )


@pytest.mark.parametrize("profile", PROFILES)
def test_every_key_of_a_profile_is_a_field_and_the_profile_is_valid(profile):
    assert set(PROFILES[profile]) <= set(Config.__dataclass_fields__)
    config = Config.from_profile(profile)
    assert config.profile == profile
    assert config.run_dir.name == profile


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config.from_profile("demo").lora_r = 1


def test_notebook_parameters_change_fields_and_none_does_not():
    names = {"PROFILE": "smoke", "MAX_STEPS": 7, "LORA_R": None, "RUN_DIR": None}
    config = Config.from_notebook({**names, "W": 1, "In": [], "config": None, "__name__": "x"})
    assert config.max_steps == 7
    assert config.lora_r == Config.from_profile("smoke").lora_r


def test_a_mistyped_parameter_is_an_error_with_the_nearest_name():
    with pytest.raises(ConfigError, match="MAX_STPES: did you mean MAX_STEPS"):
        Config.from_notebook({"PROFILE": "smoke", "MAX_STPES": 3})
    with pytest.raises(ConfigError, match="MAX_STPES"):
        Config.from_notebook({"PROFILE": "smoke", "MAX_STPES": None})


def test_an_unknown_profile_is_an_error_with_the_nearest_name():
    with pytest.raises(ConfigError, match="'dmeo'.*did you mean demo"):
        Config.from_notebook({"PROFILE": "dmeo"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LORA_R", 0),
        ("LORA_R", "8"),
        ("LORA_R", 8.0),
        ("MAX_STEPS", 0),
        ("LEARNING_RATE", -1.0),
        ("LEARNING_RATE", float("nan")),
        ("LORA_DROPOUT", 1.5),
        ("USE_4BIT", 1),
        ("TARGET_MODULES", "q_proj"),
        ("SCHEDULER_TYPE", "cosin"),
        ("SANDBOX", "none"),
        ("SEED", True),
    ],
)
def test_a_value_out_of_type_or_range_names_parameter_and_value(name, value):
    with pytest.raises(ConfigError) as caught:
        Config.from_notebook({"PROFILE": "smoke", name: value})
    assert name in str(caught.value) and repr(value) in str(caught.value)


def test_all_problems_stand_in_one_message():
    with pytest.raises(ConfigError) as caught:
        Config.from_profile("smoke", lora_r=0, learning_rate=-1.0)
    assert all(name in str(caught.value) for name in ("LORA_R", "LEARNING_RATE"))


def test_a_missing_artefact_names_the_notebook_that_makes_it(tmp_path):
    config = Config.from_profile("smoke", run_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match="run notebook 04"):
        config.require(config.adapter_dir, "04")


def test_metrics_are_written_whole_and_must_be_finite(tmp_path):
    config = Config.from_profile("smoke", run_dir=tmp_path)
    path = inventory.record_metrics(config, "04", {"eval_loss_before": 1.5})
    assert json.loads(path.read_text("utf-8")) == {"eval_loss_before": 1.5}
    with pytest.raises(ConfigError, match="eval_loss_after"):
        inventory.record_metrics(config, "04", {"eval_loss_after": float("nan")})
    assert json.loads(path.read_text("utf-8")) == {"eval_loss_before": 1.5}
    assert [item.name for item in path.parent.iterdir()] == ["04.json"]


# -- Recipes

PLACE = ("model_name", "data_source", "device_map", "bnb_4bit_compute_dtype", "max_length")


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_lies_above_the_profile_and_below_parameters(profile, recipe):
    plain = Config.from_profile(profile)
    config = Config.from_notebook({"PROFILE": profile, "RECIPE": recipe, "LORA_DROPOUT": 0.0})
    expected = {**RECIPES[recipe], "lora_dropout": 0.0, "recipe": recipe}
    assert {name: getattr(config, name) for name in expected} == expected
    others = set(Config.__dataclass_fields__) - set(expected)
    assert all(getattr(config, name) == getattr(plain, name) for name in others)
    assert not set(PLACE) & set(RECIPES[recipe])


def test_the_articles_recipe_is_the_articles_profile_and_the_recommended_one_is_demos():
    article = Config.from_profile("article", recipe="article")
    assert article == dataclasses.replace(Config.from_profile("article"), recipe="article")
    demo = Config.from_profile("demo", recipe="recommended")
    assert demo == dataclasses.replace(Config.from_profile("demo"), recipe="recommended")


@pytest.mark.parametrize("recipe", ["artcle", 3, ["article"]])
def test_an_unknown_recipe_is_named_with_those_that_there_are(recipe):
    with pytest.raises(ConfigError, match="RECIPE is ") as caught:
        Config.from_notebook({"PROFILE": "smoke", "RECIPE": recipe})
    if isinstance(recipe, str):
        assert all(name in str(caught.value) for name in ("'artcle'", *RECIPES))
