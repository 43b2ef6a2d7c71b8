"""Lesson 03: NF4 by hand against bitsandbytes, as the notebook defines it."""

import bitsandbytes as bnb
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.model import predict
from tests.notebook_code import cell_source, definitions_from


@pytest.fixture(scope="module")
def lesson():
    return definitions_from("03")


def sample(shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_levels_are_those_of_bitsandbytes(lesson):
    levels = lesson["nf4_levels"]()
    assert torch.equal(levels, bnb.functional.get_4bit_type("nf4", device="cpu"))
    assert levels[7] == 0 and (levels > 0).sum() == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 64), (192, 576), (1, 128)])
def test_bytes_scales_and_weights_equal_bitsandbytes(lesson, shape, dtype):
    weight = sample(shape, dtype)
    packed, absmax = lesson["quantize"](weight, lesson["nf4_levels"]())
    theirs, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert torch.equal(packed, theirs.flatten())
    assert torch.equal(absmax, state.absmax)
    back = lesson["dequantize"](packed, absmax, lesson["nf4_levels"](), like=weight)
    assert torch.equal(back, bnb.functional.dequantize_4bit(theirs, state))


def test_a_block_of_zeros_comes_back_as_zeros(lesson):
    weight = sample((2, 64))
    weight[0] = 0
    packed, absmax = lesson["quantize"](weight, lesson["nf4_levels"]())
    back = lesson["dequantize"](packed, absmax, lesson["nf4_levels"](), like=weight)
    assert torch.equal(back[0], torch.zeros(64)) and back.isfinite().all()


def test_absmax_rounding_errs_by_half_a_step_at_most(capsys):
    found = {"torch": torch}
    exec(cell_source("03", "742ce873"), found)
    assert found["integers"].abs().max() == 7
    error = (found["integers"] * found["scale"] - found["numbers"]).abs().max()
    assert error <= found["scale"] / 2 * 1.0001


def test_stored_bits_are_those_of_the_text(capsys):
    found = {"bnb": bnb, "weight": sample((1024, 1024))}
    exec(cell_source("03", "7553892b"), found)
    expected = {False: 4.5, True: 4 + 8 / 64 + 32 / (64 * 256)}
    assert found["stored"] == pytest.approx(expected, abs=1e-4)


def test_row_losses_count_the_answer_alone(lesson):
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=50, num_attention_heads=2, **shape)
    model = LlamaForCausalLM(config).eval()
    row = {"input_ids": [1, 5, 9, 7, 2], "labels": [-100, -100, 9, 7, 2]}
    loss = lesson["row_losses"](model, [row]).item()
    logits = model(torch.tensor([row["input_ids"]])).logits[0, 1:4]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([9, 7, 2]))
    assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_the_text_on_answers_says_what_their_file_says():
    found = predict.measured("layers_in_16bit")["rows"]
    passes = {row["kept"]: row["passes"] for row in found if row["template"] == "chat"}
    size = {row["kept"]: row["bytes"] for row in found}
    words = " ".join(cell_source("03", "setting").split())
    assert f"in 4 bits: {passes['']} of {found[0]['problems']} problems pass" in words
    assert f"quantized: {passes['all']}." in words
    assert f"with `v_proj` beside it {passes['v_proj+down_proj']} pass" in words
    single = {kept: count for kept, count in passes.items() if kept.endswith("_proj")}
    assert max((k for k in single if "+" not in k), key=single.get) == "down_proj"
    more = (size["v_proj+down_proj"] - size[""]) / (size["all"] - size[""])
    assert 0.25 < more < 0.3, "a good quarter"
