"""What a training owes to the machine and not to the lesson: arguments, its GPU, its processes.

`accelerate launch` starts several processes, each of which runs notebook 04's own cells, see
export.py; one is several too.
"""

import dataclasses
import os

import torch
from accelerate.utils import gather_object
from trl import SFTConfig

from helpers.config import Config, ConfigError
from helpers.model import loading, precision

# transformers 5.15, which Colab has, knows it by its old name.
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in SFTConfig.__dataclass_fields__
)
# A recorded pass cannot look at random states, so a checkpoint must not save them: no dropout.
RECORDED = {"use_reentrant": False, "preserve_rng_state": False, "determinism_check": "none"}


def for_this_machine(config: Config) -> dict:
    """Arguments of SFTConfig that follow from the device, for a Config that was planned."""
    fast = config.fast_path
    # The fast path computes in the model's own bfloat16.
    numbers = {"fp16": False, "bf16": False} if fast else precision.autocast(config)
    by_length = config.group_by_length and not config.packing
    return {
        "use_cpu": config.device == "cpu",
        **numbers,
        "per_device_eval_batch_size": 1 if config.packing else config.per_device_eval_batch_size,
        "train_sampling_strategy": "group_by_length" if by_length else "random",
        CHECKPOINTING: config.activation_checkpointing,
        f"{CHECKPOINTING}_kwargs": RECORDED if fast else None,
        # Looking at each loss, or waiting for each batch to arrive, would leave a GPU idle.
        "logging_nan_inf_filter": False,
        "accelerator_config": {"non_blocking": True},
        "include_num_input_tokens_seen": "no" if fast else "non_padding",
        "restore_callback_states_from_checkpoint": True,
        "disable_tqdm": True,
        "report_to": config.report_to,
    }


def on_one_device(arguments: SFTConfig, config: Config) -> SFTConfig:
    """The model is on one GPU, however many there are; transformers takes the first, whichever."""
    arguments._n_gpu = min(arguments.n_gpu, 1)
    if arguments.device.type == "cuda":
        arguments._setup_devices = torch.device(config.device)
        arguments.distributed_state.device = arguments.device
        torch.cuda.set_device(arguments.device)
    return arguments


def for_this_process(config: Config) -> Config:
    """The Config with this process's GPU; in shards without the fast path, for whole weights."""
    rank = os.environ.get("LOCAL_RANK")
    if rank is None:
        return config
    if config.fit_to_memory:
        raise ConfigError("FIT_TO_MEMORY is True, and it works in one process only: set it False")
    if config.device == "cpu":
        return config
    fast = config.fast_path and not loading.is_sharded()
    return dataclasses.replace(config, device_map={"": int(rank)}, fast_path=fast)


def of_all_processes(value) -> list:
    """The value that each process asks with; all must ask, and all have the same answer."""
    return gather_object([value]) if torch.distributed.is_initialized() else [value]
