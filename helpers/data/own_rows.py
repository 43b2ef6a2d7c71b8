"""Rows of one's own, shown before anything is trained: what is in them, what is kept, and why.

It walks the road of `curation.curate` and saves nothing.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from helpers import prompts
from helpers.config import SYSTEM_MESSAGE, Config
from helpers.data import curation
from helpers.data.posts import DataError, Posts
from helpers.data.report import Report
from helpers.data.rows import encoder_of
from helpers.data.rules import ADVICE, RULES
from helpers.data.sources import open_source
from helpers.data.split import find_leaks, row_pairs
from helpers.runs.folders import public_name

SHOWN = 700  # characters of a row
LISTED = 10  # numbers of rows, lines that are none


def describe(config: Config, tokenizer) -> str:
    """What notebook 02 would make of the rows of DATA_SOURCE, in words.

    Raises DataError; where too little is left, with all that was seen until then.
    """
    with tempfile.TemporaryDirectory() as folder:
        work, report, source = Path(folder), Report(), public_name(config.data_source)
        posts = open_source(config, work)
        if not posts.own:
            return f"{source}: {posts.questions:,} posts of a forum, in HTML"
        lines = [f"{source}: {posts.questions:,} rows", *_source_lines(config, posts)]
        config = replace(config, system_message=curation.message_of(config, posts))
        try:
            encoder = encoder_of(tokenizer, work)
            sketches = curation.clean(config, posts, encoder, map, report, False)
            rows, stay = curation.compare(config, posts, sketches, report)
            lines += _row_lines(rows.filter(pa.array(stay)), tokenizer)
            splits = curation.split(config, rows, stay, report, own=True)
        except DataError as error:
            raise DataError("\n".join([str(error), *lines, *_rule_lines(report)])) from error
        lines += _rule_lines(report) + _split_lines(config, rows, splits, posts)
    return "\n".join(lines)


def _source_lines(config: Config, posts: Posts) -> list[str]:
    seen = posts.seen
    lines = [f"  format: {form} ({count:,} rows)" for form, count in seen.formats.most_common()]
    unused = ", ".join(f"{name} ({count:,} rows)" for name, count in seen.unused.most_common())
    lines.append(f"  columns not used: {unused or 'none'}")
    lines += [f"  not read: {', '.join(seen.not_read)}"] * bool(seen.not_read)
    lines += [f"  lines that are no rows: {len(seen.lost):,}"] * bool(seen.lost)
    for entry in seen.lost[:LISTED]:
        lines.append(f"    {entry['source']}, line {entry['line']}, {entry['reason'][:200]}")
    own, rest = seen.systems.total(), posts.questions - seen.systems.total()
    lines += [f"  system message: {own:,} rows bring their own"] * bool(own)
    if rest and config.system_message is None:
        lines.append(
            f"  system message of {rest:,} rows: the course's, which asks for Python "
            f"({SYSTEM_MESSAGE!r}): set SYSTEM_MESSAGE to what your answers are"
        )
    elif rest:
        lines.append(f"  system message of {rest:,} rows: {config.system_message!r}")
    return lines


def _row_lines(rows: pa.Table, tokenizer) -> list[str]:
    """Three rows with what is learned between marks, and the lengths of all."""
    cuts = ", ".join(f"{n:.0f}" for n in np.quantile(rows["tokens"], (0, 0.5, 0.9, 1)))
    rows = rows.sort_by("question_id")
    lines = [f"  tokens of a row (least, median, 9 of 10, most): {cuts}"]
    for place in sorted({0, len(rows) // 2, len(rows) - 1}):
        (row,) = rows.slice(place, 1).to_pylist()
        prompt, completion = row["prompt"], row["completion"]
        text, end, marked = prompt + completion + tokenizer.eos_token, 0, ""
        for start, stop in prompts.learned_parts(tokenizer, prompt, completion):
            marked += f"{text[end:start]}«{text[start:stop]}»"
            end = stop
        lines.append(f"-- row {row['question_id']}, what is learned between « and »:")
        lines.append(marked[:SHOWN] + " ..." * (len(marked) > SHOWN))
    return lines


def _rule_lines(report: Report) -> list[str]:
    lines = [f"-- of {report.raw_questions:,} rows {report.kept_pairs:,} stay"]
    for rule, ids in report.removed.items():
        some = ", ".join(map(str, ids[:LISTED])) + " ..." * (len(ids) > LISTED)
        told = f"  {rule} takes {len(ids):,}: {RULES[rule]} (rows {some}): {ADVICE[rule]}"
        lines += [told] * bool(ids)
    for a, b, value in report.near_pairs[:3]:
        lines.append(f"    row {b} is like row {a} ({value:.2f})")
    return lines + [f"    {report.first_problem}"] * bool(report.first_problem)


def _split_lines(config: Config, rows: pa.Table, splits, posts: Posts) -> list[str]:
    train, held = (rows.filter(pa.array(chosen)).to_pylist() for chosen in splits)
    whose = "your own" if posts.seen.held else "drawn"
    alike = config.near_duplicate_similarity
    leaks = len(find_leaks(held, train, alike))
    lines = [
        f"  {len(train):,} rows to train, {len(held):,} to validate ({whose}), {leaks} of which "
        "have a near duplicate in training or ask what is asked there"
    ]
    # n pairs of words of which all stand in a text of n + 1: nothing unequal is more alike.
    short = sum(size < alike * (size + 1) for size in map(len, map(row_pairs, held)))
    told = f"  {short} of them are too short for near duplicates: only equal ones are found"
    return lines + [told] * bool(short)
