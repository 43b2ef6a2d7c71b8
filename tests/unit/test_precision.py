"""Which number format is chosen, machine by machine, and what follows from it."""

import pytest
import torch

from helpers.config import Config, ConfigError
from helpers.model import precision

CPU, GPU = {"": "cpu"}, {"": 0}


@pytest.mark.parametrize(
    "device, has_it, computed, fp16, bf16, adapter, stored",
    [
        (CPU, True, "bfloat16", False, True, "bfloat16", "bfloat16"),
        (CPU, False, "float32", False, False, "float32", "bfloat16"),
        (GPU, True, "bfloat16", False, True, "bfloat16", "bfloat16"),
        (GPU, False, "float16", True, False, "float32", "float16"),  # a T4
    ],
)
def test_auto_follows_the_hardware(
    monkeypatch, device, has_it, computed, fp16, bf16, adapter, stored
):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_it)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    capability = (8, 0) if has_it else (7, 5)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    config = Config.from_profile("demo", device_map=device)
    assert precision.compute_dtype(config) == getattr(torch, computed)
    assert precision.autocast(config) == {"fp16": fp16, "bf16": bf16}
    assert precision.adapter_dtype(config) == getattr(torch, adapter)
    assert precision.storage_dtype(config) == getattr(torch, stored)


def test_a_named_format_stands():
    config = Config.from_profile("demo", bnb_4bit_compute_dtype="bfloat16", bf16=True)
    assert precision.compute_dtype(config) == torch.bfloat16
    assert precision.autocast(config) == {"fp16": False, "bf16": True}
    article = Config.from_profile("article")
    assert precision.compute_dtype(article) == torch.float16
    assert precision.autocast(article) == {"fp16": False, "bf16": False}


def test_auto_and_a_switch_contradict_each_other():
    with pytest.raises(
        ConfigError, match="BNB_4BIT_COMPUTE_DTYPE 'auto' decides over FP16 and BF16"
    ):
        Config.from_profile("demo", bf16=True)


def test_a_cast_leaves_buffers_alone():
    layer = torch.nn.BatchNorm1d(3)
    precision.cast(layer.parameters(), torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16 and layer.running_mean.dtype == torch.float32
