"""The code that notebook 01 teaches: truncation, LoRA by hand and by peft, the toy task."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from tests.notebook_code import definitions_from


@pytest.fixture(scope="module")
def lesson():
    return definitions_from("01")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_truncation_keeps_the_largest_terms(lesson):
    matrix = np.diag([1.0, 5.0, 3.0])
    assert np.allclose(lesson["truncate"](matrix, 2), np.diag([0.0, 5.0, 3.0]))


def test_lora_starts_as_no_change_and_trains_a_and_b_alone(lesson):
    weight, x = torch.randn(6, 8), torch.randn(5, 8)
    layer = lesson["LoRALinear"](weight, rank=2, alpha=4)
    assert torch.equal(layer(x), x @ weight.T)
    layer(x).square().sum().backward()
    assert layer.W.grad is None and not layer.A.grad.any() and layer.B.grad.any()
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"A", "B"}


@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_lora_equals_peft_outputs_and_gradients(lesson, rank_stabilized):
    """And rsLoRA is what the lesson says: alpha divided by the root of the rank."""
    ours = lesson["LoRALinear"](torch.randn(12, 24), 4, 6 * 2 if rank_stabilized else 6)
    settings = LoraConfig(r=4, lora_alpha=6, target_modules=["q"], use_rslora=rank_stabilized)
    block = nn.ModuleDict({"q": nn.Linear(24, 12, bias=False)})
    theirs = inject_adapter_in_model(settings, block)["q"]
    nn.init.normal_(ours.B)
    theirs.base_layer.weight.data.copy_(ours.W)
    their_a, their_b = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    their_a.data.copy_(ours.A), their_b.data.copy_(ours.B)
    x = torch.randn(5, 24)
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)
    ours(x).square().sum().backward(), theirs(x).square().sum().backward()
    assert torch.allclose(ours.A.grad, their_a.grad, rtol=1e-4)
    assert torch.allclose(ours.B.grad, their_b.grad, rtol=1e-4)


def test_lora_starts_with_the_same_spread_as_peft(lesson):
    ours = lesson["LoRALinear"](torch.zeros(64, 300), 64, 16).A
    assert ours.var().item() == pytest.approx(1 / (3 * 300), rel=0.05)
    assert ours.abs().max() <= 1 / 300**0.5


def test_merged_equals_unmerged(lesson):
    layer = lesson["LoRALinear"](torch.randn(6, 8).double(), 2, 3)
    nn.init.normal_(layer.B)
    x = torch.randn(5, 8).double()
    assert torch.allclose(x @ layer.merged().T, layer(x), atol=1e-12)
    assert not torch.allclose(x @ layer.W.T, layer(x), atol=1e-3)


@pytest.mark.parametrize("alpha_by_rank", [1, 0.5])
@pytest.mark.parametrize(("rank", "floor"), [(1, 4.0), (2, 0.0), (3, 0.0)])
def test_training_stops_at_the_tail_of_the_spectrum(lesson, rank, floor, alpha_by_rank):
    """For any alpha, as the answer to exercise 3 says."""
    x = lesson["whitened"](40, 10)
    assert torch.allclose(x.T @ x / 40, torch.eye(10).double())
    change = torch.zeros(10, 10).double()
    change[0, 3], change[4, 5] = 3.0, 2.0
    layer = lesson["LoRALinear"](torch.randn(10, 10).double(), rank, alpha_by_rank * rank)
    losses = lesson["train"](layer, x, x @ (layer.W + change).T)
    assert losses[0].item() == pytest.approx(13.0)
    assert losses[-1].item() == pytest.approx(floor, abs=1e-5)


@pytest.mark.parametrize(
    ("optimizer", "rank_stabilized", "factor"),
    [("SGD", False, 1 / 16), ("SGD", True, 1), ("Adam", False, 1), ("Adam", True, 4)],
)
def test_alpha_and_the_first_step_are_as_the_optional_part_says(
    lesson, optimizer, rank_stabilized, factor
):
    """The share of a random change that the first step covers, at rank 64 against rank 4."""

    def share(rank):
        change, x = torch.randn(64, 64).double(), 8 * torch.eye(64).double()
        alpha = 16 * rank**0.5 if rank_stabilized else 16
        layer = lesson["LoRALinear"](torch.zeros_like(change), rank, alpha)
        (layer(x) - x @ change.T).square().sum(dim=1).mean().backward()
        getattr(torch.optim, optimizer)([layer.B], lr=1e-3).step()
        return (layer.merged() * change).sum().item() / change.square().sum().item()

    shares = [np.mean([share(rank) for _ in range(20)]) for rank in (64, 4)]
    assert shares[0] / shares[1] == pytest.approx(factor, rel=0.2)
