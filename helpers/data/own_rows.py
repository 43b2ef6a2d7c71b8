"""Rows of one's own, shown before anything is trained: what is in them, what is kept, and why.

It walks the road of `curation.curate` and saves nothing.
"""

import itertools
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from helpers import prompts
from helpers.config import SYSTEM_MESSAGE, Config
from helpers.data import curation
from helpers.data.formats import QUARANTINE, json_records
from helpers.data.posts import DataError, Posts
from helpers.data.report import Report
from helpers.data.rows import Encoder
from helpers.data.rules import ADVICE, RULES
from helpers.data.sources import open_source
from helpers.data.split import find_leaks, row_pairs
from helpers.runs.folders import public_name

SHOWN = 700  # characters of a row
LISTED = 10  # numbers of rows, lines of the quarantine


def describe(config: Config, tokenizer) -> str:
    """What notebook 02 would make of the rows of DATA_SOURCE, in words.

    Raises DataError; where too little is left, with all that was seen until then.
    """
    with tempfile.TemporaryDirectory() as folder:
        work, report = Path(folder), Report()
        found = (config.data_source, work, config.seed, False, config.validation_source)
        posts, source = open_source(*found), public_name(config.data_source)
        if posts.seen is None:
            return f"{source}: {posts.questions:,} posts of a forum, in HTML"
        lines = _source_lines(config, posts, work)
        config = replace(config, system_message=curation.message_of(config, posts))
        report.raw_questions = posts.questions
        try:
            encoder = Encoder.of(tokenizer, work)
            sketches = curation.clean(config, posts, encoder, map, report, False)
            rows, stay = curation.compare(config, posts, sketches, report)
            lines += _row_lines(rows.filter(pa.array(stay)), tokenizer)
            splits = curation.split(config, rows, stay, report, own=True)
            lines += _rule_lines(report) + _split_lines(config, rows, splits, posts)
        except DataError as error:
            raise DataError("\n".join([str(error), *lines, *_rule_lines(report)])) from error
    return "\n".join(lines)


def _source_lines(config: Config, posts: Posts, work: Path) -> list[str]:
    seen = posts.seen
    lines = [f"{public_name(config.data_source)}: {posts.questions:,} rows"]
    lines += [f"  format: {form} ({count:,} rows)" for form, count in seen.formats.most_common()]
    unused = [f"{name} ({count:,} rows)" for name, count in seen.unused.most_common()]
    lines.append(f"  columns not used: {', '.join(unused) or 'none'}")
    lines += [f"  not read: {', '.join(seen.not_read)}"] * bool(seen.not_read)
    if seen.quarantined:
        lines.append(f"  lines that are no rows: {seen.quarantined:,}")
        listed = itertools.islice(json_records(work / QUARANTINE), LISTED)
        lines += [f"    {r['source']}, line {r['line']}, {r['reason'][:200]}" for _, r in listed]
    own, rest = seen.systems.total(), posts.questions - seen.systems.total()
    if own:
        lines.append(f"  system message: {own:,} rows bring their own")
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
    tokens = np.array(rows["tokens"])
    cuts = ", ".join(f"{np.quantile(tokens, share):.0f}" for share in (0, 0.5, 0.9, 1))
    rows = rows.sort_by("question_id")
    lines = [f"  tokens of a row (least, median, 9 of 10, most): {cuts}"]
    for place in sorted({0, len(rows) // 2, len(rows) - 1}):
        (row,) = rows.slice(place, 1).to_pylist()
        prompt, completion = row["prompt"], row["completion"]
        text, end, marked = prompt + completion + tokenizer.eos_token, 0, ""
        for start, stop in prompts.learned_parts(tokenizer, prompt, completion):
            marked += f"{text[end:start]}«{text[start:stop]}»"
            end = stop
        marked = marked if len(marked) <= SHOWN else f"{marked[:SHOWN]} ..."
        lines += [f"-- row {row['question_id']}, what is learned between « and »:", marked]
    return lines


def _rule_lines(report: Report) -> list[str]:
    lines = [f"-- of {report.raw_questions:,} rows {report.kept_pairs:,} stay"]
    for rule, ids in report.removed.items():
        if ids:
            some = ", ".join(map(str, ids[:LISTED])) + " ..." * (len(ids) > LISTED)
            lines.append(
                f"  {rule} takes {len(ids):,}: {RULES[rule]} (rows {some}): {ADVICE[rule]}"
            )
    pairs = report.near_pairs[:3]
    lines += [f"    row {b} is like row {a} ({value:.2f})" for a, b, value in pairs]
    lines += [f"    {report.first_problem}"] * bool(report.first_problem)
    return lines


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
