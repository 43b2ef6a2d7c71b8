"""`python -m helpers`: every command that needs settings takes the same, and refuses the same."""

import argparse

import pytest

from benchmarks import recipes
from helpers.__main__ import _parser, main
from helpers.answers import inference
from helpers.config import Config
from helpers.merging import export, publishing
from helpers.runs import recording
from tests.faults.train_tiny import write_dataset

# Command -> the function that it calls with a Config, and what it needs besides.
COMMANDS = {
    "ask": (inference, "answer_alone", ["tuned"]),
    "record": (recording, "record", []),
    "first-look": (recording, "write_first_look", []),
    "export-gguf": (export, "export_gguf", []),
    "push-dataset": (publishing, "push_dataset", []),
    "push-model": (publishing, "push_model", []),
}
WITHOUT_SETTINGS = {"verify", "fetch-model"}


@pytest.fixture
def called(monkeypatch, tmp_path):
    """Each command does no more than to keep its Config."""
    configs = []

    def keep(config, *arguments):
        configs.append(config)
        return tmp_path if config is not None else None

    for module, name, _ in COMMANDS.values():
        monkeypatch.setattr(module, name, keep)
    given = [inference.Answer("q", "", 0, True)], 1.0
    monkeypatch.setattr(inference, "answer_alone", lambda config, *_: keep(config) and given)
    return configs


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_takes_parameters_and_a_run_folder(called, tmp_path, command):
    given = ["-p", "SYSTEM_MESSAGE", "Be brief.", "-p", "MAX_NEW_TOKENS", "7"]
    folder = ["--profile", "smoke", "--run-dir", str(tmp_path / "mine")]
    assert main([command, *COMMANDS[command][2], *folder, *given]) == 0
    (config,) = called
    assert (config.profile, config.run_dir) == ("smoke", tmp_path / "mine")
    assert (config.system_message, config.max_new_tokens) == ("Be brief.", 7)


def test_the_recipes_take_a_run_folder_too(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(recipes, "compare", lambda given, *_: seen.append(given) or {"runs": []})
    command = ["--profile", "smoke", "--max-steps", "3"]
    recipes.main(command)
    recipes.main([*command, "--run-dir", str(tmp_path), "-p", "LORA_R", "4"])
    assert seen[0] == {"PROFILE": "smoke", "MAX_STEPS": 3}
    assert seen[1] == {**seen[0], "RUN_DIR": str(tmp_path), "LORA_R": 4}


def test_the_script_for_several_gpus_has_the_parameters(tiny_config, capsys):
    write_dataset(tiny_config)
    command = ["export-training", "--profile", "smoke", "--run-dir", str(tiny_config.run_dir)]
    assert main([*command, "-p", "MODEL_NAME", tiny_config.model_name, "-p", "LORA_R", "4"]) == 0
    assert capsys.readouterr().out.endswith(f"ddp.yaml {tiny_config.run_dir / 'train.py'}\n")
    script = (tiny_config.run_dir / "train.py").read_text("utf-8")
    assert "\nLORA_R = 4\n" in script and "display(" not in script


def test_a_script_without_a_dataset_is_refused(tmp_path, capsys):
    assert main(["export-training", "--profile", "smoke", "--run-dir", str(tmp_path)]) == 1
    assert "run notebook 02" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("SYSTEM_MESAGE", "x", "did you mean SYSTEM_MESSAGE"),
        ("colour", "red", "parameter colour is not in capitals: write COLOUR"),
        ("HF_TOKEN", "hf_abc", "unknown parameter HF_TOKEN"),
    ],
)
def test_a_name_that_is_none_stops_each_command(called, capsys, command, name, value, message):
    assert main([command, *COMMANDS[command][2], "-p", name, value]) == 1
    assert message in capsys.readouterr().err and called == []


def test_no_command_that_makes_a_config_lacks_the_two():
    (commands,) = [a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction)]
    for name, command in commands.choices.items():
        options = {option for action in command._actions for option in action.option_strings}
        assert ({"-p", "--run-dir", "--profile"} <= options) is (name not in WITHOUT_SETTINGS), name


def test_the_profile_is_the_same_with_and_without_the_command_line(called, tmp_path):
    assert main(["export-gguf", "--profile", "article"]) == 0
    assert called == [Config.from_profile("article")]
