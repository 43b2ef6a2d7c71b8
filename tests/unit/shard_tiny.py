"""Train a tiny model in shards on CPU processes, which accelerate would do on GPUs only.

torchrun --nproc_per_node 2 -m tests.unit.shard_tiny RUN_DIR MODEL_DIR ROWS

With one process it trains whole. What a CPU does in another way than a GPU, the adapters' kernel
and the answers' head, is switched off: both read weights of which a process has only a share.
"""

import contextlib
import sys
from pathlib import Path

from accelerate.state import DistributedType, PartialState

from helpers.training import training
from helpers.training.fast import answer_head
from tests.faults.train_tiny import tiny_config

start = PartialState.__init__


def start_as_on_gpus(self, *arguments, **options):
    start(self, *arguments, **options)
    if self._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
        self._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def sharded_config(run_dir, model_dir, rows: int):
    """Four steps in 4 bits, the same rows a step for each number of processes."""
    return tiny_config(
        Path(run_dir), Path(model_dir), use_4bit=True, lora_dropout=0.0, group_by_length=False,
        max_steps=4, per_device_train_batch_size=rows,
    )  # fmt: skip


if __name__ == "__main__":
    run_dir, model_dir, rows = sys.argv[1:]
    PartialState.__init__ = start_as_on_gpus
    training.kernels = lambda trainer: contextlib.nullcontext()
    answer_head.score_answers_alone = lambda model: None
    training.train(sharded_config(run_dir, model_dir, int(rows)))
