"""The code that notebook 01 teaches: truncation, LoRA by hand, the toy task, an adapter's ranks."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

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


def test_tail_norms_are_the_norms_of_what_is_left_out(lesson):
    assert np.allclose(lesson["tail_norms"](np.array([12.0, 4.0, 3.0])), [13, 5, 3])


def test_eckart_young_holds_to_rounding_and_the_check_can_fail(lesson, monkeypatch):
    matrix = np.random.default_rng(0).normal(size=(20, 30))
    assert lesson["largest_gap"](matrix, np.arange(1, 20)) < 1e-12
    largest_gap = lesson["largest_gap"]
    monkeypatch.setitem(largest_gap.__globals__, "truncate", lambda matrix, rank: matrix * 0.5)
    assert largest_gap(matrix, [5]) > 1e-3


def test_picture_has_full_rank_and_little_of_it_matters(lesson):
    picture = lesson["make_picture"]()
    s = np.linalg.svd(picture, compute_uv=False)
    assert picture.shape == (96, 128) and np.linalg.matrix_rank(picture) == 96
    assert lesson["tail_norms"](s)[16] < 0.05 * np.linalg.norm(picture)


def test_read_weight_gives_float64(lesson, tmp_path):
    save_file({"w": torch.tensor([[1.0, 0.5]], dtype=torch.bfloat16)}, tmp_path / "m.safetensors")
    weight = lesson["read_weight"](tmp_path / "m.safetensors", "w")
    assert weight.dtype == np.float64 and weight.tolist() == [[1.0, 0.5]]


def test_lora_starts_as_no_change_and_trains_a_and_b_alone(lesson):
    weight, x = torch.randn(6, 8), torch.randn(5, 8)
    layer = lesson["LoRALinear"](weight, rank=2, alpha=4)
    assert torch.equal(layer(x), x @ weight.T)
    layer(x).square().sum().backward()
    assert layer.W.grad is None and not layer.A.grad.any() and layer.B.grad.any()
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"A", "B"}


@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_lora_equals_peft_outputs_and_gradients(lesson, rank_stabilized):
    ours = lesson["LoRALinear"](torch.randn(12, 24), 4, 6, rank_stabilized)
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


@pytest.mark.parametrize(("rank", "floor"), [(1, 4.0), (2, 0.0), (3, 0.0)])
def test_training_stops_at_the_tail_of_the_spectrum(lesson, rank, floor):
    x = lesson["whitened"](40, 10)
    assert torch.allclose(x.T @ x / 40, torch.eye(10).double())
    change = torch.zeros(10, 10).double()
    change[0, 3], change[4, 5] = 3.0, 2.0
    layer = lesson["LoRALinear"](torch.randn(10, 10).double(), rank, alpha=rank)
    losses = lesson["train"](layer, x, x @ (layer.W + change).T)
    assert losses[0].item() == pytest.approx(13.0)
    assert losses[-1].item() == pytest.approx(floor, abs=1e-6)


def test_first_step_covers_the_predicted_share(lesson):
    share = [lesson["first_step_share"](16, 32, False, torch.optim.SGD) for _ in range(20)]
    assert np.mean(share) == pytest.approx(2e-3 * 2**2 * 16 / (3 * 64), rel=0.1)


def test_product_spectrum_is_that_of_the_product(lesson):
    A, B = torch.randn(4, 30), torch.randn(20, 4)
    expected = torch.linalg.svdvals(B.double() @ A.double())[:4]
    assert torch.allclose(lesson["product_spectrum"](A, B), expected)


@pytest.mark.parametrize(
    ("strengths", "used"), [([1, 1, 1, 1], 4), ([3, 1, 0, 0], 1), ([2, 1, 1, 0], 3), ([0] * 4, 0)]
)
def test_ranks_used_counts_the_directions_that_hold_ninety_percent(lesson, strengths, used):
    A, B = torch.eye(4, 9), torch.eye(7, 4) * torch.tensor(strengths)
    name = "base_model.model.model.layers.5.mlp.up_proj.lora_{}.weight"
    table = lesson["ranks_used"]({name.format("A"): A, name.format("B"): B})
    assert table.loc[5, "up_proj"] == used


def test_ranks_used_reads_an_adapter_that_peft_saved(lesson, tmp_path):
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=11, **shape))
    settings = LoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(base, settings).save_pretrained(tmp_path)
    table = lesson["ranks_used"](load_file(tmp_path / "adapter_model.safetensors"))
    assert list(table.index) == list(range(11)) and set(table) == {"q_proj", "down_proj"}
    assert table.min().min() >= 1 and table.max().max() <= 3
