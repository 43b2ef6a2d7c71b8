"""Training that is killed, stopped, damaged, out of room or out of hand loses nothing it had."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback, TrainerState
from trl import SFTTrainer

from helpers.data import dataset_folder
from helpers.runs import inventory
from helpers.runs.folders import DiskFull
from helpers.training import callbacks, checkpoints, safety
from helpers.view import live_chart
from tests.faults.train_tiny import build, outcome, tiny_config, write_dataset
from tests.notebook_code import fine_tune, save_adapter

KILLS = 5


@pytest.fixture
def config(tmp_path, tiny_model_dir):
    return tiny_config(tmp_path / "run", tiny_model_dir)


def finish(config):
    trainer, metrics = fine_tune(build(config))
    return outcome(trainer), metrics


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_model_dir):
    """What the run of `config` comes to when nothing disturbs it, and its metrics."""
    return finish(tiny_config(tmp_path_factory.mktemp("whole"), tiny_model_dir))


class StopAfter(TrainerCallback):
    """Ends the process's work in the middle of things, as a kill would, after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise InterruptedError("killed")


def interrupt(config, after):
    trainer = build(config)
    trainer.add_callback(StopAfter(after))
    with pytest.raises(InterruptedError):
        fine_tune(trainer)


@pytest.mark.parametrize(
    "after", [3, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 5))]
)
def test_a_resumed_run_ends_as_an_uninterrupted_one_bit_for_bit(config, whole, after):
    learnt, whole_metrics = whole
    interrupt(config, after)
    resumed, metrics = finish(config)
    assert resumed == learnt  # losses, their steps, the step log, and every bit of the adapter
    for name in ("eval_loss_before", "eval_loss_after"):
        assert metrics[name] == whole_metrics[name]


def test_a_resume_in_a_later_epoch_sees_the_same_batches(config):
    config = dataclasses.replace(config, max_steps=24, save_steps=3, eval_steps=3)
    whole, _ = finish(config)  # 18 steps are an epoch
    shutil.rmtree(config.checkpoints_dir)
    interrupt(config, 22)
    resumed, _ = finish(config)
    assert resumed == whole


def test_with_a_4bit_model_the_losses_agree_closely(config):
    config = dataclasses.replace(config, use_4bit=True, bnb_4bit_compute_dtype="bfloat16")
    whole, _ = finish(config)
    shutil.rmtree(config.checkpoints_dir)
    interrupt(config, 3)
    resumed, _ = finish(config)
    assert [step for step, _ in resumed["losses"]] == [step for step, _ in whole["losses"]]
    for (_, ours), (_, theirs) in zip(resumed["losses"], whole["losses"], strict=True):
        assert ours == pytest.approx(theirs, abs=5e-3)


def test_a_run_that_was_killed_after_its_last_step_takes_no_step_more(config):
    whole, whole_metrics = finish(config)
    again, metrics = finish(config)
    assert again == whole and again["steps"] == [1, 2, 3, 4, 5, 6]
    assert metrics["eval_loss_after"] == whole_metrics["eval_loss_after"]
    assert metrics["train_tokens_per_second"] == whole_metrics["train_tokens_per_second"]


def damage(path, how):
    data = path.read_bytes()
    if how == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif how == "flipped":
        path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    else:
        path.unlink()


@pytest.fixture(scope="module")
def checkpoints_of_a_run(tmp_path_factory, tiny_model_dir):
    """The folder of a run's checkpoints, to be copied and damaged."""
    trainer = build(tiny_config(tmp_path_factory.mktemp("kept"), tiny_model_dir))
    trainer.train()
    return Path(trainer.args.output_dir)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("adapter_model.safetensors", "cut"),
        ("SHA256SUMS", "gone"),
        pytest.param("adapter_model.safetensors", "flipped", marks=pytest.mark.slow),
        pytest.param("optimizer.pt", "flipped", marks=pytest.mark.slow),
        pytest.param("optimizer.pt", "gone", marks=pytest.mark.slow),
    ],
)
def test_a_damaged_checkpoint_is_named_and_passed_over(
    tmp_path, checkpoints_of_a_run, capsys, name, how
):
    folder = shutil.copytree(checkpoints_of_a_run, tmp_path / "run")
    assert checkpoints.latest(folder) == folder / "checkpoint-6"
    damage(folder / "checkpoint-6" / name, how)
    assert checkpoints.latest(folder).name in ("checkpoint-4", "checkpoint-2")
    said = capsys.readouterr().out
    assert "checkpoint-6 is passed over: " in said
    assert name in said or "cut off while it was written" in said


def test_a_disk_without_room_is_named_before_a_checkpoint_is_written(config, monkeypatch):
    Usage = namedtuple("Usage", "total used free")
    trainer = build(config)
    folder = Path(trainer.args.output_dir)

    def usage(path):
        return Usage(0, 0, 10**12 if not (folder / "checkpoint-2").exists() else 1000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(DiskFull, match="the next checkpoint needs .* MB .* are free: make room"):
        fine_tune(trainer)
    monkeypatch.undo()
    assert checkpoints.latest(folder) == folder / "checkpoint-2"
    resumed, _ = finish(config)
    assert resumed["steps"] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_signal_stops_at_a_step_edge_with_a_checkpoint(config, whole, number):
    trainer, before = build(config), signal.getsignal(number)

    class Sender(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                os.kill(os.getpid(), number)

    trainer.add_callback(Sender())
    with pytest.raises(
        KeyboardInterrupt, match=f"{number.name} ended training after step 3.*again"
    ):
        fine_tune(trainer)
    assert signal.getsignal(number) is before
    assert checkpoints.latest(Path(trainer.args.output_dir)).name == "checkpoint-3"
    resumed, _ = finish(config)
    assert resumed == whole[0]


@pytest.mark.parametrize(("loss", "stops"), [(1.0, False), (4.9, False), (5.1, True)])
def test_a_loss_that_explodes_stops_the_run_and_names_the_cause(config, loss, stops):
    arguments = SimpleNamespace(learning_rate=0.5, fp16=False, output_dir="checkpoints")
    state = TrainerState(global_step=7, log_history=[{"loss": 2.0}, {"eval_loss": 9.0}])
    expected = pytest.raises(
        callbacks.TrainingDiverged,
        match="step 7: the loss is 5.1.* LEARNING_RATE = 0.5 is too high",
    )
    with expected if stops else nullcontext():
        logs = {"loss": loss, "learning_rate": 0.5, "grad_norm": 1.0}
        callbacks.LogLines().on_log(arguments, state, None, logs=logs)


def test_a_loss_that_is_no_number_stops_the_run(config):
    trainer = build(config)
    trained = next(p for p in trainer.model.parameters() if p.requires_grad)
    torch.nn.init.constant_(trained, float("nan"))
    with pytest.raises(callbacks.TrainingDiverged, match="step 1: the loss is nan"):
        trainer.train()


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"activation_checkpointing": False}, "ACTIVATION_CHECKPOINTING = True"),
        (
            {"activation_checkpointing": True},
            "PER_DEVICE_TRAIN_BATCH_SIZE = 1, GRAD_ACC_STEPS = 2, PER_DEVICE_EVAL_BATCH_SIZE = 1",
        ),
        ({"activation_checkpointing": True, "kept_layers": 21}, "KEPT_LAYERS = 10"),
    ],
)
def test_a_full_gpu_is_answered_with_the_next_rung(config, monkeypatch, changes, advice):
    trainer = build(dataclasses.replace(config, **changes))

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trainer, "train", full)
    with pytest.raises(safety.OutOfMemory, match=f"set {advice}.* saves about .* GiB"):
        fine_tune(trainer)


@pytest.mark.parametrize("batch", range(1, 65))
def test_every_rung_keeps_the_rows_of_a_step(config, batch):
    for accumulation in range(1, 65):
        rung = dataclasses.replace(
            config,
            activation_checkpointing=True,
            per_device_train_batch_size=batch,
            grad_acc_steps=accumulation,
        )
        seen = [batch]
        while rung.per_device_train_batch_size > 1:
            rung = dataclasses.replace(rung, **safety.next_rung(rung))
            seen.append(rung.per_device_train_batch_size)
            assert seen[-1] * rung.grad_acc_steps == batch * accumulation
        rows = range(1, batch)
        assert seen[1:] == [n for n in reversed(rows) if batch * accumulation % n == 0]


class Card:
    """A GPU of a given size: a step with more rows, or without checkpointing, does not fit."""

    def __init__(self, monkeypatch, rows):
        self.rows, self.asked = rows, []
        self.step = SFTTrainer.training_step
        monkeypatch.setattr(SFTTrainer, "training_step", self._training_step())

    def _training_step(card):
        def training_step(trainer, *args, **kwargs):
            arguments = trainer.args
            settings = (arguments.activation_checkpointing, arguments.per_device_train_batch_size)
            card.asked.append((*settings, arguments.gradient_accumulation_steps))
            if not settings[0] or settings[1] > card.rows:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return card.step(trainer, *args, **kwargs)

        return training_step


def test_a_run_may_take_the_rungs_by_itself(config, monkeypatch, capsys):
    card = Card(monkeypatch, rows=1)
    small = dataclasses.replace(config, fit_to_memory=True, per_device_train_batch_size=4)
    first = build(small)
    view = live_chart.chart(first)
    trainer, metrics = fine_tune(first)
    assert f"step {small.max_steps} of {small.max_steps}" in view.value  # it follows the last one
    assert list(dict.fromkeys(card.asked)) == [
        (False, 4, 1),
        (True, 4, 1),
        (True, 2, 2),
        (True, 1, 4),
    ]
    assert trainer.state.global_step == small.max_steps and metrics["exec_time_seconds"] > 0
    said = capsys.readouterr().out
    assert said.count("the GPU's memory is full: set ") == 3
    assert "full: set ACTIVATION_CHECKPOINTING = True, which saves about" in said


def test_a_rung_that_changes_no_step_goes_on_from_the_checkpoints(config, whole, monkeypatch):
    taken, step = [], SFTTrainer.training_step

    def training_step(trainer, *args, **kwargs):
        now = trainer.args.activation_checkpointing, trainer.state.global_step
        taken.append(now)
        if now == (False, 5):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(trainer, *args, **kwargs)

    monkeypatch.setattr(SFTTrainer, "training_step", training_step)
    found, _ = finish(dataclasses.replace(config, fit_to_memory=True))
    assert taken[5:] == [(False, 5), (True, 4), (True, 5)] and found == whole[0]


def test_a_cell_that_took_rungs_and_was_stopped_goes_on_in_their_folder(config, monkeypatch):
    """The notebook still has the trainer of the first rung then."""
    Card(monkeypatch, rows=1)
    config = dataclasses.replace(config, fit_to_memory=True)
    whole, _ = finish(config)
    shutil.rmtree(config.checkpoints_dir)
    trainer = build(config)
    send_in_step(trainer, 2)
    with pytest.raises(KeyboardInterrupt):
        fine_tune(trainer)
    trainer, _ = fine_tune(trainer)
    assert outcome(trainer) == whole


def test_a_run_that_took_rungs_is_the_run_that_began_there(config, monkeypatch):
    rung = {"activation_checkpointing": True, "per_device_train_batch_size": 1, "grad_acc_steps": 2}
    expected, _ = finish(dataclasses.replace(config, **rung, per_device_eval_batch_size=1))
    shutil.rmtree(config.checkpoints_dir)
    Card(monkeypatch, rows=1)
    found, _ = finish(dataclasses.replace(config, fit_to_memory=True))
    assert found == expected


# -- The same cell again, in the same kernel.


def send_in_step(trainer, step, number=signal.SIGINT):
    """Send a signal to this process once, in the step after `step`."""

    class Sender(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == step and not sent:
                sent.append(step)
                os.kill(os.getpid(), number)

    sent = []
    trainer.add_callback(Sender())


def same(first, second):
    """Whether two runs agree in what they learnt and in both of their validation losses."""
    (learnt, metrics), (again, metrics_again) = first, second
    names = ("eval_loss_before", "eval_loss_after")
    return learnt == again and all(metrics[name] == metrics_again[name] for name in names)


def test_after_ctrl_c_the_same_cell_goes_on_to_the_end(config, whole):
    trainer = build(config)
    send_in_step(trainer, 2)
    with pytest.raises(KeyboardInterrupt):
        fine_tune(trainer)
    trainer, metrics = fine_tune(trainer)
    assert same((outcome(trainer), metrics), whole)


@pytest.mark.parametrize("after", [1, 3])
def test_after_an_error_the_same_cell_does_not_begin_with_what_was_learnt(config, whole, after):
    """After step 1 there is no checkpoint to go on from, so it begins with a fresh adapter."""
    trainer = build(config)
    trainer.add_callback(StopAfter(after))
    with pytest.raises(InterruptedError):
        fine_tune(trainer)
    trainer.remove_callback(StopAfter)
    trainer, metrics = fine_tune(trainer)
    assert same((outcome(trainer), metrics), whole)


def test_a_run_that_is_over_is_the_same_when_its_cell_runs_again(config):
    trainer, metrics = fine_tune(build(config))
    first = (outcome(trainer), metrics)
    trainer, metrics = fine_tune(trainer)
    assert same((outcome(trainer), metrics), first)


# -- Numbers of a run that was interrupted, or that is short.


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_every_step_keeps_its_seconds_and_its_tokens_through_a_resume(config, how):
    config = dataclasses.replace(config, log_steps=4, max_steps=7)
    trainer, _ = fine_tune(build(config))
    losses = outcome(trainer)["losses"]
    tokens = [step["tokens"] for step in callbacks.step_log(trainer)]
    assert len(tokens) == 7 and min(tokens) > 0
    shutil.rmtree(config.checkpoints_dir)
    if how == "killed":
        interrupt(config, 6)
    else:
        trainer = build(config)
        send_in_step(trainer, 5)
        with pytest.raises(KeyboardInterrupt):
            fine_tune(trainer)
    trainer, metrics = fine_tune(build(config))
    steps = callbacks.step_log(trainer)
    assert [step["tokens"] for step in steps] == tokens
    assert outcome(trainer)["losses"] == losses and [step for step, _ in losses] == [2, 4, 6, 7]
    seconds = sum(step["seconds"] for step in steps)
    assert metrics["train_tokens_per_second"] == pytest.approx(sum(tokens) / seconds)


def test_the_tokens_of_a_step_are_those_of_its_rows(config):
    trainer = build(dataclasses.replace(config, grad_acc_steps=2, max_steps=3))
    fine_tune(trainer)
    rows = trainer.train_dataset["input_ids"]
    longest, shortest = max(map(len, rows)), min(map(len, rows))
    for step in callbacks.step_log(trainer):
        assert 4 * shortest <= step["tokens"] <= 4 * longest


def test_fewer_steps_than_a_log_line_takes_are_trained_and_measured(config):
    config = dataclasses.replace(config, max_steps=3, log_steps=5, eval_steps=5, save_steps=5)
    first = trainer, metrics = fine_tune(build(config))
    assert metrics["train_tokens_per_second"] > 0
    history = trainer.state.log_history
    assert [entry["step"] for entry in history if "loss" in entry] == [3]
    assert [entry["step"] for entry in history if "eval_loss" in entry][-1] == 3
    first = (outcome(trainer), metrics)
    assert same(finish(config), first)  # in a fresh kernel: it was over, and only not saved


def test_the_loss_after_is_that_of_the_adapter_which_is_kept(config):
    """Here the best evaluation is of a step without a checkpoint."""
    wild = {"learning_rate": 0.05, "scheduler_type": "constant", "max_grad_norm": 100.0}
    steps = {"save_steps": 6, "eval_steps": 1, "log_steps": 50, "max_steps": 7}
    trainer, metrics = fine_tune(build(dataclasses.replace(config, **wild, **steps)))
    assert trainer.state.best_global_step not in (6, 7)
    assert metrics["eval_loss_after"] == pytest.approx(trainer.evaluate()["eval_loss"], abs=1e-5)


# -- The folder of a run is named by what its training depends on.


def test_other_data_under_a_run_that_was_not_saved_is_trained_on(config):
    old, _ = finish(config)
    shutil.rmtree(config.dataset_dir)
    write_dataset(config, rows=30)
    assert finish(config)[0]["losses"] != old["losses"]


def test_what_training_does_not_depend_on_changes_nothing(config):
    interrupt(config, 5)
    other = {"sandbox": "off", "max_new_tokens": 3, "merge_into": "4bit"}
    other |= {"evaluation_problems": (9, 0, 0, 0)}
    other |= {"hf_hub_model_name": "me/mine", "log_steps": 2, "profile": "demo"}
    trainer = build(dataclasses.replace(config, **other))
    begun = []

    class Note(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            begun.append(state.global_step)

    trainer.add_callback(Note())
    fine_tune(trainer)
    assert begun[0] == 4


def test_the_log_names_the_data_that_was_trained_on(config):
    trainer, _ = fine_tune(build(config))
    trained_on = dataset_folder.dataset_fingerprint(config)
    shutil.rmtree(config.dataset_dir)
    write_dataset(config, rows=30)
    save_adapter(trainer, config)
    log = json.loads((config.adapter_dir / inventory.TRAINING_LOG).read_text(encoding="utf-8"))
    assert log["dataset"] == trained_on != dataset_folder.dataset_fingerprint(config)


# -- A process that is killed.


def start(run_dir, model_dir, **changes):
    settings = [f"{name}={json.dumps(value)}" for name, value in changes.items()]
    command = [sys.executable, "-m", "tests.faults.train_tiny", str(run_dir), str(model_dir)]
    return subprocess.Popen([*command, *settings], stdout=subprocess.PIPE, encoding="utf-8")


def last_step(line: str) -> int:
    return int(line.split()[1].split("/")[0]) if line.startswith("step") else 0


@pytest.mark.slow
def test_kills_at_random_moments_change_nothing(tmp_path, tiny_model_dir):
    settings = {"max_steps": 60, "save_steps": 3, "eval_steps": 3}
    output, _ = start(tmp_path / "whole", tiny_model_dir, **settings).communicate(timeout=300)
    whole, chance, kills = json.loads(output.splitlines()[-1]), random.Random(3), 0
    run_dir = tmp_path / "killed"
    config = tiny_config(run_dir, tiny_model_dir, **settings)
    write_dataset(config)
    folder = Path(build(config).args.output_dir)
    while kills < KILLS:
        process = start(run_dir, tiny_model_dir, **settings)
        seen = read_some(process, lines=chance.randint(1, 8))
        time.sleep(chance.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        seen = max([seen, *map(last_step, process.communicate()[0].splitlines())])
        kills += process.returncode == -signal.SIGKILL
        kept = checkpoints.latest(folder)
        reached = int(kept.name.split("-")[1]) if kept else 0
        assert seen - reached <= 2 * settings["save_steps"]  # the newest may be the one cut off
        if process.returncode == 0:
            shutil.rmtree(folder)  # it came to its end before it was killed: from the start
    output, _ = start(run_dir, tiny_model_dir, **settings).communicate(timeout=300)
    assert json.loads(output.splitlines()[-1]) == whole


def read_some(process, lines: int) -> int:
    """The last step that a process names in its next lines of training."""
    seen = 0
    for line in process.stdout:
        seen, lines = max(seen, last_step(line)), lines - line.startswith("step")
        if lines == 0:
            break
    return seen
