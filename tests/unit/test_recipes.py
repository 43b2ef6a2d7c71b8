"""The comparison of recipes: every run is kept, another comparison is refused, a crash is named."""

import dataclasses
import json

import pytest

from benchmarks import ladder, recipes
from helpers.answers.problem_sets import load_ladder
from helpers.config import RECIPES, Config, ConfigError
from helpers.model import loading
from helpers.training import planning
from tests.faults.train_tiny import write_dataset

RATES = ("stop_rate_tuned", "parse_rate_tuned", "pass_rate_tuned")


@pytest.fixture
def parameters(tiny_config):
    write_dataset(tiny_config, rows=12, held_out=2)
    place = {"MODEL_NAME": tiny_config.model_name, "RUN_DIR": str(tiny_config.run_dir)}
    return {"PROFILE": "smoke", **place, "LORA_R": 4}


def invented(parameters):
    return {"recipe": parameters["RECIPE"], "seed": parameters["SEED"], "answer_loss_after": 1.0}


@pytest.mark.slow
def test_every_recipe_is_trained_and_measured_by_the_same_answers(parameters, tmp_path, capfd):
    output = tmp_path / "recipes.json"
    given = [("--max-steps", "2"), ("--seeds", "5"), ("--output", str(output))]
    given += [("-p", name, str(value)) for name, value in parameters.items() if name != "PROFILE"]
    recipes.main(["--profile", "smoke", *(word for part in given for word in part)])
    assert "step    2/2" in capfd.readouterr().out  # the trainings' own lines
    found = json.loads(output.read_text("utf-8"))
    assert {"date", "hardware", "torch", "parameters"} <= set(found)
    runs = {run["recipe"]: run for run in found["runs"]}
    assert list(runs) == list(RECIPES)
    assert len({run["answer_loss_before"] for run in runs.values()}) <= 2  # two quantizations
    assert len({run["answer_loss_after"] for run in runs.values()}) == 3
    for run in runs.values():
        assert (run["seed"], run["steps"]) == (5, 2)
        assert all(0 <= run[name] <= 1 for name in RATES)
        assert run["train_tokens_per_second"] > 0 and run["peak_memory_bytes"] > 5e7


def test_a_training_that_was_planned_is_measured_and_leaves_no_checkpoints(parameters, monkeypatch):
    """As on a GPU, where the plan has other settings than those that were asked for."""

    def planned(config, *folder):
        return dataclasses.replace(config, kept_layers=0, per_device_train_batch_size=1)

    monkeypatch.setattr(planning, "planned", planned)
    config = recipes._config(parameters, "recommended", 0)
    assert recipes.measure(config)["steps"] == 2
    assert not list(config.checkpoints_dir.rglob("checkpoint-*"))


def test_a_comparison_goes_on_from_what_it_has(parameters, tmp_path, monkeypatch):
    output, asked = tmp_path / "recipes.json", []

    def killed_at_the_second(parameters):
        asked.append((parameters["SEED"], parameters["RECIPE"]))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return invented(parameters)

    monkeypatch.setattr(recipes, "measured_alone", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        recipes.compare(parameters, [0, 1], output)
    runs = recipes.compare(parameters, [0, 1], output)
    assert len(runs) == 6 and len(asked) == 7
    assert json.loads(output.read_text("utf-8"))["runs"] == runs
    recipes.compare(parameters, [1], output)
    assert len(asked) == 7
    with pytest.raises(ConfigError, match="measured with parameters = .*name another file"):
        recipes.compare({**parameters, "LORA_R": 8}, [0], output)


def test_a_training_that_crashes_is_named_and_the_others_are_kept(
    parameters, tmp_path, monkeypatch
):
    def crash(parameters):
        if parameters["RECIPE"] == "qlora_paper":
            raise RuntimeError("ended with code -9 (it said nothing)")
        return invented(parameters)

    monkeypatch.setattr(recipes, "measured_alone", crash)
    with pytest.raises(RuntimeError, match="qlora_paper with seed 0 ended with code -9"):
        recipes.compare(parameters, [0], tmp_path / "recipes.json")
    kept = json.loads((tmp_path / "recipes.json").read_text("utf-8"))["runs"]
    assert [run["recipe"] for run in kept] == ["article", "recommended"]


def test_the_last_word_of_a_crash_is_told(parameters):
    with pytest.raises(RuntimeError, match="ended with code 1 .*LORA_R is 0"):
        recipes.measured_alone({**parameters, "RECIPE": "article", "SEED": 0, "LORA_R": 0})


def test_without_a_dataset_nothing_is_trained(parameters, tmp_path):
    with pytest.raises(FileNotFoundError, match="run notebook 02"):
        recipes.compare({**parameters, "RUN_DIR": str(tmp_path)}, [0], tmp_path / "r.json")


def test_each_form_and_each_training_of_the_ladder_is_a_config():
    settings = [{"KEEP_IN_16BIT": kept or ()} for kept, _ in ladder.FORMS] + ladder.TRAININGS
    made = [Config.from_parameters({**ladder.ON_GPU, **ladder.ASKED, **s}) for s in settings]
    assert {config.keep_in_16bit for config in made} > {(), ladder.THREE}
    assert {config.use_4bit for config in made} == {True, False}
    asked = load_ladder(made[0].evaluation_problems)
    assert len({problem.id for problem in asked}) == 150


def test_the_bytes_of_a_form_are_those_of_packed_weights_and_scales(tiny_config):
    config = dataclasses.replace(tiny_config, keep_in_16bit=("v_proj",))
    layer = loading.load_model(config).model.layers[0].self_attn
    size = layer.v_proj.weight.numel()
    assert ladder.stored_bytes(layer.v_proj.weight) == 2 * size
    packed = layer.q_proj.weight.quant_state.shape.numel()
    assert packed / 2 < ladder.stored_bytes(layer.q_proj.weight) < 0.6 * packed + 8
