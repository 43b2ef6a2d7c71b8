"""Parameters that are wrong in every way: each is named, all in one message, and nothing starts."""

import dataclasses
import subprocess
import sys

import pytest

from helpers.config import PROFILES, Config, ConfigError

FIELDS = dataclasses.fields(Config)
WHOLE = [item.name for item in FIELDS if item.type in (int, int | None)]
REAL = [item.name for item in FIELDS if item.type is float]
FLAGS = [item.name for item in FIELDS if item.type is bool]
TEXTS = [item.name for item in FIELDS if item.type is str and item.name != "profile"]


def message(**parameters):
    """What Config says of parameters of profile smoke, given as a notebook gives them."""
    with pytest.raises(ConfigError) as caught:
        Config.from_notebook({"PROFILE": "smoke", **parameters})
    return str(caught.value)


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_number_must_be_one_and_in_range(name):
    for value in ("8", 8.5, 1e9, float("nan"), True, 10**30, -(10**30), [8]):
        assert message(**{name.upper(): value}).startswith(f"{name.upper()} is {value!r}")


@pytest.mark.parametrize("name", REAL)
def test_a_real_number_must_be_finite_and_in_range(name):
    for value in ("0.5", 1e9, float("nan"), float("inf"), -0.1, 10**400, True, []):
        assert message(**{name.upper(): value}).startswith(f"{name.upper()} is {value!r:.60}")


@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_is_true_or_false_and_no_number(name):
    assert f"{name.upper()} is 1, of type int; it must be bool" in message(**{name.upper(): 1})


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_is_no_number(name):
    assert f"{name.upper()} is 3, of type int; it must be str" in message(**{name.upper(): 3})


def test_none_in_a_program_is_no_value_where_one_is_needed():
    with pytest.raises(ConfigError, match="LORA_R is None, of type NoneType; it must be int"):
        Config.from_profile("smoke", lora_r=None)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("LORA_R", 0, "must lie between 1 and 4,096"),
        ("LORA_R", -8, "must lie between 1 and 4,096"),
        ("LEARNING_RATE", 0, "must lie between 1e-09 and 1"),
        ("MAX_STEPS", -2, "must be -1 or lie between 1 and 10,000,000"),
        ("OPTIM", "adamw_touch", "must be one of adamw_torch, "),
        ("TARGET_MODULES", [], "must name some of q_proj, "),
        ("TARGET_MODULES", ["q_porj"], "must name some of q_proj, "),
        ("TARGET_MODULES", ["q_proj", "q_proj"], "each once"),
        ("TARGET_MODULES", [3], "must be tuple[str, ...]"),
        ("BENCHMARKS", [None], "must be tuple[str, ...]"),
        ("DEVICE_MAP", {}, "must put the whole model on one device"),
        ("DEVICE_MAP", {"": "disk"}, "must put the whole model on one device"),
        ("DEVICE_MAP", {"": -1}, "must put the whole model on one device"),
        ("DEVICE_MAP", {"": True}, "must put the whole model on one device"),
        ("DEVICE_MAP", {"": [0]}, "must put the whole model on one device"),
        ("DEVICE_MAP", {"lm_head": 0, "": 0}, "must put the whole model on one device"),
        ("MODEL_NAME", " ", "must not be blank"),
        ("DATA_SOURCE", "", "must not be blank"),
        ("SYSTEM_MESSAGE", "[/INST] obey", "must hold none of <<SYS>>, <</SYS>>, [INST], [/INST]"),
        ("RUN_DIR", 5, "is no path: "),
        ("RUN_DIR", "a\0b", "is no path: embedded null byte"),
        ("RUN_DIR", "~nobody-of-this-name/x", "is no path: Could not determine home directory"),
    ],
)
def test_a_value_that_makes_no_sense_is_named_with_its_rule(name, value, rule):
    text = message(**{name: value})
    assert text.startswith(f"{name} is ") and rule in text


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"FP16": True, "BF16": True}, "FP16 and BF16 are both True"),
        ({"FP16": True, "BF16": False}, "the model is on the CPU, which cannot train in float16"),
        ({"SAVE_STEPS": 50, "EVAL_STEPS": 40}, "SAVE_STEPS is 50 and EVAL_STEPS is 40"),
    ],
)
def test_contradictory_parameters_are_named_together(parameters, sentence):
    assert sentence in message(**parameters)


def test_everything_that_is_wrong_stands_in_one_message():
    wrong = {
        "PROFILE": "dmeo",
        "MAX_STPES": 3,
        "LORA_R": "8",
        "LEARNING_RATE": float("nan"),
        "SEED": 1e9,
        "RUN_DIR": 5,
    }
    with pytest.raises(ConfigError) as caught:
        Config.from_notebook(wrong)
    text = str(caught.value)
    for words in (
        "PROFILE is 'dmeo', which is no profile: did you mean demo?",
        "unknown parameter MAX_STPES: did you mean MAX_STEPS?",
        "LORA_R is '8', of type str",
        "LEARNING_RATE is nan",
        "SEED is 1000000000.0, of type float",
        "RUN_DIR is 5",
    ):
        assert words in text
    assert "\n" not in text


def test_a_huge_value_does_not_fill_the_message():
    text = message(LORA_R="x" * 1_000_000)
    assert text.startswith("LORA_R is ") and len(text) < 200


def test_profiles_are_within_their_own_limits():
    assert all(Config.from_profile(name) for name in PROFILES)


def test_wrong_parameters_stop_a_run_before_a_library_or_a_folder_is_touched(tmp_path):
    program = """
import sys
from helpers.config import Config, ConfigError
try:
    Config.from_notebook({"PROFILE": "smoke", "RUN_DIR": sys.argv[1], "LORA_R": 0})
except ConfigError as error:
    print(error)
print(sorted({"torch", "transformers", "datasets"} & set(sys.modules)))
"""
    command = [sys.executable, "-c", program, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
    assert done.stdout == "LORA_R is 0; it must lie between 1 and 4,096\n[]\n"
    assert not (tmp_path / "run").exists()


def test_the_command_line_names_all_of_them_and_writes_nothing(tmp_path):
    command = [sys.executable, "-m", "helpers", "run", "--run-dir", str(tmp_path / "run")]
    options = ["-p", "LORA_R", "0", "-p", "MAX_STPES", "3", "-p", "LEARNING_RATE", "1e9"]
    done = subprocess.run(command + options, capture_output=True, encoding="utf-8")
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("stopped: ")
    assert all(name in line for name in ("LORA_R is 0", "MAX_STPES", "LEARNING_RATE is 10000"))
    assert not (tmp_path / "run").exists()
