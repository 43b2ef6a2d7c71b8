"""The trainer: a 4-bit model in a fresh adapter, with its rows, settings and checkpoints."""

from pathlib import Path

import torch
from datasets import DatasetDict

from helpers.config import Config
from helpers.model import loading, precision
from helpers.training import checkpoints, planning
from helpers.training.course_trainer import CourseTrainer
from helpers.training.fast import answer_head
from helpers.training.fast.fast_path import FastTrainer
from helpers.training.trl_settings import lora_config, prepare_tracker, sft_config, uses_fast_path


def build_trainer(
    config: Config, model, tokenizer, dataset: DatasetDict, folder: Path | None = None
) -> CourseTrainer:
    """An SFTTrainer that wraps the 4-bit model in a fresh adapter and logs every step.

    `dataset` has rows that fit, as `training_rows.load_dataset` gives them with the tokenizer.
    `folder` is that of its checkpoints, for a Config that was planned already; else the Config
    names it. Raises ValueError for a model that carries an adapter already, and what `planned`
    raises.
    """
    return wrap(config, loading.without_adapter(model), tokenizer, dataset, folder)


def wrap(
    config: Config, model, tokenizer, dataset: DatasetDict, folder: Path | None
) -> CourseTrainer:
    """`build_trainer` for a model that surely has no adapter."""
    if folder is None:
        folder = checkpoints.folder_of(config, tokenizer)
        config = planning.planned(config, folder)
    prepare_tracker(config, folder.name)
    trainer = (FastTrainer if uses_fast_path(config) else CourseTrainer)(
        config,
        dataset,
        model=model,
        args=sft_config(config, folder),
        processing_class=tokenizer,
        peft_config=lora_config(config),
    )
    if precision.adapter_dtype(config) == torch.float32:  # trl has made it bfloat16
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        precision.cast(trained, torch.float32)
    if config.device == "cpu":
        answer_head.score_answers_alone(trainer.model.get_base_model())
    return trainer
