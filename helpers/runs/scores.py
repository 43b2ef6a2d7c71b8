"""The scores that notebook 06 recorded, as rows of a table: for the report and the model's card."""

from collections.abc import Sequence

from scipy.stats import binomtest

SCORES = {
    "stop": "stop by themselves",
    "parse": "hold code that parses",
    "steps": "explain in steps",
    "pass": "pass their tests",
}


def interval(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % confidence interval of a rate (Wilson 1927)."""
    found = binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    return found.low, found.high


def score_rows(metrics: dict, models: Sequence[str] = ("base", "tuned")) -> list[tuple]:
    """(what, a text such as 0.50 [0.30, 0.70] for each model) of the scores that were taken."""

    def with_interval(rate: float, model: str) -> str:
        fewer = model in ("merged", "requantized")
        problems = metrics["problems_merged" if fewer else "problems"]
        low, high = interval(round(rate * problems), problems)
        return f"{rate:.2f} [{low:.2f}, {high:.2f}]"

    return [
        (label, *(with_interval(metrics[f"{name}_rate_{model}"], model) for model in models))
        for name, label in SCORES.items()
        if f"{name}_rate_base" in metrics
    ]
