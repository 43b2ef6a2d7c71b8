"""The sizes of a model of Llama's kind, what follows from them, and which models are of it.

A layer has four attention projections, a gated MLP and two RMSNorms. Of a Qwen or a Gemma the
biases and the norms of queries and keys are left out, thousandths of the weights; only
`measure.footprint_bytes` counts them too.
"""

import re
from collections import Counter
from collections.abc import Iterable
from math import ceil, prod

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

from helpers.config import ALL_LINEAR_TARGETS, ATTENTION_TARGETS, ConfigError
from helpers.profiles import FUSED

FLOAT32 = 4  # bytes
BLOCK, NESTED_BLOCK = 64, 256  # weights under one constant, constants under one second constant
FUSED_MODELS = ("phi3",)  # Phi-3 and Phi-4
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
CHOOSE = (
    "choose a Llama, Mistral, Qwen 2 or 3, SmolLM 2 or 3, Gemma 3 (text), Phi-3 or Phi-4 model in "
    "16 bits"
)


class Shape:
    """Sizes of a model: `hidden` numbers are a token's state, `inner` the middle of the MLP.

    `linear` gives (outputs, inputs) of one layer's linear parts by name.
    """

    def __init__(self, model_config):
        self.hidden, self.inner = model_config.hidden_size, model_config.intermediate_size
        self.layers, self.words = model_config.num_hidden_layers, model_config.vocab_size
        heads = model_config.num_attention_heads
        head = getattr(model_config, "head_dim", None) or self.hidden // heads
        key_heads = getattr(model_config, "num_key_value_heads", None) or heads
        self.heads, self.queries, self.keys = heads, heads * head, key_heads * head
        outputs = {"q_proj": self.queries, "k_proj": self.keys, "v_proj": self.keys}
        outputs |= {"gate_proj": self.inner, "up_proj": self.inner}
        for whole, parts in _fused(model_config).items():
            outputs[whole] = sum(outputs.pop(part) for part in parts)
        self.linear = {name: (count, self.hidden) for name, count in outputs.items()}
        self.linear |= {
            "o_proj": (self.hidden, self.queries),
            "down_proj": (self.hidden, self.inner),
        }
        self.layer_weights = [prod(sides) for sides in self.linear.values()]
        self.linear_parameters = self.layers * sum(self.layer_weights)
        # What stays unpacked: embedding, head (unless tied), the norms.
        tables = 1 if model_config.tie_word_embeddings else 2
        self.other_parameters = (tables * self.words + 2 * self.layers + 1) * self.hidden

    def adapter_tensors(self, rank: int, targets: Iterable[str]) -> list[int]:
        """Elements of each LoRA matrix: rank x inputs and outputs x rank, target by target."""
        sides = [side for name, shape in self.linear.items() if name in targets for side in shape]
        return [rank * side for side in sides] * self.layers


def _fused(model_config) -> dict[str, tuple[str, ...]]:
    """Matrices of a layer that hold several parts, and which."""
    return FUSED if model_config.model_type in FUSED_MODELS else {}


def own_names(model_config, names: Iterable[str]) -> tuple[str, ...]:
    """Kinds of linear layers under the names that a model has for those that they are in."""
    own = {part: whole for whole, parts in _fused(model_config).items() for part in parts}
    return tuple(dict.fromkeys(own.get(name, name) for name in names))


def quantized_bytes(parameters: int, double: bool) -> int:
    """Bytes of one 4-bit tensor with its constants (QLoRA, section 3, "Double Quantization").

    Half a byte a weight; for each 64 weights a 32-bit constant, or with double quantization an
    8-bit one, a 32-bit one for each 256 of those, and one 32-bit mean.
    """
    blocks = ceil(parameters / BLOCK)
    constants = blocks + FLOAT32 * (ceil(blocks / NESTED_BLOCK) + 1) if double else FLOAT32 * blocks
    return ceil(parameters / 2) + constants


def lora_parameters(model_config, rank: int = 64, targets=ATTENTION_TARGETS) -> int:
    """Trainable parameters: rank x (inputs + outputs) over the targets (LoRA, section 4.1)."""
    names = own_names(model_config, targets)
    return sum(Shape(model_config).adapter_tensors(rank, names))


def cache_bytes(model_config, tokens: int, width: int = 2) -> int:
    """Keys and values that answering keeps of `tokens` tokens, at `width` bytes a number."""
    shape = Shape(model_config)
    return shape.layers * 2 * shape.keys * width * tokens


def check_shape(name: str, shape, kept: tuple[str, ...] = (), base: bool = True) -> None:
    """Raise ConfigError for transformers' config of a model that this course cannot train.

    Also for layers to keep in 16 bits that it has in one matrix with others. A model that is not a
    base, but merged, may be stored in the 4 bits of bitsandbytes.
    """
    if reason := _why_not(shape, base):
        raise ConfigError(
            f"MODEL_NAME is {name!r}, a {shape.model_type!r} model {reason}: {CHOOSE}"
        )
    for kind in kept:
        (own,) = own_names(shape, [kind])
        if not own.endswith(kind):  # as transformers compares them
            says = f"KEEP_IN_16BIT names {kind}, and {name!r} has no layer of that name"
            raise ConfigError(f"{says}: name {own} instead")


def _why_not(shape, base: bool) -> str:
    packed = (getattr(shape, "quantization_config", None) or {}).get("quant_method", "")
    reasons = {
        "of an encoder and a decoder, and here a model goes on with one text": (
            shape.is_encoder_decoder
        ),
        "that takes pictures or sound too, and here a model reads text alone": (
            hasattr(shape, "vision_config") or hasattr(shape, "audio_config")
        ),
        "of several experts a layer, which are not packed into 4 bits one by one": any(
            (getattr(shape, name, None) or 0) > 1 for name in EXPERTS
        ),
        f"whose weights are packed already ({packed}), and here 16 bits are packed": (
            packed and (base or packed != "bitsandbytes")
        ),
        "that is not made to go on with a text": shape.model_type not in KNOWN,
    }
    if found := next((reason for reason, applies in reasons.items() if applies), ""):
        return found
    with torch.device("meta"):
        modules = AutoModelForCausalLM.from_config(shape).named_modules()
    there = Counter(
        re.sub(r"^model\.layers\.\d+\.(self_attn|mlp)\.", "", name) for name, _ in modules
    )
    names = own_names(shape, ALL_LINEAR_TARGETS)
    missing = [name for name in names if there[name] != shape.num_hidden_layers]
    return f"without {', '.join(missing)}, whose layers are not as Llama's" if missing else ""
