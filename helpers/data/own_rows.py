"""Rows of one's own, shown before anything is trained: what is in them, what is kept, and why.

It walks the road of `curation.curate` and saves nothing; own_rows.txt.jinja has the words.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import jinja2
import numpy as np
import pyarrow as pa

from helpers import prompts
from helpers.config import Config
from helpers.data import curation
from helpers.data.posts import DataError
from helpers.data.report import Report
from helpers.data.rows import encoder_of
from helpers.data.rules import ADVICE, RULES
from helpers.data.sources import open_source
from helpers.data.split import find_leaks, row_pairs
from helpers.runs.folders import public_name

SHOWN = 700  # characters of a row


def describe(config: Config, tokenizer) -> str:
    """What notebook 02 would make of the rows of DATA_SOURCE, in words.

    Raises DataError; where too little is left, with all that was seen until then.
    """
    source, report, error = public_name(config.data_source), Report(), None
    with tempfile.TemporaryDirectory() as folder:
        posts = open_source(config, Path(folder))
        if not posts.own:
            return f"{source}: {posts.questions:,} posts of a forum, in HTML"
        told: dict = {"message": curation.message_of(config, posts), "given": config.system_message}
        whole = replace(config, system_message=told["message"])
        try:
            encoder = encoder_of(tokenizer, Path(folder))
            sketches = curation.clean(whole, posts, encoder, map, report, False)
            rows, stay = curation.compare(whole, posts, sketches, report)
            told |= _shown(rows.filter(pa.array(stay)), tokenizer)
            told |= _split(whole, rows, curation.split(whole, rows, stay, report, own=True))
        except DataError as problem:
            error = problem
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"count": "{:,}".format, "repr": repr}
    template = environment.from_string(Path(__file__).with_suffix(".txt.jinja").read_text("utf-8"))
    told |= {"source": source, "posts": posts, "seen": posts.seen, "report": report}
    text = template.render(told, rules=RULES, advice=ADVICE).strip()
    if error:
        raise DataError(f"{error}\n{text}") from error
    return text


def _shown(rows: pa.Table, tokenizer) -> dict:
    """Three rows with what is learned between marks, and the lengths of all."""
    shown, quantiles = [], np.quantile(rows["tokens"], (0, 0.5, 0.9, 1))
    rows = rows.sort_by("question_id")
    for place in sorted({0, len(rows) // 2, len(rows) - 1}):
        (row,) = rows.slice(place, 1).to_pylist()
        prompt, completion = row["prompt"], row["completion"]
        text, end, marked = prompt + completion + tokenizer.eos_token, 0, ""
        for start, stop in prompts.learned_parts(tokenizer, prompt, completion):
            marked += f"{text[end:start]}«{text[start:stop]}»"
            end = stop
        shown.append((row["question_id"], marked[:SHOWN] + " ..." * (len(marked) > SHOWN)))
    return {"shown": shown, "lengths": [f"{tokens:.0f}" for tokens in quantiles]}


def _split(config: Config, rows: pa.Table, splits) -> dict:
    train, held = (rows.filter(pa.array(chosen)).to_pylist() for chosen in splits)
    alike = config.near_duplicate_similarity
    # n pairs of words of which all stand in a text of n + 1: nothing unequal is more alike.
    short = sum(size < alike * (size + 1) for size in map(len, map(row_pairs, held)))
    leaks = len(find_leaks(held, train, alike))
    return {"train": train, "held": held, "leaks": leaks, "short": short}
