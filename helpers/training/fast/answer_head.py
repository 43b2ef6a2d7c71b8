"""The loss on a CPU: the output layer applied to the graded positions alone, in tiles of its cache.

On a GPU trl does so itself. On a CPU it projects every position, prompt and padding included, onto
the whole vocabulary: in profile `demo` that is more than a third of a training step.
"""

import contextlib
import functools

import torch
from trl.trainer.utils import FusedCausalLMOutput

from helpers.model.predict import CPU_TILE_TOKENS
from helpers.prompts import IGNORED_LABEL


class AnswerLogProbs(torch.autograd.Function):
    """log p of each target, the entropy there, and whether the target is the likeliest word.

    hidden [tokens, width], weight [vocabulary, width] (frozen), targets [tokens]; three results
    [tokens], in float32 and bool. The derivative of log p by the hidden state, W[target] minus the
    mean row of W under p, is taken while p is at hand.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        log_probs, entropy = hidden.new_empty(2, len(hidden), dtype=torch.float32)
        is_top1 = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
        derivative = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), CPU_TILE_TOKENS):
            rows = slice(start, start + CPU_TILE_TOKENS)
            target = targets[rows]
            logits = (hidden[rows] @ weight.T).float()
            is_top1[rows] = logits.argmax(-1) == target
            log_sum = logits.logsumexp(-1)
            log_probs[rows] = logits.gather(-1, target[:, None])[:, 0] - log_sum
            probabilities = (logits - log_sum[:, None]).exp_()
            entropy[rows] = log_sum - torch.linalg.vecdot(probabilities, logits)
            if derivative is not None:
                mean_row = probabilities.to(weight.dtype) @ weight
                torch.sub(weight[target], mean_row, out=derivative[rows])
        ctx.save_for_backward(derivative)
        ctx.mark_non_differentiable(entropy, is_top1)
        return log_probs, entropy, is_top1

    @staticmethod
    def backward(ctx, gradient, *_):
        (derivative,) = ctx.saved_tensors
        return gradient[:, None].to(derivative.dtype) * derivative, None, None


def has_plain_head(model) -> bool:
    """Whether logits are hidden states times a matrix, and nothing more is done to them."""
    # Gemma 2, Cohere, Granite
    changes = ("final_logit_softcapping", "logit_scale", "logits_scaling")
    done = [getattr(model.config, name, None) for name in changes]
    return model.get_output_embeddings().bias is None and set(done) <= {None, 1.0}


@contextlib.contextmanager
def answers_scored_alone(model):
    """While `with` lasts, `model(..., labels=, fused_lm_head=True)`, trl's own call, does so.

    It returns what trl's head does, tensors [rows, length - 1], zero where the label is ignored.
    Other calls, and a head that is more than a matrix product, are left alone.
    """
    forward = model.forward
    if has_plain_head(model):
        model.forward = functools.partial(with_answer_head, model, forward)
    try:
        yield
    finally:
        model.forward = forward


def with_answer_head(model, forward, *args, fused_lm_head=False, labels=None, **kwargs):
    """`forward`, but for a call of the fused head."""
    if not fused_lm_head:
        return forward(*args, **({} if labels is None else {"labels": labels}), **kwargs)
    hidden = model.base_model(*args, **kwargs).last_hidden_state[:, :-1]
    mask = labels[:, 1:] != IGNORED_LABEL
    weight = model.get_output_embeddings().weight
    scores = AnswerLogProbs.apply(hidden[mask].to(weight.dtype), weight, labels[:, 1:][mask])
    # masked_scatter keeps a batch without any graded token connected to the model.
    log_probs, entropy, is_top1 = (
        score.new_zeros(mask.shape).masked_scatter(mask, score) for score in scores
    )
    # Not any object will do: DDP looks for the tensors in it.
    return FusedCausalLMOutput(
        log_probs=log_probs, entropy=entropy, is_top1=is_top1, label_mask=mask
    )
