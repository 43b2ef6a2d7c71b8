"""A pool of processes that works through the partitions of a source, with a progress bar."""

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial

from tqdm import tqdm

from helpers.data.sources import DataError, Partitions

# Not "fork": the copy of a process with running threads (Arrow's, torch's) can hang. A fork server
# imports once and has no threads; Windows has none.
SERVER, SPAWN = "forkserver", "spawn"
START_METHOD = SERVER if SERVER in multiprocessing.get_all_start_methods() else SPAWN


class Workers:
    """One pool of processes for all passes; a single worker is this process itself.

    `prepare` is called once in each worker when it starts. The fork server imports while this
    process still reads the source.
    """

    def __init__(self, count: int, progress: bool = False, prepare: Callable = os.getpid):
        self.count, self.progress, self.prepare, self.pool = count, progress, prepare, None

    def __enter__(self) -> "Workers":
        if self.count > 1:
            context = multiprocessing.get_context(START_METHOD)
            if START_METHOD == SERVER:
                from multiprocessing import forkserver

                context.set_forkserver_preload(["helpers.data.curation"])
                forkserver.ensure_running()
            self.pool = ProcessPoolExecutor(self.count, context, self.prepare)
        return self

    def __exit__(self, *error) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def begin(self, function, *arguments) -> Callable:
        """What gives function(*arguments) when it is called; another process begins at once."""
        if self.pool:
            return self.pool.submit(function, *arguments).result
        return partial(function, *arguments)

    def run(self, function, partitions: Partitions, label: str):
        """function(number) of every partition, in order; the other processes begin at once."""
        numbers = range(partitions.count)
        with all_alive(label):
            results = self.pool.map(function, numbers) if self.pool else map(function, numbers)
        return self._shown(results, partitions, label)

    def _shown(self, results, partitions: Partitions, label: str):
        total = partitions.questions
        with bar(self.progress, label, " questions", total) as shown, all_alive(label):
            for number, result in enumerate(results, 1):
                shown.advance(total * number // partitions.count - shown.bar.n)
                yield result


@contextmanager
def all_alive(label: str):
    """Say in one sentence that a process of the pool has died; DataError."""
    try:
        yield
    except BrokenProcessPool as error:
        raise DataError(
            f"a worker process died while {label}, probably for lack of memory: run with fewer "
            "workers"
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

    def advance(self, by: int, total: int | None = None) -> None:
        self.bar.total = total or self.bar.total
        self.bar.update(by)
