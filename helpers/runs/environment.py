"""On what does a run go: date, hardware and the versions that its numbers depend on."""

import datetime
import os
import platform
from importlib.metadata import version

import psutil

from helpers import __version__

RECORDED_VERSIONS = ("torch", "transformers", "peft", "trl", "bitsandbytes", "datasets")


def environment() -> dict[str, str]:
    """Date, hardware and versions, for a reader who wants to know where numbers come from."""
    import torch  # here, for speed: commands that run nothing import this module too

    kinds = dict.fromkeys(map(torch.cuda.get_device_name, range(torch.cuda.device_count())))
    gpu = ", ".join(kinds) or "no GPU"
    memory = f"{psutil.virtual_memory().total / 2**30:.0f} GiB of memory"
    return {
        "date": datetime.date.today().isoformat(),
        "course": __version__,
        "hardware": f"{os.cpu_count()} {platform.machine()} CPU cores, {memory}, {gpu}",
        "python": platform.python_version(),
        **{name: version(name) for name in RECORDED_VERSIONS},
    }
