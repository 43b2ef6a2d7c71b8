"""Checkpoints of a training run: sealed when complete, checked before a run goes on from one.

The trainer writes a checkpoint file by file under its final name. Only the seal, which comes last,
says that all of it is there.
"""

import hashlib
import json
import os
import signal
import threading
from pathlib import Path

import torch
from transformers import TrainerCallback, TrainerState
from transformers.trainer_pt_utils import LengthGroupedSampler

from helpers.config import Config
from helpers.data import curation_note, dataset_folder
from helpers.model import hub, loading
from helpers.runs import folders, inventory
from helpers.training import machine
from helpers.training.several_processes import in_any, wait_for_all

PLAN = "plan.json"
# What is decided for a step when it is planned to a card, and what a plan's run calls it.
PLANNED = {
    "per_device_train_batch_size": "batch",
    "grad_acc_steps": "accumulation",
    "activation_checkpointing": "checkpointing",
    "kept_layers": "kept_layers",
    "activation_offloading": "offload",
    "optim": "optimizer",
}
# Arguments of LoraConfig and SFTConfig in notebook 04, and the settings that they are given.
SAME_NAME = (
    *("lora_alpha", "lora_dropout", "target_modules", "max_steps", "learning_rate", "weight_decay"),
    *("max_grad_norm", "seed", "packing", "completion_only_loss", "eval_steps", "save_steps"),
)
GIVEN = dict(zip(SAME_NAME, SAME_NAME, strict=True)) | {
    "r": "lora_r",
    "num_train_epochs": "num_epochs",
    "lr_scheduler_type": "scheduler_type",
    "warmup_steps": "warmup_ratio",
}
# The settings of a Config that training depends on: other ones, another folder of checkpoints. Not
# here are those that only say where a layer's activations are in the meantime. What made the rows
# is not here either, for the rows themselves are asked.
NAMED_BY = (
    *sorted(GIVEN.values()),
    *("use_4bit", "keep_in_16bit", "bnb_4bit_compute_dtype", "bnb_4bit_compute_quant_type"),
    *("use_nested_quant", "fp16", "bf16", "group_by_length", "fast_path", "max_length"),
    *("max_train_length", "per_device_train_batch_size", "per_device_eval_batch_size"),
    *("grad_acc_steps", "optim", "early_stopping_patience"),
)


class TrainingInterrupted(KeyboardInterrupt):
    """A signal ended the run at a step's edge, with a checkpoint."""


class SealCheckpoints(TrainerCallback):
    """Seals each checkpoint once all of its files are written, and asks for room before."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if control.should_save:
            # The trained weights, and at most two float32 moments of each.
            needed = sum(p.nbytes + 8 * p.numel() for p in model.parameters() if p.requires_grad)
            folders.need_space(Path(args.output_dir), needed, "the next checkpoint")
            # The trainer notes which one is best once its folder is there. Under FSDP it would be
            # there too late, in one process or in both, and they would load different ones.
            folder_of_step(args, state).mkdir(parents=True, exist_ok=True)

    def on_save(self, args, state, control, **kwargs):
        wait_for_all()  # each process of DDP adds its own random numbers
        if state.is_world_process_zero:
            inventory.seal(folder_of_step(args, state))


class StopAtStepEdge(TrainerCallback):
    """While `with` lasts, Ctrl-C and SIGTERM end the run after the step, with a checkpoint.

    Each checkpoint, and so the last step, has a log line: a resume would lose the loss since one.
    """

    def __init__(self):
        self.received = None

    def __enter__(self):
        self.received, self.before = None, {}
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._note)

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        self.received = signal.Signals(number)

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = control.should_save or in_any(self.received is not None, args.device)
        control.should_log = control.should_log or control.should_save

    def on_save(self, args, state, control, **kwargs):
        if in_any(self.received is not None, args.device):
            who = self.received.name if self.received else "a signal to another process"
            raise TrainingInterrupted(
                f"{who} ended training after step {state.global_step}, and a checkpoint holds it: "
                "run the same cell or command again to go on from there"
            )


class SameOrder(TrainerCallback):
    """Draws an epoch's order from seed and epoch alone, so that a resumed process has it too."""

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        batches = train_dataloader.batch_sampler
        sampler = getattr(batches, "batch_sampler", batches).sampler  # DDP deals out another's
        if isinstance(sampler, LengthGroupedSampler):
            sampler.generator = torch.Generator().manual_seed(args.seed + int(state.epoch))


def folder_of(config: Config, tokenizer) -> Path:
    """Where the checkpoints of a training lie: named by all that it depends on, and nothing else.

    `config` is what was asked for, before it is planned: on a card with other memory a run goes on.
    """
    loading.load_shape(config.model_name)  # a model of the Hub has its commit on this disk then
    named_by = {name: getattr(config, name) for name in NAMED_BY} | {
        "planned": config.kept_layers is None,
        "device": config.device.split(":")[0],
        "processes": [os.environ.get("WORLD_SIZE", "1"), loading.is_sharded()],
        "dataset": dataset_folder.dataset_fingerprint(config),
        "tokenizer": [curation_note.tokenizer_rules(tokenizer), tokenizer.eos_token],
        "base_model": [*hub.identity(config.model_name).items()],
    }
    text = json.dumps(named_by, sort_keys=True)
    return config.checkpoints_dir / hashlib.sha256(text.encode()).hexdigest()[:12]


def changed_in_cells(arguments, lora, config: Config) -> dict:
    """What a reader has written into the calls of LoraConfig and SFTConfig in a setting's place."""
    expected = {name: getattr(config, field) for name, field in GIVEN.items()}
    expected |= {name: machine.steps_of(config)[name] for name in machine.STEPS}
    given = vars(lora) | vars(arguments)
    for values in (expected, given):
        values["target_modules"] = sorted(values["target_modules"])  # peft makes a set of them
    return {name: given[name] for name, value in expected.items() if given[name] != value}


def keep_apart(arguments, changed: dict) -> None:
    """Give a training whose calls were changed by hand a folder of its own, beside the Config's."""
    if changed:
        folder = Path(arguments.output_dir)
        digest = hashlib.sha256(repr(sorted(map(str, changed.items()))).encode()).hexdigest()[:6]
        arguments.output_dir = str(folder.with_name(f"{folder.name.split('-')[0]}-{digest}"))
        said = ", ".join(f"{name} = {value}" for name, value in changed.items())
        print(f"changed in the cells, so with checkpoints of its own: {said}")


def record_plan(folder: Path, config: Config) -> None:
    """Write down how the run in a folder takes its steps, as it begins."""
    plan = {name: getattr(config, name) for name in PLANNED}
    folders.write_text(folders.writable(folder) / PLAN, json.dumps(plan) + "\n")


def recorded_plan(folder: Path) -> dict:
    """The fields of a Config with which the run in a folder began; {} if it has no checkpoint."""
    if not any(folder.glob(f"checkpoint-*/{inventory.SEAL}")) or not (folder / PLAN).is_file():
        return {}
    return json.loads((folder / PLAN).read_text(encoding="utf-8"))


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
