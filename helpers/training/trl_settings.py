"""A Config in trl's and peft's terms: the settings of a training and of its adapter."""

import importlib.util
import os
from pathlib import Path

import torch
from peft import LoraConfig
from trl import SFTConfig

from helpers.config import Config, ConfigError
from helpers.model import precision
from helpers.training.fast import fast_path

# transformers 5.15, which Colab has, knows it by its old name.
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in SFTConfig.__dataclass_fields__
)
# Where these keep their files, they read from the environment alone.
TRACKERS = {"tensorboard": "TENSORBOARD_LOGGING_DIR", "trackio": "TRACKIO_DIR"}


def lora_config(config: Config) -> LoraConfig:
    """The adapter of a Config in peft's terms."""
    return LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(config.target_modules),
        bias="none",
        task_type="CAUSAL_LM",
    )


def uses_fast_path(config: Config) -> bool:
    """Whether a Config asks for the fast path and this machine has what it needs."""
    return config.fast_path and fast_path.is_supported(config.device)


def sft_config(config: Config, folder: Path | None = None) -> SFTConfig:
    """The training settings of a Config in trl's terms, with a folder for the checkpoints."""
    arguments = SFTConfig(
        output_dir=str(folder or config.checkpoints_dir),
        num_train_epochs=config.num_epochs,
        max_steps=config.max_steps,
        gradient_accumulation_steps=config.grad_acc_steps,
        optim=config.optim,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        lr_scheduler_type=config.scheduler_type,
        warmup_steps=config.warmup_ratio,  # a float below 1 is a share of all steps
        completion_only_loss=config.completion_only_loss,
        logging_steps=config.log_steps,
        eval_on_start=True,
        eval_strategy="steps",
        eval_steps=config.eval_steps,
        save_steps=config.save_steps,
        save_total_limit=2,
        restore_callback_states_from_checkpoint=True,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        seed=config.seed,
        disable_tqdm=True,
        report_to=config.report_to,
        **_batches(config),
        **_computation(config),
    )
    return _on_one_device(arguments, config)


def _batches(config: Config) -> dict:
    """How rows make a batch. A packed one is one row of batch size times `max_length` tokens."""
    rows, length = config.per_device_train_batch_size, config.max_length
    by_length = config.group_by_length and not config.packing
    return {
        "per_device_train_batch_size": 1 if config.packing else rows,
        "per_device_eval_batch_size": 1 if config.packing else config.per_device_eval_batch_size,
        "packing": config.packing,
        "max_length": rows * length if config.packing else length,
        "train_sampling_strategy": "group_by_length" if by_length else "random",
    }


def _computation(config: Config) -> dict:
    """On which device, in which numbers, and what a layer keeps for its backward pass."""
    fast = uses_fast_path(config)
    # The fast path computes in the model's own bfloat16.
    numbers = {"fp16": False, "bf16": False} if fast else precision.autocast(config)
    return {
        "use_cpu": config.device == "cpu",
        **numbers,
        CHECKPOINTING: config.activation_checkpointing,
        f"{CHECKPOINTING}_kwargs": fast_path.CHECKPOINT_OPTIONS if fast else None,
        # Looking at each loss, or waiting for each batch to arrive, would leave a GPU idle.
        "logging_nan_inf_filter": False,
        "accelerator_config": {"non_blocking": True},
        "include_num_input_tokens_seen": "no" if fast else "non_padding",
    }


def _on_one_device(arguments: SFTConfig, config: Config) -> SFTConfig:
    """The model is on one GPU, however many there are; transformers takes the first, whichever."""
    arguments._n_gpu = min(arguments.n_gpu, 1)
    if arguments.device.type == "cuda":
        arguments._setup_devices = torch.device(config.device)
        arguments.distributed_state.device = arguments.device
        torch.cuda.set_device(arguments.device)
    return arguments


def prepare_tracker(config: Config, name: str) -> None:
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
    os.environ[TRACKERS[config.report_to]] = str(config.run_dir / config.report_to / name)
