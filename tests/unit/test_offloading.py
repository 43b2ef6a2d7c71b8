"""Offloaded layers, with a stream whose copies are made when somebody waits for them."""

import weakref
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from helpers.model import steps
from helpers.training.fast import fast_path
from helpers.training.fast.offloading import Offloaded, run_and_tell

LAYERS = 12
make_copy = torch.Tensor.copy_


class LateStream:
    """The latest that a GPU may copy: when another stream waits. What was freed is an error."""

    current = None

    def __init__(self):
        self.asked, self.made = [], 0

    def wait_stream(self, other):
        """What computes here has computed already."""

    def record_event(self):
        return partial(self.copy_until, len(self.asked))

    def wait_event(self, event):
        event()

    def copy_until(self, count):
        for target, source in self.asked[self.made : count]:
            assert source() is not None, "its memory was given away before it was copied"
            make_copy(target, source())
        self.made = max(self.made, count)


@contextmanager
def use(stream):
    LateStream.current = stream
    yield
    LateStream.current = None


def copy_late(target, source, non_blocking=False):
    if LateStream.current is None:
        return make_copy(target, source)
    assert non_blocking
    LateStream.current.asked.append((target, weakref.ref(source)))


@pytest.fixture
def late(monkeypatch):
    compute = LateStream()
    monkeypatch.setattr(torch.cuda, "Stream", LateStream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: compute)
    monkeypatch.setattr(torch.cuda, "stream", use)
    monkeypatch.setattr(torch.Tensor, "copy_", copy_late)
    empty_like = torch.empty_like
    monkeypatch.setattr(
        torch, "empty_like", lambda *args, **options: empty_like(*args, **options).fill_(torch.nan)
    )


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = (torch.nn.Linear(16, 16, bias=False) for _ in range(2))

    def forward(self, x):
        return x + self.down(F.silu(self.up(x)))


def run(layers, x, checkpointing: bool):
    """The gradients of all weights; each layer as its checkpoints want it."""
    for layer in layers:
        layer.zero_grad()
        x = layer._gradient_checkpointing_func(layer, x) if checkpointing else layer(x)
    x.square().sum().backward()
    return [parameter.grad for layer in layers for parameter in layer.parameters()]


@pytest.mark.parametrize("kept_layers", [0, 1, 3, 4, 6, LAYERS - 3, LAYERS])
def test_offloaded_layers_have_the_gradients_that_they_have_without(late, kept_layers):
    torch.manual_seed(0)
    layers = [Layer() for _ in range(LAYERS)]
    fast_path.choose_checkpoints(layers, kept_layers, keep_weights=False, offload=True)
    for _ in range(2):  # the second pass uses the buffers of the first
        x = torch.randn(8, 16, requires_grad=True)
        plain, offloaded = (run(layers, x, checkpointing) for checkpointing in (False, True))
        assert all(map(torch.equal, plain, offloaded))


def offloaded_in(layers) -> dict[int, Offloaded]:
    """By place, also where a layer tells another one besides."""
    ways = [layer._gradient_checkpointing_func for layer in layers]
    for index, way in enumerate(ways):
        while isinstance(way, partial) and way.func is run_and_tell:
            _, way = way.args
        ways[index] = way
    return {index: way for index, way in enumerate(ways) if isinstance(way, Offloaded)}


@pytest.mark.parametrize("kept_layers", [0, 4])
def test_what_the_plan_counts_is_what_moves_and_nothing_stays(late, kept_layers):
    layers = [Layer() for _ in range(LAYERS)]
    fast_path.choose_checkpoints(layers, kept_layers, keep_weights=False, offload=True)
    found = offloaded_in(layers)
    assert list(found) == list(steps.offloaded_layers(LAYERS, kept_layers)) != []
    x = torch.randn(32, 16, requires_grad=True)
    run(layers, x, checkpointing=True)
    for layer in found.values():
        # The inputs of the layer, of the gate and of the last product; no weight, they are smaller.
        assert [buffer.nbytes for buffer in layer.buffers] == [x.nbytes] * 3
        assert layer.leaving == [] and set(layer.back) == {None}


def test_an_offloaded_layer_has_layers_after_it_to_travel_through():
    for kept_layers in range(33):
        lead = steps.offload_lead(kept_layers)
        places = steps.offloaded_layers(32, kept_layers)
        assert 3 <= lead <= 7
        assert all(place + lead < 32 and place < 32 - kept_layers for place in places)
