"""Whatever is asked of a GPU is asked of the one that DEVICE_MAP names: on stand-ins for two."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import TrainerControl, TrainerState
from trl import SFTConfig

from benchmarks.llama2 import llama2_config
from helpers.config import Config
from helpers.merging import merging
from helpers.model import embedded, loading, measure, precision, predict
from helpers.runs import environment
from helpers.training import callbacks, machine, planning

SECOND = {"": 1}
ANSWERS = {
    "get_device_capability": (9, 0),
    "get_device_properties": SimpleNamespace(total_memory=80 * predict.GIB, major=9),
    "get_per_process_memory_fraction": 1.0,
    "mem_get_info": (0, 80 * predict.GIB),
    "memory_allocated": 7,
    "max_memory_allocated": 8,
    "reset_peak_memory_stats": None,
    "synchronize": None,
}


class TwoGpus:
    """Two GPUs, of which the first is the current one; `asked` are the numbers of those asked."""

    def __init__(self, monkeypatch):
        self.current, self.asked = 0, []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", self.answer(True))
        monkeypatch.setattr(torch.cuda, "set_device", self.make_current)
        for name, value in ANSWERS.items():
            monkeypatch.setattr(torch.cuda, name, self.answer(value))

    def answer(self, value):
        def asked_of(device=None, **options):
            index = (
                device if device is None or isinstance(device, int) else torch.device(device).index
            )
            self.asked.append(self.current if index is None else index)
            return value

        return asked_of

    def make_current(self, device):
        self.current = torch.device(device).index


@pytest.fixture
def gpus(monkeypatch):
    yield TwoGpus(monkeypatch)
    AcceleratorState._reset_state(reset_partial_state=True)  # what other trainers begin with


def config_on(place, **changes):
    return Config.from_profile("llama2_7b", device_map={"": place}, **changes)


def after_a_step(config):
    log, arguments = callbacks.StepLog(), SimpleNamespace(device=torch.device(config.device))
    state = TrainerState(global_step=1)
    log.on_train_begin(arguments, state, None)
    log.on_step_begin(arguments, state, None)
    log.on_step_end(arguments, state, TrainerControl(should_log=True))
    (step,) = state.log_history
    assert (step["memory_bytes"], step["peak_memory_bytes"]) == (7, 8)


def measured(config):
    trainer = SimpleNamespace(args=SimpleNamespace(device=torch.device(config.device)))
    _, metrics = callbacks.memory_decorator(lambda trainer: (trainer, {}))(trainer)
    assert metrics == {"peak_memory_bytes": 8}


QUESTIONS = {
    "number format": lambda config: precision.compute_dtype(
        Config.from_profile("demo", device_map=config.device_map)
    ),
    "fast path": planning.why_not_fast,
    "room for a plan": lambda config: planning.rooms(config, llama2_config("7B")),
    "room in shards": planning.refuse_without_room,
    "room for a merge": lambda config: merging.with_room(config, 1),
    "now": lambda config: measure.current_memory_bytes(config.device),
    "peak": lambda config: measure.peak_memory_bytes(config.device),
    "new peak": lambda config: measure.reset_peak_memory(config.device),
    "step log": after_a_step,
    "decorator": measured,
}


@pytest.mark.parametrize("place", [1, "cuda:1", 0, "cuda"])
@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_is_put_to_the_gpu_of_the_model(gpus, monkeypatch, question, place):
    monkeypatch.setattr(loading, "load_shape", lambda name: llama2_config("7B"))
    QUESTIONS[question](config_on(place))
    assert set(gpus.asked) == {1 if place in (1, "cuda:1") else 0}


def test_before_a_model_lies_on_a_gpu_nothing_of_the_host_is_counted_for_it(gpus):
    assert measure.current_memory_bytes("cuda:1") == 7
    assert measure.current_memory_bytes("cpu") > 10**7


@pytest.mark.parametrize(
    ("names", "shown"),
    [([], "no GPU"), (["T4"], "T4"), (["H200", "H200"], "H200"), (["T4", "L4"], "T4, L4")],
)
def test_every_kind_of_gpu_is_named(monkeypatch, names, shown):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_name", names.__getitem__)
    assert environment.environment()["hardware"].endswith(f"of memory, {shown}")


@pytest.mark.parametrize("place", [1, "cuda:1"])
def test_a_trainer_is_on_the_gpu_of_its_model(gpus, tmp_path, place):
    """Kernels, streams and a recorded step are those of the current GPU."""
    config = config_on(place)
    arguments = SFTConfig(str(tmp_path), **machine.for_this_machine(config))
    machine.on_one_device(arguments, config)
    assert arguments.device == torch.device("cuda:1") and arguments.n_gpu == 1
    assert arguments.distributed_state.device == torch.device("cuda:1")
    assert gpus.current == 1


def test_a_model_is_loaded_with_its_gpu_current(gpus, monkeypatch, tiny_model_dir):
    seen = []

    def load(path, device_map, **options):
        seen.append((gpus.current, device_map))
        return torch.nn.Linear(1, 1)

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.setattr(loading, "from_hub", lambda name, load, check: load(str(tiny_model_dir)))
    loading.load_model(config_on(1))
    loading.load_model(config_on("cuda"))
    assert seen == [(1, {"": "cuda:1"}), (0, {"": "cuda:0"})]


def test_a_gpu_that_is_not_there_is_named(gpus):
    with pytest.raises(
        embedded.ModelUnavailable,
        match=r"a model on cuda:2, and torch sees 2 GPU here, numbered from 0: set DEVICE_MAP",
    ):
        loading.use_device(config_on(2), "a model")
