"""Answers to prompts, in batches. Greedy, so that a second run agrees."""

import dataclasses
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from helpers import prompts
from helpers.config import SYSTEM_MESSAGE, Config
from helpers.data import curation_note
from helpers.merging import merging
from helpers.merging.merging import check_adapter, check_merged
from helpers.model import architecture, loading, measure
from helpers.runs.scores import MODELS

MERGED = MODELS[-2:]
CHUNK = 16  # tokens between two looks at which answers have ended


@dataclass(frozen=True)
class Answer:
    """A generated answer. `stopped` tells whether the model ended it itself, by EOS."""

    prompt: str
    text: str
    tokens: int
    stopped: bool


def results(config: Config) -> tuple[Path, Path, str]:
    """The adapter's folder, the merged model's, and the system message of training, all checked."""
    adapter, merged = check_adapter(config), check_merged(config)
    return adapter, merged, system_message(config, "tuned")


def load(config: Config, which: str):
    """One of MODELS, else ValueError. "merged" keeps the bits that it was saved in.

    What the GPU has no room for in 16 bits answers on the CPU, where 4-bit weights are unpacked
    once and not for every token: the same numbers in less time.
    """
    if which not in MODELS:
        raise ValueError(f"no model is called {which!r}: choose one of {', '.join(MODELS)}")
    merged = check_merged(config) if which in MERGED else None
    if which == "merged":
        return merging.load_merged(config)
    if which == "base_chat":
        return loading.load_model(merging.with_room_for_base(config), quantized=False)
    if which == "base_chat_4bit":  # all its linear layers are packed
        config = dataclasses.replace(config, keep_in_16bit=())
    model = loading.load_model(config, source=merged)
    if config.use_4bit and config.device == "cpu":
        model = model.dequantize()
    if which == "tuned":
        model = merging.load_tuned(config, model)
        # PyTorch's matmul copies a frozen output layer for each row of a batch, gigabytes in all.
        model.get_output_embeddings().requires_grad_(True)
    return model


def system_message(config: Config, which: str) -> str:
    """The one to ask one of MODELS with: that of its training, unless SYSTEM_MESSAGE is given."""
    folder = config.merged_dir if which in MERGED else config.adapter_dir
    return curation_note.system_message(config, folder)


def asked_of(config: Config, which: str, tokenizer, texts: list[str], rows=()) -> list[str]:
    """Requests as one of MODELS is asked them: in its template, with its system message.

    `rows` are the texts' training prompts, "" for a problem in Python, which then has the course's
    system message. A row is asked as it is; in the template that the base brings, by its own words.
    """
    template = template_of(config, which)
    system = SYSTEM_MESSAGE if any(rows) else system_message(config, which)
    asked = requests(tokenizer, texts, system, template)
    for place, row in enumerate(rows):
        if template == "chat" and row.startswith(prompts.OPENING):
            found = prompts.parse(row)
            (row,) = requests(tokenizer, [found.turns[0][0]], found.system, template)
        asked[place] = row or asked[place]
    return asked


def template_of(config: Config, which: str) -> str:
    """The template in which one of MODELS is asked: "chat", its own, or "llama2"."""
    own = curation_note.in_own_template(config, config.adapter_dir)
    return "chat" if own or which.startswith("base_chat") else "llama2"


def answer_alone(config: Config, which: str, texts: list[str], rows=()):
    """`answer_all` by one of MODELS, which is in memory only while it answers."""
    tokenizer = loading.load_tokenizer(config.model_name)
    asked, model = asked_of(config, which, tokenizer, texts, rows), load(config, which)
    answers = answer_all(model, tokenizer, asked, config)
    del model
    measure.free_memory()
    return answers


def requests(tokenizer, texts: list[str], system: str, template: str) -> list[str]:
    """Texts in a template, without BOS: "chat", the model's own, where a control token that a text
    spells gets a space and so is text, or "llama2", of the training. ValueError for any other.
    """
    if template == "llama2":
        return [prompts.render_prompt(text, system) for text in texts]
    if template != "chat" or not tokenizer.chat_template:
        raise ValueError(
            f"template is {template!r}: choose llama2, or chat where the tokenizer brings one"
        )
    for token in tokenizer.added_tokens_decoder.values():
        if token.special:
            spaced = f"{token.content[0]} {token.content[1:]}"
            texts = [text.replace(token.content, spaced) for text in texts]
    return [prompts.render_prompt(text, system, tokenizer) for text in texts]


def answer_all(model, tokenizer, asked: list[str], config: Config, temperature: float = 0.0):
    """Answer prompts in batches of similar length; returns (answers in the order given, seconds).

    Padding goes to the left, so that every prompt of a batch ends where its answer begins. A
    temperature above 0 samples, from `config.seed` on: a prompt given twice has two answers.
    """
    torch.manual_seed(config.seed)
    options = {"max_new_tokens": config.max_new_tokens, "do_sample": temperature > 0}
    options |= {"temperature": temperature, "top_k": 0} if temperature > 0 else {}
    options |= {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": end_tokens(model, tokenizer),
    }
    encoded = [prompts.encode_prompt(tokenizer, text) for text in asked]
    by_length = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    longest = max(map(len, encoded), default=0) + config.max_new_tokens
    at_once = batches_at_once(model, temperature)
    rows = rows_at_a_time(model, longest, config.generation_batch_size)
    rows = min(rows, -(-len(asked) // at_once) or 1)
    batches = [by_length[first : first + rows] for first in range(0, len(asked), rows)]
    padded = [
        tokenizer.pad(
            {"input_ids": [encoded[i] for i in batch]}, padding_side="left", return_tensors="pt"
        ).to(model.device)
        for batch in batches
    ]
    threads, start = torch.get_num_threads(), time.perf_counter()
    try:
        with ThreadPoolExecutor(at_once, "", torch.set_num_threads, (threads // at_once,)) as pool:
            written = pool.map(lambda inputs: _new_tokens(model, inputs, options), padded)
            found = dict(zip(sum(batches, []), sum(written, []), strict=True))
    finally:
        torch.set_num_threads(threads)
    seconds = time.perf_counter() - start
    ends = options["eos_token_id"]
    return [_answer(asked[i], found[i], tokenizer, ends) for i in range(len(asked))], seconds


def batches_at_once(model, temperature: float) -> int:
    """Two on a CPU, each by half of its cores: a step has many products too small for all of them.

    On two cores 72 answers took 0.7 times as long so. What is sampled draws one after the other.
    """
    alone = model.device.type != "cpu" or temperature > 0
    return 1 if alone else min(2, torch.get_num_threads())


@torch.no_grad()
def _new_tokens(model, inputs, options: dict) -> list[list[int]]:
    """What `generate` adds to each row. Every CHUNK tokens, answers that ended leave the batch.

    Keys and values go on from chunk to chunk, so that no token is computed twice.
    """
    ids, mask, cache = inputs["input_ids"], inputs["attention_mask"], None
    start, ends = ids.shape[1], torch.tensor(options["eos_token_id"], device=ids.device)
    limit, rows, found = start + options["max_new_tokens"], list(range(len(ids))), {}
    while rows:
        settings = options | {"max_new_tokens": min(CHUNK, limit - ids.shape[1])}
        settings |= {"past_key_values": cache, "return_dict_in_generate": True}
        output = model.generate(ids, attention_mask=mask, **settings)
        ids, cache = output.sequences, output.past_key_values
        mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
        ended = torch.isin(ids[:, start:], ends).any(1) | (ids.shape[1] >= limit)
        found |= {row: ids[i, start:].tolist() for i, row in enumerate(rows) if ended[i]}
        going = (~ended).nonzero().flatten()
        rows, ids, mask = [rows[i] for i in going.tolist()], ids[going], mask[going]
        if rows:
            cache.batch_select_indices(going)
    return [found[row] for row in sorted(found)]


def rows_at_a_time(model, tokens: int, most: int) -> int:
    """How many requests are answered together: the most, or what the GPU has room for."""
    if model.device.type != "cuda":
        return most
    # Keys and values, and half as much again: each step writes them anew, one token longer.
    each = 1.5 * architecture.cache_bytes(model.config, tokens, model.dtype.itemsize)
    room = measure.free_bytes(model.device) - merging.WORK_BYTES
    return max(1, min(most, int(room / each)))


def end_tokens(model, tokenizer) -> list[int]:
    """Ids that end an answer: EOS, and what Llama 3's chat, for one, ends a turn with."""
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    return sorted({tokenizer.eos_token_id, *own} - {None})


def _answer(prompt: str, ids: list[int], tokenizer, ends: list[int]) -> Answer:
    """Cut what follows the first of the tokens that end an answer, and decode what is left."""
    places = [place for place, token in enumerate(ids) if token in ends]
    stopped, ids = bool(places), ids[: min(places, default=len(ids))]
    text = prompts.read_completion(tokenizer.decode(ids, skip_special_tokens=True))
    return Answer(prompt, text, len(ids), stopped)
