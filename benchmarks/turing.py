"""Train as a card before Ampere must (a T4): float16 compute, float32 adapters, a gradient scaler.

    python -m benchmarks.turing RUN_DIR [--steps 300]

Any GPU will do: it is told to compute in float16. RUN_DIR holds the dataset of notebook 02. Writes
results/turing.json: the type of everything that holds numbers, the losses, and how often the scaler
found an overflow and skipped a step. Needs 2 GB of a GPU; 300 steps took 261 s on an H100.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from transformers import TrainerCallback

from benchmarks import notebook_04
from helpers.config import Config
from helpers.runs.environment import environment

RESULTS = Path(__file__).resolve().parent / "results" / "turing.json"
HALF = {"fp16": True, "bf16": False, "bnb_4bit_compute_dtype": "float16"}


def settings(run_dir: Path, steps: int) -> Config:
    to_the_end = {"early_stopping_patience": 10**7, "max_steps": steps, "log_steps": 1}
    return Config.from_profile("demo", run_dir=run_dir, device_map={"": 0}, **to_the_end, **HALF)


class Watch(TrainerCallback):
    """Notes the gradient scaler's factor after each step: it halves when a step is skipped."""

    def __init__(self, trainer):
        self.trainer, self.scales = trainer, []

    def on_step_end(self, args, state, control, **kwargs):
        self.scales.append(self.trainer.accelerator.scaler.get_scale())


def types_of(trainer) -> dict[str, str]:
    """What holds which numbers, after training: kind -> type."""
    parameters = list(trainer.model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    moments = [
        value
        for state in trainer.optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value) and value.dim()
    ]
    groups = {
        "4-bit weights": [p for p in parameters if p.dtype == torch.uint8],
        "other frozen weights": [p for p in parameters if not p.requires_grad and p.dim() != 2],
        "adapter": trained,
        "optimizer's moments": moments,
    }
    return {
        name: ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))
        for name, tensors in groups.items()
    }


def train(config: Config) -> dict:
    trainer = notebook_04.run_cells(config, "trainer")["trainer"]
    watch = Watch(trainer)
    trainer.add_callback(watch)
    trainer, metrics = notebook_04.train(trainer)
    losses = [float(e["loss"]) for e in trainer.state.log_history if "loss" in e]
    pairs = zip(watch.scales, watch.scales[1:], strict=False)
    return {
        "steps": len(losses),
        "all_losses_finite": all(map(math.isfinite, losses)),
        "steps_skipped_by_the_scaler": sum(after < before for before, after in pairs),
        "types": types_of(trainer),
        **metrics,
        "losses": [round(loss, 4) for loss in losses],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    result = {
        "what": "QLoRA of the embedded model in float16 with float32 adapters, as on a T4",
        **environment(),
        **train(settings(options.run_dir, options.steps)),
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: value for name, value in result.items() if name != "losses"}, indent=1))


if __name__ == "__main__":
    main()
