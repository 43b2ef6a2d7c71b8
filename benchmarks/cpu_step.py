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

from trl import SFTTrainer

from helpers.config import Config
from helpers.model import loading, precision
from helpers.runs.environment import environment
from helpers.training import building, running, training_rows, trl_settings

RESULT = Path(__file__).parent / "results" / "cpu_step.json"
BATCHES = 6


def trl_trainer(config, tokenizer, dataset) -> SFTTrainer:
    """trl's trainer with the same settings; its adapter is given the format that ours has."""
    trainer = SFTTrainer(
        model=loading.load_model(config),
        args=trl_settings.sft_config(config),
        train_dataset=dataset["train"],
        eval_dataset=dataset["validation"],
        processing_class=tokenizer,
        peft_config=trl_settings.lora_config(config),
    )
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    precision.cast(trained, precision.adapter_dtype(config))
    return trainer


def seconds_of(trainer, batch) -> float:
    """Seconds of one forward and backward pass."""
    start = time.perf_counter()
    trainer.compute_loss(trainer.model.train(), dict(batch)).backward()
    return time.perf_counter() - start


def main(run_dir: str) -> None:
    config = Config.from_profile("demo", run_dir=run_dir)
    tokenizer, dataset = (
        loading.load_tokenizer(config.model_name),
        training_rows.load_dataset(config),
    )
    ours = building.build_trainer(config, loading.load_model(config), tokenizer, dataset)
    ways = {"trl": trl_trainer(config, tokenizer, dataset), "ours": ours}
    batches = list(itertools.islice(ours.get_train_dataloader(), BATCHES))
    speeds = {way: [] for way in ways}
    with running.kernels(ours):
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
