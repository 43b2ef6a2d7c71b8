"""What makes a training safe to stop, to lose and to start on any card."""

import contextlib
import copy
import dataclasses
import functools
from pathlib import Path

import torch
from datasets import DatasetDict
from peft.tuners.lora import LoraLayer
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback, set_seed

from helpers.config import Config
from helpers.data import curation_note, dataset_folder
from helpers.model import measure, precision
from helpers.training import callbacks, checkpoints, planning, several_processes
from helpers.training.fast.answer_head import answers_scored_alone
from helpers.training.fast.kernels import fused_kernels, in_place_adapters
from helpers.training.machine import steps_of
from helpers.training.smaller_steps import OutOfMemory, out_of_memory_advice
from helpers.training.training_rows import rows_that_fit
from helpers.view import live_chart


def safety(config: Config, dataset: DatasetDict) -> list[TrainerCallback]:
    """The callbacks with which a run can be stopped, killed and gone on with, and says how it goes.

    `config` as it was planned, `dataset` with prompts and completions.
    """
    return [
        Settings(config, dataset),
        callbacks.LogLines(),
        callbacks.StopOnDivergence(),
        checkpoints.SameOrder(),
        checkpoints.SealCheckpoints(),
        checkpoints.StopAtStepEdge(),
        EarlyStoppingCallback(early_stopping_patience=config.early_stopping_patience),
        callbacks.StepLog(),  # the last, which knows of everything that the others ask for
    ]


class Settings(TrainerCallback):
    """What a trainer was made from, and its adapter in the type that the machine trains.

    trl makes the adapter of a 4-bit model bfloat16, peft every one that it loads float32.
    """

    def __init__(self, config: Config, dataset: DatasetDict):
        self.config, self.dataset = config, dataset
        self.dataset_fingerprint = dataset_folder.dataset_fingerprint(config)
        self.curation = curation_note.curation_of(config, config.dataset_dir)

    def on_init_end(self, args, state, control, model=None, **kwargs):
        lora = model.peft_config["default"]
        check_adapters(model, lora)
        checkpoints.keep_apart(args, checkpoints.changed_in_cells(args, lora, self.config))
        if precision.adapter_dtype(self.config) == torch.float32:
            precision.cast((each for _, each in trained(model)), torch.float32)
        self.types = {name: parameter.dtype for name, parameter in trained(model)}

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if not torch.distributed.is_initialized():  # DDP has made room for what was loaded
            self.restore_types(model, optimizer)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.restore_types(model)

    def restore_types(self, model, optimizer=None) -> None:
        """Give each trained weight the type that it had, and its moments with it."""
        for name, parameter in trained(model):
            dtype = self.types.get(name, parameter.dtype)
            if parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)
                moments = optimizer.state.get(parameter, {}) if optimizer else {}
                for each in moments.keys() & {"exp_avg", "exp_avg_sq"}:  # others choose theirs
                    moments[each] = moments[each].to(dtype)


def trained(model) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, each) for name, each in model.named_parameters() if each.requires_grad]


def check_adapters(model, lora) -> None:
    """ValueError where layers carry the adapter of an earlier cell, which would be trained too."""
    adapted = {n.split(".")[-1] for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    if others := adapted - {*lora.target_modules}:
        raise ValueError(
            f"the model carries another adapter already, on {', '.join(sorted(others))}: run the "
            "cell that loads the model again, then this one"
        )


def part_of(trainer, kind: type[TrainerCallback]):
    """The one callback of a kind that a trainer has."""
    return next(item for item in trainer.callback_handler.callbacks if isinstance(item, kind))


def settings_of(trainer) -> Config:
    """The Config with which a trainer was made, planned to the card."""
    return part_of(trainer, Settings).config


def safely(train):
    """Go on from the last complete checkpoint, end at a step's edge, give advice where memory ends.

    `train(trainer, checkpoint)` gets None or that checkpoint. What it becomes takes a trainer and
    returns it with its metrics. Another trainer is returned where one had to begin anew: after
    steps that no checkpoint holds, or with FIT_TO_MEMORY where a step does not fit. Without it
    OutOfMemory says what to change.
    """

    @functools.wraps(train)
    def wrapper(trainer):
        live_chart.show(trainer)
        folder = Path(trainer.args.output_dir)
        if trainer.state.global_step and not checkpoints.latest(folder):
            trainer = made_anew(trainer, {}, folder)
        while True:
            try:
                return trainer, once(train, trainer)
            except OutOfMemory as full:
                if not (settings_of(trainer).fit_to_memory and full.changes):
                    raise
                print(full, flush=True)
                changes = full.changes
            # Out here the error is gone, and with it the tensors of the step that it interrupted.
            print(f"starting again with {planning.in_words(changes)}", flush=True)
            # Where these change no step it goes on from the checkpoints, else it has its own.
            same_steps = not changes.keys() & {*checkpoints.NAMED_BY}
            folder = Path(trainer.args.output_dir) if same_steps else None
            trainer = made_anew(trainer, changes, folder)

    return wrapper


def once(train, trainer) -> dict:
    """`train` with the settings that the trainer has; its metrics."""
    folder, made_from = Path(trainer.args.output_dir), part_of(trainer, Settings)
    checkpoint = checkpoints.latest(folder)
    trainer.args.eval_on_start = checkpoint is None
    trainer.optimizer = trainer.lr_scheduler = None  # peft may load a checkpoint as other tensors
    with (
        several_processes.alone_there(made_from.config),
        kernels(trainer),
        out_of_memory_advice(trainer, made_from),
        part_of(trainer, checkpoints.StopAtStepEdge),
    ):
        measure.reset_peak_memory(trainer.model.device)
        if checkpoint is None:
            if trainer.is_world_process_zero():
                checkpoints.record_plan(folder, made_from.config)
            set_seed(trainer.args.seed)  # what the cells before have drawn makes no difference
            train(trainer, None)
        elif checkpoints.was_finished(trainer, checkpoint):
            made_from.restore_types(trainer.model)
        else:
            train(trainer, str(checkpoint))
    # Ready to answer: trl turns the cache off, and without it writing is three times slower.
    trainer.model.eval().config.use_cache = True
    return metrics_of(trainer)


def metrics_of(trainer) -> dict:
    """Losses in nats per token, before the first step and of the adapter that is kept; speed."""
    tokens, seconds = (
        sum(step[name] for step in callbacks.step_log(trainer)) for name in ("tokens", "seconds")
    )
    losses = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    best = trainer.state.best_model_checkpoint  # which was loaded, if there is one
    return {
        "eval_loss_before": losses[0],
        "eval_loss_after": losses[int(best.split("-")[-1]) if best else max(losses)],
        "train_tokens_per_second": tokens / seconds,
    }


@contextlib.contextmanager
def kernels(trainer):
    """The context to train and evaluate in: fused kernels, as far as the device has them."""
    config, model = settings_of(trainer), trainer.model
    with contextlib.ExitStack() as stack:
        if config.fast_path:
            stack.enter_context(fused_kernels(model))
        elif config.device == "cpu":
            stack.enter_context(answers_scored_alone(model.get_base_model()))
            if config.lora_dropout == 0:
                stack.enter_context(in_place_adapters(model))
        yield


def made_anew(trainer, changes: dict, folder: Path | None):
    """A trainer of changed settings with a fresh adapter, on the same model."""
    asked, tokenizer = part_of(trainer, Settings), trainer.processing_class
    config = dataclasses.replace(asked.config, **changes)
    lora, base = trainer.model.peft_config["default"], trainer.model.unload()
    # What the former's step held: a notebook may still have that trainer.
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.accelerator.free_memory()
    measure.free_memory()
    if folder is None:
        config, folder, _ = planning.prepare(config, tokenizer, asked.dataset)
    rows = rows_that_fit(config, tokenizer, asked.dataset)
    arguments = copy.copy(trainer.args)
    for name, value in {**steps_of(config), "output_dir": str(folder)}.items():
        setattr(arguments, name, value)
    new = type(trainer)(
        model=base,
        args=arguments,
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=safety(config, asked.dataset),  # all rows: no ladder loses them rung by rung
    )
    new.remove_callback(PrinterCallback)  # as the notebook does
    own = tuple(type(callback) for callback in new.callback_handler.callbacks)
    for callback in trainer.callback_handler.callbacks:
        if not isinstance(callback, own):  # added by a notebook, as the live chart is
            new.add_callback(callback)
    return new
