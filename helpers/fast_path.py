"""The fast path on a GPU: packed batches of one fixed size, fused kernels, one CUDA graph a step.

A QLoRA step of a 7B model launches some 8,000 small kernels, and many a host cannot launch them as
fast as a card runs them. With every shape fixed, forward and backward pass are recorded once and
replayed as one. It knows nothing of recipes or data; `FAST_PATH = False` trains the same batches
through trl's own step, to the same losses. A CPU takes the adapters' kernel alone.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from peft.tuners.lora.bnb import Linear4bit
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint
from transformers.models.llama import modeling_llama
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from helpers.memory import LOSS_CHUNK
from helpers.prompts import IGNORED_LABEL

SHORTEST_MEAN_ROW = 32  # tokens: how many rows a batch has room for
WARM_UP_PASSES = 2  # kernels choose their algorithms and compile before anything is recorded
# A recorded pass cannot look at random states, so a checkpoint must not save them: no dropout.
CHECKPOINT_OPTIONS = {
    "use_reentrant": False,
    "preserve_rng_state": False,
    "determinism_check": "none",
}


def is_supported() -> bool:
    """Whether there is a GPU with bfloat16 and flash attention (Ampere or later)."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


@dataclass
class FixedCollator(DataCollatorForLanguageModeling):
    """trl's padding-free collator, filled up to exactly `tokens`.

    The filling is a sequence of its own that no row sees and no loss counts. Sequence bounds have
    one length too: unused ones repeat the end. Raises ValueError when the rows do not fit.
    """

    tokens: int = 0
    longest: int = 0

    def torch_call(self, examples: list[dict]) -> dict:
        batch = super().torch_call(examples)
        used = batch["input_ids"].shape[1]
        bounds = [*batch["cu_seq_lens_q"].tolist(), *range(used, self.tokens, self.longest)][1:]
        room = self.tokens // SHORTEST_MEAN_ROW + self.tokens // self.longest
        if used > self.tokens or len(bounds) > room:
            raise ValueError(
                f"a packed batch holds {used} tokens in {len(bounds)} rows and there is room for "
                f"{self.tokens} in {room}: lower per_device_train_batch_size or set FAST_PATH False"
            )
        bounds = [0, *bounds, *[self.tokens] * (room - len(bounds))]
        missing = self.tokens - used
        filling = torch.arange(missing)[None] % self.longest
        return {
            "input_ids": F.pad(batch["input_ids"], (0, missing), value=self.pad_token_id),
            "labels": F.pad(batch["labels"], (0, missing), value=IGNORED_LABEL),
            "position_ids": torch.cat([batch["position_ids"], filling], dim=1),
            # Four dimensions tell transformers to build no mask; attention here reads the bounds.
            "attention_mask": torch.zeros(1, 1, 1, 1),
            "cu_seq_lens_q": torch.tensor(bounds, dtype=torch.int32),
            "max_length_q": self.longest,
            "used_tokens": used,
        }


class FastTrainer(SFTTrainer):
    """SFTTrainer whose forward and backward pass is one recorded CUDA graph."""

    graph = None
    kept_layers = 0
    keep_weights = False  # see choose_checkpoints

    def _prepare_for_training(self, *arguments, **options):
        # DDP's part in the backward pass stays in the stream in which DDP was made, and what runs
        # in the default stream cannot be recorded.
        before, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(before)
        with torch.cuda.stream(stream):
            prepared = super()._prepare_for_training(*arguments, **options)
        before.wait_stream(stream)
        return prepared

    def training_step(self, model, inputs, num_items_in_batch=None):
        self._total_train_tokens += inputs.pop("used_tokens")
        inputs = {**self._prepare_inputs(inputs), "graded": num_items_in_batch}
        if not model.training:
            model.train()
        if self.graph is None:
            bare_model = self.accelerator.unwrap_model(model)
            choose_checkpoints(
                bare_model.get_base_model().model.layers, self.kept_layers, self.keep_weights
            )
            self.graph = StepGraph(bare_model, inputs)
        loss, processes = self.graph(inputs), self.accelerator.num_processes
        if processes > 1 and self.accelerator.sync_gradients:
            # DDP would do that bit by bit within the pass, which is one piece here.
            torch.distributed.all_reduce(self.graph.gradient)
        return loss * processes  # its share of the step's tokens; the trainer takes the mean

    def log(self, logs, *arguments, **options):
        if self.model.training:  # here all processes wait anyway, in a step none has to
            counts = gather_object([self._total_train_tokens])
            self._metrics["train"]["num_tokens"] = [sum(counts)]
        super().log(logs, *arguments, **options)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of an evaluation: mean nats over the batch's graded tokens.

        In the chunks of the training step, as `memory.evaluation_bytes` counts it: this memory
        comes on top of what the recording keeps.
        """
        inputs = dict(inputs)
        inputs.pop("used_tokens")
        labels = inputs.pop("labels")
        graded = (labels[0, 1:] != IGNORED_LABEL).sum()
        loss = packed_loss(self.accelerator.unwrap_model(model), inputs, labels) / graded
        return (loss, {}) if return_outputs else loss


class StepGraph:
    """Forward and backward pass over inputs of one shape, recorded once, replayed for each batch.

    A call copies the batch into the tensors that the recording reads, adds to the gradients of the
    trainable parameters, and returns the loss: mean nats over the graded tokens of the whole step.
    """

    def __init__(self, model, inputs: dict):
        self.model = model.train()  # all of it: only a layer in training keeps checkpoints
        self.inputs = {k: v.clone() if torch.is_tensor(v) else v for k, v in inputs.items()}
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        # Now, not between activations that will leave gaps, and in one piece: processes add it up.
        sizes = [parameter.numel() for parameter in self.parameters]
        self.gradient = self.parameters[0].new_zeros(sum(sizes))
        parts = zip(self.gradient.split(sizes), self.parameters, strict=True)
        self.gradients = [part.view_as(parameter) for part, parameter in parts]
        self._clear_gradients()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_PASSES):
                self._forward_backward()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.empty_cache()  # the recording has memory of its own
        self.graph = torch.cuda.CUDAGraph()
        # Checked in this thread alone: NCCL's asks after its events at any moment.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.loss = self._forward_backward()
        self._clear_gradients()

    def __call__(self, inputs: dict) -> torch.Tensor:
        for name, value in inputs.items():
            if torch.is_tensor(value):
                self.inputs[name].copy_(value, non_blocking=True)
        if self.parameters[0].grad is None:  # the trainer drops gradients after each step
            self._clear_gradients()
        self.graph.replay()
        return self.loss.clone()

    def _clear_gradients(self) -> None:
        self.gradient.zero_()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient

    def _forward_backward(self) -> torch.Tensor:
        inputs = dict(self.inputs)
        labels, graded = inputs.pop("labels"), inputs.pop("graded")
        loss = packed_loss(self.model, inputs, labels) / graded
        loss.backward()
        return loss.detach()


def choose_checkpoints(layers, kept_layers: int, keep_weights: bool) -> None:
    """Keep the activations of the last layers, which the backward pass needs first.

    The others run a second time. With `keep_weights` the backward pass of a layer takes the 16-bit
    weights of that second run, and need not unpack them once more.
    """
    for layer in layers[len(layers) - kept_layers :]:
        layer.gradient_checkpointing = False
    for layer in layers:
        layer._gradient_checkpointing_func = partial(
            checkpoint,
            **CHECKPOINT_OPTIONS,
            context_fn=lambda: (Pass(keep_weights), Pass(keep_weights, is_second=True)),
        )


@dataclass
class Pass:
    """The context in which a checkpointed layer runs, once or for its inner values alone."""

    keeps_weights: bool = False
    is_second: bool = False

    def __enter__(self):
        global current_pass
        current_pass = self

    def __exit__(self, *error):
        global current_pass
        current_pass = Pass()


current_pass = Pass()  # of a layer that keeps its activations


def packed_loss(model, inputs: dict, labels: torch.Tensor) -> torch.Tensor:
    """Nats over all graded tokens of one packed row, labels [1, tokens], summed chunk by chunk."""
    base = model.get_base_model()
    hidden = base.model(**inputs, use_cache=False).last_hidden_state[0, :-1]
    chunks = zip(hidden.split(LOSS_CHUNK), labels[0, 1:].split(LOSS_CHUNK), strict=True)
    head = partial(summed_loss, base.lm_head)
    return sum(checkpoint(head, h, y, **CHECKPOINT_OPTIONS) for h, y in chunks)


def summed_loss(head, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of a chunk in nats, summed; hidden [tokens, width], labels [tokens]."""
    return F.cross_entropy(
        head(hidden).float(), labels, ignore_index=IGNORED_LABEL, reduction="sum"
    )


# -- Kernels.

# For each type of module, what makes its new forward.
ADAPTER_IN_PLACE = {Linear4bit: lambda layer: partial(lora_forward, layer)}


def fused_kernels(model):
    """A context in which the small operations of a Llama with adapters are fused ones.

    Attention over packed rows (flash), RMSNorm (PyTorch's kernel), rotation and gate (compiled),
    adapters that add into the base layer's output in place.
    """
    swaps = {
        **ADAPTER_IN_PLACE,
        modeling_llama.LlamaRMSNorm: lambda norm: partial(
            F.rms_norm,
            normalized_shape=norm.weight.shape,
            weight=norm.weight,
            eps=norm.variance_epsilon,
        ),
        modeling_llama.LlamaMLP: lambda mlp: partial(mlp_forward, mlp),
        modeling_llama.LlamaAttention: lambda attention: partial(attention_forward, attention),
    }
    return swapped(model, swaps)


def in_place_adapters(model):
    """The same with the one that also helps a CPU: the adapters', which must not drop out.

    Fewer passes over memory, and fewer short-lived tensors between those kept for the backward
    pass, which would leave holes in the C library's heap.
    """
    return swapped(model, ADAPTER_IN_PLACE)


@contextmanager
def swapped(model, swaps: dict):
    """Give each module of a type in `swaps` the forward that is made for it, and its own back."""
    found = [module for module in model.modules() if type(module) in swaps]
    for module in found:
        module.forward = swaps[type(module)](module)
    try:
        yield model
    finally:
        for module in found:
            del module.forward


@cache
def compiled(function):
    return torch.compile(function, dynamic=False)


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Llama's gate, silu(gate) * up."""
    return F.silu(gate) * up


def mlp_forward(mlp, x: torch.Tensor) -> torch.Tensor:
    inner = compiled(gated)(mlp.gate_proj(x), mlp.up_proj(x))
    # A layer's last product is no inner value: in a second run nobody reads it.
    return lora_forward(mlp.down_proj, inner, is_needed=not current_pass.is_second)


def attention_forward(
    attention, hidden_states, position_embeddings, cu_seq_lens_q, max_length_q, **kwargs
):
    """Causal attention inside each packed row; hidden_states [1, tokens, width].

    `cu_seq_lens_q` holds the rows' bounds, `max_length_q` the longest row, both from the collator.
    Queries stay [tokens, heads, width] from the projection to flash attention: nothing is copied.
    """
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    query, key, value = (
        project(hidden_states).unflatten(-1, (-1, attention.head_dim)) for project in projections
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


def lora_forward(layer: Linear4bit, x: torch.Tensor, is_needed: bool = True) -> torch.Tensor:
    """peft's forward pass for one active adapter without dropout: W x + (alpha/r) B A x."""
    (name,) = layer.active_adapters
    # In float32 once the best checkpoint has been loaded.
    down, up = (part[name].weight.to(x.dtype) for part in (layer.lora_A, layer.lora_B))
    weight = layer.base_layer.weight
    return LowRankUpdate.apply(x, down, up, layer.scaling[name], weight, is_needed)


class LowRankUpdate(torch.autograd.Function):
    """y = s B A x + W x with W in 4 bits: both passes add in place, within the large product.

    peft's layer copies the output of W, computes B A x, scales it and adds it: four passes over
    memory where a matrix product itself can add. The small product comes first: it is bound by
    memory and writes only, and the large one reads what it adds to while it computes. Shapes:
    x [1, tokens, in], A [rank, in], B [out, rank], W packed. When y is not needed it is left
    unwritten. A checkpoint drops what its first pass saves, so only a second one keeps weights.
    """

    @staticmethod
    def forward(ctx, x, down, up, scale, weight, is_needed):
        flat, keeps_weights = x.flatten(0, -2), current_pass.keeps_weights
        low = flat @ down.T
        output = flat.new_empty(len(flat), len(up))
        unpacked = unpack(weight) if is_needed or keeps_weights else None
        if is_needed:
            output.addmm_(low, up.T, beta=0, alpha=scale).addmm_(flat, unpacked.T)
        ctx.save_for_backward(flat, low, down, up, *([unpacked] if keeps_weights else []))
        ctx.scale, ctx.weight = scale, weight
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, gradient):
        flat, low, down, up, *kept = ctx.saved_tensors
        gradient_shape, gradient = gradient.shape, gradient.flatten(0, -2)
        low_gradient = (gradient @ up) * ctx.scale
        (unpacked,) = kept or [unpack(ctx.weight)]
        input_gradient = (low_gradient @ down).addmm_(gradient, unpacked)
        up_gradient = (gradient.T @ low) * ctx.scale
        shape = (*gradient_shape[:-1], -1)
        return input_gradient.view(shape), low_gradient.T @ flat, up_gradient, None, None, None


def unpack(weight: bnb.nn.Params4bit) -> torch.Tensor:
    """A 4-bit weight as a matrix of its compute dtype, [out, in]."""
    return bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
