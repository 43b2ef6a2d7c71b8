"""A pool of processes that works through the partitions of a source, with a progress bar."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from tqdm import tqdm

from helpers.sources import DataError, Partitions


class Workers:
    """One pool of processes for all passes; with a single worker everything runs in this process."""

    def __init__(self, count: int, progress: bool = False):
        self.count, self.progress, self.pool = count, progress, None

    def __enter__(self) -> "Workers":
        if self.count > 1:
            # "spawn": a fork of a process with running threads (Arrow's, torch's) can hang. Started now, the workers import while this process reads.
            self.pool = ProcessPoolExecutor(self.count, multiprocessing.get_context("spawn"))
            for _ in range(self.count):
                self.pool.submit(os.getpid)
        return self

    def __exit__(self, *error) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def run(self, function, partitions: Partitions, label: str):
        """function(number) of every partition, in order."""
        numbers, total = range(partitions.count), partitions.questions
        with bar(self.progress, label, " questions", total) as shown:
            try:
                results = self.pool.map(function, numbers) if self.pool else map(function, numbers)
                for number, result in enumerate(results, 1):
                    shown.move_to(total * number // partitions.count)
                    yield result
            except BrokenProcessPool as error:
                raise DataError(
                    f"a worker process died while {label}, probably for lack of memory: run with fewer workers"
                ) from error


class bar:
    """A progress bar with a rate, on stderr, or nothing."""

    def __init__(self, shown: bool, label: str, unit: str, total: int | None = None):
        self.shown, self.options = (
            shown,
            {"desc": label, "unit": unit, "total": total, "unit_scale": True},
        )

    def __enter__(self):
        self.bar = tqdm(disable=not self.shown, **self.options)
        return self

    def __exit__(self, *error):
        self.bar.close()

    def move_to(self, done: int, total: int | None = None) -> None:
        self.bar.total = total or self.bar.total
        self.bar.update(done - self.bar.n)
