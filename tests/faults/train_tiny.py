"""Train a tiny model in a process of its own, for tests that kill it.

python -m tests.faults.train_tiny RUN_DIR MODEL_DIR NAME=VALUE...
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict

from benchmarks.notebook_04 import run_cells
from helpers import prompts
from helpers.config import SYSTEM_MESSAGE, Config
from helpers.training import callbacks
from tests.notebook_code import fine_tune


def tiny_config(run_dir: Path, model_dir: Path, **changes) -> Config:
    """A run in float32 and with dropout, so that an exact repetition is asked for."""
    settings = {
        "model_name": str(model_dir),
        "use_4bit": False,
        "bnb_4bit_compute_dtype": "float32",
        "bf16": False,
        "lora_r": 4,
        "lora_dropout": 0.1,
        "learning_rate": 1e-2,
        "max_train_rows": None,
        "max_steps": 6,
        "save_steps": 2,
        "eval_steps": 2,
        "early_stopping_patience": 1000,
        **changes,
    }
    return Config.from_profile("smoke", run_dir=run_dir, **settings)


def parameters_of(config: Config) -> dict:
    """What tells a notebook, or a script of its cells, to have the settings of a Config."""
    profile = vars(Config.from_profile(config.profile))
    changed = {n.upper(): value for n, value in vars(config).items() if value != profile[n]}
    return {"PROFILE": config.profile, **changed, "RUN_DIR": str(config.run_dir)}


def write_dataset(config: Config, rows: int = 40, held_out: int = 4) -> None:
    """Sums, asked and answered; the last rows are held out."""
    pairs = [
        {
            "prompt": prompts.render_prompt(f"What is {n} + {n}?", SYSTEM_MESSAGE),
            "completion": prompts.render_completion(f"1. Add them.\n2. It is {2 * n}."),
        }
        for n in range(rows)
    ]
    train, validation = pairs[:-held_out], pairs[-held_out:]
    splits = {"train": Dataset.from_list(train), "validation": Dataset.from_list(validation)}
    DatasetDict(splits).save_to_disk(config.dataset_dir)


def build(config: Config, **given):
    """The trainer that notebook 04's cells make."""
    if not config.dataset_dir.exists():
        write_dataset(config)
    return run_cells(config, "trainer", **given)["trainer"]


def outcome(trainer) -> dict:
    """What an interrupted run and an uninterrupted one must agree in."""
    history = trainer.state.log_history
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    bits = [p.detach().view(torch.uint8) for p in trained]  # numpy has no bfloat16
    digest = hashlib.sha256(b"".join(part.numpy().tobytes() for part in bits))
    return {
        "losses": [(entry["step"], float(entry["loss"])) for entry in history if "loss" in entry],
        "eval": [(e["step"], e["eval_loss"]) for e in history if "eval_loss" in e and e["step"]],
        "steps": [item["step"] for item in callbacks.step_log(trainer)],
        "adapter": digest.hexdigest(),
    }


if __name__ == "__main__":
    run_dir, model_dir, *changes = sys.argv[1:]
    settings = {name: json.loads(value) for name, value in (text.split("=") for text in changes)}
    trainer = build(tiny_config(Path(run_dir), Path(model_dir), **settings))
    fine_tune(trainer)
    print(json.dumps(outcome(trainer)))
