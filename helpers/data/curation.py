"""Raw posts to a dataset: pairs that are cleaned, filtered, deduplicated, split, and attributed.

Posts are read into a database; part by part every pair is judged, rendered and verified; all that
is left is compared, split and saved. Nothing depends on the number of processes.
"""

import contextlib
import gc
import json
import multiprocessing
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from helpers import prompts
from helpers.config import SYSTEM_MESSAGE, Config
from helpers.data.contamination import problem_index
from helpers.data.curation_note import tokenizer_note, write_curation
from helpers.data.posts import HELD, Posts
from helpers.data.report import Report, dataset_card
from helpers.data.rows import SCHEMA, Encoder, clean_part, encoder_of, read_rows, rows_file
from helpers.data.similarity import deduplicate
from helpers.data.sources import open_source
from helpers.data.split import SLICES, choose_validation, leaks_of_slice, validation_size
from helpers.runs import folders
from helpers.runs.inventory import seal

QUARANTINE = "quarantine.jsonl"
TOGETHER = 0.5  # posts at least this much like each other stay on one side of the split


def curate(config: Config, tokenizer, workers: int | None = None, progress: bool = False) -> Report:
    """Write the `datasets.DatasetDict` of a Config and its card to `config.dataset_dir`.

    `tokenizer` is a fast one of transformers, `workers` the number of processes (default: as many
    as pay). Raises DataError for a source that cannot be read and when no row survives, and what
    `folders.whole_folder` raises.
    """
    started = time.perf_counter()
    with folders.whole_folder(config.dataset_dir) as draft:
        work = draft / ".work"  # inside the draft: a killed run leaves one thing to remove, not two
        work.mkdir()
        problem_index(config.benchmarks)  # what cannot be read should fail here, not in a worker
        posts = open_source(config, work, progress)
        config, report = replace(config, system_message=message_of(config, posts)), Report()
        if posts.own:
            report.quarantined = _tell(config, posts, draft)
        # Fewer than all cores where starting processes would take longer than the work.
        fitting = max(1, min(os.cpu_count() or 1, len(posts.parts()) // 2))
        with spread_over(workers or fitting) as spread:
            sketches = clean(config, posts, encoder_of(tokenizer, work), spread, report, progress)
            rows, stay = compare(config, posts, sketches, report)
            save(rows, *split(config, rows, stay, report, posts.own), draft)
            find = partial(leaks_of_slice, draft, config.near_duplicate_similarity)
            report.validation_leaks = len(set().union(*spread(find, range(SLICES))))
        write_curation(note(config, tokenizer), draft)
        shutil.rmtree(work)
        seal(draft)
        (draft / "README.md").write_text(dataset_card(config, report, posts), encoding="utf-8")
    report.seconds = time.perf_counter() - started
    return report


def note(config: Config, tokenizer) -> dict:
    """What notebooks 04 to 06 must know of the rows to train on them and to ask as they do."""
    return {
        "source": folders.public_name(config.data_source),
        "system_message": config.system_message,
        "template": prompts.template_text(tokenizer, config.template == "model"),
        "max_length": config.max_length,
        "tokenizer": {"name": folders.public_name(config.model_name), **tokenizer_note(tokenizer)},
    }


def message_of(config: Config, posts: Posts) -> str:
    """The system message of the rows: SYSTEM_MESSAGE, the course's, or the one that all bring."""
    brought = posts.seen.systems if posts.own else {}
    if list(brought.values()) == [posts.questions]:
        return next(iter(brought))
    return SYSTEM_MESSAGE if config.system_message is None else config.system_message


def _tell(config: Config, posts: Posts, draft: Path) -> int:
    """Warn of what is not used of one's own rows; list the lines that are none, and count them."""
    lost, unused = posts.seen.lost, [*posts.seen.unused, *posts.seen.not_read]
    if unused:
        warnings.warn(f"not used of {config.data_source}: {', '.join(unused)}", stacklevel=3)
    if lost:
        lines = "".join(f"{json.dumps(entry)}\n" for entry in lost)
        (draft / QUARANTINE).write_text(lines, encoding="utf-8")
        listed = config.dataset_dir / QUARANTINE
        warnings.warn(f"{len(lost)} lines are no rows: see {listed}", stacklevel=3)
    return len(lost)


@contextlib.contextmanager
def spread_over(count: int) -> Iterator[Callable]:
    """`map` with the calls spread over `count` processes."""
    if count == 1:
        yield map
        return
    # Not "fork": the copy of a process with running threads (Arrow's, torch's) can hang. Garbage is
    # not looked for: a syntax tree is many objects and no cycle.
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), gc.disable)
    try:
        yield pool.map
    finally:
        pool.shutdown(cancel_futures=True)


def clean(
    config: Config, posts: Posts, encoder: Encoder, spread: Callable, report: Report, progress: bool
) -> np.ndarray:
    """Write the rows of every part, and note what the rules removed; the SKETCH of each row."""
    report.raw_questions, report.raw_answers = posts.questions, posts.answers
    parts, removed, sketches = posts.parts(), [], []
    done = spread(partial(clean_part, config, posts, encoder), parts)
    bar = tqdm(done, "cleaning", len(parts), unit=" parts", disable=not progress)
    for part_removed, part_sketches in bar:
        removed += part_removed
        sketches.append(part_sketches)
    for question_id, rule, problem in sorted(removed):
        report.removed[rule].append(question_id)
        if problem:
            report.benchmark_hits.append((question_id, problem))
    return np.concatenate(sketches)


def compare(
    config: Config, posts: Posts, sketches: np.ndarray, report: Report
) -> tuple[pa.Table, np.ndarray]:
    """All rows with their groups, and which of them stay: True for a row that nothing removes."""
    # Rows of one's own may all be cast in one mould: what is no duplicate is split row by row.
    together = 1.0 if posts.own else TOGETHER
    exact, near, groups = deduplicate(sketches, config.near_duplicate_similarity, together)
    rows = pa.concat_tables(read_rows(rows_file(posts, part)) for part in posts.parts())
    group = pa.array([groups.get(name) for name in rows["question_id"].to_pylist()], pa.int64())
    rows = rows.append_column("group", group)
    kept = rows.select(["question_id", "tokens", "problem"]).filter(group.is_valid())
    wrong = pc.not_equal(kept["problem"], "")
    long = pc.and_not(pc.greater(kept["tokens"], config.max_length), wrong)
    report.near_pairs, report.token_lengths = near, kept["tokens"].to_pylist()
    report.removed |= {
        "exact_duplicate": exact,
        "near_duplicate": [row for _, row, _ in near],
        "not_verified": kept["question_id"].filter(wrong).to_pylist(),
        "too_many_tokens": kept["question_id"].filter(long).to_pylist(),
    }
    report.first_problem = next(iter(kept["problem"].filter(wrong).to_pylist()), "")
    stay = group.is_valid().to_numpy(False)
    stay[stay] = ~(wrong.to_numpy() | long.to_numpy())
    report.kept_pairs = int(stay.sum())
    if not stay.any():
        raise report.too_few(f"no row survives of {report.raw_questions} questions")
    return rows, stay


def split(
    config: Config, rows: pa.Table, stay: np.ndarray, report: Report, own: bool
) -> tuple[np.ndarray, np.ndarray]:
    """True for the training rows, and for those held out: drawn, or by the owner of `own` rows."""
    held = stay & [own and HELD in (tags or ()) for tags in rows["tags"].to_pylist()]
    if not held.any():
        groups = rows["group"].filter(pa.array(stay)).to_numpy()
        size = validation_size(config, report.kept_pairs)
        held[stay] = choose_validation(groups, size, config.seed)
    train = stay & ~held
    if config.max_train_rows:
        train[np.flatnonzero(train)[config.max_train_rows :]] = False
    report.train_rows, report.validation_rows = int(train.sum()), int(held.sum())
    if min(report.train_rows, report.validation_rows) == 0:
        raise report.too_few(
            f"too few rows survive: {report.kept_pairs} of {report.raw_questions} questions, "
            f"{report.train_rows} to train on and {report.validation_rows} to validate with (rows "
            "that resemble each other stay on one side), which need one each",
            "give more rows that differ",
        )
    return train, held


def save(rows: pa.Table, train: np.ndarray, held: np.ndarray, draft: Path) -> None:
    """Save both splits as a `datasets.DatasetDict` to the folder `draft`. Raises DiskFull."""
    import datasets  # here and not above: workers need no second for it
    from datasets.fingerprint import generate_random_fingerprint

    rows = rows.select(SCHEMA.names).cast(SCHEMA)
    if not any(rows["tests"].to_pylist()):
        rows = rows.drop_columns("tests")
    folders.need_space(draft, rows.nbytes, "saving the dataset")
    # With a fingerprint of its own: for one, datasets would read all rows.
    dataset = datasets.Dataset(rows, fingerprint=generate_random_fingerprint())
    splits = {"train": np.flatnonzero(train), "validation": np.flatnonzero(held)}
    chosen = {name: dataset.select(places) for name, places in splits.items()}
    datasets.DatasetDict(chosen).save_to_disk(str(draft))
