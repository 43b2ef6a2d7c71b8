"""What a training's arguments owe to the machine and not to the lesson."""

import importlib.util
import os
from pathlib import Path

import torch
from trl import SFTConfig

from helpers.config import Config, ConfigError
from helpers.model import precision

# transformers 5.15, which Colab has, knows it by its old name.
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in SFTConfig.__dataclass_fields__
)
# A recorded pass cannot look at random states, so a checkpoint must not save them: no dropout.
RECORDED = {"use_reentrant": False, "preserve_rng_state": False, "determinism_check": "none"}
# Of SFTConfig's arguments, those of a step that are planned to a card.
STEPS = ("per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "optim")
# Where these keep their files, they read from the environment alone.
TRACKERS = {"tensorboard": "TENSORBOARD_LOGGING_DIR", "trackio": "TRACKIO_DIR"}


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


def steps_of(config: Config) -> dict:
    """What of a trainer's arguments a rung of FIT_TO_MEMORY changes, as notebook 04 gives it."""
    packed = config.per_device_train_batch_size if config.packing else 1
    rows, length = config.per_device_train_batch_size // packed, config.max_length * packed
    return {
        **dict(zip(STEPS, (rows, config.grad_acc_steps, length, config.optim), strict=True)),
        "per_device_eval_batch_size": 1 if config.packing else config.per_device_eval_batch_size,
        CHECKPOINTING: config.activation_checkpointing,
        "gradient_checkpointing": config.activation_checkpointing,  # trl asks by the old name
    }


def on_one_device(arguments: SFTConfig, config: Config) -> SFTConfig:
    """The model is on one GPU, however many there are; transformers takes the first, whichever."""
    arguments._n_gpu = min(arguments.n_gpu, 1)
    if arguments.device.type == "cuda":
        arguments._setup_devices = torch.device(config.device)
        arguments.distributed_state.device = arguments.device
        torch.cuda.set_device(arguments.device)
    return arguments


def prepare_tracker(config: Config, folder: Path) -> None:
    """Tell the tracker of `report_to`, if any, to keep its files in run_dir, by a run's name.

    Raises ConfigError when it is not installed.
    """
    if config.report_to not in TRACKERS:
        return
    if importlib.util.find_spec(config.report_to) is None:
        raise ConfigError(
            f"REPORT_TO is {config.report_to!r}, and that package is not installed: run `pip "
            f'install {config.report_to}`, or set REPORT_TO = "none"'
        )
    place = config.run_dir / config.report_to / folder.name
    os.environ[TRACKERS[config.report_to]] = str(place)
