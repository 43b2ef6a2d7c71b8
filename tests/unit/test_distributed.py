"""DDP: two processes that share a step's rows do what one process does with all of them."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from transformers.models.llama import modeling_llama

from helpers import integrity, models, training
from helpers.config import PROJECT_DIR, ConfigError
from tests.faults.train_tiny import tiny_config, write_dataset

CONFIG_FILE = PROJECT_DIR / "accelerate" / "ddp_cpu.yaml"


def launch(config, *parameters, processes):
    place = [("MODEL_NAME", config.model_name), ("RUN_DIR", config.run_dir), *parameters]
    for name in ("use_4bit", "bf16", "bnb_4bit_compute_dtype", "lora_r", "learning_rate"):
        place.append((name.upper(), getattr(config, name)))
    place += [("LORA_DROPOUT", 0.0), ("GROUP_BY_LENGTH", False), ("MAX_STEPS", 4)]
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["accelerate.commands.launch", "--config_file", str(CONFIG_FILE), "-m"]
    command += ["helpers", "train", "--profile", "smoke"]
    command += [str(word) for name, value in place for word in ("-p", name, value)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    log = json.loads((config.adapter_dir / integrity.TRAINING_LOG).read_text())
    return done.stdout, [entry["loss"] for entry in log["history"] if "loss" in entry]


@pytest.mark.slow
def test_two_processes_train_as_one_does_on_the_same_rows(tmp_path, tiny_model_dir):
    losses, lines = {}, {}
    for processes, rows in ((1, 4), (2, 2)):
        config = tiny_config(tmp_path / str(processes), tiny_model_dir)
        write_dataset(config, rows=20, held_out=4)
        given = ("PER_DEVICE_TRAIN_BATCH_SIZE", rows)
        lines[processes], losses[processes] = launch(config, given, processes=processes)
        integrity.check_seal(config.adapter_dir, "04")
        metrics = json.loads((config.metrics_dir / "04.json").read_text())
        assert metrics["eval_loss_after"] < metrics["eval_loss_before"]
        assert not config.checkpoints_dir.exists()
    assert losses[2] == pytest.approx(losses[1], abs=1e-4)
    assert losses[1][-1] < losses[1][0] - 0.1
    for text in lines.values():  # the first process alone prints the log
        assert text.count("step    4/4   loss") == 1


def test_under_fsdp_packed_bytes_pass_for_numbers(tmp_path, tiny_model_dir, monkeypatch):
    """accelerate shards on GPUs only, so what a process does there is checked here one by one."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    config = tiny_config(tmp_path, tiny_model_dir, use_4bit=True)
    write_dataset(config, rows=8, held_out=2)
    model, dataset = models.load_model(config), training.load_dataset(config)
    layer = model.model.layers[0].mlp.up_proj
    assert layer.weight.dtype == layer.compute_dtype == torch.float32
    trainer = training.build_trainer(
        config, model, models.load_tokenizer(config.model_name), dataset
    )
    assert trainer.args.eval_on_start and training.loss_before(trainer) is None


def test_the_fsdp_file_wraps_the_layers_of_a_llama():
    settings = yaml.safe_load((PROJECT_DIR / "accelerate" / "fsdp_qlora.yaml").read_text())
    assert settings["distributed_type"] == "FSDP" and settings["num_processes"] == 2
    wrapped = settings["fsdp_config"]["fsdp_transformer_layer_cls_to_wrap"]
    assert hasattr(modeling_llama, wrapped)


def test_each_process_has_its_gpu(tmp_path, tiny_model_dir, monkeypatch):
    on_cpu = tiny_config(tmp_path, tiny_model_dir)
    on_gpu = tiny_config(tmp_path, tiny_model_dir, device_map={"": 0})
    assert training.for_this_process(on_gpu) is on_gpu
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert training.for_this_process(on_gpu).device == "cuda:1"
    assert training.for_this_process(on_cpu).device == "cpu"
    with pytest.raises(ConfigError, match="FIT_TO_MEMORY is True.*in one process only"):
        training.for_this_process(tiny_config(tmp_path, tiny_model_dir, fit_to_memory=True))
