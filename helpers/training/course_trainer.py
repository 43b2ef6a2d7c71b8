"""trl's SFTTrainer, with what it was made from and what its run writes down beside the adapter."""

import contextlib
from collections.abc import Iterator

from datasets import DatasetDict
from transformers import EarlyStoppingCallback, PrinterCallback
from trl import SFTTrainer

from helpers.config import Config
from helpers.data import curation_note, dataset_folder
from helpers.training import callbacks, checkpoints


class CourseTrainer(SFTTrainer):
    """SFTTrainer that logs every step, and seals its checkpoints to go on from one.

    Attributes: `settings`, the Config as it was planned; `dataset`, the rows as they were given;
    `stop`, which ends a run at a step's edge; `trained_on`, the rows' checksum and their curation.
    """

    def __init__(self, config: Config, dataset: DatasetDict, **arguments):
        self.settings, self.dataset = config, dataset
        self.stop = checkpoints.StopAtStepEdge()
        self.trained_on = {
            "dataset": dataset_folder.dataset_fingerprint(config),
            "curation": curation_note.curation_of(config, config.dataset_dir),
        }
        super().__init__(
            train_dataset=dataset["train"],
            eval_dataset=dataset["validation"],
            callbacks=[
                callbacks.LogLines(),
                callbacks.StopOnDivergence(),
                checkpoints.SameOrder(),
                checkpoints.SealCheckpoints(),
                self.stop,
                checkpoints.LogEachCheckpoint(),  # also at one that a signal asked for
                EarlyStoppingCallback(early_stopping_patience=config.early_stopping_patience),
                callbacks.StepLog(),  # the last, which knows of everything that the others ask for
            ],
            **arguments,
        )
        self.remove_callback(PrinterCallback)  # LogLines prints the same numbers, readable

    def _load_from_checkpoint(self, *arguments, **options):
        with own_types(self.model):
            super()._load_from_checkpoint(*arguments, **options)

    def _load_best_model(self):
        with own_types(self.model):
            super()._load_best_model()


@contextlib.contextmanager
def own_types(model) -> Iterator[None]:
    """Let an adapter that is loaded keep its type, and its optimizer's moments with it.

    peft casts what it loads to float32. For the checkpoint that a run goes on from that would be
    another run, for the best one at the end a file of twice the size with the same numbers.
    """
    types = [(p, p.dtype) for name, p in model.named_parameters() if "lora_" in name]
    yield
    for parameter, dtype in types:
        if parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
