"""Supervised fine-tuning with QLoRA: a Config in trl's and peft's terms, measured, resumable.

The training loop is trl's SFTTrainer. The settings, the article's decorators and the step log are
here; the lesson that reads them is notebook 04.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import json
import math
import os
import shutil
import statistics
import time
import warnings
from pathlib import Path

import psutil
import torch
from datasets import DatasetDict, load_from_disk
from peft import LoraConfig
from torch.distributed.tensor import DTensor
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback, set_seed
from transformers.trainer_callback import ExportableState
from trl import SFTConfig, SFTTrainer

from helpers import prompts
from helpers.config import Config, ConfigError
from helpers.data import curation_note, dataset_folder
from helpers.model import loading, measure, plan, precision, predict
from helpers.model.steps import Run
from helpers.prompts import IGNORED_LABEL
from helpers.runs import folders, inventory
from helpers.training import checkpoints
from helpers.training.fast import answer_head, fast_path
from helpers.training.fast.kernels import fused_kernels, in_place_adapters

SPLITS = {"train": "training rows", "validation": "validation rows"}
SMALLEST_SHARE = 0.1  # of the training rows must fit MAX_LENGTH: fewer are not what was meant
EXPLOSION = 3.0  # nats above the first loss, twenty times less likely words: it will not return

# transformers 5.15, which Colab has, knows it by its old name.
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in SFTConfig.__dataclass_fields__
)


def time_decorator(function):
    """Add `exec_time_seconds` to the metrics of a function that returns (result, metrics)."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        start = time.perf_counter()
        result, metrics = function(*args, **kwargs)
        return result, {**metrics, "exec_time_seconds": time.perf_counter() - start}

    return wrapper


def memory_decorator(function):
    """Add `peak_memory_bytes` to the metrics of a function of a trainer: (result, metrics).

    On a GPU that is what torch had allocated at most, on a CPU the resident memory of the process.
    """

    @functools.wraps(function)
    def wrapper(trainer):
        device = trainer.model.device
        measure.reset_peak_memory(device)
        result, metrics = function(trainer)
        return result, {**metrics, "peak_memory_bytes": measure.peak_memory_bytes(device)}

    return wrapper


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
    """The training settings of a Config in trl's terms, with a folder for the checkpoints.

    A packed batch is one row of batch size times `max_length` tokens.
    """
    rows, eval_rows = config.per_device_train_batch_size, config.per_device_eval_batch_size
    fast = uses_fast_path(config)
    arguments = SFTConfig(
        output_dir=str(folder or config.checkpoints_dir),
        use_cpu=config.device == "cpu",
        # The fast path computes in the model's own bfloat16.
        **({"fp16": False, "bf16": False} if fast else precision.autocast(config)),
        num_train_epochs=config.num_epochs,
        max_steps=config.max_steps,
        per_device_train_batch_size=1 if config.packing else rows,
        per_device_eval_batch_size=1 if config.packing else eval_rows,
        gradient_accumulation_steps=config.grad_acc_steps,
        optim=config.optim,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        lr_scheduler_type=config.scheduler_type,
        warmup_steps=config.warmup_ratio,  # a float below 1 is a share of all steps
        train_sampling_strategy=(
            "group_by_length" if config.group_by_length and not config.packing else "random"
        ),
        **{CHECKPOINTING: config.activation_checkpointing},
        **{f"{CHECKPOINTING}_kwargs": fast_path.CHECKPOINT_OPTIONS if fast else None},
        packing=config.packing,
        max_length=rows * config.max_length if config.packing else config.max_length,
        # Looking at each loss, or waiting for each batch to arrive, would leave a GPU idle.
        logging_nan_inf_filter=False,
        accelerator_config={"non_blocking": True},
        completion_only_loss=config.completion_only_loss,
        logging_steps=config.log_steps,
        include_num_input_tokens_seen="no" if fast else "non_padding",
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
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # the model is on one, however many there are
    if arguments.device.type == "cuda":  # transformers takes the first one, whichever that is
        arguments._setup_devices = torch.device(config.device)
        arguments.distributed_state.device = arguments.device
        torch.cuda.set_device(arguments.device)
    return arguments


def prepare_tracker(config: Config, name: str) -> None:
    """Tell the tracker of `report_to`, if any, to keep its files in run_dir, by a run's name.

    Both read their folder from the environment alone. Raises ConfigError when it is not installed.
    """
    variables = {"tensorboard": "TENSORBOARD_LOGGING_DIR", "trackio": "TRACKIO_DIR"}
    if config.report_to not in variables:
        return
    if importlib.util.find_spec(config.report_to) is None:
        raise ConfigError(
            f"REPORT_TO is {config.report_to!r}, and that package is not installed: run `pip "
            f'install {config.report_to}`, or set REPORT_TO = "none"'
        )
    os.environ[variables[config.report_to]] = str(config.run_dir / config.report_to / name)


def planned(config: Config, folder: Path | None = None) -> Config:
    """The Config with the fastest way to take its step that its GPU has room for, which is printed.

    The rows of a step stay the same; how many go at a time, which layers keep or offload their
    activations and the optimizer are `plan.for_card`'s. A Config that is off the fast path or names
    KEPT_LAYERS stays as it is. A run that has checkpoints in `folder` goes on as it began, or, in
    less memory, with the same rows at a time and the same optimizer. A model that is no Llama
    leaves the fast path. Raises ConfigError when nothing fits: only the model's shape was loaded by
    then.
    """
    begun = checkpoints.recorded_plan(folder) if folder else {}
    same = {name: value for name, value in begun.items() if name in checkpoints.NAMED_BY}
    config = dataclasses.replace(config, **same)
    if not uses_fast_path(config):
        return config
    shape = loading.load_shape(config.model_name)
    if shape.model_type != "llama":
        say_once(f"trained without the fast path, which knows no {shape.model_type!r} model")
        return dataclasses.replace(config, fast_path=False)
    if config.kept_layers is not None:
        return config
    room, host_room = rooms(config, shape)
    as_begun = dataclasses.replace(config, **begun)
    if begun and plan.fits(shape, Run.from_config(as_begun), room, host_room):
        say_once(f"planned as when this run began: {in_words(begun)}")
        return as_begun
    step, gib = Run.from_config(config), f"{room / predict.GIB:.1f} GiB"
    found = plan.for_card(shape, step, room, 0, host_room, same_step=bool(begun))
    if begun and not found.fits:
        raise ConfigError(
            f"the run in {folder} began with {in_words(same)}, and in {gib} it cannot go on so: "
            "free the memory that it had, or remove that folder and training begins again"
        )
    if not found.fits:
        raise ConfigError(
            f"{config.model_name} does not train on the fast path in {gib} "
            f"with rows of {config.max_length} tokens: {found.advice}"
        )
    if begun:
        say_once(f"{gib} do not hold this run as it began, with {in_words(begun)}")
    say_once(f"planned for {gib}: {found.advice}")
    return follow(config, found.run)


def rooms(config: Config, shape) -> tuple[int, int]:
    """Bytes that a plan may take: of the smallest of several GPUs, and of the host's memory.

    Of what is free on the host that is half, a share for each process.
    """
    room = checkpoints.least_of_all(measure.torch_bytes(config.device), config.device)
    if "LOCAL_RANK" in os.environ:  # DDP keeps gradients a second time
        room -= predict.estimate(shape, Run.from_config(config)).gradients
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free = psutil.virtual_memory().available // 2 // processes
    return room, checkpoints.least_of_all(free, config.device)


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
    """Say what a share of the model and a step take of each GPU; ConfigError when it is too much.

    A GiB is kept free for the allocator's gaps, as `plan.for_card` does off the fast path.
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
    say_once(f"planned for {step.shards} shards: {says}")


def say_once(text: str) -> None:
    """Print in one process, if there are several."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def alone_there(config: Config):
    """Hold the run folder while `with` lasts; of several processes, the first one does it for all.

    Raises InUse, while somebody else trains or writes there: two would mix their checkpoints.
    """
    first = os.environ.get("RANK", "0") == "0"
    return folders.writing_in(config.run_dir) if first else contextlib.nullcontext()


def load_dataset(config: Config, tokenizer=None) -> DatasetDict:
    """The train and validation rows that notebook 02 wrote, with only the columns that train.

    With the tokenizer of a training: those rows that fit, see `rows_that_fit`.
    Raises ArtefactError for rows in another template, and for rows that were made with another
    tokenizer and fail with that of MODEL_NAME. Warns, ArtefactWarning, when none of these fails,
    and of another SYSTEM_MESSAGE.
    """
    dataset = load_from_disk(str(dataset_folder.check_dataset(config)))
    dataset = dataset.select_columns(["prompt", "completion"])
    curation_note.system_message(config, config.dataset_dir)
    note = curation_note.curation_of(config, config.dataset_dir)
    if note and note["template"] != prompts.TEMPLATE:
        raise inventory.ArtefactError(
            f"the rows are in the template {note['template']!r}, and the one here is "
            f"{prompts.TEMPLATE!r}: run notebook 02 again"
        )
    if note:
        own = loading.load_tokenizer(config.model_name)
        if not curation_note.tokenizer_note(own).items() <= note["tokenizer"].items():
            _check_rows(config, dataset, own, note["tokenizer"]["name"])
    return dataset if tokenizer is None else rows_that_fit(config, tokenizer, dataset)


def _check_rows(config: Config, dataset: DatasetDict, tokenizer, made_with: str) -> None:
    """ArtefactError for rows that fail with another tokenizer than they were made with."""
    rows = [row for split in dataset.values() for row in zip(*split[:].values(), strict=True)]
    failing = [
        problems or [f"{length} tokens, MAX_LENGTH is {config.max_length}"]
        for length, problems in prompts.verify_rows(tokenizer, rows)
        if problems or length > config.max_length
    ]
    other = f"the rows were made with the tokenizer of {made_with}, and with that of MODEL_NAME "
    other += f"({config.model_name})"
    if failing:
        raise inventory.ArtefactError(
            f"{other} {len(failing)} of {len(rows)} fail, the first for {failing[0][0]}: run "
            "notebook 02 again with this MODEL_NAME"
        )
    warnings.warn(
        f"{other} all {len(rows)} verify and fit as well",
        inventory.ArtefactWarning,
        stacklevel=3,
    )


def rows_that_fit(config: Config, tokenizer, dataset: DatasetDict) -> DatasetDict:
    """The rows of up to `max_length` tokens, BOS and EOS included; how many are not is printed.

    trl would cut a longer one, and a row without its end teaches a model not to stop. Raises
    ConfigError when less than a tenth of the training rows fits, or no validation row.
    """
    lengths = row_lengths(tokenizer, dataset)
    longest = max(itertools.chain(*lengths.values()))
    if longest <= config.max_length:
        return dataset
    fitting = {
        name: [place for place, length in enumerate(found) if length <= config.max_length]
        for name, found in lengths.items()
    }
    longer = f"{count_longer(lengths, config.max_length)} are longer"
    few = len(fitting["train"]) < SMALLEST_SHARE * len(lengths["train"])
    if few or not fitting["validation"]:
        raise ConfigError(
            f"MAX_LENGTH is {config.max_length}, and {longer}: raise it (the longest has {longest} "
            "tokens), or have shorter rows written by notebook 02"
        )
    say_once(f"MAX_LENGTH = {config.max_length}: {longer} and left out")
    return DatasetDict({name: rows.select(fitting[name]) for name, rows in dataset.items()})


def row_lengths(tokenizer, dataset: DatasetDict) -> dict[str, list[int]]:
    """The tokens of each row by split, as trl counts them before it cuts any."""
    lengths = {}
    for name, rows in dataset.items():
        if "input_ids" in rows.column_names:
            lengths[name] = [len(ids) for ids in rows["input_ids"]]
            continue
        pairs = zip(rows["prompt"], rows["completion"], strict=True)
        lengths[name] = [length for length, _ in prompts.verify_rows(tokenizer, pairs)]
    return lengths


def count_longer(lengths: dict[str, list[int]], max_length: int) -> str:
    """How many rows of these lengths are longer than that, in words."""
    return " and ".join(
        f"{sum(length > max_length for length in lengths[name])} of {len(lengths[name])} {words}"
        for name, words in SPLITS.items()
    )


def build_trainer(
    config: Config, model, tokenizer, dataset: DatasetDict, folder: Path | None = None
) -> SFTTrainer:
    """An SFTTrainer that wraps the 4-bit model in a fresh adapter and logs every step.

    `folder` is that of its checkpoints, for a Config that was planned already; else the Config
    names it. Only rows that fit `max_length` train. Raises ValueError for a model that carries an
    adapter already, and what `rows_that_fit` and `planned` raise.
    """
    fitting = rows_that_fit(config, tokenizer, dataset)
    folder = folder or checkpoints.folder_of(config, tokenizer)
    prepare_tracker(config, folder.name)
    config = planned(config, folder)
    fast = uses_fast_path(config)
    trainer = (fast_path.FastTrainer if fast else SFTTrainer)(
        model=loading.without_adapter(model),
        args=sft_config(config, folder),
        train_dataset=fitting["train"],
        eval_dataset=fitting["validation"],
        processing_class=tokenizer,
        peft_config=lora_config(config),
        callbacks=[
            LogLines(),
            StopOnDivergence(),
            checkpoints.SameOrder(),
            checkpoints.SealCheckpoints(),
            checkpoints.StopAtStepEdge(),
            checkpoints.LogEachCheckpoint(),  # also at one that a signal asked for
            EarlyStoppingCallback(early_stopping_patience=config.early_stopping_patience),
            StepLog(),  # the last, which knows of everything that the others ask for
        ],
    )
    if fast:
        packed = (trainer.train_dataset, trainer.eval_dataset)
        # trl takes none when it packs
        trainer.data_collator = fixed_collator(config, tokenizer, packed)
        trainer.kept_layers = config.kept_layers or 0
        trainer.offload = config.activation_offloading
        trainer.keep_weights = plan.weights_fit_in_place(model.config, Run.from_config(config))
    trainer.dataset_fingerprint = dataset_folder.dataset_fingerprint(config)
    trainer.curation = curation_note.curation_of(config, config.dataset_dir)
    trainer.made_from = (config, tokenizer, dataset)
    checkpoints.load_in_own_type(trainer.model)
    trainer.remove_callback(PrinterCallback)  # LogLines prints the same numbers, readable
    if precision.adapter_dtype(config) == torch.float32:  # trl has made it bfloat16
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        precision.cast(trained, torch.float32)
    if config.device == "cpu":
        answer_head.score_answers_alone(trainer.model.get_base_model())
    return trainer


def fixed_collator(config: Config, tokenizer, packed) -> fast_path.FixedCollator:
    """One whose batches have room for any packed row of these datasets."""
    return fast_path.FixedCollator(
        tokenizer.pad_token_id,
        padding_free=True,
        tokens=config.per_device_train_batch_size * config.max_length,
        longest=config.max_length,
        rows=max(len(lengths) for dataset in packed for lengths in dataset["seq_lengths"]),
    )


def examples_of(batch: dict) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The ids of each example in a batch that are shown to the model, and those that are graded.

    The examples are padded on the right, or with PACKING laid end to end.
    """
    ids, labels = batch["input_ids"], batch["labels"]
    if "position_ids" not in batch:
        places = [(row, slice(n)) for row, n in enumerate(batch["attention_mask"].sum(dim=1))]
    else:
        used = batch.get("used_tokens", ids.shape[1])  # on the fast path a filling follows
        starts = (batch["position_ids"][0, :used] == 0).nonzero().flatten().tolist()
        places = [(0, slice(*ends)) for ends in itertools.pairwise([*starts, used])]
    return [(ids[at], labels[at][labels[at] != IGNORED_LABEL]) for at in places]


class OutOfMemory(RuntimeError):
    """The GPU is too small for a step. The message names the next thing to change.

    `changes` are the fields and values of the next rung, none when there is no rung left.
    """

    def __init__(self, message: str, changes: dict):
        super().__init__(message)
        self.changes = changes


@contextlib.contextmanager
def out_of_memory_advice(trainer: SFTTrainer):
    """Turn torch's error into the next rung of the ladder, with the memory that it saves."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        config, tokenizer, dataset = trainer.made_from
        changes = next_rung(config, tokenizer, dataset)
        if not changes:
            raise OutOfMemory(
                "the GPU's memory is full, and no shorter MAX_LENGTH keeps half of the rows: lower "
                "LORA_R, or choose a smaller model or a larger card",
                changes,
            ) from error
        lost = ""
        if "max_length" in changes:
            longer = count_longer(row_lengths(tokenizer, dataset), changes["max_length"])
            lost = f"leaves out {longer} and "
        saved = memory_saved(config, changes, trainer.model.config) / predict.GIB
        raise OutOfMemory(
            f"the GPU's memory is full: set {in_words(changes)}, which {lost}saves about "
            f"{saved:.1f} GiB; training goes on from the last checkpoint of the new settings",
            changes,
        ) from error


def next_rung(config: Config, tokenizer, dataset: DatasetDict) -> dict:
    """What to change first when a step does not fit: what costs least speed. Fields and values.

    Fewer rows go at a time and more batches make a step, so that the step's rows stay the same.
    Last the length, which costs rows: see `shorter_rows`.
    """
    batch = config.per_device_train_batch_size
    step_rows = batch * config.grad_acc_steps
    if not config.activation_checkpointing:
        return {"activation_checkpointing": True}
    if config.kept_layers:
        return {"kept_layers": config.kept_layers // 2}
    if batch > 1:
        smaller = plan.whole_batches(step_rows, most=batch - 1)[-1]
        return {
            "per_device_train_batch_size": smaller,
            "grad_acc_steps": step_rows // smaller,
            "per_device_eval_batch_size": max(
                1, config.per_device_eval_batch_size * smaller // batch
            ),
        }
    return shorter_rows(config, row_lengths(tokenizer, dataset))


def shorter_rows(config: Config, lengths: dict[str, list[int]]) -> dict:
    """Half the length of the longest row, or more where half of the rows of a split need more.

    Nothing when that is no shorter, so that a ladder never loses most rows.
    """
    longest = min(config.max_length, max(itertools.chain(*lengths.values())))
    half = max(longest // 2, *map(statistics.median_low, lengths.values()))
    return {"max_length": half} if half < longest else {}


def in_words(changes: dict) -> str:
    """Changes of a Config as one would write them into a parameters cell."""
    return ", ".join(f"{name.upper()} = {value}" for name, value in changes.items())


def memory_saved(config: Config, changes: dict, model_config) -> int:
    """Predicted bytes by which the changes make a step smaller."""
    before, after = (
        predict.estimate(model_config, Run.from_config(each)).total
        for each in (config, dataclasses.replace(config, **changes))
    )
    return before - after


def one_rung_down(trainer: SFTTrainer, changes: dict) -> SFTTrainer:
    """A trainer of the next rung's settings, on the same model with its adapter taken off.

    Where they change no step it goes on from the checkpoints of the former, else it has its own.
    """
    print(f"starting again with {in_words(changes)}", flush=True)
    same_steps = not changes.keys() & {*checkpoints.NAMED_BY}
    return made_anew(trainer, changes, Path(trainer.args.output_dir) if same_steps else None)


def made_anew(trainer: SFTTrainer, changes: dict, folder: Path | None) -> SFTTrainer:
    """A trainer of changed settings with a fresh adapter, on the same model."""
    config, tokenizer, dataset = trainer.made_from
    base = trainer.model.unload()
    base.given_to_an_adapter = False
    # What the former's step held, before the new one asks for memory: a notebook may still have
    # the old one.
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.accelerator.free_memory()
    measure.free_memory()
    new = build_trainer(dataclasses.replace(config, **changes), base, tokenizer, dataset, folder)
    own = tuple(type(callback) for callback in new.callback_handler.callbacks)
    for callback in trainer.callback_handler.callbacks:
        if not isinstance(callback, own):  # added by a notebook, as the live chart is
            callback.trainer = new
            new.add_callback(callback)
    return new


def kernels(trainer: SFTTrainer):
    """The context to train and evaluate in: fused kernels, as far as the device has them."""
    if isinstance(trainer, fast_path.FastTrainer):
        return fused_kernels(trainer.model)
    if trainer.args.use_cpu and trainer.made_from[0].lora_dropout == 0:
        return in_place_adapters(trainer.model)
    return contextlib.nullcontext()


def fine_tune(trainer: SFTTrainer) -> tuple[SFTTrainer, dict]:
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
            if not (trainer.made_from[0].fit_to_memory and full.changes):
                raise
            print(full, flush=True)
            changes = full.changes
        # Out here the error is gone, and with it the tensors of the step that it interrupted.
        trainer = one_rung_down(trainer, changes)


@memory_decorator
@time_decorator
def train_once(trainer: SFTTrainer) -> tuple[SFTTrainer, dict]:
    """`fine_tune` with the settings that the trainer has."""
    folder = Path(trainer.args.output_dir)
    checkpoint = checkpoints.latest(folder)
    trainer.args.eval_on_start = checkpoint is None
    stoppable = callback_of(trainer, checkpoints.StopAtStepEdge)
    alone = alone_there(trainer.made_from[0])
    with alone, kernels(trainer), out_of_memory_advice(trainer), stoppable:
        if checkpoint and checkpoints.is_finished(checkpoint):
            checkpoints.restore_finished(trainer, checkpoint)
        elif checkpoint:
            trainer.train(resume_from_checkpoint=str(checkpoint))
        else:
            if trainer.is_world_process_zero():
                checkpoints.record_plan(folder, trainer.made_from[0])
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


def step_log(trainer: SFTTrainer) -> list[dict]:
    """What StepLog measured: one dictionary for each optimizer step, resumed from or run here."""
    return callback_of(trainer, StepLog).steps


def callback_of(trainer: SFTTrainer, kind: type) -> TrainerCallback:
    """The trainer's one callback of a kind."""
    (found,) = [item for item in trainer.callback_handler.callbacks if isinstance(item, kind)]
    return found


def tokens_per_second(steps: list[dict]) -> float:
    """The tokens of steps of a step log over their seconds, evaluations not counted."""
    return sum(step["tokens"] for step in steps) / sum(step["seconds"] for step in steps)


class StepLog(TrainerCallback, ExportableState):
    """Measures every optimizer step: its tokens, its seconds, and the memory in use after it.

    A process runs ahead of its GPU and waits for it at log lines, evaluations and checkpoints, so
    a step between two of these has the mean of the seconds from one to the other.

    The trainer stores it in each checkpoint, so a resumed run has the steps before it too.
    """

    def __init__(self):
        self.steps = []

    def state(self) -> dict:
        return {"args": {}, "attributes": {"steps": self.steps}}

    def on_train_begin(self, args, state, control, **kwargs):
        self.begun = []  # seconds at which the steps since the last wait began
        self.seen = state.num_input_tokens_seen

    def on_step_begin(self, args, state, control, **kwargs):
        self.begun.append(time.perf_counter())

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(
            {
                "step": state.global_step,
                "seconds": time.perf_counter() - self.begun[-1],
                "tokens": state.num_input_tokens_seen - self.seen,
                "memory_bytes": measure.current_memory_bytes(args.device),
                "peak_memory_bytes": measure.peak_memory_bytes(args.device),
            }
        )
        self.seen = state.num_input_tokens_seen
        waits = control.should_log or control.should_evaluate or control.should_save
        if args.device.type == "cuda" and waits:
            torch.cuda.synchronize(args.device)
            seconds = (time.perf_counter() - self.begun[0]) / len(self.begun)
            for step in self.steps[-len(self.begun) :]:
                step["seconds"] = seconds
        if waits:
            self.begun = []


class TrainingDiverged(RuntimeError):
    """The loss is no number any more, or far above where it began. The message says the cause."""


class StopOnDivergence(TrainerCallback):
    """Ends a run whose loss cannot recover, before it spends hours on it."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:
            return
        first = next(entry["loss"] for entry in state.log_history if "loss" in entry)
        if math.isfinite(logs["loss"]) and logs["loss"] < first + EXPLOSION:
            return
        overflow = ", or float16 overflowed (set BF16 where the card has it)" if args.fp16 else ""
        raise TrainingDiverged(
            f"step {state.global_step}: the loss is {logs['loss']:.3f} and began at {first:.3f}; "
            f"most likely LEARNING_RATE = {args.learning_rate} is too high{overflow}: set a lower "
            f"one. The checkpoints up to here are in {args.output_dir}"
        )


class LogLines(TrainerCallback):
    """Prints one line for each logging step and each evaluation, headless or not."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        if "loss" in logs:
            print(
                f"step {state.global_step:>4}/{state.max_steps}   loss {float(logs['loss']):.3f}   "
                f"learning rate {float(logs['learning_rate']):.1e}   "
                f"gradient norm {float(logs['grad_norm']):.2f}",
                flush=True,
            )
        elif "eval_loss" in logs:
            print(
                f"step {state.global_step:>4}/{state.max_steps}   "
                f"validation loss {float(logs['eval_loss']):.3f}",
                flush=True,
            )


def save_adapter(trainer: SFTTrainer, tokenizer, config: Config) -> Path:
    """Write adapter, tokenizer and training log to run_dir/adapter, whole or not at all.

    The checkpoints have done their duty then and are removed. Under DDP the first process does it.
    """
    checkpoints.wait_for_all()  # another may still be reading its best checkpoint
    weights = whole_adapter(trainer.model)
    if trainer.is_world_process_zero():
        with folders.writing_in(config.run_dir):  # no checkpoint that goes is somebody else's
            _write_adapter(trainer, tokenizer, config, weights)
    checkpoints.wait_for_all()
    return config.adapter_dir


def whole_adapter(model) -> dict[str, torch.Tensor]:
    """The trained weights by name. Under FSDP every process has a share of each, and all must ask.

    The base model's are not gathered: they may be more than the memory of one machine.
    """
    trained = [(name, p.detach()) for name, p in model.named_parameters() if p.requires_grad]
    return {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in trained}


def _write_adapter(trainer: SFTTrainer, tokenizer, config: Config, weights: dict) -> None:
    with folders.whole_folder(config.adapter_dir) as draft:
        trainer.model.save_pretrained(draft, state_dict=weights)
        tokenizer.save_pretrained(draft)
        log = {"history": trainer.state.log_history, "steps": step_log(trainer)}
        log |= {"dataset": trainer.dataset_fingerprint, "recipe": config.recipe}
        (draft / inventory.TRAINING_LOG).write_text(
            json.dumps(log, indent=1, default=float), encoding="utf-8"
        )
        curation_note.write_curation(trainer.curation, draft)
        inventory.seal(draft)
    shutil.rmtree(config.checkpoints_dir, ignore_errors=True)


def for_this_process(config: Config) -> Config:
    """The Config with the GPU of this process, when `accelerate launch` started several.

    In shards there is no fast path: it reads weights that are whole. Raises ConfigError for
    FIT_TO_MEMORY: one process alone would start again.
    """
    rank = os.environ.get("LOCAL_RANK")
    if rank is None:
        return config
    if config.fit_to_memory:
        raise ConfigError("FIT_TO_MEMORY is True, and it works in one process only: set it False")
    if config.device == "cpu":
        return config
    fast = config.fast_path and not loading.is_sharded()
    return dataclasses.replace(config, device_map={"": int(rank)}, fast_path=fast)


def train(config: Config) -> dict:
    """What notebook 04 does, in one call: train on notebook 02's dataset, save, record metrics/04.

    In every process of DDP, of which the first one writes. Returns the metrics.
    """
    config = for_this_process(config)
    loading.use_device(config, config.model_name)
    # The first process comes first: it may have a model to fetch, or a dataset to tokenize.
    with sft_config(config).main_process_first():
        tokenizer = loading.load_tokenizer(config.model_name)
        dataset = load_dataset(config, tokenizer)
    before = measure.current_memory_bytes(config.device)
    folder = checkpoints.folder_of(config, tokenizer)
    # Here and not only in build_trainer: before the weights are loaded.
    config = planned(config, folder)
    if loading.is_sharded() and config.device != "cpu":
        refuse_without_room(config)
    trainer = build_trainer(config, loading.load_model(config), tokenizer, dataset, folder)
    trainable, every = trainer.model.get_nb_trainable_parameters()
    trainer, metrics = fine_tune(trainer)
    save_adapter(trainer, tokenizer, config)
    longest = max(len(ids) for ids in trainer.train_dataset["input_ids"])
    run = step_of(trainer.made_from[0], longest)
    metrics |= {
        "trainable_parameters": trainable,
        "trainable_percent": 100 * trainable / every,
        "peak_memory_bytes_predicted": predict.estimate(trainer.model.config, run, before).total,
    }
    if trainer.is_world_process_zero():
        inventory.record_metrics(config, "04", metrics)
    return metrics
