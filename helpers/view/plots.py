"""How figures look here, and how they are shown: one style, and alt text on every image.

Colours are Okabe and Ito's, which people with any colour vision tell apart; a line also differs in
dash or marker, so that it can be read in grey. Drawing itself is matplotlib, in the notebooks.
"""

import matplotlib.pyplot as plt
from IPython.display import display
from matplotlib import cycler
from matplotlib.patches import FancyBboxPatch

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "black")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 3)))
BLUE, RED = COLOURS[0], COLOURS[3]

STYLE = {
    "figure.figsize": (7.0, 3.6),
    "figure.constrained_layout.use": True,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=COLOURS, linestyle=DASHES),
    "grid.color": "#DDDDDD",
    "axes.axisbelow": True,
    "axes.titlesize": 11,
}
plt.rcParams.update(STYLE)


def show(figure, alt: str) -> None:
    """Display a figure with its alternative text, then close it, so that a re-run piles up none."""
    display(figure, metadata={"image/png": {"alt": alt}})
    plt.close(figure)


STOPS = {
    "01": "an idea:\na small\nadapter",
    "02": "posts\nbecome\nrows",
    "03": "a base\nmodel\nin 4 bits",
    "04": "rows train\nan adapter\non the base",
    "05": "adapter\nand base\nmerge",
    "06": "questions\nget\nanswers",
}


def road(here: str) -> None:
    """Show the six lessons as a row of boxes; that of `here`, such as "03", is dark."""
    figure, axis = plt.subplots(figsize=(7, 1.5))
    for place, (number, words) in enumerate(STOPS.items()):
        ground, ink = (BLUE, "white") if number == here else ("white", "black")
        box = FancyBboxPatch((place + 0.06, 0.06), 0.74, 0.88, "round,pad=0.04", fc=ground, ec=BLUE)
        axis.add_patch(box)
        axis.text(place + 0.43, 0.84, number, ha="center", va="center", color=ink, weight="bold")
        axis.text(place + 0.43, 0.38, words, ha="center", va="center", color=ink, fontsize=9)
        if place:
            arrow = {"fc": "black", "arrowstyle": "-|>"}
            axis.annotate("", (place + 0.02, 0.5), (place - 0.16, 0.5), arrowprops=arrow)
    axis.set(title="The road from posts to answers", xlim=(0, 5.86), ylim=(0, 1))
    axis.axis("off")
    stops = "; ".join(f"{number}, {' '.join(words.split())}" for number, words in STOPS.items())
    show(figure, f"The six lessons in order: {stops}. You are at {here}.")
