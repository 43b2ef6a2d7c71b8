"""A chart that follows a training run, for a notebook with a front end.

Its static twin is the loss figure that notebook 04 draws afterwards; run headless, the printed log
lines say the same.
"""

import time

import ipywidgets
import matplotlib.pyplot as plt
import pandas as pd
from IPython import get_ipython
from IPython.display import display
from transformers import TrainerCallback

from helpers.view import plots, widgets

SECONDS_BETWEEN_PICTURES = 20.0  # drawing one takes a few tenths of a second, from the training
LOGGED = ("step", "loss", "eval_loss", "learning_rate", "grad_norm")  # at some steps
MEASURED = ("tokens", "seconds", "memory_bytes")  # at each step
PANELS = {
    "loss": ("Training loss", "nats per token"),
    "eval_loss": ("Validation loss", "nats per token"),
    "learning_rate": ("Learning rate", ""),
    "grad_norm": ("Gradient norm", ""),
    "speed": ("Speed", "tokens per s"),
    "memory": ("Memory", "GiB"),
}


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
        self.drawn = float("-inf")

    def on_log(self, args, state, control, **kwargs):
        if time.perf_counter() - self.drawn >= SECONDS_BETWEEN_PICTURES:
            self.draw(state)

    def on_train_end(self, args, state, control, **kwargs):
        self.draw(state)

    def draw(self, state) -> None:
        """Show what the log holds now, and say it in words, which are also the picture's text."""
        log = pd.DataFrame(state.log_history, columns=[*LOGGED, *MEASURED]).set_index("step")
        log = log.assign(speed=log.tokens / log.seconds, memory=log.memory_bytes / widgets.GIB)
        words = [f"step {state.global_step} of {state.max_steps}"]
        figure, axes = plt.subplots(2, 3, figsize=(9, 4), dpi=72)
        for axis, (name, (title, unit)) in zip(axes.flat, PANELS.items(), strict=True):
            points = log[name].dropna()
            axis.plot(points, ".-", color=plots.BLUE)
            axis.set(title=title, xlabel="optimizer step", ylabel=unit or "no unit")
            words += [f"{title.lower()} {value:.4g} {unit}".strip() for value in points[-1:]]
        left = (state.max_steps - state.global_step) * log.seconds.mean()
        said = ", ".join(words) + f"; {left:.0f} s of steps left."
        picture = widgets.image_html(widgets.figure_png(figure), f"Training so far: {said}")
        self.view.value = f"<p>{said}</p>{picture}"
        self.drawn = time.perf_counter()
