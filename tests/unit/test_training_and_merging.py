"""Training and merging on a tiny model: what is trained, saved, resumed, merged and measured."""

import copy
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tokenizers import normalizers
from transformers import TrainerControl, TrainerState
from trl import SFTConfig

from benchmarks import notebook_04
from helpers import prompts
from helpers.config import SYSTEM_MESSAGE, Config
from helpers.merging import comparison, merging
from helpers.model import architecture, loading, measure, precision
from helpers.profiles import PROFILES
from helpers.training import callbacks, checkpoints, machine, planning, safety, training_rows
from helpers.training.fast import fast_path
from tests.faults.train_tiny import build, write_dataset
from tests.notebook_code import (
    cell_source,
    definitions_from,
    examples_of,
    fine_tune,
    merge,
    save_adapter,
    save_merged,
)
from tests.unit.test_lesson_05 import with_adapter
from tests.walking import walk


@pytest.fixture
def config(tiny_model_dir, tmp_path):
    config = Config.from_profile(
        "smoke",
        model_name=str(tiny_model_dir),
        run_dir=tmp_path / "run",
        max_steps=4,
        learning_rate=0.05,
        lora_r=4,
    )
    write_dataset(config, rows=8, held_out=2)
    return config


@pytest.fixture
def trained(config, tokenizer):
    trainer, metrics = fine_tune(build(config))
    save_adapter(trainer, config)
    return trainer, metrics


def test_only_the_adapter_is_trained_and_its_size_is_predicted(config, tokenizer):
    trainer = build(config)
    named = [(n, p) for n, p in trainer.model.named_parameters() if p.requires_grad]
    assert all("lora_" in name for name, _ in named)
    predicted = architecture.lora_parameters(
        trainer.model.config, config.lora_r, config.target_modules
    )
    assert sum(parameter.numel() for _, parameter in named) == predicted


def test_a_gpus_steps_take_the_time_from_wait_to_wait(monkeypatch):
    """It works on while the process is between two steps, and where that waits varies."""
    clock = iter([0.0, 0.1, 2.0, 2.1, 3.9])  # begin, end, begin, end, and the GPU is done
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    log, arguments = callbacks.StepLog(), SimpleNamespace(device=torch.device("cuda"))
    log.on_train_begin(arguments, TrainerState(num_input_tokens_seen=100), None)
    state = TrainerState()
    for step, waits in ((1, False), (2, True)):
        control = TrainerControl(should_log=waits)
        log.on_step_begin(arguments, None, control)
        state.global_step, state.num_input_tokens_seen = step, 100 + 30 * step
        log.on_step_end(arguments, state, control)
    steps = callbacks.step_log(SimpleNamespace(state=state))
    assert [step["seconds"] for step in steps] == [1.95, 1.95]
    assert [step["tokens"] for step in steps] == [30, 30]


def test_a_step_that_a_signal_ends_has_its_seconds_as_one_that_is_waited_for(config, tokenizer):
    """So StepLog comes last: what asks for a checkpoint has asked by then, resumed or not."""
    kinds = [type(item) for item in build(config).callback_handler.callbacks]
    order = (checkpoints.SafeCheckpoints, callbacks.StepLog)
    assert [kind for kind in kinds if kind in order] == [*order]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("completion_only", [False, True])
def test_the_cell_that_shows_a_batch_shows_any(config, tokenizer, capsys, packing, completion_only):
    config = dataclasses.replace(
        config, packing=packing, completion_only_loss=completion_only, max_length=128
    )
    names = {"trainer": build(config), "tokenizer": tokenizer}
    capsys.readouterr()
    exec(cell_source("04", "69a7a62c"), names)
    shown, graded = capsys.readouterr().out.splitlines()
    begin = " 1. Add" if completion_only else r"(<.im_start.>)?\[INST\]"
    assert re.match(r"shown, \d+ tokens: ['\"](<.im_start.>)?\[INST\]", shown)
    assert re.match(rf"graded, \d+ tokens: ['\"]({begin})", graded)
    assert graded.endswith(f"{tokenizer.eos_token}'") and shown[-20:] == graded[-20:]
    count = len(examples_of(names["batch"]))
    assert count == 2 or packing and count > 2


def test_a_filled_up_batch_of_the_fast_path_has_its_examples(tokenizer):
    rows = [[5, 6, 7], [8, 9]]
    collate = fast_path.FixedCollator(0, padding_free=True, tokens=16, longest=8, rows=4)
    row = {"input_ids": sum(rows, []), "labels": sum(rows, []), "seq_lengths": [3, 2]}
    found = examples_of(collate([row]))
    assert [ids.tolist() for ids, _ in found] == rows
    assert [graded.tolist() for _, graded in found] == [[6, 7], [9]]  # none is the first


def test_the_loss_falls_on_the_answer_and_its_end_alone(config, tokenizer):
    batch = next(iter(build(config).get_train_dataloader()))
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        graded = tokenizer.decode(ids[labels != prompts.IGNORED_LABEL])
        assert graded.startswith(" 1. Add them.") and graded.endswith(tokenizer.eos_token)


def test_the_article_profile_counts_the_prompt_too(config, tokenizer):
    whole = dataclasses.replace(config, completion_only_loss=False)
    batch = next(iter(build(whole).get_train_dataloader()))
    padding = batch["attention_mask"] == 0
    assert ((batch["labels"] == prompts.IGNORED_LABEL) == padding).all()


def test_training_lowers_the_loss_and_measures_itself(trained):
    trainer, metrics = trained
    assert metrics["eval_loss_after"] < metrics["eval_loss_before"]
    assert metrics["exec_time_seconds"] > 0
    assert metrics["peak_memory_bytes"] > 50_000_000
    assert metrics["train_tokens_per_second"] > 0
    assert [step["step"] for step in callbacks.step_log(trainer)] == [1, 2, 3, 4]


def trained_by(trainer) -> list[torch.Tensor]:
    return [parameter for _, parameter in safety.trained(trainer.model)]


def test_a_model_that_is_wrapped_again_gets_a_fresh_adapter_of_the_same_layers(config, tokenizer):
    """The cell that makes the trainer may run twice."""
    first = build(config)
    made = [p.detach().clone() for p in trained_by(first)]
    fine_tune(first)
    again = build(config, model=first.model.get_base_model())
    assert all(map(torch.equal, trained_by(again), made))
    fewer = dataclasses.replace(config, target_modules=("q_proj",))
    with pytest.raises(ValueError, match="carries another adapter already, on down_proj, gate_pr"):
        build(fewer, model=first.model.get_base_model())


def test_the_adapter_is_saved_whole_and_the_checkpoints_are_gone(trained, config):
    names = {path.name for path in config.adapter_dir.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "training_log.json"} <= names
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)
    assert not config.checkpoints_dir.exists()
    assert not list(config.run_dir.glob(".*partial"))
    log = json.loads((config.adapter_dir / "training_log.json").read_text("utf-8"))
    assert len(log["steps"]) == 4 and any("eval_loss" in entry for entry in log["history"])


# What training does not depend on, or what the checkpoints' name says in another way: the model,
# the device and the rows, and by them all that made the rows.
NOT_NAMED_BY = {
    *("profile", "recipe", "run_dir", "model_name", "device_map", "data_source", "system_message"),
    *("min_question_score", "min_answer_score", "max_train_rows", "validation_rows"),
    *("validation_share", "near_duplicate_similarity", "min_answer_characters"),
    *("max_post_characters", "benchmarks", "activation_checkpointing", "kept_layers"),
    *("activation_offloading", "log_steps", "report_to", "fit_to_memory", "merge_into"),
    *(
        "gguf_types",
        "gguf_adapter_apart",
        "comparison_rows",
        "comparison_problems",
        "article_prompt",
        "max_new_tokens",
        "generation_batch_size",
    ),
    *("evaluation_problems", "sandbox", "new_dataset_name", "new_dataset_name_complete"),
    *("new_model_name", "hf_hub_model_name", "push_to_hub", "check_python"),
    *("validation_source", "template"),  # which are in the rows
}
# Arguments of the cells' calls that have another name than the setting they are given.
ARGUMENT_OF = {
    "lora_r": "r",
    "num_epochs": "num_train_epochs",
    "scheduler_type": "lr_scheduler_type",
    "warmup_ratio": "warmup_steps",
    "grad_acc_steps": "gradient_accumulation_steps",
    "group_by_length": "train_sampling_strategy",
}


def test_every_setting_is_said_to_change_the_training_or_not():
    """Whoever adds a field decides: into SETTINGS or ARGUMENTS of checkpoints, or NOT_NAMED_BY."""
    fields = {f.name for f in dataclasses.fields(Config)} - NOT_NAMED_BY
    named = {*checkpoints.SETTINGS, *checkpoints.ARGUMENTS}
    assert {ARGUMENT_OF.get(name, name) for name in fields} == named
    assert not named & NOT_NAMED_BY


def test_other_trainings_have_other_checkpoints(config):
    other = {"lora_r": 8, "scheduler_type": "linear", "early_stopping_patience": 2}
    configs = [config, *(dataclasses.replace(config, **{n: v}) for n, v in other.items())]
    folders = {build(each).args.output_dir for each in configs}
    assert len(folders) == len(configs)
    assert checkpoints.latest(config.checkpoints_dir / "none") is None


def test_other_rows_tokens_weights_or_processes_have_other_checkpoints(
    config, tokenizer, tmp_path, monkeypatch
):
    def folder(tokenizer=tokenizer):
        return checkpoints.folder_of(config, tokenizer)

    model = shutil.copytree(config.model_name, tmp_path / "model")
    config = dataclasses.replace(config, model_name=str(model))
    folders = [folder()]
    lower = copy.deepcopy(tokenizer)
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    folders.append(folder(lower))
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    folders.append(folder())
    write_dataset(config, rows=9, held_out=2)
    folders.append(folder())
    monkeypatch.setenv("WORLD_SIZE", "2")
    folders.append(folder())
    assert len(set(folders)) == 5


def test_a_copy_of_everything_has_the_same_checkpoints(config, tokenizer, tmp_path):
    model = shutil.copytree(config.model_name, tmp_path / "moved" / "model")
    shutil.copytree(config.run_dir, tmp_path / "other")
    moved = dataclasses.replace(config, model_name=str(model), run_dir=tmp_path / "other")
    names = {checkpoints.folder_of(each, tokenizer).name for each in (config, moved)}
    assert len(names) == 1


def test_adapters_are_float32_where_bfloat16_is_not_to_be_had(config, tokenizer):
    model = loading.load_model(config)
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    precision.cast([p for p in tuned.parameters() if p.requires_grad], torch.float32)
    assert {p.dtype for p in tuned.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("when", ["resumed", "finished"])
def test_an_adapter_is_loaded_in_the_type_that_it_has(config, when):
    """trl trains it in bfloat16 where a GPU computes in that, and peft loads it in float32."""
    config = dataclasses.replace(config, bnb_4bit_compute_dtype="bfloat16", bf16=False)
    whole = build(config)
    fine_tune(whole)
    if when == "resumed":
        shutil.rmtree(checkpoints.latest(Path(whole.args.output_dir)))
    again = build(config)
    fine_tune(again)
    moments = [m["exp_avg"] for m in again.optimizer.state.values()] if when == "resumed" else []
    assert {each.dtype for each in [*trained_by(again), *moments]} == {torch.bfloat16}
    assert all(map(torch.equal, trained_by(again), trained_by(whole)))


@pytest.mark.parametrize("package", planning.TRACKERS)
def test_a_tracker_keeps_its_files_in_the_run_folder(config, tokenizer, monkeypatch, package):
    monkeypatch.setenv(planning.TRACKERS[package], "elsewhere")
    tracked = dataclasses.replace(config, report_to=package)
    dataset = training_rows.load_dataset(config)
    _, folder, _ = planning.prepare(tracked, tokenizer, dataset)
    place = Path(os.environ[planning.TRACKERS[package]])
    assert place == config.run_dir / package / folder.name
    assert machine.for_this_machine(tracked)["report_to"] == package
    assert folder == planning.prepare(config, tokenizer, dataset)[1]


def test_tensorboard_gets_the_log(config, tokenizer, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "elsewhere")
    trainer = build(dataclasses.replace(config, report_to="tensorboard"))
    fine_tune(trainer)
    (events,) = (config.run_dir / "tensorboard").rglob("events.out.*")
    assert b"train/learning_rate" in events.read_bytes()


CHANGES = {
    "learning_rate": ("learning_rate=config.learning_rate", "learning_rate=1e-5"),
    "r": ("r=config.lora_r", "r=8"),
    "target_modules": (
        "target_modules=list(config.target_modules)",
        'target_modules=["v_proj", "q_proj"]',
    ),
    "gradient_accumulation_steps": (
        "gradient_accumulation_steps=config.grad_acc_steps",
        "gradient_accumulation_steps=3",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_call_that_is_changed_in_its_cell_has_checkpoints_of_its_own(config, monkeypatch, name):
    """Else a run that was interrupted would go on from what other settings have learnt."""
    asked = [Path(build(config).args.output_dir) for _ in range(2)]
    before, after = CHANGES[name]
    cells = notebook_04.train_cells({})
    assert sum(before in cell for cell in cells) == 1
    changed = [cell.replace(before, after) for cell in cells]
    monkeypatch.setattr(notebook_04, "train_cells", lambda parameters: changed)
    found = [Path(build(config).args.output_dir) for _ in range(2)]
    assert asked[0] == asked[1] != found[0] == found[1]
    assert {folder.parent for folder in [*asked, *found]} == {asked[0].parent}


def test_the_folder_of_a_call_is_the_same_in_every_process(tmp_path):
    """A set has another order in each."""
    arguments, lora = SFTConfig(str(tmp_path), use_cpu=True, bf16=False), vars(LoraConfig())
    orders = (["q_proj", "v_proj"], ["v_proj", "q_proj"])
    loras = [SimpleNamespace(**{**lora, "target_modules": order}) for order in orders]
    assert len({checkpoints.folder_of_calls(tmp_path, arguments, lora) for lora in loras}) == 1


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_builds_its_trainer(profile, config):
    changes = {name: getattr(config, name) for name in ("run_dir", "model_name", "max_length")}
    on_cpu = {"device_map": {"": "cpu"}, "fp16": False, "bf16": False, "optim": "adamw_torch"}
    asked = Config.from_profile(profile, **changes, **on_cpu)
    arguments = build(asked).args
    assert (arguments.learning_rate, arguments.max_steps) == (asked.learning_rate, asked.max_steps)


SHAPES = """
import sys, helpers, psutil, torch
weights = [torch.randn(rows, 576, dtype=torch.bfloat16) for rows in (576, 192, 1536, 64)]
def step(length):
    for weight in weights:
        inputs = torch.randn(4 * length, 576, dtype=torch.bfloat16)
        (torch.nn.functional.linear(inputs, weight) @ weight).T @ inputs
for length in range(80, 104, 2): step(length)
before = psutil.Process().memory_info().rss
for length in range(104, 152, 2): step(length)
print(psutil.Process().memory_info().rss - before)
"""


@pytest.mark.slow
def test_a_cpu_keeps_no_machine_code_of_lengths_gone_by():
    """24 more lengths took 216 MB with torch's own limits."""
    command = [sys.executable, "-c", SHAPES]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
    assert int(done.stdout) < 100e6


# -- Merging


def test_merges_differ_from_the_trained_model_as_little_as_they_should(trained, config, tokenizer):
    rows = training_rows.load_dataset(config)["validation"]
    reference, _ = comparison.known_answers(merging.load_tuned(config), tokenizer, rows)
    lesson = definitions_from("05")

    def distance(into):
        logits, _ = comparison.known_answers(merge(config, into), tokenizer, rows)
        return torch.cat(list(map(lesson["kl_divergence"], reference, logits))).mean().item()

    assert 0 <= distance("dequantized") < min(distance("4bit"), distance("16bit"))


def test_a_merged_model_is_saved_beside_the_adapter_and_comes_back_equal(
    trained, config, tokenizer
):
    rows = training_rows.load_dataset(config)["validation"]
    merged = merge(config, "16bit")
    folder = save_merged(merged, tokenizer, config)
    template = (folder / "chat_template.jinja").read_text("utf-8")
    assert template == prompts.chat_template(SYSTEM_MESSAGE)
    assert folder == config.merged_dir and (config.adapter_dir / "adapter_config.json").exists()
    again = loading.load_model(config, quantized=False, source=folder)
    for saved, loaded in zip(
        comparison.known_answers(merged, tokenizer, rows)[0],
        comparison.known_answers(again, tokenizer, rows)[0],
        strict=True,
    ):
        assert torch.equal(saved, loaded)


@pytest.mark.filterwarnings("ignore::helpers.runs.inventory.ArtefactWarning")
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kept", [(), ("v_proj", "down_proj")], ids=str)
def test_the_dequantized_base_is_the_4_bit_model_unpacked(config, double, kept):
    """Layers that stay in 16 bits stay as they are: in both, and in the merge too."""
    before = with_adapter(config, target_modules=["q_proj"])
    config = dataclasses.replace(config, use_nested_quant=double, keep_in_16bit=kept)
    packed = loading.load_model(config).dequantize()
    theirs = merging.load_tuned(config, packed).merge_and_unload().state_dict()
    ours = merge(config, "dequantized").state_dict()
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        if "q_proj" not in name:
            assert torch.equal(weight, theirs[name].to(weight.dtype)), name
        if "_proj" in name:
            untouched = torch.equal(weight, before[name])
            assert untouched == (name.split(".")[-2] in kept), name


def test_a_model_that_does_not_fit_the_gpu_is_merged_on_the_cpu(trained, config, monkeypatch):
    weights = merge(config, "16bit").get_memory_footprint(return_buffers=False)
    adapter = (config.adapter_dir / "adapter_model.safetensors").stat().st_size
    needed = weights + adapter + merging.WORK_BYTES
    on_gpu = dataclasses.replace(config, device_map={"": 0})
    monkeypatch.setattr(measure, "free_bytes", lambda device: needed - 1)
    assert merging.with_room_for_base(on_gpu).device_map == {"": "cpu"}
    monkeypatch.setattr(measure, "free_bytes", lambda device: needed)
    assert merging.with_room_for_base(on_gpu).device_map == {"": 0}


def test_layers_that_travel_answer_and_are_saved_as_those_that_stay(
    trained, config, tokenizer, monkeypatch
):
    """What a GPU without room does; here the layers travel from the CPU to itself."""
    rows = training_rows.load_dataset(config)["validation"]
    stays = merge(config, "16bit")
    expected, _ = comparison.known_answers(stays, tokenizer, rows)
    travels = merging.cpu_offload(merge(config, "16bit"), torch.device("cpu"))
    assert {p.device.type for p in travels.parameters()} == {"meta"}
    found, _ = comparison.known_answers(travels, tokenizer, rows)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    travelled = load_file(save_merged(travels, tokenizer, config) / "model.safetensors")
    stayed = load_file(save_merged(stays, tokenizer, config) / "model.safetensors")
    assert travelled.keys() == stayed.keys()
    assert all(torch.equal(travelled[name], stayed[name]) for name in stayed)


@pytest.mark.parametrize("into", ["16bit", "4bit"])
def test_notebook_05_saves_the_merge_that_it_is_told_to(trained, config, into):
    given = {"PROFILE": "smoke", "RUN_DIR": str(config.run_dir), "MODEL_NAME": config.model_name}
    given |= {"LORA_R": 4, "MERGE_INTO": into, "SANDBOX": "off", "GGUF_TYPES": ["q8_0"]}
    found = walk("05", **given)
    record = json.loads((config.merged_dir / "merge.json").read_text("utf-8"))
    assert (record["merged_into"], record["taken_by"]) == (into, "MERGE_INTO")
    assert found["metrics"]["reload_max_abs_diff"] == 0
    assert found["metrics"]["eval_loss_merged"] == found["results"][into]["loss"]
    described = json.loads((config.merged_dir / "config.json").read_text("utf-8"))
    assert ("quantization_config" in described) == (into == "4bit")
    assert config.gguf_dir.exists() == (into == "16bit")
    assert "taken by MERGE_INTO" in found["card"].text
