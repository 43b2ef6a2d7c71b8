"""Fused operations of a Llama with 4-bit weights and adapters, each for several of PyTorch's.

What stands here passes over a tensor once where the libraries' layers pass two to five times: a
step is bound by memory and by the number of its kernels. A CPU takes the adapters' part alone.
"""

from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, partial

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from peft.tuners.lora.bnb import Linear4bit
from torch.nn.attention.varlen import varlen_attn
from transformers.models.llama import modeling_llama

from helpers.model.predict import LOSS_CHUNK
from helpers.prompts import IGNORED_LABEL


def fused_kernels(model):
    """A context in which the small operations of a Llama with adapters are fused ones.

    Attention and gate take the norm before them along, so that they can make its output again.
    """
    forwards = {
        norm: rms_norm(norm) for norm in modules_of(model, modeling_llama.LlamaRMSNorm)
    } | adapters_in_place(model)
    for layer in modules_of(model, modeling_llama.LlamaDecoderLayer):
        for part, norm, forward in (
            (layer.self_attn, layer.input_layernorm, attention_forward),
            (layer.mlp, layer.post_attention_layernorm, mlp_forward),
        ):
            forwards |= {part: partial(forward, part, forwards[norm]), norm: as_it_is}
    return swapped(forwards)


def adapters_in_place(model) -> dict:
    """The forward of each layer with an adapter, which must not drop out; `swapped` takes it.

    On a CPU too: fewer passes over memory, and fewer short-lived tensors between those kept for the
    backward pass, which would leave holes in the C library's heap. A layer with a bias (Qwen 2)
    stays as it is, for the product below does not add one.
    """
    adapted = [m for m in modules_of(model, Linear4bit) if m.base_layer.bias is None]
    return {layer: partial(lora_forward, layer) for layer in adapted}


def modules_of(model, kind: type) -> list:
    return [module for module in model.modules() if type(module) is kind]


@contextmanager
def swapped(forwards: dict):
    """Give each module in `forwards` that forward, and its own back."""
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.forward


@cache
def compiled(function):
    return torch.compile(function, dynamic=False)


@dataclass
class Pass:
    """The context in which a layer runs: what it leaves for its backward pass."""

    keeps_weights: bool = False  # the 16-bit weights too
    remakes_inputs: bool = False  # no outputs of norms and gates, which it makes again
    is_second: bool = False  # the second run of a checkpoint, which leaves inner values alone

    def __enter__(self):
        self.before = current_pass.set(self)

    def __exit__(self, *error):
        current_pass.reset(self.before)


# A layer is called by transformers' code, which hands on no argument of ours. A context belongs to
# its thread: the second run of a checkpoint is in one of the backward pass.
current_pass: ContextVar[Pass] = ContextVar("current_pass")


# -- Layers


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Llama's gate, silu(gate) * up."""
    return F.silu(gate) * up


def rms_norm(norm: modeling_llama.LlamaRMSNorm):
    shape, eps = norm.weight.shape, norm.variance_epsilon
    return partial(F.rms_norm, normalized_shape=shape, weight=norm.weight, eps=eps)


def mlp_forward(mlp, norm, hidden_states: torch.Tensor) -> torch.Tensor:
    gate, up = joint_lora_forward([mlp.gate_proj, mlp.up_proj], norm, hidden_states)
    # A layer's last product is no inner value: in a second run nobody reads it.
    is_needed = not current_pass.get(Pass()).is_second
    (output,) = joint_lora_forward([mlp.down_proj], compiled(gated), gate, up, is_needed=is_needed)
    return output


def attention_forward(
    attention, norm, hidden_states, position_embeddings, cu_seq_lens_q, max_length_q, **kwargs
):
    """Causal attention inside each packed row; hidden_states [1, tokens, width], before the norm.

    `cu_seq_lens_q` holds the rows' bounds, `max_length_q` the longest row, both from the collator.
    Queries stay [tokens, heads, width] from the projection to flash attention: nothing is copied.
    """
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    query, key, value = (
        states.unflatten(-1, (-1, attention.head_dim))
        for states in joint_lora_forward(projections, norm, hidden_states)
    )
    query, key = compiled(modeling_llama.apply_rotary_pos_emb)(
        query, key, *position_embeddings, unsqueeze_dim=2
    )
    groups = attention.num_key_value_groups
    if groups > 1:
        key, value = (states.repeat_interleave(groups, dim=2) for states in (key, value))
    bounds = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
    # Not [0], whose gradient is written into a tensor of zeros.
    query, key, value = (states.squeeze(0) for states in (query, key, value))
    output = varlen_attn(query, key, value, *bounds, window_size=(-1, 0))
    return attention.o_proj(output.flatten(1)[None]), None


# -- A frozen weight in 4 bits and its adapter


def lora_forward(layer: Linear4bit, x: torch.Tensor) -> torch.Tensor:
    """peft's forward pass for one active adapter without dropout: W x + (alpha/r) B A x."""
    (output,) = joint_lora_forward([layer], as_it_is, x)
    return output


def as_it_is(x: torch.Tensor) -> torch.Tensor:
    return x


def joint_lora_forward(layers: list, make, *sources: torch.Tensor, is_needed: bool = True) -> tuple:
    """The same for layers that read the same x = make(*sources), with adapters of one kind.

    An output of each. The backward pass keeps x or makes it again, as the current pass says.
    """
    x = make(*sources)
    # Some were not targets, or have a bias.
    if not all(isinstance(layer, Linear4bit) and layer.base_layer.bias is None for layer in layers):
        return tuple(layer(x) for layer in layers)
    (name,) = layers[0].active_adapters
    # peft alone makes them float32; under trl they have x's type, and nothing is copied.
    downs, ups = (
        [getattr(layer, part)[name].weight.to(x.dtype) for layer in layers]
        for part in ("lora_A", "lora_B")
    )
    weights = [layer.base_layer.weight for layer in layers]
    origin = (make, sources) if current_pass.get(Pass()).remakes_inputs else (as_it_is, (x,))
    return LowRankUpdate.apply(x, origin, layers[0].scaling[name], weights, is_needed, *downs, *ups)


class LowRankUpdate(torch.autograd.Function):
    """y = s B A x + W x with W in 4 bits, for each of several (W, A, B) that read the same x.

    peft's layer copies the output of W, computes B A x, scales it and adds it: four passes over
    memory where a matrix product itself can add. All A are one matrix, so x is read once for them.
    Shapes: x [1, tokens, in], A [rank, in], B [out, rank], W packed. `origin` is a function and the
    tensors, which are kept, of which it makes x. When no y is needed they are left unwritten. A
    checkpoint drops what its first pass saves, so only a second one keeps weights.
    """

    @staticmethod
    def forward(ctx, x, origin, scale, weights, is_needed, *parts):
        downs, ups = parts[: len(weights)], parts[len(weights) :]
        flat, keeps_weights = x.flatten(0, -2), current_pass.get(Pass()).keeps_weights
        down = joined(downs)
        low = flat.new_empty(len(flat), len(down)).addmm_(flat, down.T, beta=0, alpha=scale)
        outputs, kept = [], []
        for weight, up, low_part in zip(weights, ups, split_as(ups, low), strict=True):
            output = flat.new_empty(len(flat), len(up))
            unpacked = unpack(weight) if is_needed or keeps_weights else None
            if is_needed:  # the small product only writes; the large one adds while it computes
                torch.mm(low_part, up.T, out=output).addmm_(flat, unpacked.T)
            kept += [unpacked] if keeps_weights else []
            outputs.append(output.view(*x.shape[:-1], -1))
        ctx.make, sources = origin
        ctx.save_for_backward(low, *parts, *sources, *kept)
        ctx.scale, ctx.weights, ctx.first_kept = scale, weights, len(parts) + len(sources)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *gradients):
        (low, *saved), count = ctx.saved_tensors, len(ctx.weights)
        downs, ups = saved[:count], saved[count : 2 * count]
        sources, kept = saved[2 * count : ctx.first_kept], saved[ctx.first_kept :]
        shape, gradients = gradients[0].shape, [each.flatten(0, -2) for each in gradients]
        low_gradient, up_gradients = torch.empty_like(low), []
        parts = zip(gradients, ups, split_as(ups, low), split_as(ups, low_gradient), strict=True)
        for gradient, up, low_part, part_gradient in parts:
            part_gradient.addmm_(gradient, up, beta=0, alpha=ctx.scale)
            up_gradients.append(gradient.T @ low_part)
        input_gradient = low_gradient @ joined(downs)
        for index, gradient in enumerate(gradients):
            input_gradient.addmm_(gradient, kept[index] if kept else unpack(ctx.weights[index]))
        flat = ctx.make(*sources).flatten(0, -2)
        down_gradients = split_as(ups, low_gradient.T @ flat, dim=0)
        x_gradient = input_gradient.view(*shape[:-1], -1)
        return x_gradient, None, None, None, None, *down_gradients, *up_gradients


def joined(downs) -> torch.Tensor:
    """Matrices A of one width as one, without a copy where there is one."""
    return torch.cat(downs) if len(downs) > 1 else downs[0]


def split_as(ups, whole: torch.Tensor, dim: int = 1) -> tuple:
    """The part of each adapter in what was made by all A as one; ups are its B [out, rank]."""
    return whole.split([up.shape[1] for up in ups], dim)


def unpack(weight: bnb.nn.Params4bit) -> torch.Tensor:
    """A 4-bit weight as a matrix [out, in] of its compute dtype, in one launch on a GPU."""
    state = weight.quant_state
    if not weight.is_cuda:
        return bnb.functional.dequantize_4bit(weight.data, state)
    return compiled(unpack_blocks)(weight.data.flatten(), *tables(state)).view(state.shape)


def tables(state: bnb.functional.QuantState) -> tuple:
    """What `unpack_blocks` takes after the packed bytes."""
    second = ()
    if state.nested:
        second = (state.state2.code, state.state2.absmax, state.state2.blocksize, state.offset)
    return state.code, state.absmax, state.blocksize, state.dtype, *second


def unpack_blocks(packed, code, scales, block, dtype, *second) -> torch.Tensor:
    """Two 4-bit numbers a byte, the high one first: places in `code`, in units of a block's scale.

    With double quantization the scales are places too: `second` has their code, scales and offset.
    """
    if second:
        scale_code, scale_scales, scale_block, offset = second
        scales = at_scale(scales, scale_code, scale_scales, scale_block) + offset
    places = torch.stack([packed >> 4, packed & 15], dim=-1).flatten()
    return at_scale(places, code, scales, block).to(dtype)


def at_scale(places, code, scales, block) -> torch.Tensor:
    """The numbers at these places of a code, times the scale of their block."""
    return code[places.int()] * scales.repeat_interleave(block)[: len(places)]


# -- The loss


class ChunkedLoss(torch.autograd.Function):
    """Cross-entropy of a head in nats, summed over the graded tokens and divided by `count`.

    In chunks, of which one has logits at a time, and with them the gradient is made: none runs
    twice. hidden [tokens, width], weight [words, width] (frozen), labels [tokens], count [].
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, count):
        total, gradient = torch.zeros_like(count, dtype=torch.float32), None
        if ctx.needs_input_grad[0]:
            gradient = torch.empty_like(hidden)
        for start in range(0, len(hidden), LOSS_CHUNK):
            part = slice(start, start + LOSS_CHUNK)
            logits = hidden[part] @ weight.T
            loss, logits_gradient = compiled(loss_and_gradient)(logits, labels[part], count)
            total += loss
            if gradient is not None:
                torch.mm(logits_gradient, weight, out=gradient[part])
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, of_loss):
        (gradient,) = ctx.saved_tensors
        return gradient * of_loss, None, None, None


def loss_and_gradient(logits, labels, count) -> tuple[torch.Tensor, torch.Tensor]:
    """Nats of logits [tokens, words] over `count`, and their gradient in the logits' own type."""
    graded = (labels != IGNORED_LABEL)[:, None]
    logs = logits.float().log_softmax(-1)
    hits = torch.arange(logits.shape[1], device=labels.device) == labels[:, None]
    gradient = (logs.exp() - hits.float()) * graded / count
    return -torch.where(hits, logs, 0).sum() / count, gradient.to(logits.dtype)
