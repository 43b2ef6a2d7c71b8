"""A run folder with a dataset, an adapter and metrics, made by the helpers in some seconds."""

import dataclasses
import shutil
from pathlib import Path

from benchmarks.notebook_04 import run_cells
from helpers.config import Config
from helpers.runs import inventory
from tests.notebook_code import curate, save_adapter


def make_run(model_dir: Path, tokenizer, run_dir: Path, **changes) -> Config:
    """Curate, build a trainer and save its adapter, untrained: what is tested is the files."""
    config = Config.from_profile(
        "smoke", model_name=str(model_dir), run_dir=run_dir, lora_r=4, max_steps=4, **changes
    )
    curate(config)
    save_adapter(run_cells(config, "trainer")["trainer"], config)
    inventory.record_metrics(config, "04", {"eval_loss_before": 2.5, "eval_loss_after": 1.5})
    inventory.record_metrics(config, "05", {"eval_loss_merged": 1.6})
    return config


def copy_run(config: Config, run_dir: Path) -> Config:
    """The same run in another folder, to be damaged."""
    shutil.copytree(config.run_dir, run_dir)
    return dataclasses.replace(config, run_dir=run_dir)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
