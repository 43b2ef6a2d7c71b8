"""The merged model as GGUF, for llama.cpp and Ollama, with the Modelfile that Ollama reads.

Written by the gguf package, which knows the format but no Hugging Face model: what a Llama needs
stands here. Other architectures are refused by name, and so is a merge whose weights are 4-bit.
"""

import json
import shutil
from collections.abc import Iterator
from math import prod
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import TokenType
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from helpers import prompts
from helpers.config import Config
from helpers.data.curation_note import system_message
from helpers.merging.merged_folder import check_merged
from helpers.model import loading, predict
from helpers.runs import folders

# File name -> how matrices are stored, and the number by which a file says so.
TYPES = {
    "f16": (Kind.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (Kind.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
# How a tokenizer cuts text before it merges, as llama.cpp calls it.
PRE_TOKENIZERS = {("ByteLevel",): "gpt-2", ("Digits", "ByteLevel"): "smollm"}
# Tokenizer, settings and headers, once for each of the three forms of a model: 20 MB at most.
SMALL_FILES_BYTES = 20_000_000
CONVERTER = "use llama.cpp's own converter, `python convert_hf_to_gguf.py` and the merged folder"


class NoGGUF(ValueError):
    """A model that this writer cannot write. The message says why, and what can."""


def disk_needed(config: Config) -> dict[str, int]:
    """Bytes of what notebook 05 writes, file by file, from the shape of the model alone."""
    shape = loading.load_shape(config.model_name)
    with torch.device("meta"):
        sizes = [list(p.shape) for p in AutoModelForCausalLM.from_config(shape).parameters()]
    if config.merge_into == "4bit":
        merged = predict.weight_bytes(shape, predict.Run.from_config(config))
    else:
        merged = 2 * sum(map(prod, sizes))
    files = {"merged/": merged}
    if config.merge_into != "4bit" and not why_not(shape):
        for name in config.gguf_types:
            kind, _ = TYPES[name]
            files[f"gguf/model.{name}.gguf"] = sum(_stored_bytes(size, kind) for size in sizes)
    return {name: size + SMALL_FILES_BYTES for name, size in files.items()}


def need_disk(config: Config) -> str:
    """`disk_needed`, a line for each file, and what is free. DiskFull where that is too little.

    An earlier merge makes room when it is replaced.
    """
    files = disk_needed(config)
    earlier = sum(file.stat().st_size for file in config.merged_dir.glob("*"))
    needed = max(files["merged/"], sum(files.values()) - earlier)
    folders.need_space(config.run_dir, needed, "notebook 05")
    free = shutil.disk_usage(config.run_dir).free
    files |= {"in all": sum(files.values()), "free on the disk": free}
    return "\n".join(f"{size / 1e9:8.2f} GB {name}" for name, size in files.items())


def export_gguf(config: Config) -> Path:
    """Write run_dir/gguf, whole or not at all: the merged model in every type, and a Modelfile.

    The types are those of GGUF_TYPES. Returns the folder. Raises FileNotFoundError without a merged
    model, ArtefactError for one that is damaged or stale, NoGGUF for one that cannot be written,
    DiskFull.
    """
    source = check_merged(config)
    paths = {name: f"model.{name}.gguf" for name in config.gguf_types}
    device = config.device if torch.cuda.is_available() else "cpu"
    with folders.whole_folder(config.gguf_dir) as draft:
        write_gguf(source, {name: draft / file for name, file in paths.items()}, device)
        text = modelfile(config, paths.get("q8_0", paths[config.gguf_types[0]]))
        (draft / "Modelfile").write_text(text, encoding="utf-8")
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


def write_gguf(source: Path, paths: dict[str, Path], device: str = "cpu") -> None:
    """Write a Llama model in a folder of safetensors as one GGUF file for each type of TYPES.

    Tensors are read once and one at a time, and converted on the device. Raises NoGGUF.
    """
    shape = AutoConfig.from_pretrained(source)
    if reason := why_not(shape):
        raise NoGGUF(reason)
    writers = {name: _begin(source, path, name, shape) for name, path in paths.items()}
    for name, tensor in _tensors(source, shape):
        rows = _in_ggml_order(name, tensor[:].to(device).float(), shape)
        for type_name, writer in writers.items():
            kind = _stored_as(list(rows.shape), TYPES[type_name][0])
            writer.write_tensor_data(in_blocks(rows, kind).cpu().numpy())
    for writer in writers.values():
        writer.close()


def _begin(source: Path, path: Path, type_name: str, shape) -> gguf.GGUFWriter:
    """A file with all but the numbers of its tensors, open for those."""
    kind, file_type = TYPES[type_name]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA])
    _add_shape(writer, shape, file_type)
    _add_tokenizer(writer, source, shape.vocab_size)
    for name, tensor in _tensors(source, shape):
        size = tensor.get_shape()
        stored, bytes_needed = _stored_as(size, kind), _stored_bytes(size, kind)
        writer.add_tensor_info(name, size, np.dtype(np.float32), bytes_needed, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return writer


def why_not(shape) -> str:
    """Why a model of this shape cannot be written, and what can write it; "" if it can."""
    rope_type = (shape.rope_parameters or {}).get("rope_type", "default")
    if shape.model_type != "llama" or rope_type != "default":
        return (
            f"only Llama models with plain rotary positions are written as GGUF here; this one is "
            f"{shape.model_type!r} with positions {rope_type!r}: {CONVERTER}"
        )
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


def _tensors(source: Path, shape) -> Iterator[tuple]:
    """(name in GGUF, lazily read tensor) of all files; NoGGUF for one with no name there."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, shape.num_hidden_layers)
    for name, tensor in loading.stored_tensors(source):
        if name == "lm_head.weight" and shape.tie_word_embeddings:
            continue  # a reader takes the embedding where there is no output matrix
        stem, _, suffix = name.rpartition(".")
        if names.get_name(stem) is None:
            raise NoGGUF(f"{source} holds {name}, which no Llama in GGUF has: {CONVERTER}")
        yield f"{names.get_name(stem)}.{suffix}", tensor


def _stored_as(size, kind: Kind) -> Kind:
    """Vectors stay in 32 bits; a row that no whole number of blocks makes up stays in 16."""
    if len(size) == 1:
        return Kind.F32
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return kind if size[-1] % block == 0 else Kind.F16


def _stored_bytes(size, kind: Kind) -> int:
    """Bytes of a tensor of a size in a file whose matrices are of a kind."""
    return prod(gguf.quant_shape_to_byte_shape(size, _stored_as(size, kind)))


def in_blocks(rows: torch.Tensor, kind: Kind) -> torch.Tensor:
    """float32 rows as a file holds them; those of q8_0 as bytes, bit for bit `gguf.quantize`.

    Here and not there because a GPU does it in no time, and numpy takes minutes for 7B.
    """
    if kind != Kind.Q8_0:
        return rows if kind == Kind.F32 else rows.half()
    blocks = rows.reshape(-1, 32)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    # By a tensor, for on a GPU torch multiplies by the rounded inverse of a plain number.
    scale = largest / torch.full_like(largest, 127)
    inverse = torch.where(scale == 0, 0, scale.reciprocal())
    scaled = blocks * inverse
    # Halves go away from zero, as in C; torch.round takes them to the even neighbour.
    down = scaled.abs().floor()
    whole = scaled.sign() * (down + (2 * (scaled.abs() - down)).floor())
    packed = torch.cat([scale.half().view(torch.uint8), whole.to(torch.int8).view(torch.uint8)], 1)
    return packed.reshape(*rows.shape[:-1], -1)


def read_back(path: Path, source: Path) -> tuple[int, int, float]:
    """Compare a GGUF file, unpacked by gguf's own reader, with the model that it was written from.

    Reads all tensors outside the layers and those of the first, middle and last layer. Returns how
    many that are, how many the file has, and the largest difference in steps, the distance of two
    neighbouring values there: half a step, and for q8_0 a little more, as its scale is rounded too.
    """
    shape = AutoConfig.from_pretrained(source)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    last = shape.num_hidden_layers - 1
    chosen = tuple(f"blk.{layer}." for layer in (0, last // 2, last))
    largest, checked = 0.0, 0
    for name, tensor in _tensors(source, shape):
        if name.startswith("blk.") and not name.startswith(chosen):
            continue
        wanted = _in_ggml_order(name, tensor[:].float(), shape)
        stored = found[name]
        again = torch.tensor(gguf.dequantize(stored.data, stored.tensor_type))
        steps = (again.reshape(wanted.shape) - wanted).abs() / _step(wanted, stored.tensor_type)
        largest, checked = max(largest, steps.max().item()), checked + 1
    return checked, len(found), largest


def _step(rows: torch.Tensor, kind: Kind) -> torch.Tensor:
    """The distance of neighbouring values of a kind, for each number of the rows."""
    if kind == Kind.Q8_0:
        largest = rows.reshape(-1, 32).abs().amax(dim=1, keepdim=True).clamp(min=1e-30)
        return (largest / 127).expand(-1, 32).reshape(rows.shape)
    numbers = torch.finfo(torch.float32 if kind == Kind.F32 else torch.float16)
    # Below the smallest normal number the distance stays what it is there.
    _, exponent = torch.frexp(rows.abs().clamp(min=numbers.smallest_normal))
    return numbers.eps * torch.exp2(exponent - 1.0)


def _in_ggml_order(name: str, rows: torch.Tensor, shape) -> torch.Tensor:
    """Query and key rows as ggml rotates them, everything else as it is."""
    if ".attn_q." in name:
        return to_neighbours(rows, shape.num_attention_heads)
    if ".attn_k." in name:
        return to_neighbours(rows, shape.num_key_value_heads)
    return rows


def to_neighbours(rows: torch.Tensor, heads: int) -> torch.Tensor:
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
    """llama.cpp's name for the first cut that tokenizer.json describes; NoGGUF if unknown."""
    parts = tuple(part["type"] for part in described.get("pretokenizers", [described]))
    if parts not in PRE_TOKENIZERS:
        raise NoGGUF(
            f"the tokenizer cuts text by {' and '.join(parts)}, whose name in llama.cpp is not "
            f"known here: {CONVERTER}"
        )
    return PRE_TOKENIZERS[parts]
