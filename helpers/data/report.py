"""What a curation did, in numbers, and the card that tells them: the README.md of a dataset."""

import itertools
import operator
import re
from dataclasses import dataclass, field
from pathlib import Path

from helpers.config import Config
from helpers.data.posts import DataError, Posts
from helpers.data.rules import ADVICE, RULES
from helpers.runs.folders import public_name

METRICS = "raw_questions raw_answers kept_pairs train_rows validation_rows validation_leaks"
CARD = Path(__file__).with_name("card.md")
LICENCES = ("CC BY-SA 3.0", "CC BY-SA 4.0")  # those that the Hub knows by a tag


@dataclass
class Report:
    """What a curation did. `removed` maps each rule to the question ids it removed."""

    raw_questions: int = 0
    raw_answers: int = 0
    quarantined: int = 0  # lines of the source that are no rows; dataset/quarantine.jsonl has them
    removed: dict[str, list[int]] = field(default_factory=lambda: {rule: [] for rule in RULES})
    benchmark_hits: list[tuple[int, str]] = field(default_factory=list)
    near_pairs: list[tuple[int, int, float]] = field(default_factory=list)
    token_lengths: list[int] = field(default_factory=list)
    first_problem: str = ""  # what the verification says of the first prompt that fails
    kept_pairs: int = 0
    train_rows: int = 0
    validation_rows: int = 0
    validation_leaks: int = 0
    seconds: float = 0.0

    def metrics(self) -> dict[str, int | float]:
        """The numbers that notebook 02 records, but for what it verifies on the saved rows."""
        return {
            **{name: getattr(self, name) for name in METRICS.split()},
            "benchmark_hits_removed": len(self.removed["contaminated"]),
            "quarantined_lines": self.quarantined,
            "rows_per_second": (self.raw_questions + self.raw_answers) / self.seconds,
        }

    def funnel(self) -> list[tuple[str, str, int, int]]:
        """(rule, why, pairs removed, pairs left) of every rule in order, from all pairs on."""
        removed = [len(ids) for ids in self.removed.values()]
        left = itertools.accumulate(removed, operator.sub, initial=self.raw_questions)
        return list(zip(RULES, RULES.values(), removed, [*left][1:], strict=True))

    def too_few(self, what: str, *advice: str) -> DataError:
        """`what`, with the three rules that removed most and what to do about them."""
        removed = sorted(self.funnel(), key=lambda step: -step[2])
        most = [(rule, count) for rule, _, count, _ in removed[:3] if count]
        counts = ", ".join(f"{rule} {count}" for rule, count in most)
        told = "; ".join([*advice, *(ADVICE[rule] for rule, _ in most)])
        if self.first_problem:
            told += f"; the first problem of a prompt: {self.first_problem}"
        return DataError(f"{what}{counts and f' (removed: {counts})'}: {told}")


def dataset_card(config: Config, report: Report, posts: Posts) -> str:
    """The card of a whole dataset: card.md with the numbers of the run."""
    steps = ((rule, why, f"{gone:,} | {left:,}") for rule, why, gone, left in report.funnel())
    return CARD.read_text(encoding="utf-8").format(
        config=config,
        report=report,
        funnel="\n".join(f"| {' | '.join(step)} |" for step in steps),
        licence=posts.licence,
        tag=posts.licence.lower().replace(" ", "-") if posts.licence in LICENCES else "other",
        source=public_name(config.data_source),
        benchmarks=", ".join(map(public_name, config.benchmarks)),
        model=public_name(config.model_name),
    )


def card_of_part(card: str, rows: int, every: int, held: int) -> str:
    """The card of a repository with the first `rows` of `every` training rows, and all held out.

    What its owner wrote into the card stays.
    """
    part = f" (the first of {every:,})" if rows < every else ""
    counts = f"{rows:,} rows to train{part} and {held:,} to validate"
    return re.sub(r"(?m)^[\d,]+ rows to train and [\d,]+ to validate", counts, card, count=1)
