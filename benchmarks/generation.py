"""Measure batched generation against the article's way, one `pipeline` call for each prompt.

    python -m benchmarks.generation [--prompts 12] [--tokens 64]

It needs a finished `demo` run and some ten minutes on two cores. Both ways answer the same prompts
greedily in the same process. Answers that differ are looked into: is the first token that differs
a tie in bfloat16, and are the answers equal when everything is computed in float32? Writes
results/generation.json. What a GPU does is measured by `benchmarks.generation_gpu`.
"""

import argparse
import dataclasses
import json
import os
import time
from pathlib import Path

import torch
from transformers import pipeline

import helpers  # noqa: F401, I001  before torch, since it says how torch's threads wait
from helpers import prompts
from helpers.answers import inference
from helpers.config import Config
from helpers.model import loading

RESULTS = Path(__file__).resolve().parent / "results" / "generation.json"


def one_by_one(model, tokenizer, texts: list[str], config: Config) -> tuple[list[str], float]:
    """The article's way: a `pipeline`, called once for each prompt. Returns (answers, seconds)."""
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {"max_new_tokens": config.max_new_tokens, "do_sample": False}
    start = time.perf_counter()
    answers = [pipe(text, **options, return_full_text=False)[0] for text in texts]
    seconds = time.perf_counter() - start
    return [prompts.read_completion(answer["generated_text"]) for answer in answers], seconds


@torch.no_grad()
def gap_in_steps(model, tokenizer, prompt: str, first: str, second: str) -> float:
    """How far apart two answers' first different tokens were, in rounding steps of bfloat16.

    Computed from the logits that the model gives after what both answers share.
    """
    start = tokenizer(prompt)["input_ids"]
    one, two = (tokenizer(f"{prompt} {text}")["input_ids"] for text in (first, second))
    shared = next(
        (i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b),
        min(len(one), len(two)) - 1,
    )
    logits = model(torch.tensor([one[: max(shared, len(start))]])).logits[0, -1].float()
    pair = logits[torch.tensor([one[shared], two[shared]])]
    step = torch.finfo(torch.bfloat16).eps * 2 ** pair.abs().max().log2().floor()
    return ((pair[0] - pair[1]).abs() / step).item()


def compare(config: Config, which: str, texts: list[str]) -> dict:
    """Both ways with one model: tokens per second, equal answers, and how close the others were."""
    tokenizer = loading.load_tokenizer(config.model_name)
    model = inference.load(config, which)
    inference.answer_all(model, tokenizer, texts[:1], dataclasses.replace(config, max_new_tokens=4))
    singles, single_seconds = one_by_one(model, tokenizer, texts, config)
    batch, batch_seconds = inference.answer_all(model, tokenizer, texts, config)
    written = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in singles)
    different = [i for i, text in enumerate(singles) if text != batch[i].text]
    return {
        "model": which,
        "computed_in": config.bnb_4bit_compute_dtype,
        "pipeline_tokens_per_second": round(written / single_seconds, 1),
        "batch_tokens_per_second": round(sum(a.tokens for a in batch) / batch_seconds, 1),
        "speedup": round(
            (sum(a.tokens for a in batch) / batch_seconds) / (written / single_seconds), 2
        ),
        "equal_answers": len(texts) - len(different),
        "gaps_of_the_others_in_bfloat16_steps": [
            round(gap_in_steps(model, tokenizer, texts[i], singles[i], batch[i].text), 2)
            for i in different
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    from helpers.answers import problem_sets
    from helpers.runs.environment import environment

    config = Config.from_profile("demo", max_new_tokens=options.tokens)
    exact = dataclasses.replace(config, bnb_4bit_compute_dtype="float32")
    texts = [
        prompts.render_prompt(problem.prompt, inference.system_message(config, "tuned"))
        for problem in problem_sets.load_problems(1, options.prompts)
    ]
    runs = [compare(config, which, texts) for which in ("base", "tuned", "merged")]
    runs.append(compare(exact, "base", texts))
    facts = {
        **environment(),
        "load_average": os.getloadavg(),
        "prompts": options.prompts,
        "tokens": options.tokens,
    }
    facts |= {"runs": runs}
    RESULTS.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
