"""The article's two decorators: one measures the time of a function, one its memory.

The function takes a trainer and returns it with its metrics; each adds one to these.
"""

import functools
import time

from helpers.model import measure


def time_decorator(function):
    """Add `exec_time_seconds`."""

    @functools.wraps(function)
    def wrapper(trainer):
        start = time.perf_counter()
        result, metrics = function(trainer)
        return result, {**metrics, "exec_time_seconds": time.perf_counter() - start}

    return wrapper


def memory_decorator(function):
    """Add `peak_memory_bytes`: torch's allocations on a GPU, resident memory on a CPU."""

    @functools.wraps(function)
    def wrapper(trainer):
        device = trainer.model.device
        measure.reset_peak_memory(device)
        result, metrics = function(trainer)
        return result, {**metrics, "peak_memory_bytes": measure.peak_memory_bytes(device)}

    return wrapper
