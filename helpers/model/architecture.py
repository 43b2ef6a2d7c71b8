"""The sizes of a model of Llama's kind, and how many numbers and bytes follow from them.

A layer has four attention projections, a gated MLP and two RMSNorms. Of a Qwen or a Gemma the
biases and the norms of queries and keys are left out, thousandths of the weights; only
`measure.footprint_bytes` counts them too.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from math import ceil, prod

from transformers import LlamaConfig

from helpers.config import ATTENTION_TARGETS
from helpers.profiles import FUSED

FLOAT32 = 4  # bytes
BLOCK, NESTED_BLOCK = 64, 256  # weights under one constant, constants under one second constant
FUSED_MODELS = ("phi3",)  # Phi-3 and Phi-4
# Touvron et al. 2023, arXiv 2307.09288
LLAMA_SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads"),
)
LLAMA_2 = {
    "7B": (4096, 11008, 32, 32, 32),
    "13B": (5120, 13824, 40, 40, 40),
    "70B": (8192, 28672, 80, 64, 8),
}


@dataclass(frozen=True)
class Shape:
    """`hidden` numbers are a token's state, `inner` the middle of the MLP, `head` one head."""

    hidden: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    head: int
    words: int
    tied: bool = False
    fused: bool = False  # q, k and v are one matrix, and gate and up another

    @classmethod
    def of(cls, model_config) -> "Shape":
        """The Shape of transformers' config of a model."""
        hidden, heads = model_config.hidden_size, model_config.num_attention_heads
        return cls(
            hidden=hidden,
            inner=model_config.intermediate_size,
            layers=model_config.num_hidden_layers,
            heads=heads,
            key_heads=getattr(model_config, "num_key_value_heads", None) or heads,
            head=getattr(model_config, "head_dim", None) or hidden // heads,
            words=model_config.vocab_size,
            tied=model_config.tie_word_embeddings,
            fused=model_config.model_type in FUSED_MODELS,
        )

    @cached_property
    def linear(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of one layer's linear parts by name."""
        queries, keys = self.heads * self.head, self.key_heads * self.head
        if self.fused:
            attention = {"qkv_proj": (queries + 2 * keys, self.hidden)}
            attention |= {"o_proj": (self.hidden, queries)}
            mlp = {"gate_up_proj": (2 * self.inner, self.hidden)}
            return attention | mlp | {"down_proj": (self.hidden, self.inner)}
        attention = {"q_proj": (queries, self.hidden), "k_proj": (keys, self.hidden)}
        attention |= {"v_proj": (keys, self.hidden), "o_proj": (self.hidden, queries)}
        mlp = {"gate_proj": (self.inner, self.hidden), "up_proj": (self.inner, self.hidden)}
        return attention | mlp | {"down_proj": (self.hidden, self.inner)}

    @cached_property
    def layer_weights(self) -> list[int]:
        """Weights of each linear part of one layer."""
        return [prod(sides) for sides in self.linear.values()]

    @property
    def linear_parameters(self) -> int:
        """Weights of all layers' linear parts."""
        return self.layers * sum(self.layer_weights)

    @property
    def other_parameters(self) -> int:
        """Weights that stay unpacked: embedding, head (unless tied), the norms."""
        tables = 1 if self.tied else 2
        return (tables * self.words + 2 * self.layers + 1) * self.hidden

    def adapter_tensors(self, rank: int, targets: Iterable[str]) -> list[int]:
        """Elements of each LoRA matrix: rank x inputs and outputs x rank, target by target."""
        sides = [side for name, shape in self.linear.items() if name in targets for side in shape]
        return [rank * side for side in sides] * self.layers


def own_names(model_config, names: Iterable[str]) -> tuple[str, ...]:
    """Kinds of linear layers under the names that a model has for those that they are in."""
    fused = FUSED if model_config.model_type in FUSED_MODELS else {}
    own = {part: whole for whole, parts in fused.items() for part in parts}
    return tuple(dict.fromkeys(own.get(name, name) for name in names))


def llama2_config(size: str = "7B") -> LlamaConfig:
    """The public shape of a Llama 2 model, "7B", "13B" or "70B", without its weights."""
    sizes = dict(zip(LLAMA_SIZES, LLAMA_2[size], strict=True))
    return LlamaConfig(vocab_size=32000, **sizes, max_position_embeddings=4096, rms_norm_eps=1e-5)


def quantized_bytes(parameters: int, double: bool) -> int:
    """Bytes of one 4-bit tensor with its constants (QLoRA, section 3, "Double Quantization").

    Half a byte a weight; for each 64 weights a 32-bit constant, or with double quantization an
    8-bit one, a 32-bit one for each 256 of those, and one 32-bit mean.
    """
    blocks = ceil(parameters / BLOCK)
    constants = blocks + FLOAT32 * (ceil(blocks / NESTED_BLOCK) + 1) if double else FLOAT32 * blocks
    return ceil(parameters / 2) + constants


def lora_parameters(
    model_config, rank: int = 64, targets: Iterable[str] = ATTENTION_TARGETS
) -> int:
    """Trainable parameters: rank x (inputs + outputs) over the targets (LoRA, section 4.1)."""
    names = own_names(model_config, targets)
    return sum(Shape.of(model_config).adapter_tensors(rank, names))


def cache_bytes(model_config, tokens: int, width: int = 2) -> int:
    """Keys and values that answering keeps of `tokens` tokens, at `width` bytes a number."""
    shape = Shape.of(model_config)
    return shape.layers * 2 * shape.key_heads * shape.head * width * tokens
