"""A pool of processes, or this process alone."""

import contextlib
import gc
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from helpers.data.posts import DataError


@contextlib.contextmanager
def spread_over(count: int) -> Iterator[Callable]:
    """`map` with the calls spread over `count` processes. DataError when one of them dies."""
    if count == 1:
        yield map
        return
    # Not "fork": the copy of a process with running threads (Arrow's, torch's) can hang. Garbage is
    # not looked for: a syntax tree is many objects and no cycle.
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), gc.disable)
    try:
        yield pool.map
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process died, probably for lack of memory: run with fewer workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
