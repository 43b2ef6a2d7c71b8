"""Walks notebooks in this process: every code cell runs and shows what it shows, without a kernel.

A hundred kernels would spend ten seconds each on imports alone.
"""

import contextlib
import io
import json
import sys
from pathlib import Path

import nbformat
import pandas as pd
import torch
import transformers
import trl
from IPython.core.interactiveshell import InteractiveShell
from IPython.core.pylabtools import select_figure_formats
from traitlets.config import Config as Traits

from helpers.data.sources import SAMPLE_DIR
from tests.notebook_code import notebook_path

# Sizes that make a walk short. None of them chooses a way through the code. (A packed batch has
# PER_DEVICE_TRAIN_BATCH_SIZE times MAX_LENGTH tokens.)
SHORT = {
    "LOG_STEPS": 2,
    "MAX_LENGTH": 320,
    "PER_DEVICE_TRAIN_BATCH_SIZE": 2,
    "PER_DEVICE_EVAL_BATCH_SIZE": 2,
    "EVALUATION_PROBLEMS": (1, 1, 1, 1),
    "MAX_NEW_TOKENS": 8,
    "COMPARISON_ROWS": 1,
    "COMPARISON_PROBLEMS": 1,
    "SANDBOX": "limits-only",  # generated code is run where nothing can be isolated, too
}


EOS = "<|im_end|>"  # of the embedded model


class CellFailed(AssertionError):
    """A cell raised. The message names the notebook, the cell and the error."""


def walk(number: str, edit=list, **parameters) -> dict:
    """Run a notebook's code cells in order, in a namespace that lasts until the next walk.

    `edit` may choose among the cells that follow the parameters. Raises CellFailed at the first
    cell that raises.
    """
    path = notebook_path(number)
    cells = nbformat.read(path, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    (start,) = [i for i, cell in enumerate(code) if "parameters" in cell.metadata.get("tags", [])]
    shell = _shell()
    shell.reset()
    for cell in code[: start + 1]:
        _run(shell, f"{path.stem}, cell {cells.index(cell)}", cell.source)
    given = [f"{name} = {value!r}" for name, value in parameters.items()]
    _run(shell, f"{path.stem}, injected parameters", "\n".join(given))  # as papermill does
    for cell in edit(code[start + 1 :]):
        _run(shell, f"{path.stem}, cell {cells.index(cell)}", cell.source)
    return shell.user_ns


def _shell() -> InteractiveShell:
    """IPython that draws a figure when it is shown, as in a kernel, and writes no history."""
    main = sys.modules["__main__"]  # which IPython replaces; what forks later needs this one
    shell = InteractiveShell.instance(config=Traits(HistoryManager={"enabled": False}))
    sys.modules["__main__"] = main
    select_figure_formats(shell, {"png"})
    return shell


def _run(shell: InteractiveShell, name: str, source: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        result = shell.run_cell(source)
    if error := result.error_before_exec or result.error_in_exec:
        line = source.strip().splitlines()[0]
        raise CellFailed(f"{name} ({line}): {type(error).__name__}: {error}") from error


def write_corpus(folder, questions: int = 30) -> None:
    """Short questions of the sample and their answers, as Kaggle's three files.

    The shortest ones of all were made to be removed.
    """
    tables = {
        name: pd.read_csv(SAMPLE_DIR / f"{name}.csv", encoding="ISO-8859-1", keep_default_na=False)
        for name in ("Questions", "Answers", "Tags")
    }
    best = tables["Answers"].sort_values("Score", ascending=False).drop_duplicates("ParentId")
    pairs = tables["Questions"].merge(best, left_on="Id", right_on="ParentId")
    pairs = pairs[(pairs.Score_y > 0) & pairs.Body_y.str.contains("<pre")]
    length = pairs.Body_x.str.len() + pairs.Body_y.str.len()
    chosen = pairs.ParentId[length[length > 500].sort_values().index[:questions]]
    for name, key in (("Questions", "Id"), ("Answers", "ParentId"), ("Tags", "Id")):
        rows = tables[name][tables[name][key].isin(chosen)]
        rows.to_csv(folder / f"{name}.csv", index=False, encoding="ISO-8859-1")


def first_tokens(tokenizer, count: int, folder):
    """A tokenizer of the first `count` tokens: fewer logits, and a GGUF that is soon read back."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer.json"
    described = json.loads(file.read_text(encoding="utf-8"))
    model = described["model"]
    kept = {name: place for name, place in model["vocab"].items() if place < count}
    merges = [pair for pair in model["merges"] if "".join(pair) in kept]
    described["model"] |= {"vocab": kept, "merges": merges}
    file.write_text(json.dumps(described), encoding="utf-8")
    return transformers.AutoTokenizer.from_pretrained(folder)


def save_random_model(config_class: str, tokenizer, folder, **shape) -> None:
    """A random model of two layers, 32 wide, in a folder beside its tokenizer, in bfloat16."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
    }
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    ends = {name: getattr(tokenizer, name) for name in names}
    make = getattr(transformers, config_class)
    described = make(vocab_size=len(tokenizer), **{**sizes, **ends, **shape})
    model = transformers.AutoModelForCausalLM.from_config(described, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def bare_tokenizer(folder, special: int = 17, **names):
    """The tokenizer in a folder without BOS, padding and chat template, and with EOS for `unk`.

    It keeps so many special tokens, of which EOS is always one; `names` says what else they are.
    """
    file = folder / "tokenizer.json"
    described = json.loads(file.read_text(encoding="utf-8"))
    tokens = described["added_tokens"]
    tokens.sort(key=lambda token: token["content"] != EOS)
    described |= {"added_tokens": tokens[:special], "post_processor": None}
    file.write_text(json.dumps(described), encoding="utf-8")
    (folder / "chat_template.jinja").unlink()
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "unk_token": EOS}
    settings |= names
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return transformers.AutoTokenizer.from_pretrained(folder)


# What tokenizers of known families do: BOS, whether it is written before a text, EOS, the token in
# which a turn ends, `pad`, `unk`, the other control tokens, and the chat template, as trl has it.
HABITS = {
    "llama2": ("<s>", True, "</s>", None, "<unk>", "<unk>", "", None),
    "mistral": ("<s>", True, "</s>", None, None, "<unk>", "", None),
    "llama3": (
        *("<|begin_of_text|>", True, "<|eot_id|>", None, "<|eot_id|>", None),
        *("<|start_header_id|> <|end_header_id|> <|finetune_right_pad_id|>", "llama3"),
    ),
    "qwen": (
        *(None, False, "<|im_end|>", None, "<|endoftext|>", None),
        *("<|im_start|>", "qwen2_5"),
    ),
    "gemma": (
        *("<bos>", True, "<eos>", "<end_of_turn>", "<pad>", "<unk>"),
        *("<start_of_turn>", "gemma3"),
    ),
    "phi3": (
        *("<s>", False, "<|endoftext|>", "<|end|>", "<|endoftext|>", "<unk>"),
        *("<|user|> <|assistant|> <|system|>", "phi3"),
    ),
}


def tokenizer_like(family: str, tokenizer, folder, count: int = 2000):
    """The first tokens of a tokenizer, with the control tokens and habits of a family in HABITS."""
    bos, writes_bos, eos, ending, pad, unk, marks, template = HABITS[family]
    named = {"bos_token": bos, "eos_token": eos, "pad_token": pad, "unk_token": unk}
    wanted = dict.fromkeys(filter(None, (bos, eos, ending, pad, unk, *marks.split())))
    first_tokens(tokenizer, count, folder)
    file = folder / "tokenizer.json"
    described = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = described["model"]["vocab"]
    tokens = sorted(described["added_tokens"], key=lambda token: token["content"] in wanted)
    for token, new in zip(tokens, [new for new in wanted if new not in vocabulary], strict=False):
        vocabulary[new] = vocabulary.pop(token["content"])
        token["content"] = new
    described["post_processor"] = _bos_first(bos, vocabulary[bos]) if writes_bos else None
    file.write_text(json.dumps(described), encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings |= {name: token for name, token in named.items() if token}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    if template:
        source = Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja"
        (folder / "chat_template.jinja").write_bytes(source.read_bytes())
    return transformers.AutoTokenizer.from_pretrained(folder)


def _bos_first(bos: str, number: int) -> dict:
    """A tokenizer's post-processor that writes BOS in front of each text."""
    special = {"SpecialToken": {"id": bos, "type_id": 0}}
    single = [special, {"Sequence": {"id": "A", "type_id": 0}}]
    tokens = {bos: {"id": bos, "ids": [number], "tokens": [bos]}}
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": tokens,
    }
