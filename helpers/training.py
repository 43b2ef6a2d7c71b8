"""Supervised fine-tuning with QLoRA: a Config in trl's and peft's terms, measured, resumable.

The training loop is trl's SFTTrainer. The settings, the article's decorators and the step log are
here; the lesson that reads them is notebook 04.
"""

import contextlib
import dataclasses
import functools
import json
import math
import shutil
import time
from pathlib import Path

import torch
from datasets import DatasetDict, load_from_disk
from peft import LoraConfig
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback
from transformers.trainer_callback import ExportableState
from trl import SFTConfig, SFTTrainer

from helpers import artefacts, checkpoints, fast_path, integrity, memory, models
from helpers.config import Config

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
    """Add `peak_memory_bytes` to the metrics of a function that returns (result, metrics).

    On a GPU that is what torch had allocated at most, on a CPU the resident memory of the process.
    """

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        memory.reset_peak_memory()
        result, metrics = function(*args, **kwargs)
        return result, {**metrics, "peak_memory_bytes": memory.peak_memory_bytes()}

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
    return config.fast_path and fast_path.is_supported()


def sft_config(config: Config) -> SFTConfig:
    """The training settings of a Config in trl's terms.

    A packed batch is one row of batch size times `max_length` tokens.
    """
    rows, eval_rows = config.per_device_train_batch_size, config.per_device_eval_batch_size
    fast = uses_fast_path(config)
    return SFTConfig(
        output_dir=str(checkpoints.folder_of(config)),
        use_cpu=config.device == "cpu",
        fp16=config.fp16,
        bf16=config.bf16 and not fast,  # the fast path computes in the model's own bfloat16
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
        eval_strategy="steps",
        eval_steps=config.eval_steps,
        save_steps=config.save_steps,
        save_total_limit=2,
        restore_callback_states_from_checkpoint=True,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        seed=config.seed,
        disable_tqdm=True,
        report_to="none",
    )


def load_dataset(config: Config) -> DatasetDict:
    """The train and validation rows that notebook 02 wrote, with only the columns that train."""
    dataset = load_from_disk(str(integrity.check_dataset(config)))
    return dataset.select_columns(["prompt", "completion"])


def build_trainer(config: Config, model, tokenizer, dataset: DatasetDict) -> SFTTrainer:
    """An SFTTrainer that wraps the 4-bit model in a fresh adapter and logs every step.

    Raises ValueError for a model that carries an adapter already.
    """
    fast = uses_fast_path(config)
    trainer = (fast_path.FastTrainer if fast else SFTTrainer)(
        model=models.without_adapter(model),
        args=sft_config(config),
        train_dataset=dataset["train"],
        eval_dataset=dataset["validation"],
        processing_class=tokenizer,
        peft_config=lora_config(config),
        callbacks=[
            StepLog(),
            LogLines(),
            StopOnDivergence(),
            checkpoints.SameOrder(),
            checkpoints.SealCheckpoints(),
            checkpoints.StopAtStepEdge(),
            EarlyStoppingCallback(early_stopping_patience=config.early_stopping_patience),
        ],
    )
    if fast:
        trainer.data_collator = fixed_collator(config, tokenizer)  # trl takes none when it packs
        trainer.kept_layers = config.kept_layers
    checkpoints.resume_in_own_type(trainer.model)
    trainer.remove_callback(PrinterCallback)  # LogLines prints the same numbers, readable
    if config.fp16:
        keep_adapter_in_float32(trainer.model)
    return trainer


def fixed_collator(config: Config, tokenizer) -> fast_path.FixedCollator:
    tokens = config.per_device_train_batch_size * config.max_length
    return fast_path.FixedCollator(
        tokenizer.pad_token_id, padding_free=True, tokens=tokens, longest=config.max_length
    )


def keep_adapter_in_float32(model) -> None:
    """Undo trl's cast of the adapter to bfloat16, which cards before Ampere do not have."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


class OutOfMemory(RuntimeError):
    """The GPU is too small for a step. The message names the next thing to change."""


@contextlib.contextmanager
def out_of_memory_advice(trainer: SFTTrainer):
    """Turn torch's error into the next rung of the ladder, with the memory that it saves."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(next_rung(trainer.args, trainer.model.config)) from error


def next_rung(args: SFTConfig, model_config) -> str:
    """What to change first when a step does not fit: what costs least speed, and what it saves."""
    run = memory.Run(
        rank=1,
        batch=args.per_device_train_batch_size,
        length=args.max_length,
        checkpointing=getattr(args, CHECKPOINTING),
    )
    halved = {"length": run.length // 2} if args.packing else {"batch": run.batch // 2}
    rungs = [
        (not run.checkpointing, {"checkpointing": True}, "ACTIVATION_CHECKPOINTING = True"),
        (
            args.packing or run.batch > 1,
            halved,
            "half the PER_DEVICE_TRAIN_BATCH_SIZE and GRAD_ACC_STEPS = "
            f"{2 * args.gradient_accumulation_steps}, the same rows a step",
        ),
        (True, {"length": run.length // 2}, f"MAX_LENGTH = {run.length // 2}"),
    ]
    changes, advice = next(rung[1:] for rung in rungs if rung[0])
    before = memory.estimate(model_config, run).total
    saved = before - memory.estimate(model_config, dataclasses.replace(run, **changes)).total
    return (
        f"the GPU's memory is full: set {advice}, which saves about {saved / memory.GIB:.1f} GiB; "
        "training goes on from the last checkpoint of the new settings"
    )


def kernels(trainer: SFTTrainer):
    """The context to train and evaluate in: fused kernels for the fast path, else nothing."""
    if isinstance(trainer, fast_path.FastTrainer):
        return fast_path.fused_kernels(trainer.model)
    return contextlib.nullcontext()


@memory_decorator
@time_decorator
def fine_tune(trainer: SFTTrainer) -> tuple[SFTTrainer, dict]:
    """Train, going on from the last complete checkpoint if there is one.

    Returns the trainer and its metrics: eval_loss_before, eval_loss_after (nats per token of the
    answers), train_tokens_per_second (padding not counted), and what the decorators add.
    """
    checkpoint = checkpoints.latest(Path(trainer.args.output_dir))
    stoppable = callback_of(trainer, checkpoints.StopAtStepEdge)
    with kernels(trainer), out_of_memory_advice(trainer), stoppable:
        before = trainer.evaluate()["eval_loss"]
        if checkpoint and checkpoints.is_finished(checkpoint):
            checkpoints.restore_finished(trainer, checkpoint)
        else:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        # The best checkpoint is loaded; a run too short for an evaluation has none.
        after = trainer.state.best_metric or trainer.evaluate()["eval_loss"]
    # Ready to answer: trl turns the cache off, and without it writing is three times slower.
    trainer.model.eval().config.use_cache = True
    return trainer, {
        "eval_loss_before": before,
        "eval_loss_after": after,
        "train_tokens_per_second": tokens_per_second(trainer),
    }


def step_log(trainer: SFTTrainer) -> list[dict]:
    """What StepLog measured: one dictionary for each optimizer step, resumed from or run here."""
    return callback_of(trainer, StepLog).steps


def callback_of(trainer: SFTTrainer, kind: type) -> TrainerCallback:
    """The trainer's one callback of a kind."""
    (found,) = [item for item in trainer.callback_handler.callbacks if isinstance(item, kind)]
    return found


def tokens_per_second(trainer: SFTTrainer) -> float:
    """Tokens that trl counted up to its last log line, over the seconds of those steps."""
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    counts = [float(entry["num_tokens"]) for entry in entries]
    # After a resume trl counts from zero again.
    pairs = zip([0.0, *counts], counts, strict=False)
    tokens = sum(now - before if now > before else now for before, now in pairs)
    last = entries[-1]["step"]
    return tokens / sum(item["seconds"] for item in step_log(trainer) if item["step"] <= last)


class StepLog(TrainerCallback, ExportableState):
    """Measures every optimizer step: its seconds, and the memory in use after it.

    The trainer stores it in each checkpoint, so a resumed run has the steps before it too.
    """

    def __init__(self):
        self.steps = []

    def state(self) -> dict:
        return {"args": {}, "attributes": {"steps": self.steps}}

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(
            {
                "step": state.global_step,
                "seconds": time.perf_counter() - self.start,
                "memory_bytes": memory.current_memory_bytes(),
                "peak_memory_bytes": memory.peak_memory_bytes(),
            }
        )


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

    The checkpoints have done their duty then and are removed.
    """
    with artefacts.whole_folder(config.adapter_dir) as draft:
        trainer.model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        log = {"history": trainer.state.log_history, "steps": step_log(trainer)}
        log |= {"dataset": integrity.dataset_fingerprint(config), "recipe": config.recipe}
        (draft / integrity.TRAINING_LOG).write_text(json.dumps(log, indent=1, default=float))
        integrity.seal(draft)
    shutil.rmtree(config.checkpoints_dir, ignore_errors=True)
    return config.adapter_dir
