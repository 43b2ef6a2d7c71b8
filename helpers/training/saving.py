"""What is saved beside the adapter, and that all of it is there or none."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from transformers.trainer import TRAINING_ARGS_NAME

from helpers.config import Config
from helpers.data import curation_note
from helpers.model import loading
from helpers.runs import folders, inventory
from helpers.training.callbacks import step_log
from helpers.training.safety import Settings, part_of, trained


@contextlib.contextmanager
def adapter_folder(trainer, config: Config) -> Iterator[Path]:
    """A folder for `trainer.save_model`; it becomes run_dir/adapter when `with` ends without error.

    It gets the training log, a note of the rows and checksums too; the checkpoints are removed.
    """
    trainer.accelerator.wait_for_everyone()  # another may still be reading its best checkpoint
    weights = whole_adapter(trainer.model) if loading.is_sharded() else None
    if trainer.is_world_process_zero():
        # No checkpoint that goes is somebody else's.
        with folders.writing_in(config.run_dir), folders.whole_folder(config.adapter_dir) as draft:
            yield draft
            if weights is not None:  # of shards, the trainer saves none
                trainer.model.save_pretrained(draft, state_dict=weights)
                trainer.processing_class.save_pretrained(draft)
            _write_notes(trainer, config, draft)
            inventory.seal(draft)
        shutil.rmtree(config.checkpoints_dir, ignore_errors=True)
    else:
        yield config.adapter_dir
    trainer.accelerator.wait_for_everyone()


def whole_adapter(model) -> dict[str, torch.Tensor]:
    """The trained weights by name. Under FSDP every process has a share, and all must ask."""
    shares = {name: parameter.detach() for name, parameter in trained(model)}
    return {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in shares.items()}


def _write_notes(trainer, config: Config, draft: Path) -> None:
    made_from = part_of(trainer, Settings)
    (draft / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle, which nothing here reads
    log = {
        "history": [entry for entry in trainer.state.log_history if "seconds" not in entry],
        "steps": step_log(trainer),
        "dataset": made_from.dataset_fingerprint,
        "recipe": config.recipe,
        "base": {name: getattr(config, name) for name in loading.PACKED_BY},
    }
    text = json.dumps(log, indent=1, default=float)
    (draft / inventory.TRAINING_LOG).write_text(text, encoding="utf-8")
    curation_note.write_curation(made_from.curation, draft)
