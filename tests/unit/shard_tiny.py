"""Train a tiny model in shards on CPU processes, which accelerate would do on GPUs only.

torchrun --nproc_per_node 2 -m tests.unit.shard_tiny SCRIPT

The script has the cells of notebook 04, see `export_training`. With one process it trains whole.
What a CPU does in another way than a GPU, the adapters' kernel and the answers' head, is switched
off: both read weights of which a process has only a share.
"""

import contextlib
import runpy
import sys

from accelerate.state import DistributedType, PartialState

from helpers.training import safety

start = PartialState.__init__


def start_as_on_gpus(self, *arguments, **options):
    start(self, *arguments, **options)
    if self._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
        self._shared_state["distributed_type"] = DistributedType.MULTI_GPU


if __name__ == "__main__":
    PartialState.__init__ = start_as_on_gpus
    safety.kernels = lambda trainer: contextlib.nullcontext()
    runpy.run_path(sys.argv[1], run_name="__main__")
