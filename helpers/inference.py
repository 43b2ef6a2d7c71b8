"""Answers: many prompts in batches, or one prompt streamed. Greedy, so that a second run agrees."""

import time
from dataclasses import dataclass
from threading import Thread

import torch
from transformers import TextIteratorStreamer

from helpers import merging, models, prompts
from helpers.config import LINKED_LIST_PROMPT, Config

# What `ask` calls a model, and the article's two names for the same.
MODELS = {"base": "base", "llama2": "base", "tuned": "tuned", "new_model": "tuned"}


@dataclass(frozen=True)
class Answer:
    """A generated answer. `stopped` tells whether the model ended it itself, by EOS."""

    prompt: str
    text: str
    tokens: int
    stopped: bool


def load(config: Config, which: str):
    """The "base" model in 4 bits, or the "tuned" one, with its adapter; else ValueError."""
    if which not in MODELS:
        raise ValueError(f"no model is called {which!r}: choose one of {', '.join(MODELS)}")
    tuned = MODELS[which] == "tuned"
    return merging.load_tuned(config) if tuned else models.load_model(config)


@torch.no_grad()
def answer_all(model, tokenizer, rendered_prompts: list[str], config: Config):
    """Answer prompts in batches of similar length; returns (answers in the order given, seconds).

    The prompts are rendered already (`prompts.render_prompt`). Padding goes to the left, so that
    every prompt of a batch ends where its answer begins.
    """
    by_length = sorted(range(len(rendered_prompts)), key=lambda i: len(rendered_prompts[i]))
    answers, start = {}, time.perf_counter()
    for first in range(0, len(by_length), config.generation_batch_size):
        batch = by_length[first : first + config.generation_batch_size]
        texts = [rendered_prompts[i] for i in batch]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
        output = model.generate(**inputs.to(model.device), **_greedy(tokenizer, config))
        for i, ids in zip(batch, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            answers[i] = _answer(rendered_prompts[i], ids, tokenizer)
    return [answers[i] for i in range(len(rendered_prompts))], time.perf_counter() - start


def stream(model, tokenizer, rendered_prompt: str, config: Config):
    """Yield an answer piece by piece, as it is generated."""
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    inputs = tokenizer(rendered_prompt, return_tensors="pt").to(model.device)
    options = {**inputs, **_greedy(tokenizer, config), "streamer": streamer}
    worker = Thread(target=model.generate, kwargs=options, daemon=True)
    worker.start()
    yield from streamer
    worker.join()


def ask(config: Config, which: str, question: str = LINKED_LIST_PROMPT):
    """Yield the answer of the base or the tuned model to a question, in the training template."""
    model, tokenizer = load(config, which), models.load_tokenizer(config.model_name)
    yield from stream(
        model, tokenizer, prompts.render_prompt(question, config.system_message), config
    )


def _greedy(tokenizer, config: Config) -> dict:
    return {
        "max_new_tokens": config.max_new_tokens,
        "do_sample": False,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def _answer(prompt: str, ids: list[int], tokenizer) -> Answer:
    """Cut the padding that follows EOS and decode what is left."""
    stopped = tokenizer.eos_token_id in ids
    ids = ids[: ids.index(tokenizer.eos_token_id)] if stopped else ids
    return Answer(
        prompt, tokenizer.decode(ids, skip_special_tokens=True).strip(), len(ids), stopped
    )
