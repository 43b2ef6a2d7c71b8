"""Training and merging on a tiny model: what is trained, saved, resumed, merged and measured."""

import copy
import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tokenizers import normalizers
from transformers import TrainerControl, TrainerState

from helpers import prompts
from helpers.config import SYSTEM_MESSAGE, Config, ConfigError
from helpers.merging import adapter_folder, comparison, merging
from helpers.model import architecture, embedded, loading, measure, precision
from helpers.runs import inventory
from helpers.training import callbacks, checkpoints, machine, planning, safety, training_rows
from helpers.training.fast import fast_path
from tests.conftest import fill_adapters, relative_error
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
    order = (checkpoints.StopAtStepEdge, callbacks.StepLog)
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
    *("gguf_types", "comparison_rows", "article_prompt", "max_new_tokens", "generation_batch_size"),
    *("evaluation_problems", "sandbox", "new_dataset_name", "new_dataset_name_complete"),
    *("new_model_name", "hf_hub_model_name", "push_to_hub", "check_python"),
    *("validation_source", "template"),  # which are in the rows
}
OTHER = {
    "lora_r": 8,
    "learning_rate": 1e-3,
    "weight_decay": 0.5,
    "scheduler_type": "linear",
    "max_steps": 9,
    "early_stopping_patience": 2,
    "target_modules": ("q_proj",),
}


def test_every_setting_is_said_to_change_the_training_or_not():
    """Whoever adds a field decides: into checkpoints.NAMED_BY, or into NOT_NAMED_BY here."""
    named, fields = set(checkpoints.NAMED_BY), {f.name for f in dataclasses.fields(Config)}
    assert named | NOT_NAMED_BY == fields and not named & NOT_NAMED_BY


def test_other_trainings_have_other_checkpoints(config, tokenizer):
    folders = {checkpoints.folder_of(config, tokenizer)}
    for name, value in OTHER.items():
        folders.add(checkpoints.folder_of(dataclasses.replace(config, **{name: value}), tokenizer))
    assert len(folders) == len(OTHER) + 1
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


def test_the_checkpoints_are_named_by_what_was_asked_for_and_not_by_the_plan(
    config, tokenizer, monkeypatch
):
    asked = checkpoints.folder_of(config, tokenizer)
    monkeypatch.setattr(planning, "planned", lambda config, folder: planned(config))

    def planned(config):
        return dataclasses.replace(config, kept_layers=1, per_device_train_batch_size=1)

    trainer = build(config)
    assert Path(trainer.args.output_dir) == asked
    assert trainer.args.per_device_train_batch_size == 1


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


@pytest.mark.parametrize("package", ["tensorboard", "trackio"])
def test_a_tracker_that_is_not_installed_is_named(config, tokenizer, monkeypatch, package):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=f"REPORT_TO is '{package}', .*pip install {package}"):
        machine.prepare_tracker(dataclasses.replace(config, report_to=package), Path("a-run"))


def test_a_tracker_keeps_its_files_in_the_run_folder(config, tokenizer, monkeypatch):
    for package, name in (("tensorboard", "TENSORBOARD_LOGGING_DIR"), ("trackio", "TRACKIO_DIR")):
        monkeypatch.setenv(name, "elsewhere")
        monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
        tracked = dataclasses.replace(config, report_to=package)
        machine.prepare_tracker(tracked, Path("a-run"))
        assert Path(os.environ[name]) == config.run_dir / package / "a-run"
        assert machine.for_this_machine(tracked)["report_to"] == package
        folders = {checkpoints.folder_of(each, tokenizer) for each in (tracked, config)}
        assert len(folders) == 1


def test_tensorboard_gets_the_log(config, tokenizer, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "elsewhere")
    trainer = build(dataclasses.replace(config, report_to="tensorboard"))
    fine_tune(trainer)
    (events,) = (config.run_dir / "tensorboard").rglob("events.out.*")
    assert b"train/learning_rate" in events.read_bytes()


# -- Merging


def test_merges_differ_from_the_trained_model_as_little_as_they_should(trained, config, tokenizer):
    rows = training_rows.load_dataset(config)["validation"]
    reference = comparison.answer_logits(merging.load_tuned(config), tokenizer, rows)
    distance = {
        into: comparison.kl_divergence(
            reference, comparison.answer_logits(merge(config, into), tokenizer, rows)
        )
        for into in merging.MERGES
    }
    assert 0 <= distance["dequantized"] < distance["4bit"]
    assert distance["dequantized"] < distance["16bit"]


def with_adapter(config, std=0.02, **settings):
    """A random adapter with other settings than the Config's; the base's weights by layer."""
    settings = {"r": 8, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"], **settings}
    base = loading.load_model(config, quantized=False)
    weights = {name: p.detach().clone().float() for name, p in base.named_parameters()}
    tuned = get_peft_model(base, LoraConfig(**settings))
    fill_adapters(tuned, std)
    tuned.save_pretrained(config.adapter_dir)
    return weights


@pytest.mark.filterwarnings("ignore::helpers.runs.inventory.ArtefactWarning")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 40}},
        {"layers_to_transform": [1], "target_modules": ["v_proj"]},
    ],
)
def test_an_update_is_what_the_adapter_says_and_not_the_config(tiny_config, settings):
    before = with_adapter(tiny_config, **settings)
    assert tiny_config.lora_alpha == 16 and tiny_config.lora_r == 64
    adapter, merged = adapter_folder.Adapter(tiny_config.adapter_dir), merge(tiny_config, "16bit")
    for name, weight in merged.named_parameters():
        layer, change = name.removesuffix(".weight"), weight - before[name]
        if layer in adapter.pairs:
            # The rest is what 16 bits round: a three-hundredth of the weight, not of the update.
            assert relative_error(change, adapter.update(layer)) < 0.3, name
        else:
            assert not change.any(), name
    assert adapter.pairs.keys() == {f"model.{kind}" for kind in _adapted(tiny_config, settings)}


def _adapted(config, settings):
    layers = settings.get("layers_to_transform", [0, 1])
    targets = settings.get("target_modules", ["q_proj", "down_proj"])
    places = {"q_proj": "self_attn", "v_proj": "self_attn", "down_proj": "mlp"}
    return {f"layers.{layer}.{places[name]}.{name}" for layer in layers for name in targets}


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"modules_to_save": ["lm_head"]}, "lm_head"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens"),
    ],
)
def test_an_adapter_that_adds_something_else_is_refused_by_name(tiny_config, settings, name):
    with_adapter(tiny_config, **settings)
    with pytest.raises(inventory.ArtefactError, match=f"holds .*{name}.*, which is no A or B"):
        adapter_folder.Adapter(tiny_config.adapter_dir)


@pytest.mark.filterwarnings("ignore::helpers.runs.inventory.ArtefactWarning")
@pytest.mark.parametrize("std", [0.02, 0.002])  # 0.002: as small, next to the weights, as in `demo`
def test_merging_by_hand_is_pefts_merge_and_an_unmerged_matrix_is_not(tiny_config, std):
    with_adapter(tiny_config, std, lora_alpha=8)
    trained, lesson = adapter_folder.Adapter(tiny_config.adapter_dir), definitions_from("05")
    layer = "model.layers.0.self_attn.q_proj"
    lesson |= trained.pairs[layer] | {"scale": trained.scale(layer)}
    lesson["numbers"] = torch.finfo(torch.bfloat16)
    lesson["update"] = trained.update(layer)
    in_4_bits = merging.weight_of(loading.load_model(tiny_config), layer)
    W = merging.weight_of(loading.load_model(tiny_config, quantized=False), layer)
    for into, start in (("16bit", W), ("dequantized", in_4_bits)):
        merged = merging.weight_of(merge(tiny_config, into), layer)
        as_by_hand, missing = lesson["compare"](merged, start).values()
        assert as_by_hand == 1 and missing < 0.9
        as_by_hand, missing = lesson["compare"](start, start).values()
        assert as_by_hand < 0.9 and missing == pytest.approx(1)
    packed_anew = merging.weight_of(merge(tiny_config, "4bit"), layer)
    assert lesson["compare"](packed_anew, in_4_bits)["entries as by hand"] < 0.9


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
        comparison.answer_logits(merged, tokenizer, rows),
        comparison.answer_logits(again, tokenizer, rows),
        strict=True,
    ):
        assert torch.equal(saved, loaded)


@pytest.mark.parametrize("double", [True, False])
def test_the_dequantized_base_is_the_4_bit_model_unpacked(config, double):
    with_adapter(config)
    config = dataclasses.replace(config, use_nested_quant=double)
    ours, theirs = merging.load_base(config, "dequantized"), loading.load_model(config).dequantize()
    theirs = theirs.state_dict()
    assert ours.state_dict().keys() == theirs.keys()
    for name, weight in ours.state_dict().items():
        assert torch.equal(weight, theirs[name].to(weight.dtype)), name


def test_a_model_that_does_not_fit_the_gpu_is_merged_on_the_cpu(trained, config, monkeypatch):
    on_gpu = dataclasses.replace(config, device_map={"": 0})
    needed = merging.bytes_needed(on_gpu) + merging.WORK_BYTES
    monkeypatch.setattr(measure, "free_bytes", lambda device: needed - 1)
    assert merging.load_base(on_gpu, "16bit").device.type == "cpu"
    monkeypatch.setattr(measure, "free_bytes", lambda device: needed)
    with pytest.raises(embedded.ModelUnavailable, match="torch sees no GPU"):
        merging.load_base(on_gpu, "16bit")


def test_layers_that_travel_answer_and_are_saved_as_those_that_stay(
    trained, config, tokenizer, monkeypatch
):
    """What a GPU without room does; here the layers travel from the CPU to itself."""
    rows = training_rows.load_dataset(config)["validation"]
    stays = merge(config, "16bit")
    expected = comparison.answer_logits(stays, tokenizer, rows)
    layer = "model.layers.0.self_attn.q_proj"
    travels = merging.cpu_offload(merge(config, "16bit"), torch.device("cpu"))
    assert {p.device.type for p in travels.parameters()} == {"meta"}
    for ours, theirs in zip(
        comparison.answer_logits(travels, tokenizer, rows), expected, strict=True
    ):
        assert torch.equal(ours, theirs)
    assert torch.equal(merging.weight_of(travels, layer), merging.weight_of(stays, layer))
    travelled = load_file(save_merged(travels, tokenizer, config) / "model.safetensors")
    stayed = load_file(save_merged(stays, tokenizer, config) / "model.safetensors")
    assert travelled.keys() == stayed.keys()
    assert all(torch.equal(travelled[name], stayed[name]) for name in stayed)


def test_the_memory_of_a_merge_is_that_of_its_weights_and_the_adapter(trained, config):
    weights = merge(config, "16bit").get_memory_footprint(return_buffers=False)
    adapter = (config.adapter_dir / "adapter_model.safetensors").stat().st_size
    assert merging.bytes_needed(config) == weights + adapter


def test_the_general_text_is_prose_that_is_read_whole(config, tokenizer):
    rows = comparison.general_rows()
    assert len(rows) == 4 and all("def " not in row["completion"] for row in rows)
    model = loading.load_model(config, quantized=False)
    lengths = [len(tokenizer(row["completion"])["input_ids"]) for row in rows]
    # BOS predicts the first token, and the last one predicts EOS.
    assert [len(each) for each in comparison.answer_logits(model, tokenizer, rows)] == lengths


def test_an_unknown_merge_is_named(config):
    with pytest.raises(ValueError, match="'8bit'.*16bit, dequantized, 4bit"):
        merging.load_base(config, "8bit")


def test_merging_needs_the_adapter(config):
    shutil.rmtree(config.adapter_dir, ignore_errors=True)
    with pytest.raises(FileNotFoundError, match="run notebook 04"):
        merging.load_base(config, "16bit")


def test_kl_divergence_is_that_of_known_distributions():
    p = torch.tensor([[0.5, 0.5]]).log()
    q = torch.tensor([[0.25, 0.75]]).log()
    expected = 0.5 * torch.log(torch.tensor(2.0)) + 0.5 * torch.log(torch.tensor(2 / 3))
    assert comparison.kl_divergence([p], [q]) == pytest.approx(expected.item(), rel=1e-5)
    assert comparison.kl_divergence([p], [p]) == 0
    assert (
        comparison.top_token_agreement(
            [torch.tensor([[0.0, 1.0], [1.0, 0.0]])] * 2,
            2 * [torch.tensor([[0.0, 1.0], [0.0, 1.0]])],
        )
        == 0.5
    )
