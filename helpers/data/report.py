"""What a curation did, in numbers."""

import contextlib
import itertools
import operator
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from helpers.data.posts import DataError
from helpers.data.rules import ADVICE, RULES

METRICS = "raw_questions raw_answers kept_pairs train_rows validation_rows validation_leaks"


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
    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def timed(self, step: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[step] = time.perf_counter() - started

    def metrics(self) -> dict[str, int | float]:
        """The numbers that notebook 02 records, but for what it verifies on the saved rows."""
        return {
            **{name: getattr(self, name) for name in METRICS.split()},
            "benchmark_hits_removed": len(self.removed["contaminated"]),
            "quarantined_lines": self.quarantined,
            "rows_per_second": (self.raw_questions + self.raw_answers) / sum(self.seconds.values()),
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
