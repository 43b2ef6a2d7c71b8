"""The output layer on a CPU gives what trl's own gives, on the graded positions and elsewhere."""

import copy

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from helpers.prompts import IGNORED_LABEL
from helpers.training.fast import answer_head


@pytest.fixture(scope="module")
def plain():
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(shape)
    model.get_output_embeddings().weight.requires_grad = False
    return model


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 300, (3, 90), generator=generator)
    labels = ids.clone()
    labels[:, :20] = IGNORED_LABEL
    labels[2, 50:] = IGNORED_LABEL
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def with_trl(model):
    model = copy.deepcopy(model)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    return model


def with_ours(model):
    model = with_trl(model)
    model.way = answer_head.answers_scored_alone(model)  # which ends with the model
    model.way.__enter__()
    return model


def test_the_way_of_trl_is_given_back(plain, batch):
    model = with_trl(plain)
    before = model.forward
    with answer_head.answers_scored_alone(model):
        assert model.forward is not before
    assert model.forward is before


def scores_and_gradient(model, batch):
    found = model(**batch, fused_lm_head=True)
    (-found.log_probs.sum()).backward()
    return found, model.model.layers[0].mlp.up_proj.weight.grad


@pytest.mark.parametrize("tile", [7, 128])  # 170 graded positions: several tiles, the last short
def test_scores_and_gradients_are_those_of_trl(plain, batch, monkeypatch, tile):
    monkeypatch.setattr(answer_head, "CPU_TILE_TOKENS", tile)
    theirs, their_gradient = scores_and_gradient(with_trl(plain), batch)
    ours, our_gradient = scores_and_gradient(with_ours(plain), batch)
    assert type(ours) is type(theirs)  # DDP finds the tensors in no other one
    for name in ("log_probs", "entropy"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))
    assert torch.equal(ours.is_top1, theirs.is_top1)
    assert torch.equal(ours.label_mask, theirs.label_mask) and ours.label_mask.sum() == 170
    assert our_gradient.abs().max() > 0
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-4, atol=1e-5)


def test_only_graded_positions_are_projected(plain, batch, monkeypatch):
    seen = []
    original = answer_head.AnswerLogProbs.apply
    monkeypatch.setattr(
        answer_head.AnswerLogProbs, "apply", lambda *a: seen.append(a[0].shape) or original(*a)
    )
    found = with_ours(plain)(**batch, fused_lm_head=True)
    assert seen == [(int(found.label_mask.sum()), 32)]


def test_a_batch_without_an_answer_has_a_loss_of_zero_and_a_gradient(plain, batch):
    batch["labels"] = torch.full_like(batch["labels"], IGNORED_LABEL)
    found, gradient = scores_and_gradient(with_ours(plain), batch)
    assert found.log_probs.abs().sum() == 0
    assert gradient.abs().sum() == 0


def test_no_derivative_is_made_for_an_evaluation(plain, batch):
    with torch.no_grad():
        found = with_ours(plain)(**batch, fused_lm_head=True)
    assert not found.log_probs.requires_grad


def test_other_calls_are_left_alone(plain, batch):
    ours = with_ours(plain).eval()
    assert torch.equal(ours(**batch).logits, plain.eval()(**batch).logits)
    assert ours(**batch).loss == plain(**batch).loss


def test_a_head_that_bends_its_logits_stays_trls(batch):
    """Gemma 2 caps them: without that the loss would be another one, and nobody would be told."""
    torch.manual_seed(0)
    shape = Gemma2Config(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=1, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, final_logit_softcapping=0.1,
    )  # fmt: skip
    model = Gemma2ForCausalLM(shape).eval()
    found = with_ours(model)(**batch, fused_lm_head=True)
    loss = -found.log_probs.sum() / found.label_mask.sum()
    torch.testing.assert_close(loss, model(**batch).loss)
