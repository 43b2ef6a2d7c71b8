"""The merged model as GGUF, for llama.cpp and Ollama, with the Modelfile that Ollama reads.

Written by the gguf package, which knows the format but no Hugging Face model: what a Llama needs
stands here. Other architectures are refused, and so is a merge whose weights are 4-bit.
"""

import json
from collections.abc import Iterator
from math import prod
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import TokenType
from transformers import AutoConfig, AutoTokenizer

from helpers import artefacts, models, prompts
from helpers.config import Config
from helpers.integrity import check_merged, system_message

# File name -> how matrices are stored, and the number by which a file says so.
TYPES = {
    "f16": (Kind.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (Kind.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
# How a tokenizer cuts text before it merges, as llama.cpp calls it.
PRE_TOKENIZERS = {("ByteLevel",): "gpt-2", ("Digits", "ByteLevel"): "smollm"}


def export_gguf(config: Config) -> Path:
    """Write run_dir/gguf, whole or not at all: the merged model in every type, and a Modelfile.

    Returns the folder. Raises FileNotFoundError without a merged model, ArtefactError for one
    that is damaged or stale, ValueError for a model that cannot be written.
    """
    source = check_merged(config)
    with artefacts.whole_folder(config.gguf_dir) as draft:
        for name in TYPES:
            write_gguf(source, draft / f"model.{name}.gguf", name)
        (draft / "Modelfile").write_text(modelfile(config), encoding="utf-8")
    return config.gguf_dir


def modelfile(config: Config, weights: str = "model.q8_0.gguf") -> str:
    """Ollama's description of the model. Its template is the one of training, byte for byte.

    Ollama fills in `.System` and `.Prompt`; BOS comes from the file's own flag. Temperature 0 is
    greedy, as everywhere in this course. Ollama cannot take off the blank lines around a
    request, as `prompts.render_prompt` does.
    """
    system = prompts.without_blank_lines(system_message(config, config.merged_dir))
    if '"""' in system:
        raise ValueError('SYSTEM_MESSAGE holds """, which ends a text in a Modelfile: reword it')
    template = prompts.render_prompt("{{ .Prompt }}", "{{ .System }}")
    return (
        f'FROM ./{weights}\nTEMPLATE """{template}"""\nSYSTEM """{system}"""\n'
        f"PARAMETER temperature 0\nPARAMETER num_predict {config.max_new_tokens}\n"
    )


def write_gguf(source: Path, path: Path, type_name: str) -> None:
    """Write a Llama model in a folder of safetensors as one GGUF file of a type of TYPES.

    Tensors are read, converted and written one at a time, so memory holds one of them.
    """
    kind, file_type = TYPES[type_name]
    shape = AutoConfig.from_pretrained(source)
    _check(shape)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA])
    _add_shape(writer, shape, file_type)
    _add_tokenizer(writer, source, shape.vocab_size)
    for name, tensor in _tensors(source, shape):
        size, stored = tensor.get_shape(), _stored_as(tensor.get_shape(), kind)
        bytes_needed = prod(gguf.quant_shape_to_byte_shape(size, stored))
        writer.add_tensor_info(name, size, np.dtype(np.float32), bytes_needed, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in _tensors(source, shape):
        array = _in_ggml_order(name, tensor[:].float().numpy(), shape)
        writer.write_tensor_data(gguf.quantize(array, _stored_as(array.shape, kind)))
    writer.close()


def _check(shape) -> None:
    """ValueError for what this writer does not know, before anything is written."""
    rope_type = (shape.rope_parameters or {}).get("rope_type", "default")
    if shape.model_type != "llama" or rope_type != "default":
        raise ValueError(
            f"only Llama models with plain rotary positions are written as GGUF; this one is "
            f"{shape.model_type!r} with positions {rope_type!r}: use llama.cpp's own converter"
        )
    if getattr(shape, "quantization_config", None):
        raise ValueError(
            "the merged model is stored in 4 bits, which GGUF does not know: merge once more with "
            'MERGE_INTO = "dequantized"'
        )


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


def _tensors(source: Path, shape) -> Iterator[tuple]:
    """(name in GGUF, lazily read tensor) of all files; ValueError for one with no name there."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, shape.num_hidden_layers)
    for name, tensor in models.stored_tensors(source):
        if name == "lm_head.weight" and shape.tie_word_embeddings:
            continue  # a reader takes the embedding where there is no output matrix
        stem, _, suffix = name.rpartition(".")
        if names.get_name(stem) is None:
            raise ValueError(f"{source} holds {name}, which no Llama in GGUF has")
        yield f"{names.get_name(stem)}.{suffix}", tensor


def _stored_as(size, kind: Kind) -> Kind:
    """Vectors stay in 32 bits; a row that no whole number of blocks makes up stays in 16."""
    if len(size) == 1:
        return Kind.F32
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return kind if size[-1] % block == 0 else Kind.F16


def _in_ggml_order(name: str, array: np.ndarray, shape) -> np.ndarray:
    """Query and key rows as ggml rotates them, everything else as it is."""
    if ".attn_q." in name:
        return to_neighbours(array, shape.num_attention_heads)
    if ".attn_k." in name:
        return to_neighbours(array, shape.num_key_value_heads)
    return array


def to_neighbours(rows: np.ndarray, heads: int) -> np.ndarray:
    """Put the two rows that a rotary position turns together next to each other, head by head.

    transformers keeps a pair half a head apart, row i and row i + width / 2; ggml keeps it at 2 i
    and 2 i + 1. rows: (heads * width, ...).
    """
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _add_tokenizer(writer: gguf.GGUFWriter, source: Path, vocabulary_size: int) -> None:
    """Tokens with types, merges or scores, special tokens, BOS flag, chat template."""
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
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(vocabulary_size)]

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

    return tokens, [kind(number, token) for number, token in enumerate(tokens)]


def scores(tokens: list[str], merges: list) -> list[float]:
    """SentencePiece's scores, from the order of the merges: the earlier, the higher.

    llama.cpp merges by score. With one score for all, as gguf's own LlamaHfVocab gives, it would
    cut words in other places than the model was trained on.
    """
    rank: dict[str, int] = {}
    for place, pair in enumerate(merges):
        rank.setdefault("".join(pair.split(" ") if isinstance(pair, str) else pair), place)
    return [-float(rank.get(token, 0)) for token in tokens]


def pre_tokenizer(described: dict) -> str:
    """llama.cpp's name for the first cut that tokenizer.json describes; ValueError if unknown."""
    parts = tuple(part["type"] for part in described.get("pretokenizers", [described]))
    if parts not in PRE_TOKENIZERS:
        raise ValueError(
            f"the tokenizer cuts text by {' and '.join(parts)}, whose name in llama.cpp is not "
            "known here: add it to PRE_TOKENIZERS in helpers/export.py"
        )
    return PRE_TOKENIZERS[parts]
