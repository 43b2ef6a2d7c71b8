"""A training step of profile `demo` on a CPU: our output layer and adapters against trl's.

Same model, same batches, taken in turns in one process:  python benchmarks/cpu_step.py RUN_DIR
RUN_DIR holds notebook 02's dataset. Writes benchmarks/results/cpu_step.json.
"""

import itertools
import json
import statistics
import sys
import time
from pathlib import Path

from helpers import answer_head, fast_path, models, precision, report, training
from helpers.config import Config

RESULT = Path(__file__).parent / "results" / "cpu_step.json"
BATCHES = 6


def trainer_of(config, head=answer_head.score_answers_alone):
    """A trainer of the Config; head=None keeps trl's own output layer."""
    own = answer_head.score_answers_alone
    answer_head.score_answers_alone = head or (lambda model: None)
    try:
        model = models.load_model(config)
        dataset = training.load_dataset(config)
        return training.build_trainer(
            config, model, models.load_tokenizer(config.model_name), dataset
        )
    finally:
        answer_head.score_answers_alone = own


def seconds_of(trainer, batch) -> float:
    """Seconds of one forward and backward pass."""
    start = time.perf_counter()
    trainer.compute_loss(trainer.model.train(), dict(batch)).backward()
    return time.perf_counter() - start


def main(run_dir: str) -> None:
    config = Config.from_profile("demo", run_dir=run_dir)
    ways = {"trl": trainer_of(config, head=None), "ours": trainer_of(config)}
    batches = list(itertools.islice(ways["ours"].get_train_dataloader(), BATCHES))
    tokens = [int(batch["attention_mask"].sum()) for batch in batches]
    speeds = {way: [] for way in ways}
    with fast_path.in_place_adapters(ways["ours"].model):
        for trainer in ways.values():
            seconds_of(trainer, batches[0])  # warm up
        for batch, count in zip(batches, tokens, strict=True):
            for way, trainer in ways.items():
                speeds[way].append(count / seconds_of(trainer, batch))
    ratios = [ours / trl for ours, trl in zip(speeds["ours"], speeds["trl"], strict=True)]
    result = {
        **report.environment(),
        "dtype": str(precision.compute_dtype(config)),
        "tokens_per_second": {way: statistics.median(found) for way, found in speeds.items()},
        "ratios": ratios,
    }
    print(json.dumps(result, indent=1))
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
