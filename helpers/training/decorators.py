"""The article's two decorators: one measures the time of a function, one its memory."""

import functools
import time

from helpers.model import measure


def time_decorator(function):
    """Add `exec_time_seconds` to the metrics of a function that returns (result, metrics)."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        start = time.perf_counter()
        result, metrics = function(*args, **kwargs)
        return result, {**metrics, "exec_time_seconds": time.perf_counter() - start}

    return wrapper


def memory_decorator(function):
    """Add `peak_memory_bytes` to the metrics of a function of a trainer: (result, metrics).

    On a GPU that is what torch had allocated at most, on a CPU the resident memory of the process.
    """

    @functools.wraps(function)
    def wrapper(trainer):
        device = trainer.model.device
        measure.reset_peak_memory(device)
        result, metrics = function(trainer)
        return result, {**metrics, "peak_memory_bytes": measure.peak_memory_bytes(device)}

    return wrapper
