"""Checkpoints of a training run: sealed when complete, checked before a run goes on from one.

The trainer writes a checkpoint file by file under its final name. Only the seal, which comes last,
says that all of it is there.
"""

import contextlib
import hashlib
import json
import os
import signal
import threading
from pathlib import Path

import torch
from transformers import TrainerCallback, TrainerState
from transformers.trainer_pt_utils import LengthGroupedSampler

from accelerate import PartialState
from helpers.config import Config
from helpers.data import curation_note, dataset_folder
from helpers.model import hub, loading
from helpers.runs import folders, inventory
from helpers.training.machine import of_all_processes

# What a training depends on: with another value, its checkpoints have another folder. Settings of a
# Config, and arguments of LoraConfig and SFTConfig as notebook 04's cells give them, changed by a
# reader or not. What made the rows is not here, for the rows themselves are asked, nor where a
# layer's activations are in the meantime.
SETTINGS = (
    *("use_4bit", "keep_in_16bit", "bnb_4bit_compute_dtype", "bnb_4bit_compute_quant_type"),
    *("use_nested_quant", "max_train_length", "early_stopping_patience", "fast_path"),
)
ARGUMENTS = (
    *("r", "lora_alpha", "lora_dropout", "target_modules", "max_steps", "num_train_epochs", "seed"),
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm"),
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
    *("max_length", "packing", "train_sampling_strategy", "completion_only_loss", "eval_steps"),
    *("save_steps", "optim", "fp16", "bf16"),
)


class TrainingInterrupted(KeyboardInterrupt):
    """A signal ended the run at a step's edge, with a checkpoint."""


class SafeCheckpoints(TrainerCallback):
    """Seals each checkpoint once all of its files are written, and has a log line before it.

    While it `listens`, Ctrl-C and SIGTERM end the run after the step, with a checkpoint. An epoch's
    order is drawn from seed and epoch alone, so that a resumed process has it too.
    """

    received = None  # the name of a signal

    @contextlib.contextmanager
    def listens(self):
        """To signals, in place of what else does."""
        self.received = None
        here = threading.current_thread() is threading.main_thread()  # others hear no signal
        numbers = (signal.SIGINT, signal.SIGTERM) if here else ()
        before = {number: signal.signal(number, self._note) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number, frame):
        self.received = signal.Signals(number).name

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        batches = train_dataloader.batch_sampler
        sampler = getattr(batches, "batch_sampler", batches).sampler  # DDP deals out another's
        if isinstance(sampler, LengthGroupedSampler):
            sampler.generator = torch.Generator().manual_seed(args.seed + int(state.epoch))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if control.should_save or any(of_all_processes(self.received)):
            # A resume would lose the loss since a log line.
            control.should_save = control.should_log = True
            # The trained weights, and at most two float32 moments of each.
            needed = sum(p.nbytes + 8 * p.numel() for p in model.parameters() if p.requires_grad)
            folders.need_space(Path(args.output_dir), needed, "the next checkpoint")
            # The trainer notes which one is best once its folder is there. Under FSDP it would be
            # there too late, in one process or in both, and they would load different ones.
            folder_of_step(args, state).mkdir(parents=True, exist_ok=True)

    def on_save(self, args, state, control, **kwargs):
        PartialState().wait_for_everyone()  # each process of DDP adds its own random numbers
        if state.is_world_process_zero:
            folders.follow_umask(folder_of_step(args, state))
            inventory.seal(folder_of_step(args, state))
        if received := [name for name in of_all_processes(self.received) if name]:
            raise TrainingInterrupted(
                f"{received[0]} ended training after step {state.global_step}, and a checkpoint "
                "holds it: run the same cell or command again to go on from there"
            )


def folder_of(config: Config, tokenizer) -> Path:
    """Where the checkpoints of all trainings lie that start from this model and these rows."""
    loading.load_shape(config.model_name)  # a model of the Hub has its commit on this disk then
    started_from = {name: getattr(config, name) for name in SETTINGS} | {
        "device": config.device.split(":")[0],
        "processes": [os.environ.get("WORLD_SIZE", "1"), loading.is_sharded()],
        "dataset": dataset_folder.dataset_fingerprint(config),
        "tokenizer": [curation_note.tokenizer_rules(tokenizer), tokenizer.eos_token],
        "base_model": [*hub.identity(config.model_name).items()],
    }
    return config.checkpoints_dir / _digest(started_from)


def folder_of_calls(folder: Path, arguments, lora) -> Path:
    """The folder in that one for a training with these SFTConfig and LoraConfig."""
    given = vars(lora) | vars(arguments)
    given["target_modules"] = sorted(given["target_modules"])  # peft makes a set of them
    return folder / _digest({name: given[name] for name in ARGUMENTS})


def _digest(values: dict) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def folder_of_step(args, state) -> Path:
    """Where the trainer puts the checkpoint of the step that it is at."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint; any newer one is passed over and named on the way."""
    for path in sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name[11:])):
        problem = "it was cut off while it was written"
        if (path / inventory.SEAL).is_file():
            try:
                inventory.check_seal(path, "04")
                return path
            except inventory.ArtefactError as error:
                problem = str(error)
        print(f"{path.name} is passed over: {problem}", flush=True)
    return None


def was_finished(trainer, checkpoint: Path) -> bool:
    """Whether its run had come to an end: then the trainer has the log and the best adapter now.

    Asked to resume from its last step, the Trainer would take one more.
    """
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    if not state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"]:
        return False
    trainer.state = state
    best = trainer.state.best_model_checkpoint or checkpoint  # the last, where no best was saved
    trainer.state.best_model_checkpoint = str(checkpoint.parent / Path(best).name)
    trainer._load_callback_state()
    trainer._load_best_model()
    return True
