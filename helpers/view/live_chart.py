"""A chart that follows a training run, for a notebook with a front end.

Its static twin is the loss figure that notebook 04 draws afterwards; run headless, the printed log
lines say the same.
"""

import itertools
import time

import ipywidgets
import matplotlib.pyplot as plt
from IPython import get_ipython
from IPython.display import display
from transformers import TrainerCallback

from helpers.view import plots, widgets

SECONDS_BETWEEN_PICTURES = 10.0  # drawing one takes a fifth of a second, from the training
PANELS = (
    ("Training loss", "nats per token"),
    ("Validation loss", "nats per token"),
    ("Learning rate", ""),
    ("Gradient norm", ""),
    ("Speed", "tokens per s"),
    ("Memory", "GiB"),
)


def show(trainer) -> None:
    """Display `chart` above the training of a notebook's cell; a script has the log lines alone."""
    if get_ipython() is not None:
        display(chart(trainer))


def chart(trainer) -> ipywidgets.HTML:
    """A picture of the trainer's numbers, drawn anew while it trains, at times."""
    callback = LiveChart()
    trainer.add_callback(callback)
    return callback.view


class LiveChart(TrainerCallback):
    """Draws the trainer's log into `view` at its log steps, and at the end."""

    def __init__(self):
        self.view = ipywidgets.HTML("The chart begins with the first numbers of the training.")
        self.drawn, self.began = float("-inf"), None

    def on_train_begin(self, args, state, control, **kwargs):
        self.began, self.first_step = time.perf_counter(), state.global_step

    def on_log(self, args, state, control, **kwargs):
        # The evaluation before the first step is logged too, and then nothing has begun.
        if self.began and time.perf_counter() - self.drawn >= SECONDS_BETWEEN_PICTURES:
            self.draw(state)

    def on_train_end(self, args, state, control, **kwargs):
        self.draw(state)

    def draw(self, state) -> None:
        """Show what the log holds now, and say it in words, which are also the picture's text."""
        found = [*zip(PANELS, curves(state.log_history), strict=True)]
        newest = [
            f"{title.lower()} {points[-1][1]:.4g} {unit}".strip()
            for (title, unit), points in found
            if points
        ]
        words = ", ".join([f"step {state.global_step} of {state.max_steps}", *newest])
        words = f"{words}; {self._time_left(state)}."
        picture = widgets.image_html(_picture(found), f"Training so far: {words}")
        self.view.value = f"<p>{words}</p>{picture}"
        self.drawn = time.perf_counter()

    def _time_left(self, state) -> str:
        """From the steps of this process, with the evaluations and checkpoints between them."""
        taken, left = state.global_step - self.first_step, state.max_steps - state.global_step
        if not taken or not left:
            return "done" if not left else "time left not known yet"
        seconds = (time.perf_counter() - self.began) / taken * left
        return f"about {seconds / 60:.0f} min left" if seconds >= 90 else f"{seconds:.0f} s left"


def _picture(found: list[tuple[tuple[str, str], list]]) -> bytes:
    """A panel for each (title, unit) and its (step, value) pairs, as PNG."""
    figure, axes = plt.subplots(2, 3, figsize=(9, 4), dpi=72, layout="none")  # twice as fast
    figure.subplots_adjust(0.08, 0.12, 0.98, 0.92, wspace=0.45, hspace=0.6)
    for axis, ((title, unit), points) in zip(axes.flat, found, strict=True):
        steps, values = zip(*points, strict=True) if points else ((), ())
        axis.plot(steps, values, ".-", color=plots.BLUE)
        axis.set(title=title, xlabel="optimizer step", ylabel=unit or "no unit")
    return widgets.figure_png(figure)


def curves(history: list[dict]) -> list[list[tuple[int, float]]]:
    """For each of PANELS its (step, value) pairs, from the trainer's log, which has every step."""
    steps = [entry for entry in history if "tokens" in entry]
    named = ("loss", "eval_loss", "learning_rate", "grad_norm")
    found = [
        [(entry["step"], float(entry[name])) for entry in history if name in entry]
        for name in named
    ]
    memory = [(item["step"], item["memory_bytes"] / widgets.GIB) for item in steps]
    return [*found, speeds(history, steps), memory]


def speeds(history: list[dict], steps: list[dict]) -> list[tuple[int, float]]:
    """(step, tokens per second since the log line before), evaluations not counted."""
    ends = [entry["step"] for entry in history if "loss" in entry]
    parts = [
        (last, [item for item in steps if first < item["step"] <= last])
        for first, last in itertools.pairwise([0, *ends])
    ]
    return [
        (last, sum(item["tokens"] for item in part) / sum(item["seconds"] for item in part))
        for last, part in parts
        if part
    ]
