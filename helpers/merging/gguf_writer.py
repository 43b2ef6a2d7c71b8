"""A Llama, or a LoRA adapter for one, in the GGUF format that llama.cpp and Ollama read.

The gguf package knows the format but no Hugging Face model: what a Llama needs stands here. Others
are refused by name, see `check_model.why_not_gguf`, and so is a model whose weights are 4-bit.
"""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import TokenType
from gguf.lazy import LazyNumpyTensor
from peft import PeftConfig
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer

from helpers.model.check_model import CONVERTER, pre_tokenizer, why_not_gguf

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


def write_gguf(source: Path, path: Path, type_name: str, tokenizer_folder: Path) -> None:
    """Write a Llama model in a folder of safetensors as a GGUF file of one of TYPES; NoGGUF.

    One tensor at a time is read, stored as its kind of layer bears, and written.
    """
    shape = AutoConfig.from_pretrained(source)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    if reason := why_not_gguf(shape, tokenizer):
        raise NoGGUF(reason)
    writer, (kind, file_type) = gguf.GGUFWriter(path, "llama"), TYPES[type_name]
    _add_shape(writer, shape, file_type)
    _add_tokenizer(writer, tokenizer, tokenizer_folder, shape.vocab_size)
    for name, rows in tensors_of(source, shape):
        stored = stored_as(name, rows.shape, kind)
        writer.add_tensor(name, quantized(rows, stored), raw_dtype=stored)
    _close(writer)


def quantized(rows: LazyNumpyTensor, kind: Kind) -> LazyNumpyTensor:
    """`gguf.quantize`, when the tensor is used, on all cores: on one, 7B in q8_0 takes minutes."""

    def pack(read: np.ndarray) -> np.ndarray:
        parts = np.array_split(read, os.cpu_count() or 1)
        with ThreadPoolExecutor(len(parts)) as pool:
            return np.concatenate([*pool.map(lambda part: gguf.quantize(part, kind), parts)])

    return LazyNumpyTensor(meta=gguf.quantize(rows, kind)._meta, args=(rows,), func=pack)


def write_adapter(adapter: Path, base: Path, path: Path) -> None:
    """Write a LoRA adapter in peft's folder as a GGUF file, in 16 bits; the base gives the shape.

    llama.cpp adds `alpha / rank * B A x` to what a layer of a base GGUF says. NoGGUF.
    """
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, PeftConfig.from_pretrained(adapter).lora_alpha)
    for name, rows in tensors_of(adapter, AutoConfig.from_pretrained(base)):
        writer.add_tensor(name, rows.astype(np.float16))
    _close(writer)


def _close(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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


def tensors_of(folder: Path, shape) -> Iterator[tuple[str, LazyNumpyTensor]]:
    """(name in GGUF, float32 tensor that is read when it is used) of a model or an adapter.

    NoGGUF for one with no name there. Query and key rows are as ggml rotates them.
    """
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, shape.num_hidden_layers)
    heads = {"attn_q": shape.num_attention_heads, "attn_k": shape.num_key_value_heads}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            sizes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}
        for name, size in sizes.items():
            if name == "lm_head.weight" and shape.tie_word_embeddings:
                continue  # a reader takes the embedding where there is no output matrix
            layer, _, part = name.removeprefix("base_model.model.").rpartition(".")
            layer, _, side = layer.partition(".lora_")  # "A" or "B" of an adapter
            found = names.get_name(layer)
            if found is None or part != "weight" or side not in ("", "A", "B"):
                raise NoGGUF(f"{folder} holds {name}, which no Llama in GGUF has: {CONVERTER}")
            # The rows of B are those of the layer, those of A are not.
            turned = heads.get(found.rpartition(".")[2]) if side != "A" else None

            def read(file=file, name=name, heads=turned) -> np.ndarray:
                with safe_open(file, "pt") as opened:
                    rows = opened.get_tensor(name).float().numpy()
                return to_neighbours(rows, heads) if heads else rows

            meta = LazyNumpyTensor.meta_with_dtype_and_shape(np.float32, tuple(size))
            own = f"{found}.weight" + f".lora_{side.lower()}" * bool(side)
            yield own, LazyNumpyTensor(meta=meta, func=read)


def stored_as(name: str, size, kind: Kind) -> Kind:
    """How a tensor is stored in a file of a kind, by its name in GGUF.

    Vectors stay in 32 bits; a row that no whole number of blocks makes up stays in 16.
    """
    if len(size) == 1:
        return Kind.F32
    if kind == Kind.Q4_0 and IN_8_BITS & {*name.split(".")}:
        kind = Kind.Q8_0
    return kind if size[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0 else Kind.F16


def to_neighbours(rows: np.ndarray, heads: int) -> np.ndarray:
    """Put the two rows that a rotary position turns together next to each other, head by head.

    transformers keeps a pair half a head apart, row i and row i + width / 2; ggml keeps it at 2 i
    and 2 i + 1. rows: (heads * width, ...).
    """
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer, folder: Path, vocabulary_size: int) -> None:
    pre = pre_tokenizer(tokenizer)
    pieces = pre == "default"  # a converted SentencePiece vocabulary
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(vocabulary_size)]
    writer.add_tokenizer_model("llama" if pieces else "gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    unknown = tokenizer.unk_token if pieces else None
    kinds = (token_type(tokenizer, by_id.get(n), n, unknown) for n in range(vocabulary_size))
    writer.add_token_types(list(kinds))
    if pieces:
        described = json.loads(tokenizer.backend_tokenizer.to_str())
        writer.add_token_scores(scores(tokens, described["model"]["merges"]))
    special = gguf.SpecialVocab(folder, load_merges=not pieces, n_vocab=vocabulary_size)
    begins = tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    special.add_special_token["bos"] = begins  # a reader that finds no flag guesses
    special.add_to_gguf(writer, quiet=True)


def token_type(tokenizer, token: str | None, number: int, unknown: str | None) -> TokenType:
    """The kind of a token; a row of the embedding without a token is unused."""
    added = tokenizer.added_tokens_decoder.get(number)
    if token is None:
        return TokenType.UNUSED
    if token == unknown:
        return TokenType.UNKNOWN
    if added is not None:
        return TokenType.CONTROL if added.special else TokenType.USER_DEFINED
    is_byte = len(token) == 6 and token.startswith("<0x")
    return TokenType.BYTE if is_byte else TokenType.NORMAL


def scores(tokens: list[str], merges: list) -> list[float]:
    """SentencePiece's scores, from the order of the merges: the earlier, the higher.

    llama.cpp merges by score. With one score for all, as gguf's own LlamaHfVocab gives, it would
    cut words in other places than the model was trained on.
    """
    merged = ["".join(pair.split(" ") if isinstance(pair, str) else pair) for pair in merges]
    rank = {token: place for place, token in reversed([*enumerate(merged)])}  # the first counts
    return [-float(rank.get(token, 0)) for token in tokens]
