"""A ladder for a step that does not fit the GPU: on each rung it needs less memory.

Fewer rows go at a time and more batches make a step, so that the step's rows stay the same. The
last rung is a shorter length, which costs rows.
"""

import contextlib
import dataclasses
import itertools
import statistics

import torch
from datasets import DatasetDict

from helpers.config import Config
from helpers.model import plan, predict
from helpers.model.steps import Run
from helpers.training.planning import in_words
from helpers.training.training_rows import count_longer, row_lengths


class OutOfMemory(RuntimeError):
    """The GPU is too small for a step; `changes` are the next rung's, none when none is left."""

    def __init__(self, message: str, changes: dict):
        super().__init__(message)
        self.changes = changes


@contextlib.contextmanager
def out_of_memory_advice(trainer, made_from):
    """Turn torch's error into the next rung of the ladder, with the memory that it saves.

    `made_from` is the trainer's `Settings`: see safety.py.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        config, dataset, tokenizer = made_from.config, made_from.dataset, trainer.processing_class
        changes = next_rung(config, tokenizer, dataset)
        if not changes:
            raise OutOfMemory(
                "the GPU's memory is full, and no shorter MAX_LENGTH keeps half of the rows: lower "
                "LORA_R, or choose a smaller model or a larger card",
                changes,
            ) from error
        lost = ""
        if "max_length" in changes:
            lengths = row_lengths(tokenizer, dataset)
            lost = f"leaves out {count_longer(lengths, changes['max_length'])} and "
        before, after = (
            predict.estimate(trainer.model.config, Run.from_config(each)).total / predict.GIB
            for each in (config, dataclasses.replace(config, **changes))
        )
        raise OutOfMemory(
            f"the GPU's memory is full: set {in_words(changes)}, which {lost}saves about "
            f"{before - after:.1f} GiB; training goes on from the last checkpoint of the new "
            "settings",
            changes,
        ) from error


def next_rung(config: Config, tokenizer, dataset: DatasetDict) -> dict:
    """What to change first: what costs least speed. Fields and values; {} when nothing is left."""
    batch = config.per_device_train_batch_size
    step_rows = batch * config.grad_acc_steps
    if not config.activation_checkpointing:
        return {"activation_checkpointing": True}
    if config.kept_layers:
        return {"kept_layers": config.kept_layers // 2}
    if batch > 1:
        smaller = plan.whole_batches(step_rows, most=batch - 1)[-1]
        evaluated = max(1, config.per_device_eval_batch_size * smaller // batch)
        return {
            "per_device_train_batch_size": smaller,
            "grad_acc_steps": step_rows // smaller,
            "per_device_eval_batch_size": evaluated,
        }
    return shorter_rows(config, row_lengths(tokenizer, dataset))


def shorter_rows(config: Config, lengths: dict[str, list[int]]) -> dict:
    """Half the length of the longest row, or more where half of the rows of a split need more.

    Nothing when that is no shorter, so that a ladder never loses most rows.
    """
    longest = min(config.max_length, max(itertools.chain(*lengths.values())))
    half = max(longest // 2, *map(statistics.median_low, lengths.values()))
    return {"max_length": half} if half < longest else {}
