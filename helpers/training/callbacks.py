"""What is measured and said of a training and its steps."""

import functools
import time

import torch
from transformers import TrainerCallback

from helpers.model import measure

EXPLOSION = 3.0  # nats above the first loss, twenty times less likely words: it will not return


class StepLog(TrainerCallback):
    """Adds an entry for every optimizer step to the trainer's log: see `step_log`.

    A process waits for its GPU at log lines, evaluations and checkpoints alone, so a step between
    two of these has the mean of the seconds from one to the other.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        self.begun, self.entries = [], []  # since the last wait: seconds at the beginning, entries
        self.seen = state.num_input_tokens_seen

    def on_step_begin(self, args, state, control, **kwargs):
        self.begun.append(time.perf_counter())

    def on_step_end(self, args, state, control, **kwargs):
        entry = {
            "step": state.global_step,
            "seconds": time.perf_counter() - self.begun[-1],
            "tokens": state.num_input_tokens_seen - self.seen,
            "memory_bytes": measure.current_memory_bytes(args.device),
            "peak_memory_bytes": measure.peak_memory_bytes(args.device),
        }
        state.log_history.append(entry)
        self.entries.append(entry)
        self.seen = state.num_input_tokens_seen
        if not (control.should_log or control.should_evaluate or control.should_save):
            return
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
            seconds = (time.perf_counter() - self.begun[0]) / len(self.begun)
            for entry in self.entries:
                entry["seconds"] = seconds
        self.begun, self.entries = [], []


def step_log(trainer) -> list[dict]:
    """A dictionary for each optimizer step, before a resume too: its tokens, seconds, memory."""
    return [entry for entry in trainer.state.log_history if "seconds" in entry]


def metrics_of(trainer) -> dict:
    """Losses in nats per token, before the first step and of the adapter that is kept; speed."""
    steps, history = step_log(trainer), trainer.state.log_history
    tokens, seconds = (sum(step[name] for step in steps) for name in ("tokens", "seconds"))
    losses = {e["step"]: e["eval_loss"] for e in history if "eval_loss" in e}
    best = trainer.state.best_model_checkpoint  # which was loaded, if there is one
    return {
        "eval_loss_before": losses[0],
        "eval_loss_after": losses[int(best.split("-")[-1]) if best else max(losses)],
        "train_tokens_per_second": tokens / seconds,
    }


class TrainingDiverged(RuntimeError):
    """The loss is no number any more, or far above where it began."""


class LogLines(TrainerCallback):
    """Prints a line for each logging step and each evaluation, headless or not.

    Ends a run whose loss cannot recover, before it spends hours on it.
    """

    def on_log(self, args, state, control, logs=None, **kwargs):
        step = f"step {state.global_step:>4}/{state.max_steps}   "
        if "loss" in logs:
            loss, rate, norm = (float(logs[n]) for n in ("loss", "learning_rate", "grad_norm"))
            step += f"loss {loss:.3f}   learning rate {rate:.1e}   gradient norm {norm:.2f}"
            print(step, flush=True)
            first = next(entry["loss"] for entry in state.log_history if "loss" in entry)
            if not loss < first + EXPLOSION:
                raise TrainingDiverged(
                    f"step {state.global_step}: the loss is {loss:.3f} and began at {first:.3f}; "
                    f"most likely LEARNING_RATE = {args.learning_rate} is too high: set a lower "
                    "one (where FP16 is True and the card has BF16, set that instead)"
                )
        elif "eval_loss" in logs:
            print(f"{step}validation loss {float(logs['eval_loss']):.3f}", flush=True)


# The article's two decorators, of a function that takes a trainer and returns it with its metrics.


def time_decorator(function):
    """Add `exec_time_seconds`."""

    @functools.wraps(function)
    def wrapper(trainer):
        start = time.perf_counter()
        result, metrics = function(trainer)
        return result, {**metrics, "exec_time_seconds": time.perf_counter() - start}

    return wrapper


def memory_decorator(function):
    """Add `peak_memory_bytes`: torch's allocations on a GPU, resident memory on a CPU."""

    @functools.wraps(function)
    def wrapper(trainer):
        result, metrics = function(trainer)
        peak = measure.peak_memory_bytes(result.args.device)
        return result, {**metrics, "peak_memory_bytes": peak}

    return wrapper
