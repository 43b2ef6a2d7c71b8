"""DDP and FSDP: two processes do what one does with all of the rows, or all of the model."""

import dataclasses
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainerControl, TrainerState
from transformers.models.llama import modeling_llama
from trl import SFTConfig

from benchmarks.llama2 import llama2_config
from benchmarks.notebook_04 import run_cells
from helpers.config import PROJECT_DIR, Config, ConfigError
from helpers.merging import merging
from helpers.model import measure, predict
from helpers.runs import inventory
from helpers.training import checkpoints, machine, planning
from helpers.training.export import export_training
from tests.faults.train_tiny import parameters_of, tiny_config, write_dataset

CONFIG_FILE = PROJECT_DIR / "accelerate" / "ddp_cpu.yaml"


def script_of(run_dir, model_dir, rows, **changes):
    """(the Config of four steps, the script of notebook 04 that trains it on that many rows)."""
    config = tiny_config(
        run_dir, model_dir, lora_dropout=0.0, group_by_length=False, max_steps=4,
        per_device_train_batch_size=rows, **changes,
    )  # fmt: skip
    write_dataset(config)
    return config, export_training(parameters_of(config))


def train(config, command, **variables):
    """Run a command; its output and the log beside the adapter that it saved."""
    options = {"capture_output": True, "encoding": "utf-8", "env": os.environ | variables}
    done = subprocess.run([sys.executable, *map(str, command)], timeout=300, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    inventory.check_seal(config.adapter_dir, "04")
    assert not config.checkpoints_dir.exists()
    log = json.loads((config.adapter_dir / inventory.TRAINING_LOG).read_text("utf-8"))
    return done.stdout, log["history"]


@pytest.mark.slow
def test_two_processes_train_as_one_does_on_the_same_rows(tmp_path, tiny_model_dir):
    losses = {}
    launcher = ("-m", "accelerate.commands.launch", "--config_file", CONFIG_FILE)
    for processes, rows in ((1, 4), (2, 2)):
        config, script = script_of(tmp_path / str(processes), tiny_model_dir, rows)
        text, history = train(config, [*(launcher if processes > 1 else ()), script])
        losses[processes] = [entry["loss"] for entry in history if "loss" in entry]
        metrics = json.loads((config.metrics_dir / "04.json").read_text("utf-8"))
        assert metrics["eval_loss_after"] < metrics["eval_loss_before"]
        assert text.count("step    4/4   loss") == 1  # the first process alone speaks
    assert losses[2] == pytest.approx(losses[1], abs=1e-4)
    assert losses[1][-1] < losses[1][0] - 0.1


def fsdp_environment() -> dict:
    """What accelerate makes of the committed file for the processes that it starts."""
    settings = yaml.safe_load((PROJECT_DIR / "accelerate" / "fsdp_qlora.yaml").read_text("utf-8"))
    named = {name.upper(): str(value) for name, value in settings["fsdp_config"].items()}
    named["FSDP_TRANSFORMER_CLS_TO_WRAP"] = named.pop("FSDP_TRANSFORMER_LAYER_CLS_TO_WRAP")
    return {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_USE_CPU": "true", **named}


@pytest.mark.slow
def test_two_shards_train_as_one_model_does(tmp_path, tiny_model_dir):
    logs, adapters = {}, {}
    for processes, rows in ((1, 4), (2, 2)):
        folder = tmp_path / str(processes)
        config, script = script_of(folder, tiny_model_dir, rows, use_4bit=True)
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
        sharded = fsdp_environment() if processes > 1 else {}
        _, history = train(config, [*launcher, "-m", "tests.unit.shard_tiny", script], **sharded)
        history = [entry for entry in history if entry["step"] > 0]
        logs[processes] = [e[key] for e in history for key in ("loss", "eval_loss") if key in e]
        adapters[processes] = load_file(config.adapter_dir / merging.ADAPTER_WEIGHTS)
    assert logs[2] == pytest.approx(logs[1], abs=1e-4)
    assert logs[1][-1] < logs[1][0] - 1
    shapes = [{name: t.shape for name, t in adapter.items()} for adapter in adapters.values()]
    assert shapes[0] == shapes[1]


def test_the_processes_of_a_run_share_its_checkpoints(tmp_path, tiny_model_dir, tokenizer):
    folders = [
        checkpoints.folder_of(
            tiny_config(tmp_path, tiny_model_dir, device_map={"": place}), tokenizer
        )
        for place in (0, 1, "cuda:1", "cpu")
    ]
    assert folders[0] == folders[1] == folders[2] != folders[3]


def test_a_checkpoint_has_its_folder_before_anything_is_written(tmp_path):
    arguments, control = SimpleNamespace(output_dir=str(tmp_path)), TrainerControl(should_save=True)
    step = TrainerState(global_step=7)
    checkpoints.SafeCheckpoints().on_step_end(arguments, step, control, model=torch.nn.Linear(2, 2))
    assert (tmp_path / "checkpoint-7").is_dir()


def test_shards_without_room_are_refused_before_the_weights_load(tmp_path, monkeypatch, capsys):
    llama2_config("70B").save_pretrained(tmp_path)
    monkeypatch.setattr(measure, "torch_bytes", lambda device: 24 * predict.GIB)
    for name, value in {**fsdp_environment(), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    settings = {"model_name": str(tmp_path), "per_device_train_batch_size": 2}
    large = machine.for_this_process(Config.from_profile("llama2_7b", **settings))
    assert not large.fast_path
    with pytest.raises(ConfigError, match="in shards, each of 2 GPUs needs .* of 23.0: lower LORA"):
        planning.refuse_without_room(large)
    planning.refuse_without_room(dataclasses.replace(large, lora_r=16))
    assert "planned in shards: each of 2 GPUs" in capsys.readouterr().out


TWO_GPUS = json.loads((PROJECT_DIR / "benchmarks/results/two_gpus.json").read_text("utf-8"))


PLANNED = [row for row in TWO_GPUS["table"] if row["planned GiB"] and row["measured GiB"]]


@pytest.mark.parametrize("row", PLANNED, ids=lambda row: row["run"])
def test_what_was_planned_for_a_gpu_was_measured(row):
    assert row["measured GiB"] == pytest.approx(row["planned GiB"], rel=0.12)


def test_two_gpus_learnt_what_one_learnt():
    after = {row["run"]: row["validation loss after"] for row in TWO_GPUS["table"]}
    assert after["7B ddp"] == pytest.approx(after["7B one"], rel=0.01)
    assert after["7B fsdp"] == pytest.approx(after["7B one plain"], rel=0.01)


def test_several_gpus_in_sight_do_not_split_the_batch(tmp_path, tiny_model_dir, monkeypatch):
    monkeypatch.setattr(SFTConfig, "n_gpu", property(lambda arguments: 2))
    config = tiny_config(tmp_path, tiny_model_dir)
    arguments = SFTConfig(str(tmp_path), **machine.for_this_machine(config))
    assert machine.on_one_device(arguments, config)._n_gpu == 1


def test_under_fsdp_packed_bytes_pass_for_numbers(tmp_path, tiny_model_dir, monkeypatch):
    """accelerate shards on GPUs only, so what a process does there is checked here one by one."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("WORLD_SIZE", "1")
    config = tiny_config(tmp_path, tiny_model_dir, use_4bit=True)
    write_dataset(config, rows=8, held_out=2)
    names = run_cells(config, "trainer")
    layer = names["trainer"].model.get_base_model().model.layers[0].mlp.up_proj.base_layer
    assert layer.weight.dtype == layer.compute_dtype == torch.float32


def test_the_fsdp_file_wraps_the_layers_of_a_llama():
    settings = yaml.safe_load((PROJECT_DIR / "accelerate" / "fsdp_qlora.yaml").read_text("utf-8"))
    assert settings["distributed_type"] == "FSDP" and settings["num_processes"] == 2
    wrapped = settings["fsdp_config"]["fsdp_transformer_layer_cls_to_wrap"]
    assert hasattr(modeling_llama, wrapped)


def test_each_process_has_its_gpu(tmp_path, tiny_model_dir, monkeypatch):
    on_cpu = tiny_config(tmp_path, tiny_model_dir)
    on_gpu = tiny_config(tmp_path, tiny_model_dir, device_map={"": 0})
    assert machine.for_this_process(on_gpu) is on_gpu
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert machine.for_this_process(on_gpu).device == "cuda:1"
    assert machine.for_this_process(on_cpu).device == "cpu"
    with pytest.raises(ConfigError, match="FIT_TO_MEMORY is True.*in one process only"):
        machine.for_this_process(tiny_config(tmp_path, tiny_model_dir, fit_to_memory=True))
