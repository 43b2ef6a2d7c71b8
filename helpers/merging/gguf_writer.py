"""A Llama, or a LoRA adapter for one, in the GGUF format that llama.cpp and Ollama read.

The gguf package knows the format but no Hugging Face model: what a Llama needs stands here. Other
architectures are refused by name, and so is a model whose weights are 4-bit.
"""

import itertools
import json
from collections.abc import Iterator
from math import prod
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import TokenType
from peft import PeftConfig
from transformers import AutoConfig, AutoTokenizer

from helpers.model import check_model, hub
from helpers.model.check_model import CONVERTER

# File name -> how matrices are stored, and the number by which a file says so.
TYPES = {
    "f16": (Kind.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (Kind.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (Kind.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}
# What 4 bits would harm most has 8 in a file of q4_0.
IN_8_BITS = {"token_embd", "output", "attn_v", "ffn_down"}


class NoGGUF(ValueError):
    """A model that this writer cannot write. The message says why, and what can."""


def write_gguf(source: Path, paths: dict[str, Path], tokenizer: Path, device: str = "cpu") -> None:
    """Write a Llama model in a folder of safetensors as a GGUF file for each name of TYPES; NoGGUF.

    tokenizer: the folder with its files. One tensor at a time is read, and converted on the device.
    """
    shape = AutoConfig.from_pretrained(source)
    if reason := why_not(shape):
        raise NoGGUF(reason)
    writers = {name: gguf.GGUFWriter(path, "llama") for name, path in paths.items()}
    for type_name, writer in writers.items():
        kind, file_type = TYPES[type_name]
        _add_shape(writer, shape, file_type)
        _add_tokenizer(writer, tokenizer, shape.vocab_size)
        for name, tensor in tensors_of(source, shape):
            size = tensor.get_shape()
            stored, length = stored_as(name, size, kind), stored_bytes(name, size, kind)
            writer.add_tensor_info(name, size, np.dtype(np.float32), length, raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    for name, tensor in tensors_of(source, shape):
        rows = in_ggml_order(name, tensor[:].to(device).float(), shape)
        for type_name, writer in writers.items():
            kind = stored_as(name, rows.shape, TYPES[type_name][0])
            writer.write_tensor_data(in_blocks(rows, kind).cpu().numpy())
    for writer in writers.values():
        writer.close()


def write_adapter(adapter: Path, base: Path, path: Path) -> None:
    """Write a LoRA adapter in peft's folder as a GGUF file, in 16 bits; the base gives the shape.

    llama.cpp adds `alpha / rank * B A x` to what a layer of a base GGUF says. NoGGUF.
    """
    shape = AutoConfig.from_pretrained(base)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    alpha = PeftConfig.from_pretrained(adapter).lora_alpha
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    names = names_in_gguf(shape)
    for name, tensor in hub.stored_tensors(adapter):
        layer, _, part = name.removeprefix("base_model.model.").partition(".lora_")
        stem, rows = names.get_name(layer), tensor[:].float()
        if stem is None or part not in ("A.weight", "B.weight"):
            raise NoGGUF(f"{adapter} holds {name}, which no adapter of a Llama in GGUF has")
        if part[0] == "B":  # whose rows are those of the layer
            rows = in_ggml_order(f"{stem}.", rows, shape)
        writer.add_tensor(f"{stem}.weight.lora_{part[0].lower()}", rows.half().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def why_not(shape, tokenizer=None) -> str:
    """Why a model of this shape, and tokenizer, cannot be written, and what can; "" if it can."""
    if reason := check_model.why_not_gguf(shape, tokenizer):
        return reason
    if getattr(shape, "quantization_config", None):
        return (
            "the merged model is stored in the 4 bits of bitsandbytes, which GGUF does not know: "
            'merge once more with MERGE_INTO = "dequantized"'
        )
    return ""


def _add_shape(writer: gguf.GGUFWriter, shape, file_type: int) -> None:
    writer.add_vocab_size(shape.vocab_size)
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def names_in_gguf(shape) -> gguf.TensorNameMap:
    """What a Llama's tensors are called in GGUF, by their names in transformers."""
    return gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, shape.num_hidden_layers)


def tensors_of(source: Path, shape) -> Iterator[tuple]:
    """(name in GGUF, lazily read tensor) of all files; NoGGUF for one with no name there."""
    names = names_in_gguf(shape)
    for name, tensor in hub.stored_tensors(source):
        if name == "lm_head.weight" and shape.tie_word_embeddings:
            continue  # a reader takes the embedding where there is no output matrix
        stem, _, suffix = name.rpartition(".")
        if names.get_name(stem) is None:
            raise NoGGUF(f"{source} holds {name}, which no Llama in GGUF has: {CONVERTER}")
        yield f"{names.get_name(stem)}.{suffix}", tensor


def stored_as(name: str, size, kind: Kind) -> Kind:
    """How a tensor is stored in a file of a kind, by its name in GGUF.

    Vectors stay in 32 bits; a row that no whole number of blocks makes up stays in 16.
    """
    if len(size) == 1:
        return Kind.F32
    if kind == Kind.Q4_0 and IN_8_BITS & {*name.split(".")}:
        kind = Kind.Q8_0
    return kind if size[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0 else Kind.F16


def stored_bytes(name: str, size, kind: Kind) -> int:
    """Bytes of a tensor in a file of a kind."""
    return prod(gguf.quant_shape_to_byte_shape(size, stored_as(name, size, kind)))


def in_blocks(rows: torch.Tensor, kind: Kind) -> torch.Tensor:
    """float32 rows as a file holds them; those of q8_0, q4_0 as bytes, as `gguf.quantize` does.

    Here and not there because a GPU does it in no time, and numpy takes minutes for 7B.
    """
    if kind in (Kind.F32, Kind.F16):
        return rows if kind == Kind.F32 else rows.half()
    blocks = rows.reshape(-1, 32)
    furthest = blocks.gather(1, blocks.abs().argmax(dim=1, keepdim=True))
    # By a tensor, for on a GPU torch multiplies by the rounded inverse of a plain number.
    steps = torch.full_like(furthest, 127 if kind == Kind.Q8_0 else -8)
    scale = (furthest.abs() if kind == Kind.Q8_0 else furthest) / steps
    scaled = blocks * torch.where(scale == 0, 0, scale.reciprocal())
    if kind == Kind.Q8_0:
        # Halves go away from zero, as in C; torch.round takes them to the even neighbour.
        down = scaled.abs().floor()
        whole = scaled.sign() * (down + (2 * (scaled.abs() - down)).floor())
        codes = whole.to(torch.int8).view(torch.uint8)
    else:  # two weights a byte: the first half of a block lies in the lower four bits
        low, high = (scaled + 8.5).trunc().clamp(0, 15).to(torch.uint8).chunk(2, dim=1)
        codes = low | high << 4
    packed = torch.cat([scale.half().view(torch.uint8), codes], 1)
    return packed.reshape(*rows.shape[:-1], -1)


def in_ggml_order(name: str, rows: torch.Tensor, shape) -> torch.Tensor:
    """Query and key rows as ggml rotates them, everything else as it is."""
    heads = {"attn_q": shape.num_attention_heads, "attn_k": shape.num_key_value_heads}
    turned = next((count for kind, count in heads.items() if f".{kind}." in name), None)
    return to_neighbours(rows, turned) if turned else rows


def to_neighbours(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Put the two rows that a rotary position turns together next to each other, head by head.

    transformers keeps a pair half a head apart, row i and row i + width / 2; ggml keeps it at 2 i
    and 2 i + 1. rows: (heads * width, ...).
    """
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _add_tokenizer(writer: gguf.GGUFWriter, source: Path, vocabulary_size: int) -> None:
    described = json.loads((source / "tokenizer.json").read_text("utf-8"))
    model = described["model"]
    pieces = bool(model.get("byte_fallback"))  # a converted SentencePiece vocabulary, as Llama 2's
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokens, types = tokens_and_types(tokenizer, vocabulary_size, pieces)
    writer.add_tokenizer_model("llama" if pieces else "gpt2")
    writer.add_tokenizer_pre("default" if pieces else pre_tokenizer(described["pre_tokenizer"]))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if pieces:
        writer.add_token_scores(scores(tokens, model["merges"]))
    special = gguf.SpecialVocab(source, load_merges=not pieces, n_vocab=vocabulary_size)
    begins = tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    special.add_special_token["bos"] = begins  # a reader that finds no flag guesses
    special.add_to_gguf(writer, quiet=True)


def tokens_and_types(tokenizer, vocabulary_size: int, pieces: bool) -> tuple[list[str], list[int]]:
    """Every token's text and kind by id. A row of the embedding without a token is unused."""
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}

    def kind(number: int, token: str) -> TokenType:
        added = tokenizer.added_tokens_decoder.get(number)
        if number not in by_id:
            return TokenType.UNUSED
        if pieces and token == tokenizer.unk_token:
            return TokenType.UNKNOWN
        if added is not None:
            return TokenType.CONTROL if added.special else TokenType.USER_DEFINED
        is_byte = pieces and len(token) == 6 and token.startswith("<0x")
        return TokenType.BYTE if is_byte else TokenType.NORMAL

    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(vocabulary_size)]
    return tokens, list(itertools.starmap(kind, enumerate(tokens)))


def scores(tokens: list[str], merges: list) -> list[float]:
    """SentencePiece's scores, from the order of the merges: the earlier, the higher.

    llama.cpp merges by score. With one score for all, as gguf's own LlamaHfVocab gives, it would
    cut words in other places than the model was trained on.
    """
    merged = ["".join(pair.split(" ") if isinstance(pair, str) else pair) for pair in merges]
    rank = {token: place for place, token in reversed([*enumerate(merged)])}  # the first counts
    return [-float(rank.get(token, 0)) for token in tokens]


def pre_tokenizer(described: dict) -> str:
    """llama.cpp's name for the first cut that tokenizer.json describes; NoGGUF if unknown."""
    name, reason = check_model.first_cut(described)
    if reason:
        raise NoGGUF(reason)
    return name
