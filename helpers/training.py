"""Supervised fine-tuning with QLoRA: a Config in trl's and peft's terms, measured, resumable.

The training loop is trl's SFTTrainer. The settings, the article's decorators and the step log are
here; the lesson that reads them is notebook 04.
"""

import dataclasses
import functools
import hashlib
import json
import shutil
import time
from pathlib import Path

from datasets import DatasetDict, load_from_disk
from peft import LoraConfig
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from helpers import memory
from helpers.config import Config

ADAPTER_WEIGHTS = "adapter_model.safetensors"
# What a checkpoint must hold before a run goes on from it.
CHECKPOINT_FILES = (ADAPTER_WEIGHTS, "optimizer.pt", "scheduler.pt", "trainer_state.json")

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


def sft_config(config: Config) -> SFTConfig:
    """The training settings of a Config in trl's terms."""
    return SFTConfig(
        output_dir=str(checkpoints_dir(config)),
        use_cpu=config.device == "cpu",
        fp16=config.fp16,
        bf16=config.bf16,
        num_train_epochs=config.num_epochs,
        max_steps=config.max_steps,
        per_device_train_batch_size=config.per_device_train_batch_size,
        per_device_eval_batch_size=config.per_device_eval_batch_size,
        gradient_accumulation_steps=config.grad_acc_steps,
        optim=config.optim,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        lr_scheduler_type=config.scheduler_type,
        warmup_steps=config.warmup_ratio,  # a float below 1 is a share of all steps
        train_sampling_strategy="group_by_length" if config.group_by_length else "random",
        **{CHECKPOINTING: config.activation_checkpointing},
        max_length=config.max_length,
        completion_only_loss=config.completion_only_loss,
        logging_steps=config.log_steps,
        eval_strategy="steps",
        eval_steps=config.eval_steps,
        save_steps=config.save_steps,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        seed=config.seed,
        disable_tqdm=True,
        report_to="none",
    )


def load_dataset(config: Config) -> DatasetDict:
    """The train and validation rows that notebook 02 wrote, with only the columns that train."""
    dataset = load_from_disk(str(config.require(config.dataset_dir, "02")))
    return dataset.select_columns(["prompt", "completion"])


def build_trainer(config: Config, model, tokenizer, dataset: DatasetDict) -> SFTTrainer:
    """An SFTTrainer that wraps the 4-bit model in a fresh adapter and logs every step.

    Raises ValueError for a model that carries an adapter already.
    """
    if any("lora_" in name for name, _ in model.named_parameters()):
        raise ValueError("the model carries an adapter already: load it again before building")
    trainer = SFTTrainer(
        model=model,
        args=sft_config(config),
        train_dataset=dataset["train"],
        eval_dataset=dataset["validation"],
        processing_class=tokenizer,
        peft_config=lora_config(config),
        callbacks=[
            StepLog(),
            LogLines(),
            EarlyStoppingCallback(early_stopping_patience=config.early_stopping_patience),
        ],
    )
    trainer.remove_callback(PrinterCallback)  # LogLines prints the same numbers, readable
    if config.fp16:
        keep_adapter_in_float32(trainer.model)
    return trainer


def keep_adapter_in_float32(model) -> None:
    """Undo trl's cast of the adapter to bfloat16, which cards before Ampere do not have."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


@memory_decorator
@time_decorator
def fine_tune(trainer: SFTTrainer) -> tuple[SFTTrainer, dict]:
    """Train, going on from the last complete checkpoint if there is one.

    Returns the trainer and its metrics: eval_loss_before, eval_loss_after (nats per token of the
    answers), train_tokens_per_second (padding not counted), and what the decorators add.
    """
    before = trainer.evaluate()["eval_loss"]
    trainer.train(resume_from_checkpoint=latest_checkpoint(Path(trainer.args.output_dir)))
    after = trainer.evaluate()["eval_loss"]
    # Ready to answer: trl turns the cache off, and without it writing is three times slower.
    trainer.model.eval().config.use_cache = True
    return trainer, {
        "eval_loss_before": before,
        "eval_loss_after": after,
        "train_tokens_per_second": tokens_per_second(trainer),
    }


def step_log(trainer: SFTTrainer) -> list[dict]:
    """What StepLog measured: one dictionary for each optimizer step that this process ran."""
    (log,) = [item for item in trainer.callback_handler.callbacks if isinstance(item, StepLog)]
    return log.steps


def tokens_per_second(trainer: SFTTrainer) -> float:
    """Tokens that trl counted up to its last log line, over the seconds of those steps."""
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    seconds = sum(item["seconds"] for item in step_log(trainer) if item["step"] <= last["step"])
    return float(last["num_tokens"]) / seconds


class StepLog(TrainerCallback):
    """Measures every optimizer step: its seconds, and the memory in use after it."""

    def __init__(self):
        self.steps = []

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


def checkpoints_dir(config: Config) -> Path:
    """Where a Config's checkpoints lie: other settings, another folder; none is mixed up."""
    settings = json.dumps({**dataclasses.asdict(config), "run_dir": None}, sort_keys=True)
    return config.checkpoints_dir / hashlib.sha256(settings.encode()).hexdigest()[:12]


def latest_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that is complete; one that was cut off while written is passed over."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    complete = [path for path in found if all((path / name).exists() for name in CHECKPOINT_FILES)]
    return str(complete[-1]) if complete else None


def save_adapter(trainer: SFTTrainer, tokenizer, config: Config) -> Path:
    """Write adapter, tokenizer and training log to run_dir/adapter, whole or not at all.

    The checkpoints have done their duty then and are removed.
    """
    draft = config.run_dir / ".adapter.partial"
    shutil.rmtree(draft, ignore_errors=True)
    trainer.model.save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    log = {"history": trainer.state.log_history, "steps": step_log(trainer)}
    (draft / "training_log.json").write_text(json.dumps(log, indent=1, default=float))
    shutil.rmtree(config.adapter_dir, ignore_errors=True)
    draft.rename(config.adapter_dir)
    shutil.rmtree(config.checkpoints_dir, ignore_errors=True)
    return config.adapter_dir
