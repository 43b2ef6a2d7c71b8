"""Will it fit? The memory of a QLoRA training step, predicted from shapes alone, in bytes.

Each part has one formula, counted from the code that allocates it (transformers' Llama layers,
peft's LoRA layer, bitsandbytes, the loss); gaps between tensors alone are fitted to measurements.
"""

import json
from dataclasses import replace
from math import ceil, inf, prod
from typing import NamedTuple

from helpers.config import PROJECT_DIR
from helpers.model.architecture import FLOAT32, NESTED_BLOCK, Shape, own_names, quantized_bytes
from helpers.model.steps import Run, offload_lead

RESULTS = PROJECT_DIR / "benchmarks" / "results"
GIB = 2**30  # bytes
# trl 1.16 projects to the vocabulary in tiles of 4,096 tokens by 32,768 words
# (kernels/chunked_logprob.py).
TILE_TOKENS, TILE_WORDS = 4096, 32768
CPU_TILE_TOKENS = 128  # training.fast.answer_head: 25 MB in float32 for 49,152 words
LOSS_CHUNK = 1024  # tokens whose logits exist at one time on the fast path
# Its two streams (of the recording and of all else) each give cuBLAS and cuBLASLt 32 MiB to work
# in, the size that torch chooses on an H100; older cards get 8.
GRAPH_WORKSPACES = 2 * 2 * 32 * 2**20
# A recorded step cannot give memory back, so gaps too small for the next tensor stay reserved. In
# sizes of the widest weight, unpacked: 1 to 9 were measured (benchmarks/caps.py), which is 3.5 %
# less to 2.7 % more than is predicted.
GAPS = 4
SMALLEST_PAGED, SMALLEST_8BIT = 100_000, 4_096  # elements; bitsandbytes/optim/optimizer.py
# Parts of a layer that read the same tensor as another one.
READS_WITH = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


class Estimate(NamedTuple):
    """Bytes at the fullest moment of a step: its "loss", "backward" or optimizer's "step"."""

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    overhead: int
    moment: str

    @property
    def parts(self) -> dict[str, int]:
        return dict(zip(self._fields[:-1], self[:-1], strict=True))

    @property
    def total(self) -> int:
        return sum(self[:-1])


class Step:
    """A Run on a model of some Shape: each attribute is a part of it, in bytes."""

    def __init__(self, shape: Shape, run: Run):
        self.shape, self.run = shape, run
        self._weigh()
        self._train()
        self._keep_of_a_layer()
        self._hold()
        self._work()

    @classmethod
    def of(cls, model_config, run: Run) -> "Step":
        """The Step of transformers' config of a model, whose own names the layers get."""
        targets, kept = (own_names(model_config, n) for n in (run.targets, run.keep_in_16bit))
        return cls(Shape(model_config), replace(run, targets=targets, keep_in_16bit=kept))

    def with_run(self, **changes) -> "Step":
        """The same model with another Run."""
        return Step(self.shape, replace(self.run, **changes))

    def _weigh(self) -> None:
        """`weights`, the base model as it lies on the device, and `widest_weight`, unpacked."""
        run, shape = self.run, self.shape
        kept = tuple(shape.linear) if run.quantization == "16bit" else run.keep_in_16bit
        self.packed = [prod(sides) for name, sides in shape.linear.items() if name not in kept]
        plain = sum(shape.layer_weights) - sum(self.packed)
        self.layer_bytes = sum(self.packed) / 2 + plain * run.stream_bytes
        whole = shape.layers * self.layer_bytes + shape.other_parameters * run.stream_bytes
        # A device has its share of a model in shards, but all constants: those are no parameters.
        double = run.quantization == "nf4-double"
        constants = sum(quantized_bytes(n, double) - n // 2 for n in self.packed)
        self.weights = ceil(whole / run.shards) + shape.layers * constants
        self.widest_weight = max(shape.layer_weights) * run.compute_bytes

    def _train(self) -> None:
        """`adapters`, whose gradients take as much, and `optimizer`, two moments of each number.

        torch keeps those in the parameter's own type, bitsandbytes in 32 bits, or of larger tensors
        in 8, with a 32-bit constant for 256 of them. The large ones of a paged optimizer lie in
        managed memory, which the driver moves to the host: counted as none.
        """
        run, tensors = self.run, self.shape.adapter_tensors(self.run.rank, self.run.targets)
        self.adapters = ceil(sum(tensors) / run.shards) * run.adapter_bytes
        wide = 2 * (run.adapter_bytes if "torch" in run.optimizer else FLOAT32)
        narrow = 2 * (1 + FLOAT32 / NESTED_BLOCK) if "8bit" in run.optimizer else wide
        end = SMALLEST_PAGED if run.optimizer.startswith("paged") else inf
        states = sum(n * (narrow if n >= SMALLEST_8BIT else wide) for n in tensors if n < end)
        self.optimizer = round(states / run.shards)
        # What FSDP has put together again at one moment: three layers (one computes, one arrives,
        # in a buffer first), with adapters and gradients, and the head, once it was used.
        layer = self.layer_bytes + 2 * sum(tensors) / self.shape.layers * run.adapter_bytes
        head = self.shape.words * self.shape.hidden * run.stream_bytes
        self.gathered = round(3 * layer) + head if run.shards > 1 else 0

    def _keep_of_a_layer(self) -> None:
        """`layer`, what autograd keeps of one layer's forward pass for its backward pass.

        Read off modeling_llama.py and peft's Linear4bit: of norms the input and one reciprocal root
        a token; of attention query, key, value and output at full head count, and a log-sum-exp a
        head; of the MLP `wide` tensors; and the adapters. A frozen projection keeps nothing.
        """
        run, shape, stream = self.run, self.shape, self.run.stream_bytes
        # transformers' norms keep float32, its gate is there before and after SiLU, and each row
        # has a mask. The fast path fuses the gate, and reads the rows' bounds.
        norm, self.wide, masks = (stream, 2, 0) if run.fast else (FLOAT32, 3, 1)
        # Inputs of the A matrices. Parts that read one tensor share one copy, unless dropout, which
        # keeps a mask too, or a cast gives each its own; the input of o_proj is kept anyway.
        inputs = {name: sides[1] for name, sides in shape.linear.items() if name in run.targets}
        width = run.compute_bytes if run.autocast else run.adapter_bytes
        if run.dropout == 0 and width == stream:
            inputs = {READS_WITH.get(name, name): inputs[name] for name in inputs}
            inputs.pop("o_proj", None)
        given = run.tokens * sum(inputs.values()) * (width + (run.dropout > 0))
        norms = 2 * (shape.hidden * norm + FLOAT32)
        attention = 4 * shape.queries * stream + shape.heads * FLOAT32
        gate = self.wide * shape.inner * stream
        low_rank = len(run.targets) * run.rank * width
        mask = masks * run.batch * run.length**2 * stream
        self.layer = run.tokens * (norms + attention + gate + low_rank) + given + mask
        # Between checkpoints the fast path makes inputs of adapters again, of packed layers.
        self.kept_layer = self.layer - given * (run.fast and not run.keep_in_16bit)

    def _hold(self) -> None:
        """`held` of activations between forward and backward, and on the `host` of those offloaded.

        A `checkpoint` is a hidden state, all that is kept of a layer (Chen et al., 1604.06174).
        """
        run, layers, state = self.run, self.shape.layers, self.run.tokens * self.shape.hidden
        self.checkpoint = state * run.stream_bytes
        self.host = run.offloaded(layers) * self.kept_layer
        # On the GPU of layers whose activations are on their way, at most.
        self.travelling = (1 + offload_lead(run.kept_layers) // 2) * self.kept_layer * run.offload
        kept = min(run.kept_layers, layers)
        checkpoints = layers - kept - run.offloaded(layers)
        between = kept * self.kept_layer + checkpoints * self.checkpoint
        # The norm after the last layer, on the fast path with what it gives. Without checkpoints
        # the model's first norm keeps nothing, which makes up for it.
        last = 2 * run.stream_bytes if run.fast else FLOAT32 * run.checkpointing
        self.held = state * last + (between if run.checkpointing else layers * self.layer)

    def _work(self) -> None:
        """What is there for a moment: for the loss, for walking back through one layer, and beside.

        The residual's gradient is there twice. On a CPU pages of the 16-bit file that were read to
        quantize it stay; they are clean, and the system takes them back when it needs room.
        """
        run, shape, tokens = self.run, self.shape, self.run.tokens
        numbers = tokens * (2 * shape.hidden + self.wide * shape.inner)
        unpacked = max(self.packed, default=0) * run.compute_bytes
        self.walking_back = numbers * run.stream_bytes + unpacked
        # Tokens of one tile, words, bytes beside a logit, and of a state's gradient.
        tile, words, beside_logit, of_state = TILE_TOKENS, TILE_WORDS, run.compute_bytes, FLOAT32
        if run.fast:  # a chunk's logits and their gradient
            tile, words, of_state = LOSS_CHUNK, shape.words, run.compute_bytes
            beside_logit = 2 * run.compute_bytes
        elif run.loss == "full":  # float32 logits, log-softmax and gradients side by side
            tile, words, beside_logit, of_state = tokens, shape.words, 3 * FLOAT32, 0
        elif run.device == "cpu":
            tile, words, beside_logit = CPU_TILE_TOKENS, shape.words, 3 * FLOAT32
            of_state = run.compute_bytes
        self.logits = min(tokens, tile) * words * beside_logit + tokens * shape.hidden * of_state
        self.beside = self.gathered + (self._recording() if run.fast else 0)
        self.beside += 2 * shape.layers * sum(self.packed) if run.device == "cpu" else 0

    def _recording(self) -> int:
        """What a recorded step keeps: workspaces, gaps, and room for an evaluation beside it, of a
        layer (residual, norm, three wide tensors) or the last state and logits with their gradient.
        """
        tokens, shape = self.run.tokens, self.shape
        layer = tokens * 3 * (shape.hidden + shape.inner)
        head = tokens * shape.hidden + 2 * min(tokens, LOSS_CHUNK) * shape.words
        evaluation = max(layer, head) * self.run.compute_bytes
        return evaluation + GRAPH_WORKSPACES + GAPS * self.widest_weight

    def estimate(self, baseline: int = 0) -> Estimate:
        """The fullest moment. Walking back comes twice: next to the loss, at the first layer."""
        run, adapters, states = self.run, self.adapters, self.optimizer
        there, beside = (self.weights, adapters), self.beside + baseline
        # Gradients are kept between accumulated batches; a recorded step always has them.
        kept = adapters if run.accumulation > 1 or run.fast else 0
        first = max(kept, adapters // self.shape.layers)
        # Layers that keep theirs come first, so these are gone when a checkpoint runs again.
        gone = run.kept_layers * self.kept_layer
        top = self.held + max(0, self.layer + self.travelling - gone) * run.checkpointing
        bottom = self.layer + self.checkpoint * run.checkpointing
        back = beside + self.walking_back
        moments = (
            Estimate(*there, kept, states, self.held, self.logits, beside, "loss"),
            Estimate(*there, first, states, top, 0, back, "backward"),
            Estimate(*there, adapters, states, bottom, 0, back, "backward"),
            Estimate(*there, adapters, states, 0, 0, beside, "step"),
        )
        return max(moments, key=lambda moment: moment.total)


def estimate(model_config, run: Run, baseline: int = 0) -> Estimate:
    """Predicted peak of a training step, part by part.

    `baseline` is what the process holds before the model is loaded (`current_memory_bytes()`), and
    matters on a CPU. On a GPU the result stands for `torch.cuda.max_memory_allocated()`, on the
    fast path, which keeps its memory, for `max_memory_reserved()`; CUDA's context is in neither.
    """
    return Step.of(model_config, run).estimate(baseline)


def measured(name: str) -> dict:
    """A file of benchmarks/results: its `rows`, the `hardware` and the `date`."""
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
