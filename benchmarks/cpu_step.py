"""A training step of profile `demo` on a CPU: this project's trainer against trl's own.

Same weights, same batches, taken in turns in one process:  python -m benchmarks.cpu_step RUN_DIR
RUN_DIR holds notebook 02's dataset. Needs 4 GB of memory and some ten minutes.
Writes benchmarks/results/cpu_step.json.
"""

import itertools
import json
import statistics
import sys
import time
from pathlib import Path

from benchmarks import notebook_04
from helpers.config import Config
from helpers.model import precision
from helpers.runs.environment import environment
from helpers.training import safety

RESULT = Path(__file__).parent / "results" / "cpu_step.json"
BATCHES = 6


def seconds_of(trainer, batch) -> float:
    """Seconds of one forward and backward pass."""
    start = time.perf_counter()
    trainer.compute_loss(trainer.model.train(), dict(batch)).backward()
    return time.perf_counter() - start


def main(run_dir: str) -> None:
    config = Config.from_profile("demo", run_dir=run_dir)
    ways = {way: notebook_04.run_cells(config, "trainer")["trainer"] for way in ("trl", "ours")}
    ours = ways["ours"]  # alone in the context of its kernels
    batches = list(itertools.islice(ours.get_train_dataloader(), BATCHES))
    speeds = {way: [] for way in ways}
    with safety.kernels(ours):
        for trainer in ways.values():
            seconds_of(trainer, batches[0])  # warm up
        for batch, (way, trainer) in itertools.product(batches, ways.items()):
            tokens = int(batch["attention_mask"].sum())
            speeds[way].append(tokens / seconds_of(trainer, batch))
    result = {
        **environment(),
        "dtype": str(precision.compute_dtype(config)),
        "tokens_per_second": {way: statistics.median(found) for way, found in speeds.items()},
        "ratios": [ours / trl for ours, trl in zip(speeds["ours"], speeds["trl"], strict=True)],
    }
    print(json.dumps(result, indent=1))
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
