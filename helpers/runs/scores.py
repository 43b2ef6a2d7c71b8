"""The scores that notebook 06 recorded, as rows of a table: for the report and the model's card."""

from collections.abc import Sequence

from scipy.stats import binomtest

# The beginning of a metric's name: what it counts, and the metric that says of how many problems.
SCORES = {
    "own_match_rate": ("held-out rows of your own, answered right", "own_rows"),
    "pass_rate_level1": ("pass their tests, level 1", "problems_level1"),
    "pass_rate_level1_held_back": ("the same, problems held back", "problems_level1_held_back"),
    "pass_rate_level2": ("pass their tests, level 2", "problems_level2"),
    "pass_rate_level3": ("pass their tests, level 3", "problems_level3"),
    "stop_rate": ("stop by themselves", "problems"),
    "parse_rate": ("hold code that parses", "problems"),
    "steps_rate": ("explain in steps", "problems"),
}
# Who can be asked: the base in 16 bits and in 4, each in the chat template that it brings; the base
# in 4 bits in that of the training; with the adapter; merged by notebook 05; and that in 4 bits.
MODELS = ("base_chat", "base_chat_4bit", "base", "tuned", "merged", "requantized")


def models_asked(metrics: dict) -> list[str]:
    """Those of MODELS that answered, in that order."""
    return [model for model in MODELS if f"stop_rate_{model}" in metrics]


def score_rows(metrics: dict, models: Sequence[str]) -> list[tuple]:
    """(what, a text such as 0.50 [0.30, 0.70] for each model) of the scores that were taken.

    Behind a rate is Wilson's 95 % interval (Wilson 1927). A model that was not asked has a dash.
    """
    return [
        (label, *(_with_interval(metrics, name, count, model) for model in models))
        for name, (label, count) in SCORES.items()
        if any(f"{name}_{model}" in metrics for model in models)
    ]


def _with_interval(metrics: dict, name: str, count: str, model: str) -> str:
    if (rate := metrics.get(f"{name}_{model}")) is None:
        return "-"
    trials = metrics.get(f"{count}_{model}", metrics[count])  # some answered fewer
    around = binomtest(round(rate * trials), trials).proportion_ci(0.95, method="wilson")
    return f"{rate:.2f} [{around.low:.2f}, {around.high:.2f}]"
