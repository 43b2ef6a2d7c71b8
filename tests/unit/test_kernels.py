"""The fused operations, each against what it stands for, on a tiny model and a CPU.

What torch.compile makes of them for a GPU is the business of its own tests; here they run as they
are written.
"""

from functools import partial

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from peft.tuners.lora.bnb import Linear4bit

from helpers.config import ALL_LINEAR_TARGETS, ATTENTION_TARGETS, Config
from helpers.model import loading
from helpers.training.fast import fast_path, kernels
from tests.conftest import fill_adapters, lora_of, relative_error
from tests.walking import save_random_model


@pytest.fixture(autouse=True)
def not_compiled(monkeypatch):
    monkeypatch.setattr(kernels, "compiled", lambda function: function)


@pytest.fixture
def make_layer(tiny_model_dir, tmp_path):
    """A function that returns the first decoder layer of a tiny Llama in 4 bits with adapters."""

    def make(dtype="float32", **changes):
        torch.manual_seed(0)
        config = Config.from_profile(
            "demo", model_name=str(tiny_model_dir), run_dir=tmp_path, bnb_4bit_compute_dtype=dtype,
            bf16=dtype == "bfloat16", keep_in_16bit=(), **changes,
        )  # fmt: skip
        model = get_peft_model(loading.load_model(config), lora_of(config))
        model.to(getattr(torch, dtype))
        fill_adapters(model)
        return model.get_base_model().model.layers[0]

    return make


def compare(ours, theirs, modules, width, dtype="float32") -> float:
    """The largest relative error of outputs and gradients; both are functions of x."""
    found = []
    for forward in (ours, theirs):
        torch.manual_seed(1)
        x = torch.randn(1, 12, width, dtype=getattr(torch, dtype), requires_grad=True)
        outputs = forward(x)
        sum(output.float().square().sum() for output in outputs).backward()
        trained = [p for m in modules for p in m.parameters() if p.requires_grad]
        found.append([*(output.detach() for output in outputs), x.grad, *(p.grad for p in trained)])
        for parameter in trained:
            parameter.grad = None
    return max(relative_error(*pair) for pair in zip(*found, strict=True))


# bfloat16 rounds at 4e-3
@pytest.mark.parametrize("dtype, rounding", [("bfloat16", 1e-2), ("float32", 1e-5)])
def test_an_adapter_in_place_equals_pefts_forward_and_backward(make_layer, dtype, rounding):
    layer = make_layer(dtype)
    modules = [module for module in layer.modules() if isinstance(module, Linear4bit)]
    assert len(modules) == len(ALL_LINEAR_TARGETS)
    for module in modules:
        error = compare(
            lambda x, module=module: [kernels.lora_forward(module, x)],
            lambda x, module=module: [module(x)],
            [module], module.in_features, dtype,
        )  # fmt: skip
        assert error < rounding


def test_layers_that_read_the_same_equal_each_one_alone(make_layer):
    attention = make_layer().self_attn
    modules = [attention.q_proj, attention.k_proj, attention.v_proj]
    error = compare(
        lambda x: kernels.joint_lora_forward(modules, kernels.as_it_is, x),
        lambda x: [module(x) for module in modules],
        modules, attention.q_proj.in_features,
    )  # fmt: skip
    assert error < 1e-5


def test_layers_without_an_adapter_keep_their_own_forward(make_layer):
    mlp = make_layer(target_modules=ATTENTION_TARGETS).mlp
    x = torch.randn(1, 12, mlp.gate_proj.in_features)
    with torch.no_grad():
        ours = kernels.mlp_forward(mlp, kernels.as_it_is, x)
        assert relative_error(ours, mlp(x)) < 1e-5


@pytest.mark.parametrize("keep_weights", [False, True])
def test_a_checkpoint_that_keeps_weights_unpacks_them_once_less(
    make_layer, monkeypatch, keep_weights
):
    """And the gradients stay those of a layer without a checkpoint."""
    layer = make_layer().self_attn.q_proj
    unpacked, unpack = [], kernels.unpack
    monkeypatch.setattr(kernels, "unpack", lambda w: unpacked.append(w) or unpack(w))
    x = torch.randn(1, 12, layer.in_features, requires_grad=True)
    gradients = []
    for kept_layers in (1, 0):
        unpacked.clear()
        holder = torch.nn.Module()
        fast_path.choose_checkpoints([holder], kept_layers, keep_weights)
        run = partial(kernels.lora_forward, layer)
        layer.zero_grad()
        output = run(x) if kept_layers else holder._gradient_checkpointing_func(run, x)
        output.float().square().sum().backward()
        gradients.append(layer.lora_A["default"].weight.grad.clone())
    assert torch.equal(*gradients)
    assert len(unpacked) == (2 if keep_weights else 3)


@pytest.mark.parametrize("nested", [True, False])
def test_weights_are_unpacked_as_bitsandbytes_does_it(nested):
    weight = torch.randn(320, 330, dtype=torch.bfloat16)  # neither kind of block divides it
    packed, state = bnb.functional.quantize_4bit(
        weight, quant_type="nf4", compress_statistics=nested
    )
    unpacked = kernels.unpack_blocks(packed.flatten(), *kernels.tables(state)).view(state.shape)
    assert torch.equal(unpacked, bnb.functional.dequantize_4bit(packed, state))


@pytest.mark.parametrize("trains", [True, False])
def test_the_loss_in_chunks_and_its_gradient_are_cross_entropys(monkeypatch, trains):
    monkeypatch.setattr(kernels, "LOSS_CHUNK", 5)
    hidden, weight = torch.randn(23, 16, requires_grad=trains), torch.randn(40, 16)
    labels = torch.where(torch.arange(23) % 4 > 0, torch.arange(23), -100)
    count = (labels != -100).sum()
    theirs = F.cross_entropy(hidden @ weight.T, labels, ignore_index=-100)
    ours = kernels.ChunkedLoss.apply(hidden, weight, labels, count)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    if trains:
        gradients = [torch.autograd.grad(3 * loss, hidden)[0] for loss in (ours, theirs)]
        assert relative_error(*gradients) < 1e-5


def test_a_bias_of_the_base_layer_is_not_lost(tokenizer, tmp_path):
    """Qwen 2 has one on queries, keys and values; the product in place does not add it."""
    save_random_model("Qwen2Config", tokenizer, tmp_path)
    config = Config.from_profile("demo", model_name=str(tmp_path), run_dir=tmp_path / "run")
    base = loading.load_model(config)
    for name, parameter in base.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model = get_peft_model(base, lora_of(config))
    fill_adapters(model)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        theirs = model(input_ids=ids).logits
        with kernels.swapped(kernels.adapters_in_place(model)):
            ours = model(input_ids=ids).logits
    assert relative_error(ours, theirs) < 1e-2
