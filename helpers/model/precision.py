"""Which number format a run computes in, by the hardware where the Config leaves it open.

On a CPU without AMX a product in bfloat16 takes up to seven times as long as in float32.
"""

from collections.abc import Iterable

import torch

from helpers.config import Config


def compute_dtype(config: Config) -> torch.dtype:
    """The format of hidden states and products; "auto" takes the fastest one that can train here.

    bfloat16 on a GPU that has it and on a CPU with AMX (Intel's tile instructions).
    """
    if config.bnb_4bit_compute_dtype != "auto":
        return getattr(torch, config.bnb_4bit_compute_dtype)
    if config.device == "cpu":
        return torch.bfloat16 if torch.cpu._is_amx_tile_supported() else torch.float32
    return torch.bfloat16 if has_bfloat16(config.device) else torch.float16


def has_bfloat16(device: str) -> bool:
    """Whether there is a GPU that computes in bfloat16, from Ampere on: a T4 only emulates it."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (8, 0)


def storage_dtype(config: Config) -> torch.dtype:
    """The 16-bit format that merged weights are rounded to and saved in."""
    computed = compute_dtype(config)
    return torch.bfloat16 if computed == torch.float32 else computed


def autocast(config: Config) -> dict[str, bool]:
    """The trainer's two switches, `fp16` and `bf16`: which format it casts products to, if any."""
    if config.bnb_4bit_compute_dtype != "auto":
        return {"fp16": config.fp16, "bf16": config.bf16}
    computed = compute_dtype(config)
    return {"fp16": computed == torch.float16, "bf16": computed == torch.bfloat16}


def adapter_dtype(config: Config) -> torch.dtype:
    """The format that the adapter is trained in: float32 where products are in float32 or fp16.

    trl casts the adapter of a 4-bit model to bfloat16, which cards before Ampere do not have.
    """
    wide = autocast(config)["fp16"] or compute_dtype(config) == torch.float32
    return torch.float32 if wide else torch.bfloat16


def cast(parameters: Iterable[torch.nn.Parameter], dtype: torch.dtype) -> None:
    """Put parameters into another format, in place; packed weights are bytes, and buffers stay."""
    for parameter in parameters:
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
