"""Will it fit? The memory of a QLoRA training step, predicted from shapes alone, in bytes.

Each part has one formula, counted from the code that allocates it (transformers' Llama layers,
peft's LoRA layer, bitsandbytes, the loss); gaps between tensors alone are fitted to measurements.
What differs between the ways to compute stands as numbers in `Way` and `Loss`.
"""

import json
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil, prod
from typing import NamedTuple

from helpers.config import PROJECT_DIR
from helpers.model.architecture import FLOAT32, Shape, own_names, quantized_bytes
from helpers.model.steps import OPTIMIZERS, Run, offload_lead

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


class Way(NamedTuple):
    """What the code that computes a step keeps, as numbers for the formulas of `Step`."""

    norm_bytes: int  # width of the input that an RMSNorm keeps
    last_norm_bytes: int  # the same of the norm after the last layer, with what it gives
    wide: int  # tensors as wide as the MLP's middle: kept of a layer, and as gradients
    masks: int  # additive attention masks, one for each row
    inputs_made_again: bool  # those of adapters, where a layer keeps its activations


class Loss(NamedTuple):
    """How the loss goes over a batch: `tokens` at a time, over `words` of the vocabulary."""

    tokens: int
    words: int
    logit_bytes: int  # all that stands beside a logit, together
    state_bytes: int  # width of the gradient by the hidden states


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


@dataclass(frozen=True)
class Step:
    """A Run on a model of some Shape: the bytes of each part of it."""

    shape: Shape
    run: Run

    @classmethod
    def of(cls, model_config, run: Run) -> "Step":
        shape = Shape.of(model_config)
        targets, kept = (own_names(model_config, n) for n in (run.targets, run.keep_in_16bit))
        return cls(shape, replace(run, targets=targets, keep_in_16bit=kept))

    @cached_property
    def way(self) -> Way:
        """transformers' norms keep float32, and its gate is there before and after SiLU. The fast
        path fuses the gate and reads the rows' bounds in place of a mask.
        """
        run, stream = self.run, self.run.stream_bytes
        if run.fast:  # kernels that make inputs again know packed layers only
            return Way(stream, 2 * stream, 2, masks=0, inputs_made_again=not run.keep_in_16bit)
        # Without checkpoints the model's first norm keeps nothing, which makes up for the last.
        return Way(FLOAT32, FLOAT32 * run.checkpointing, 3, masks=1, inputs_made_again=False)

    @cached_property
    def loss(self) -> Loss:
        """The fast path: a chunk's logits and their gradient. "full": transformers upcasts the
        logits; log-softmax, its gradient and that of the logits stand side by side. "chunked": on a
        GPU one 16-bit tile of trl's, on a CPU three float32 tiles.
        """
        run, words, width = self.run, self.shape.words, self.run.compute_bytes
        if run.fast:
            return Loss(LOSS_CHUNK, words, 2 * width, width)
        if run.loss == "full":
            return Loss(run.tokens, words, 3 * FLOAT32, 0)
        if run.device == "cpu":
            return Loss(CPU_TILE_TOKENS, words, 3 * FLOAT32, width)
        return Loss(TILE_TOKENS, TILE_WORDS, width, FLOAT32)

    @cached_property
    def packed_weights(self) -> list[int]:
        """Weights of each linear part of one layer that is in 4 bits."""
        kept = self.run.keep_in_16bit if self.run.packed else tuple(self.shape.linear)
        return [prod(shape) for name, shape in self.shape.linear.items() if name not in kept]

    @property
    def layer_bytes(self) -> float:
        """Linear weights of one layer without quantization constants. What is not packed has the
        width of the hidden states: an upcast takes both to float32.
        """
        packed = sum(self.packed_weights)
        return packed / 2 + (sum(self.shape.layer_weights) - packed) * self.run.stream_bytes

    @property
    def weights(self) -> int:
        """The base model as it lies on the device; of a model in shards the device's share, but all
        of the quantization constants, which are no parameters.
        """
        run, shape, double = self.run, self.shape, self.run.quantization == "nf4-double"
        constants = sum(quantized_bytes(n, double) - n // 2 for n in self.packed_weights)
        whole = shape.layers * self.layer_bytes + shape.other_parameters * run.stream_bytes
        return ceil(whole / run.shards) + shape.layers * constants

    @cached_property
    def adapter_tensors(self) -> list[int]:
        return self.shape.adapter_tensors(self.run.rank, self.run.targets)

    @property
    def adapters(self) -> int:
        """The trainable parameters that one device holds; their gradients take as much."""
        return ceil(sum(self.adapter_tensors) / self.run.shards) * self.run.adapter_bytes

    @property
    def optimizer(self) -> int:
        """Two moments for each trainable parameter, in the optimizer's own width.

        bitsandbytes keeps tensors below 4,096 elements in 32 bits. Paged states of 100,000 elements
        or more lie in managed memory, which the driver moves to the host: counted as none.
        """
        width, total = OPTIMIZERS[self.run.optimizer], 0.0
        for elements in self.adapter_tensors:
            if isinstance(width, str):
                total += elements * 2 * self.run.adapter_bytes
            elif not (self.run.optimizer.startswith("paged") and elements >= SMALLEST_PAGED):
                total += elements * (width if elements >= SMALLEST_8BIT else 2 * FLOAT32)
        return round(total / self.run.shards)

    @cached_property
    def layer(self) -> int:
        """What autograd keeps of one decoder layer's forward pass for its backward pass.

        Read off modeling_llama.py and peft's Linear4bit. A frozen projection costs nothing. What is
        kept is kept for norms (the input, and one reciprocal root a token), attention (query, key,
        value, output at full head count, and a log-sum-exp a head), the gate, and the adapters.
        """
        run, shape, way = self.run, self.shape, self.way
        norms = 2 * (shape.hidden * way.norm_bytes + FLOAT32)
        attention = 4 * shape.heads * shape.head * run.stream_bytes + shape.heads * FLOAT32
        gate = way.wide * shape.inner * run.stream_bytes
        low_rank = len(run.targets) * run.rank * run.adapter_input_bytes
        mask = way.masks * run.batch * run.length**2 * run.stream_bytes
        return run.tokens * (norms + attention + gate + low_rank) + self.adapter_inputs + mask

    @cached_property
    def adapter_inputs(self) -> int:
        """Inputs of the A matrices. Parts that read the same tensor share one copy, unless dropout,
        which keeps a mask too, or a cast gives each its own; the input of o_proj is kept anyway.
        """
        run, dropped = self.run, self.run.dropout > 0
        inputs = {n: sides[1] for n, sides in self.shape.linear.items() if n in run.targets}
        if not dropped and run.adapter_input_bytes == run.stream_bytes:
            inputs = {READS_WITH.get(name, name): inputs[name] for name in inputs}
            inputs.pop("o_proj", None)
        return run.tokens * sum(inputs.values()) * (run.adapter_input_bytes + dropped)

    @property
    def kept_layer(self) -> int:
        """`layer` where activations are kept between checkpoints: the fast path makes inputs of
        adapters again, from what norms and gates keep anyway.
        """
        return self.layer - self.adapter_inputs * self.way.inputs_made_again

    @property
    def checkpoint(self) -> int:
        """One hidden state: all that a checkpoint keeps of a layer (Chen et al., 1604.06174)."""
        return self.run.tokens * self.shape.hidden * self.run.stream_bytes

    @property
    def held(self) -> int:
        """Activations kept between forward and backward, over all layers, and the last norm's."""
        run, layers = self.run, self.shape.layers
        last = run.tokens * self.shape.hidden * self.way.last_norm_bytes
        if not run.checkpointing:
            return last + layers * self.layer
        kept = min(run.kept_layers, layers)
        checkpoints = layers - kept - run.offloaded(layers)
        return last + kept * self.kept_layer + checkpoints * self.checkpoint

    @property
    def host(self) -> int:
        """What offloaded activations take of the host's memory."""
        return self.run.offloaded(self.shape.layers) * self.kept_layer

    @property
    def travelling(self) -> int:
        """What is on the GPU of layers whose activations are on their way, at most."""
        count = 1 + offload_lead(self.run.kept_layers) // 2
        return count * self.kept_layer * self.run.offload

    @property
    def logits(self) -> int:
        """The most that the loss holds at once: a tile of logits, and the gradient it gives."""
        tokens, loss = self.run.tokens, self.loss
        tile = min(tokens, loss.tokens) * loss.words * loss.logit_bytes
        return tile + tokens * self.shape.hidden * loss.state_bytes

    @property
    def widest_weight(self) -> int:
        """The largest linear weight, unpacked to be multiplied with."""
        return max(self.shape.layer_weights) * self.run.compute_bytes

    @property
    def walking_back(self) -> int:
        """What walking back through one layer needs besides its activations: the residual's
        gradient twice, wide gradients, and the widest weight if it is unpacked.
        """
        numbers = self.run.tokens * (2 * self.shape.hidden + self.way.wide * self.shape.inner)
        unpacked = max(self.packed_weights, default=0) * self.run.compute_bytes
        return numbers * self.run.stream_bytes + unpacked

    @property
    def recording(self) -> int:
        """What a recorded step keeps: workspaces, gaps, and room for an evaluation beside it, of a
        layer (residual, norm, three wide tensors) or the last state and logits with their gradient.
        """
        tokens, shape = self.run.tokens, self.shape
        layer = tokens * 3 * (shape.hidden + shape.inner)
        head = tokens * shape.hidden + 2 * min(tokens, LOSS_CHUNK) * shape.words
        evaluation = max(layer, head) * self.run.compute_bytes
        return evaluation + GRAPH_WORKSPACES + GAPS * self.widest_weight

    @property
    def gathered(self) -> int:
        """What FSDP has put together again at one moment: three layers (one computes, one arrives,
        in a buffer first), with adapters and their gradients, and the head, once it was used.
        """
        run, shape = self.run, self.shape
        layer = self.layer_bytes + 2 * sum(self.adapter_tensors) / shape.layers * run.adapter_bytes
        return round(3 * layer) + shape.words * shape.hidden * run.stream_bytes

    @property
    def beside(self) -> int:
        """What is there all the time besides. On a CPU: pages of the 16-bit file that were read to
        quantize it; they are clean, and the system takes them back when it needs room.
        """
        found = self.recording if self.run.fast else 0
        found += self.gathered if self.run.shards > 1 else 0
        pages = 2 * self.shape.layers * sum(self.packed_weights)
        return found + (pages if self.run.device == "cpu" else 0)

    def moments(self, baseline: int) -> list[Estimate]:
        """Walking back comes twice: at the layer next to the loss, and at the first one."""
        run, adapters, states = self.run, self.adapters, self.optimizer
        there, beside = (self.weights, adapters), self.beside + baseline
        # Before the first optimizer step of several accumulated batches the gradients are kept.
        # A recorded step always has them in one place.
        kept = adapters if run.accumulation > 1 or run.fast else 0
        first = max(kept, adapters // self.shape.layers)
        # Layers that keep theirs come first, so these are gone when a checkpoint runs again.
        gone = run.kept_layers * self.kept_layer
        top = self.held + max(0, self.layer + self.travelling - gone) * run.checkpointing
        bottom = self.layer + self.checkpoint * run.checkpointing
        back = beside + self.walking_back
        return [
            Estimate(*there, kept, states, self.held, self.logits, beside, "loss"),
            Estimate(*there, first, states, top, 0, back, "backward"),
            Estimate(*there, adapters, states, bottom, 0, back, "backward"),
            Estimate(*there, adapters, states, 0, 0, beside, "step"),
        ]

    def estimate(self, baseline: int = 0) -> Estimate:
        """The fullest of its moments."""
        return max(self.moments(baseline), key=lambda moment: moment.total)


def estimate(model_config, run: Run, baseline: int = 0) -> Estimate:
    """Predicted peak of a training step, part by part.

    `baseline` is what the process holds before the model is loaded (`current_memory_bytes()`), and
    matters on a CPU. On a GPU the result stands for `torch.cuda.max_memory_allocated()`, on the
    fast path for `max_memory_reserved()`, because a recorded step keeps its memory: the CUDA
    context, a few hundred MB, is in neither.
    """
    return Step.of(model_config, run).estimate(baseline)


def measured(name: str) -> dict:
    """A file of benchmarks/results: its `rows`, the `hardware` and the `date`."""
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
