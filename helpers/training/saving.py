"""Save what was trained: the adapter, the tokenizer, the log, and what is noted of the rows."""

import json
import shutil
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from helpers.config import Config
from helpers.data import curation_note
from helpers.runs import folders, inventory
from helpers.training.callbacks import step_log
from helpers.training.course_trainer import CourseTrainer
from helpers.training.several_processes import wait_for_all


def save_adapter(trainer: CourseTrainer, tokenizer, config: Config) -> Path:
    """Write adapter, tokenizer and training log to run_dir/adapter, whole or not at all.

    The checkpoints have done their duty then and are removed. Of several processes, the first one
    does it.
    """
    wait_for_all()  # another may still be reading its best checkpoint
    weights = whole_adapter(trainer.model)
    if trainer.is_world_process_zero():
        with folders.writing_in(config.run_dir):  # no checkpoint that goes is somebody else's
            _write_adapter(trainer, tokenizer, config, weights)
    wait_for_all()
    return config.adapter_dir


def whole_adapter(model) -> dict[str, torch.Tensor]:
    """The trained weights by name. Under FSDP every process has a share of each, and all must ask.

    The base model's are not gathered: they may be more than the memory of one machine.
    """
    trained = [(name, p.detach()) for name, p in model.named_parameters() if p.requires_grad]
    return {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in trained}


def _write_adapter(trainer: CourseTrainer, tokenizer, config: Config, weights: dict) -> None:
    with folders.whole_folder(config.adapter_dir) as draft:
        trainer.model.save_pretrained(draft, state_dict=weights)
        tokenizer.save_pretrained(draft)
        log = {
            "history": [entry for entry in trainer.state.log_history if "seconds" not in entry],
            "steps": step_log(trainer),
            "dataset": trainer.trained_on["dataset"],
            "recipe": config.recipe,
        }
        (draft / inventory.TRAINING_LOG).write_text(
            json.dumps(log, indent=1, default=float), encoding="utf-8"
        )
        curation_note.write_curation(trainer.trained_on["curation"], draft)
        inventory.seal(draft)
    shutil.rmtree(config.checkpoints_dir, ignore_errors=True)
