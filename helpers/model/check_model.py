"""Does a model go through all six lessons? Asked of its config and tokenizer, without its weights.

STOP is final; the sentence of a "no" names what is done instead.
"""

import dataclasses
import json
import textwrap
from collections.abc import Iterator

import psutil
import torch

from helpers import own_template, prompts
from helpers.config import Config
from helpers.model import loading, plan, precision
from helpers.model.architecture import Shape, lora_parameters, own_names
from helpers.model.model_folder import check_shape
from helpers.model.predict import estimate
from helpers.model.steps import Run

Finding = tuple[str, str, str, str]  # lesson, question, answer ("yes", "no" or STOP), sentence
STOP, LLAMA_2 = "STOP", ': set TEMPLATE to "llama2"'
CARDS = (8, 12, 16, 24, 48, 80)  # GB
CONVERTER = "use llama.cpp's own converter, `python convert_hf_to_gguf.py` and the merged folder"
PRE_TOKENIZERS = {("ByteLevel",): "gpt-2", ("Digits", "ByteLevel"): "smollm"}  # in llama.cpp
TURNS = ("Is one odd?", "Yes."), ("Is two?", "No.")
ONE_TURN, TALK = (prompts.Conversation("Be brief.", TURNS[:count]) for count in (1, 2))


def check(config: Config) -> list[Finding]:
    """What the lessons say to MODEL_NAME."""
    found, tokenizer = list[Finding](), None
    try:
        tokenizer = loading.load_tokenizer(config.model_name)
        found += of_tokenizer(tokenizer)
    except (OSError, ValueError) as reason:
        found.append(("02", "tokenizer", STOP, str(reason)))
    try:
        shape = loading.load_shape(config.model_name)
        check_shape(config.model_name, shape, config.keep_in_16bit)
        found += of_shape(config, shape, tokenizer)
    except (OSError, ValueError) as reason:
        found.append(("03", "layers", STOP, str(reason)))
    return found


def report(config: Config) -> str:
    """The findings as a table in text."""
    lines = []
    for lesson, question, answer, says in check(config):
        head = f"{lesson}  {question:<10} {answer:<4}  "
        lines += [textwrap.fill(says, 98, initial_indent=head, subsequent_indent=" " * len(head))]
    return "\n".join(lines)


def of_tokenizer(tokenizer) -> Iterator[Finding]:
    """On ends of a text, padding and the chat template."""
    first = repr(tokenizer.bos_token) if prompts.begins_with_bos(tokenizer) else "no token"
    ((_, wrong),) = prompts.verify_rows(tokenizer, [prompts.render_row(ONE_TURN, tokenizer)])
    if wrong:
        says = f"a row does not come through its tokenizer ({'; '.join(wrong)}): choose another"
        yield "02", "ends", STOP, f"{says} model, or mend its tokenizer.json"
    else:
        yield "02", "ends", "yes", f"{first} begins a text, {tokenizer.eos_token!r} ends an answer"
    named, taken = tokenizer.init_kwargs.get("pad_token"), tokenizer.pad_token
    why = f"{str(named)!r} would hide where answers end" if named else "none is named"
    if str(named) == taken:
        yield "02", "padding", "yes", f"{taken!r} fills short rows up"
    else:
        yield "02", "padding", "no", f"{why}, so {taken!r} is taken, and you need do nothing"
    yield "02", "template", *_of_template(tokenizer)


def _of_template(tokenizer) -> tuple[str, str]:
    try:
        prompts.render_row(ONE_TURN, tokenizer, own=True)
        prompts.render_row(TALK, tokenizer, own=True)
    except ValueError as reason:
        return "no", f"{reason}".removesuffix(LLAMA_2) + LLAMA_2
    ending = getattr(own_template.frame_of(tokenizer), "ending", "")
    return "yes", f'a turn ends in {ending!r} in its own, with which TEMPLATE = "model" trains'


def of_shape(config: Config, shape, tokenizer) -> Iterator[Finding]:
    """On layers and memory, the fast path, the merge and GGUF."""
    sizes, targets = Shape.of(shape), ", ".join(own_names(shape, config.target_modules))
    weights = (sizes.linear_parameters + sizes.other_parameters) / 1e9
    trained = lora_parameters(shape, config.lora_r, config.target_modules) / 1e6
    says = f"{sizes.layers} of {shape.model_type!r}, {weights:,.2f} billion weights; beside"
    yield "03", "layers", "yes", f"{says} {targets} {trained:,.1f} million are trained"
    yield "03", "embedding", *_of_embedding(shape, tokenizer)
    why = why_not_fast(config)
    taken = dataclasses.replace(config, fast_path=config.fast_path and not why)
    yield "03", "memory", *_of_memory(taken, shape)
    says = f"it trains without the fast path, {why}, and you need do nothing"
    yield "04", "fast path", *(("no", says) if why else ("yes", "FAST_PATH = True takes it"))
    yield "05", "merge", "yes", f"takes {2 * weights:,.1f} GB in memory, and as much on the disk"
    why = why_not_gguf(shape, tokenizer)
    yield "05", "GGUF", "no" if why else "yes", why or "llama.cpp and Ollama can run it"
    yield "06", "answers", "yes", "base and tuned model answer side by side"


def _of_embedding(shape, tokenizer) -> tuple[str, str]:
    says = "is the output matrix too (tied)" if shape.tie_word_embeddings else "is not tied"
    spare = shape.vocab_size - max(tokenizer.get_vocab().values()) - 1 if tokenizer else 0
    if spare < 0:
        says = f"has {-spare} rows less than the tokenizer has tokens: take the tokenizer that"
        return STOP, f"{says} belongs to the model, or give the model more rows"
    return "yes", f"{says}, and {spare} of its {shape.vocab_size:,} rows belong to no token"


def _of_memory(config: Config, shape) -> tuple[str, str]:
    run = Run.from_config(config)
    if run.device == "cpu":
        needed, there = estimate(shape, run).total / 1e9, psutil.virtual_memory().total / 1e9
        says = f"a step takes {needed:,.1f} GB on this CPU, which has {there:,.1f}"
        return ("yes", says) if needed < there else ("no", f"{says}: choose a smaller model")
    yours = torch.cuda.is_available()
    cards = [torch.cuda.mem_get_info()[1] // 2**30] if yours else CARDS
    plans = {size: plan.for_card(shape, run, size * 2**30) for size in cards}
    fitting = [f"fits {size} GB: {each.advice}" for size, each in plans.items() if each.fits]
    where = f"your card of {cards[0]} GB" if yours else f"any card of up to {cards[-1]} GB"
    none = f"a step does not fit {where}: {plans[cards[-1]].advice}"
    return ("yes", fitting[0]) if fitting else ("no", none)


def why_not_fast(config: Config) -> str:
    """Why this machine or model cannot take the fast path, as the end of a sentence; else ""."""
    if (kind := loading.load_shape(config.model_name).model_type) != "llama":
        return f"which knows no {kind!r} model"
    if config.device == "cpu" or not precision.has_bfloat16(config.device):
        return "which needs a GPU from Ampere on"
    kept = "whose kernels know layers in 4 bits alone (KEEP_IN_16BIT names others)"
    return kept if config.keep_in_16bit else ""


def why_not_gguf(shape, tokenizer=None) -> str:
    """Why a model of this shape, and tokenizer, is not written as GGUF, and what can; else ""."""
    rope_type = (shape.rope_parameters or {}).get("rope_type", "default")
    if shape.model_type != "llama" or rope_type != "default":
        says = "only Llama models with plain rotary positions are written as GGUF here; this one is"
        return f"{says} {shape.model_type!r} with positions {rope_type!r}: {CONVERTER}"
    described: dict = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer else {}
    pieces = not described or described["model"].get("byte_fallback")
    return "" if pieces else first_cut(described["pre_tokenizer"])[1]


def first_cut(described: dict | None) -> tuple[str, str]:
    """llama.cpp's name for how tokenizer.json first cuts text; where there is none, why not."""
    parts = (described or {}).get("pretokenizers", [described or {"type": "nothing"}])
    cut = tuple(part["type"] for part in parts)
    why = f"the tokenizer cuts text by {' and '.join(cut)}, whose name in llama.cpp is not known"
    return PRE_TOKENIZERS.get(cut, ""), "" if cut in PRE_TOKENIZERS else f"{why} here: {CONVERTER}"
