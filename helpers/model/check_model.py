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
from helpers.model.architecture import Shape, check_shape, lora_parameters, own_names
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
    ((_, wrong),) = prompts.verify_rows(tokenizer, [prompts.render_row(ONE_TURN, tokenizer)])
    if wrong:
        says = f"a row does not come through its tokenizer ({'; '.join(wrong)}): choose another"
        yield "02", "ends", STOP, f"{says} model, or mend its tokenizer.json"
    else:
        first = repr(tokenizer.bos_token) if prompts.begins_with_bos(tokenizer) else "no token"
        yield "02", "ends", "yes", f"{first} begins a text, {tokenizer.eos_token!r} ends an answer"
    named, taken = str(tokenizer.init_kwargs.get("pad_token")), tokenizer.pad_token
    says = f"{taken!r} fills short rows up"
    if named != taken:
        says += ", for it names none, or one that would hide where answers end; do nothing"
    yield "02", "padding", "yes" if named == taken else "no", says
    try:
        for turns in (ONE_TURN, TALK):
            prompts.render_row(turns, tokenizer, own=True)
        ending = own_template.frame_of(tokenizer).ending
        says = f'a turn ends in {ending!r} in its own, with which TEMPLATE = "model" trains'
        yield "02", "template", "yes", says
    except ValueError as reason:
        yield "02", "template", "no", f"{reason}".removesuffix(LLAMA_2) + LLAMA_2


def of_shape(config: Config, shape, tokenizer) -> Iterator[Finding]:
    """On layers and memory, the fast path, the merge and GGUF."""
    sizes, targets = Shape(shape), ", ".join(own_names(shape, config.target_modules))
    weights = (sizes.linear_parameters + sizes.other_parameters) / 1e9
    trained = lora_parameters(shape, config.lora_r, config.target_modules) / 1e6
    says = f"{sizes.layers} of {shape.model_type!r}, {weights:,.2f} billion weights; beside"
    yield "03", "layers", "yes", f"{says} {targets} {trained:,.1f} million are trained"
    spare = shape.vocab_size - max(tokenizer.get_vocab().values()) - 1 if tokenizer else 0
    tied = "is the output matrix too (tied)" if shape.tie_word_embeddings else "is not tied"
    says = f"{tied}, and {spare} of its {shape.vocab_size:,} rows belong to no token"
    if spare < 0:
        says = f"has {-spare} rows less than the tokenizer has tokens: take the tokenizer that "
        says += "belongs to the model, or give the model more rows"
    yield "03", "embedding", "yes" if spare >= 0 else STOP, says
    why = why_not_fast(config)
    taken = dataclasses.replace(config, fast_path=config.fast_path and not why)
    yield "03", "memory", *of_memory(taken, shape)
    says = f"it trains without the fast path, {why}, and you need do nothing"
    yield "04", "fast path", "no" if why else "yes", says if why else "FAST_PATH = True takes it"
    yield "05", "merge", "yes", f"takes {2 * weights:,.1f} GB in memory, and as much on the disk"
    why = why_not_gguf(shape, tokenizer)
    yield "05", "GGUF", "no" if why else "yes", why or "llama.cpp and Ollama can run it"
    yield "06", "answers", "yes", "base and tuned model answer side by side"


def of_memory(config: Config, shape) -> tuple[str, str]:
    """Whether a training step fits this CPU, the GPU that is there, or else any usual card."""
    run = Run.from_config(config)
    if run.device == "cpu":
        needed, there = estimate(shape, run).total / 1e9, psutil.virtual_memory().total / 1e9
        says = f"a step takes {needed:,.1f} GB on this CPU, which has {there:,.1f}"
        return ("yes", says) if needed < there else ("no", f"{says}: choose a smaller model")
    yours = torch.cuda.is_available()
    for size in [torch.cuda.mem_get_info()[1] // 2**30] if yours else CARDS:
        planned = plan.for_card(shape, run, size * 2**30)
        if planned.fits:
            return "yes", f"fits {size} GB: {planned.advice}"
    where = "your card of" if yours else "any card of up to"
    return "no", f"a step does not fit {where} {size} GB: {planned.advice}"


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
    positions = (shape.rope_parameters or {}).get("rope_type", "default")
    if shape.model_type != "llama" or positions != "default":
        says = "only Llama models with plain rotary positions are written as GGUF here; this one is"
        return f"{says} {shape.model_type!r} with positions {positions!r}: {CONVERTER}"
    if getattr(shape, "quantization_config", None):
        says = "the merged model is stored in the 4 bits of bitsandbytes, which GGUF does not know"
        return f'{says}: merge once more with MERGE_INTO = "dequantized"'
    known = not tokenizer or pre_tokenizer(tokenizer)
    says = "the tokenizer cuts text in a way whose name in llama.cpp is not known here"
    return "" if known else f"{says}: {CONVERTER}"


def pre_tokenizer(tokenizer) -> str:
    """llama.cpp's name for how a tokenizer first cuts text; "" for one that is not known here."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    if described["model"].get("byte_fallback"):
        return "default"  # a converted SentencePiece vocabulary, as Llama 2's
    first = described["pre_tokenizer"] or {"type": "nothing"}
    cut = tuple(part["type"] for part in first.get("pretokenizers", [first]))
    return PRE_TOKENIZERS.get(cut, "")
