"""Train to the end: from the last checkpoint, and where a step does not fit, by the next rung."""

import contextlib
import dataclasses
from pathlib import Path

from transformers import set_seed

from helpers.model import measure
from helpers.training import checkpoints, several_processes
from helpers.training.building import wrap
from helpers.training.callbacks import step_log, tokens_per_second
from helpers.training.course_trainer import CourseTrainer
from helpers.training.decorators import memory_decorator, time_decorator
from helpers.training.fast.fast_path import FastTrainer
from helpers.training.fast.kernels import fused_kernels, in_place_adapters
from helpers.training.planning import in_words
from helpers.training.smaller_steps import OutOfMemory, out_of_memory_advice
from helpers.training.training_rows import rows_that_fit


def fine_tune(trainer: CourseTrainer) -> tuple[CourseTrainer, dict]:
    """Train, going on from the last complete checkpoint if there is one.

    Returns the trainer and its metrics: eval_loss_before, eval_loss_after (nats per token of the
    answers; before the first step, and of the adapter that is kept), train_tokens_per_second
    (padding not counted), and what the decorators add. The trainer that is returned is another one
    where training had to begin with a fresh adapter: after steps that no checkpoint holds, or with
    `fit_to_memory` where a step does not fit, which then makes way for the next rung. Without it,
    OutOfMemory names that rung.
    """
    folder = Path(trainer.args.output_dir)
    if trainer.state.global_step and not checkpoints.latest(folder):
        trainer = made_anew(trainer, {}, folder)
    while True:
        try:
            return train_once(trainer)
        except OutOfMemory as full:
            if not (trainer.settings.fit_to_memory and full.changes):
                raise
            print(full, flush=True)
            changes = full.changes
        # Out here the error is gone, and with it the tensors of the step that it interrupted.
        trainer = one_rung_down(trainer, changes)


@memory_decorator
@time_decorator
def train_once(trainer: CourseTrainer) -> tuple[CourseTrainer, dict]:
    """`fine_tune` with the settings that the trainer has."""
    folder = Path(trainer.args.output_dir)
    checkpoint = checkpoints.latest(folder)
    trainer.args.eval_on_start = checkpoint is None
    alone = several_processes.alone_there(trainer.settings)
    with alone, kernels(trainer), out_of_memory_advice(trainer), trainer.stop:
        if checkpoint and checkpoints.is_finished(checkpoint):
            checkpoints.restore_finished(trainer, checkpoint)
        elif checkpoint:
            trainer.train(resume_from_checkpoint=str(checkpoint))
        else:
            if trainer.is_world_process_zero():
                checkpoints.record_plan(folder, trainer.settings)
            set_seed(trainer.args.seed)  # what the cells before have drawn makes no difference
            trainer.train()
    # Ready to answer: trl turns the cache off, and without it writing is three times slower.
    trainer.model.eval().config.use_cache = True
    losses = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    best = trainer.state.best_model_checkpoint  # which was loaded, if there is one
    return trainer, {
        "eval_loss_before": losses[0],
        "eval_loss_after": losses[int(best.split("-")[-1]) if best else max(losses)],
        "train_tokens_per_second": tokens_per_second(step_log(trainer)),
    }


def kernels(trainer: CourseTrainer):
    """The context to train and evaluate in: fused kernels, as far as the device has them."""
    if isinstance(trainer, FastTrainer):
        return fused_kernels(trainer.model)
    if trainer.args.use_cpu and trainer.settings.lora_dropout == 0:
        return in_place_adapters(trainer.model)
    return contextlib.nullcontext()


def one_rung_down(trainer: CourseTrainer, changes: dict) -> CourseTrainer:
    """A trainer of the next rung's settings, on the same model with its adapter taken off.

    Where they change no step it goes on from the checkpoints of the former, else it has its own.
    """
    print(f"starting again with {in_words(changes)}", flush=True)
    same_steps = not changes.keys() & {*checkpoints.NAMED_BY}
    return made_anew(trainer, changes, Path(trainer.args.output_dir) if same_steps else None)


def made_anew(trainer: CourseTrainer, changes: dict, folder: Path | None) -> CourseTrainer:
    """A trainer of changed settings with a fresh adapter, on the same model."""
    config = dataclasses.replace(trainer.settings, **changes)
    base, tokenizer = trainer.model.unload(), trainer.processing_class
    # What the former's step held, before the new one asks for memory: a notebook may still have
    # the old one.
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.accelerator.free_memory()
    measure.free_memory()
    fitting = rows_that_fit(config, tokenizer, trainer.dataset)
    new = wrap(config, base, tokenizer, fitting, folder)
    new.dataset = trainer.dataset  # all rows, so that no ladder loses most of them rung by rung
    own = tuple(type(callback) for callback in new.callback_handler.callbacks)
    for callback in trainer.callback_handler.callbacks:
        if not isinstance(callback, own):  # added by a notebook, as the live chart is
            new.add_callback(callback)
    return new
