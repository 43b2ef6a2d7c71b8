"""How figures look here, and how they are shown: one style, and alt text on every image.

Colours are Okabe and Ito's, which people with any colour vision tell apart; a line also differs in
dash or marker, so that it can be read in grey. Drawing itself is matplotlib, in the notebooks.
"""

import matplotlib.pyplot as plt
from cycler import cycler
from IPython.display import display

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#000000",
)
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), "-")

STYLE = {
    "figure.figsize": (7.0, 3.6),
    "figure.dpi": 100,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "axes.facecolor": "white",
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(
        color=(BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK), linestyle=DASHES
    ),
    "grid.color": "#DDDDDD",
    "axes.axisbelow": True,
    "font.size": 10,
    "axes.titlesize": 11,
    "image.cmap": "viridis",
}
plt.rcParams.update(STYLE)


def show(figure, alt: str) -> None:
    """Display a figure with its alternative text, then close it, so that a re-run piles up nothing.

    Raises ValueError when the text is too short to stand in for the picture.
    """
    if len(alt.split()) < 5:
        raise ValueError(
            f"alt text {alt!r} says too little: describe what the figure shows, in a sentence"
        )
    display(figure, metadata={"image/png": {"alt": alt}})
    plt.close(figure)
