"""Several processes that train one model, as `accelerate launch` starts them; one is several too.

Each runs notebook 04's own cells, see export.py.
"""

import contextlib
import dataclasses
import datetime
import os

import torch

from accelerate import PartialState
from helpers.config import Config, ConfigError
from helpers.model import loading
from helpers.runs import folders

LONGEST_WAIT = datetime.timedelta(minutes=30)  # for another, as transformers has it


def join(config: Config) -> None:
    """Meet the other processes, if there are several; then they can be asked."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        PartialState(cpu=config.device == "cpu", timeout=LONGEST_WAIT)


def for_this_process(config: Config) -> Config:
    """The Config with this process's GPU; in shards without the fast path, for whole weights."""
    rank = os.environ.get("LOCAL_RANK")
    if rank is None:
        return config
    if config.fit_to_memory:
        raise ConfigError("FIT_TO_MEMORY is True, and it works in one process only: set it False")
    if config.device == "cpu":
        return config
    fast = config.fast_path and not loading.is_sharded()
    return dataclasses.replace(config, device_map={"": int(rank)}, fast_path=fast)


def alone_there(config: Config):
    """Hold the run folder while `with` lasts, the first process for all; raises InUse."""
    first = os.environ.get("RANK", "0") == "0"
    return folders.writing_in(config.run_dir) if first else contextlib.nullcontext()


def wait_for_all() -> None:
    """Wait until every process has come here."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def in_any(raised: bool, device) -> bool:
    """Whether it is so in any process; all must ask, and then all have the same answer."""
    return bool(-least_of_all(-int(raised), device))


def least_of_all(number: int, device) -> int:
    """The smallest of the numbers that the processes ask with; all must ask."""
    if not torch.distributed.is_initialized():
        return number
    least = torch.tensor(number, device=device)
    torch.distributed.all_reduce(least, op=torch.distributed.ReduceOp.MIN)
    return int(least)
