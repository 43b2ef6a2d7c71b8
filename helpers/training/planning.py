"""How a training takes its step on the memory that is there, decided before any weight is loaded.

The rows of a step stay what the Config says; all else of it `plan.for_card` may choose.
"""

import dataclasses
import os
from pathlib import Path

import psutil
from datasets import DatasetDict

from helpers.config import Config, ConfigError
from helpers.model import loading, measure, plan, predict
from helpers.model.check_model import why_not_fast
from helpers.model.steps import Run
from helpers.training import checkpoints, machine, several_processes
from helpers.training.training_rows import row_lengths


def prepare(
    config: Config, tokenizer, dataset: DatasetDict
) -> tuple[Config, Path, predict.Estimate]:
    """(the Config as it is `planned`, the folder of its checkpoints, the memory of a step).

    Before any weights load: what the process has is counted. Raises what `planned` raises.
    """
    folder = checkpoints.folder_of(config, tokenizer)
    machine.prepare_tracker(config, folder)
    config = planned(config, folder)
    longest = None if config.packing else max(row_lengths(tokenizer, dataset)["train"])
    shape, step = loading.load_shape(config.model_name), step_of(config, longest)
    there = measure.current_memory_bytes(config.device)
    return config, folder, predict.estimate(shape, step, there)


def planned(config: Config, folder: Path | None = None) -> Config:
    """The Config with the fastest way to take its step that its GPU has room for, which is printed.

    Its TARGET_MODULES have the model's own names. A Config that is off the fast path or names
    KEPT_LAYERS stays as it is otherwise. A run that has checkpoints in `folder` goes on as it
    began, or, in less memory, with the same rows at a time and the same optimizer.
    Raises ConfigError when nothing fits.
    """
    several_processes.join(config)
    config = loading.for_model(several_processes.for_this_process(config))
    begun = checkpoints.recorded_plan(folder) if folder else {}
    same_steps = {name: begun[name] for name in begun.keys() & {*checkpoints.NAMED_BY}}
    config = dataclasses.replace(config, **same_steps)
    if loading.is_sharded() and config.device != "cpu":
        refuse_without_room(config)
    if not config.fast_path:
        return config
    if reason := why_not_fast(config):
        print(f"trained without the fast path, {reason}")
        return dataclasses.replace(config, fast_path=False)
    if config.kept_layers is not None:
        return config
    return _fastest(config, loading.load_shape(config.model_name), begun, folder)


def _fastest(config: Config, shape, begun: dict, folder: Path | None) -> Config:
    """The Config as its run began, or with the plan for the room that there is now."""
    room, host_room = rooms(config, shape)
    as_begun = dataclasses.replace(config, **begun)
    if begun and plan.fits(shape, Run.from_config(as_begun), room, host_room):
        print(f"planned as when this run began: {in_words(begun)}")
        return as_begun
    step, gib = Run.from_config(config), f"{room / predict.GIB:.1f} GiB"
    found = plan.for_card(shape, step, room, 0, host_room, same_step=bool(begun))
    if begun and not found.fits:
        steps = {name: value for name, value in begun.items() if name in checkpoints.NAMED_BY}
        raise ConfigError(
            f"the run in {folder} began with {in_words(steps)}, and in {gib} it cannot go on so: "
            "free the memory that it had, or remove that folder and training begins again"
        )
    if not found.fits:
        raise ConfigError(
            f"{config.model_name} does not train on the fast path in {gib} "
            f"with rows of {config.max_length} tokens: {found.advice}"
        )
    if begun:
        print(f"{gib} do not hold this run as it began, with {in_words(begun)}")
    print(f"planned for {gib}: {found.advice}")
    return follow(config, found.run)


def rooms(config: Config, shape) -> tuple[int, int]:
    """Bytes that a plan may take: of the smallest GPU, and half of the host's free memory."""
    room = several_processes.least_of_all(measure.torch_bytes(config.device), config.device)
    if "LOCAL_RANK" in os.environ:  # DDP keeps gradients a second time
        room -= predict.estimate(shape, Run.from_config(config)).gradients
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free = psutil.virtual_memory().available // 2 // sharing
    return room, several_processes.least_of_all(free, config.device)


def follow(config: Config, run: Run) -> Config:
    """The Config that takes its step in the way of a plan's run."""
    planned = {field: getattr(run, name) for field, name in checkpoints.PLANNED.items()}
    return dataclasses.replace(config, **planned)


def step_of(config: Config, length: int | None = None) -> Run:
    """What a step does, for `predict.estimate`; under FSDP on a share of the model."""
    shards = int(os.environ["WORLD_SIZE"]) if loading.is_sharded() else 1
    return dataclasses.replace(Run.from_config(config, length), shards=shards)


def refuse_without_room(config: Config) -> None:
    """Say what a share of the model and a step take of each GPU; ConfigError when it is too much.

    A GiB is kept free for the allocator's gaps.
    """
    step, room = step_of(config), measure.torch_bytes(config.device) - predict.GIB
    needed = predict.estimate(loading.load_shape(config.model_name), step).total
    says = f"each of {step.shards} GPUs needs {needed / predict.GIB:.1f} GiB"
    says += f" of {room / predict.GIB:.1f}"
    if needed > room:
        raise ConfigError(
            f"{config.model_name} does not train in {step.shards} shards, {says}: lower LORA_R, "
            "PER_DEVICE_TRAIN_BATCH_SIZE or MAX_LENGTH, or start more processes, one a GPU"
        )
    print(f"planned for {step.shards} shards: {says}")


def in_words(changes: dict) -> str:
    """Changes of a Config as one would write them into a parameters cell."""
    return ", ".join(f"{name.upper()} = {value}" for name, value in changes.items())
