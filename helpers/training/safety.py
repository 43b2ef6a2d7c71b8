"""What makes a training safe to stop, to lose and to start on any card."""

import contextlib
import dataclasses
import functools
from pathlib import Path

import torch
from datasets import DatasetDict
from peft.tuners.lora import LoraLayer
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback, set_seed

from helpers.config import Config
from helpers.data import curation_note, dataset_folder
from helpers.model import measure, plan, precision, predict
from helpers.model.steps import Run
from helpers.runs import folders
from helpers.training import callbacks, checkpoints, machine
from helpers.training.fast.answer_head import answers_scored_alone
from helpers.training.fast.kernels import adapters_in_place, fused_kernels, swapped
from helpers.view import live_chart


def safety(config: Config, dataset: DatasetDict) -> list[TrainerCallback]:
    """The callbacks with which a run can be stopped, killed and gone on with, and says how it goes.

    For a Config that was planned, and rows of `training_rows`.
    """
    return [
        Settings(config, dataset),
        callbacks.LogLines(),
        checkpoints.SafeCheckpoints(),
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
        self.folder, lora = Path(args.output_dir), model.peft_config["default"]
        adapted = {n.split(".")[-1] for n, m in model.named_modules() if isinstance(m, LoraLayer)}
        if others := adapted - {*lora.target_modules}:  # of an earlier cell: it would train too
            raise ValueError(
                f"the model carries another adapter already, on {', '.join(sorted(others))}: run "
                "the cell that loads the model again, then this one"
            )
        args.output_dir = str(checkpoints.folder_of_calls(self.folder, args, lora))
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


def part_of(trainer, kind: type[TrainerCallback]):
    """The one callback of a kind that a trainer has."""
    return next(item for item in trainer.callback_handler.callbacks if isinstance(item, kind))


class OutOfMemory(RuntimeError):
    """The GPU is too small for a step; the message names what to change first."""


def safely(train):
    """Go on from the last complete checkpoint, end at a step's edge, give advice where memory ends.

    `train(trainer, checkpoint)` gets None or that checkpoint. What it becomes takes a trainer and
    returns it with its metrics, or another one that had to begin anew: after steps that no
    checkpoint holds, or with FIT_TO_MEMORY, without which OutOfMemory says what to change.
    """

    @functools.wraps(train)
    def wrapper(trainer):
        live_chart.show(trainer)
        if trainer.state.global_step and not checkpoints.latest(Path(trainer.args.output_dir)):
            trainer = made_anew(trainer, {})
        while True:
            try:
                return trainer, once(train, trainer)
            except torch.OutOfMemoryError as error:
                config = part_of(trainer, Settings).config
                changes = next_rung(config)
                says = f"the GPU's memory is full: {advice(config, changes, trainer.model.config)}"
                if not (config.fit_to_memory and changes):
                    raise OutOfMemory(says) from error
            # Out here the error is gone, and with it the tensors of the step that it interrupted.
            print(f"{says}\nstarting again with that", flush=True)
            trainer = made_anew(trainer, changes)

    return wrapper


def next_rung(config: Config) -> dict:
    """The fields to change where a step does not fit: what costs least speed, and no row."""
    batch = config.per_device_train_batch_size
    step_rows = batch * config.grad_acc_steps
    if not config.activation_checkpointing:
        return {"activation_checkpointing": True}
    if config.kept_layers:
        return {"kept_layers": config.kept_layers // 2}
    if batch == 1:
        return {}
    smaller = plan.whole_batches(step_rows, most=batch - 1)[-1]
    return {
        "per_device_train_batch_size": smaller,
        "grad_acc_steps": step_rows // smaller,
        "per_device_eval_batch_size": min(smaller, config.per_device_eval_batch_size),
    }


def advice(config: Config, changes: dict, shape) -> str:
    """What to do where a step does not fit, and how much memory that saves."""
    if not changes:
        return "lower MAX_LENGTH or LORA_R, or choose a smaller model or a larger card"
    runs = (Run.from_config(each) for each in (config, dataclasses.replace(config, **changes)))
    before, after = (predict.estimate(shape, run).total / predict.GIB for run in runs)
    named = ", ".join(f"{name.upper()} = {value}" for name, value in changes.items())
    return f"set {named}, which saves about {before - after:.1f} GiB"


def once(train, trainer) -> dict:
    """`train` with the settings that the trainer has; its metrics."""
    made_from = part_of(trainer, Settings)
    checkpoint = checkpoints.latest(Path(trainer.args.output_dir))
    trainer.args.eval_on_start = checkpoint is None
    trainer.optimizer = trainer.lr_scheduler = None  # peft may load a checkpoint as other tensors
    first = trainer.is_world_process_zero()  # it holds the run's folder for all
    with (
        folders.writing_in(made_from.config.run_dir) if first else contextlib.nullcontext(),
        kernels(trainer),
        part_of(trainer, checkpoints.SafeCheckpoints).listens(),
    ):
        measure.reset_peak_memory(trainer.model.device)
        if checkpoint is None:
            set_seed(trainer.args.seed)  # what the cells before have drawn makes no difference
            train(trainer, None)
        elif checkpoints.was_finished(trainer, checkpoint):
            made_from.restore_types(trainer.model)
        else:
            train(trainer, str(checkpoint))
    # Ready to answer: trl turns the cache off, and without it writing is three times slower.
    trainer.model.eval().config.use_cache = True
    return callbacks.metrics_of(trainer)


@contextlib.contextmanager
def kernels(trainer):
    """The context to train and evaluate in: fused kernels, as far as the device has them."""
    config, model = part_of(trainer, Settings).config, trainer.model
    with contextlib.ExitStack() as stack:
        if config.fast_path:
            stack.enter_context(fused_kernels(model))
        elif config.device == "cpu":
            stack.enter_context(answers_scored_alone(model.get_base_model()))
            if config.lora_dropout == 0:
                stack.enter_context(swapped(adapters_in_place(model)))
        yield


def made_anew(trainer, changes: dict):
    """A trainer of changed settings with a fresh adapter, on the same model.

    Where the changes leave the steps as they are it goes on from the checkpoints.
    """
    asked, tokenizer = part_of(trainer, Settings), trainer.processing_class
    config = dataclasses.replace(asked.config, **changes)
    lora, base = trainer.model.peft_config["default"], trainer.model.unload()
    # What the former's step held: a notebook may still have that trainer.
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.accelerator.free_memory()
    measure.free_memory()
    rows = config.per_device_train_batch_size if config.packing else 1  # in one long row
    arguments = dataclasses.replace(
        trainer.args,
        output_dir=str(asked.folder),
        per_device_train_batch_size=config.per_device_train_batch_size // rows,
        gradient_accumulation_steps=config.grad_acc_steps,
        max_length=config.max_length * rows,
        **machine.for_this_machine(config),
    )
    new = type(trainer)(
        model=base,
        args=machine.on_one_device(arguments, config),
        train_dataset=asked.dataset["train"],
        eval_dataset=asked.dataset["validation"],
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=safety(config, asked.dataset),
    )
    new.remove_callback(PrinterCallback)  # as the notebook does
    own = tuple(type(callback) for callback in new.callback_handler.callbacks)
    for callback in trainer.callback_handler.callbacks:
        if not isinstance(callback, own):  # added by a notebook, as the live chart is
            new.add_callback(callback)
    return new
