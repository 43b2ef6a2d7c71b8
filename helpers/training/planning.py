"""How a training takes its step on the memory that is there, decided before any weight is loaded.

The rows of a step stay what the Config says; all else of it `plan.for_card` may choose.
"""

import dataclasses
import datetime
import os
from pathlib import Path

import psutil
from datasets import DatasetDict

from accelerate import PartialState
from helpers.config import Config, ConfigError
from helpers.model import loading, measure, plan, predict
from helpers.model.check_model import why_not_fast
from helpers.model.steps import Run
from helpers.training import checkpoints
from helpers.training.machine import for_this_process, of_all_processes
from helpers.training.training_rows import row_lengths

# Where the trackers of REPORT_TO keep their files, they read from the environment alone.
TRACKERS = {"tensorboard": "TENSORBOARD_LOGGING_DIR", "trackio": "TRACKIO_DIR"}


def prepare(
    config: Config, tokenizer, dataset: DatasetDict
) -> tuple[Config, Path, predict.Estimate]:
    """(the Config as it is `planned`, the folder of its checkpoints, the memory of a step).

    Before any weights load: what the process has now is counted.
    """
    folder = checkpoints.folder_of(config, tokenizer)
    if config.report_to in TRACKERS:
        place = config.run_dir / config.report_to / folder.name
        os.environ[TRACKERS[config.report_to]] = str(place)
    config = planned(config)
    step = step_of(config, max(row_lengths(tokenizer, dataset)["train"]))
    there = measure.current_memory_bytes(config.device)
    return config, folder, predict.estimate(loading.load_shape(config.model_name), step, there)


def planned(config: Config) -> Config:
    """The Config with the fastest way to take its step that its GPU has room for, which is printed.

    Its TARGET_MODULES have the model's own names. A Config that is off the fast path or names
    KEPT_LAYERS stays as it is otherwise. Raises ConfigError when nothing fits.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # meet the others, as long as transformers waits
        PartialState(cpu=config.device == "cpu", timeout=datetime.timedelta(minutes=30))
    config = loading.for_model(for_this_process(config))
    if loading.is_sharded() and config.device != "cpu":
        refuse_without_room(config)
    if not config.fast_path:
        return config
    if reason := why_not_fast(config):
        print(f"trained without the fast path, {reason}")
        return dataclasses.replace(config, fast_path=False)
    return config if config.kept_layers is not None else _fastest(config)


def _fastest(config: Config) -> Config:
    shape = loading.load_shape(config.model_name)
    room, host_room = rooms(config, shape)
    found = plan.for_card(shape, Run.from_config(config), room, 0, host_room)
    gib = f"{room / predict.GIB:.1f} GiB"
    if not found.fits:
        raise ConfigError(
            f"{config.model_name} does not train on the fast path in {gib} "
            f"with rows of {config.max_length} tokens: {found.advice}"
        )
    print(f"planned for {gib}: {found.advice}")
    return follow(config, found.run)


def rooms(config: Config, shape) -> tuple[int, int]:
    """Bytes that a plan may take: of the smallest GPU, and half of the host's free memory."""
    room = min(of_all_processes(measure.torch_bytes(config.device)))
    if "LOCAL_RANK" in os.environ:  # DDP keeps gradients a second time
        room -= predict.estimate(shape, Run.from_config(config)).gradients
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return room, min(of_all_processes(psutil.virtual_memory().available // 2 // sharing))


def follow(config: Config, run: Run) -> Config:
    """The Config that takes its step in the way of a plan's run."""
    return dataclasses.replace(
        config,
        per_device_train_batch_size=run.batch,
        grad_acc_steps=run.accumulation,
        activation_checkpointing=run.checkpointing,
        kept_layers=run.kept_layers,
        activation_offloading=run.offload,
        optim=run.optimizer,
    )


def step_of(config: Config, length: int | None = None) -> Run:
    """What a step does, for `predict.estimate`; under FSDP on a share of the model."""
    shards = int(os.environ["WORLD_SIZE"]) if loading.is_sharded() else 1
    return dataclasses.replace(Run.from_config(config, length), shards=shards)


def refuse_without_room(config: Config) -> None:
    """Say what a share of the model and a step take of each GPU; ConfigError for too much."""
    step = step_of(config)
    room = measure.torch_bytes(config.device) - predict.GIB  # for the allocator's gaps
    needed = predict.estimate(loading.load_shape(config.model_name), step).total
    says = f"each of {step.shards} GPUs needs {needed / predict.GIB:.1f} GiB"
    says += f" of {room / predict.GIB:.1f}"
    if needed > room:
        raise ConfigError(
            f"{config.model_name} does not train in shards, {says}: lower LORA_R, "
            "PER_DEVICE_TRAIN_BATCH_SIZE or MAX_LENGTH, or start more processes, one a GPU"
        )
    print(f"planned in shards: {says}")
