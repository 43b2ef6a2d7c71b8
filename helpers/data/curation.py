"""Raw posts to a dataset: pairs that are cleaned, filtered, deduplicated, split, and attributed.

Posts are read into a database; part by part every pair is judged, rendered and verified; all that
is left is compared, split and saved. Nothing depends on the number of processes.
"""

import os
import shutil
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from helpers import prompts
from helpers.config import SYSTEM_MESSAGE, Config
from helpers.data.card import dataset_card
from helpers.data.contamination import problem_index
from helpers.data.curation_note import tokenizer_note, write_curation
from helpers.data.duplicates import SKETCH, deduplicate, sketch
from helpers.data.formats import QUARANTINE
from helpers.data.posts import HELD, Posts
from helpers.data.report import Report
from helpers.data.rows import SCHEMA, Encoder, read_rows, rows_file, training_row, verified
from helpers.data.rows import write_rows as write
from helpers.data.rules import judge
from helpers.data.sources import open_source
from helpers.data.split import SLICES, choose_validation, leaks_of_slice, validation_size
from helpers.data.workers import spread_over
from helpers.runs import folders
from helpers.runs.inventory import seal


def curate(config: Config, tokenizer, workers: int | None = None, progress: bool = False) -> Report:
    """Write the `datasets.DatasetDict` of a Config and its card to `config.dataset_dir`.

    `tokenizer` is a fast one of transformers, `workers` the number of processes (default: as many
    as pay). Raises DataError for a source that cannot be read and when no row survives, and what
    `folders.whole_folder` raises.
    """
    report = Report()
    with folders.whole_folder(config.dataset_dir) as draft:
        work = draft / ".work"  # inside the draft: a killed run leaves one thing to remove, not two
        work.mkdir()
        posts = read(config, work, report, progress)
        config = replace(config, system_message=message_of(config, posts))
        # Fewer than all cores where starting processes would take longer than the work.
        fitting = max(1, min(os.cpu_count() or 1, len(posts.parts()) // 2))
        with spread_over(workers or fitting) as spread:
            encoder = Encoder.of(tokenizer, work)
            sketches = clean(config, posts, encoder, spread, report, progress)
            rows, stay = compare(config, posts, sketches, report)
            with report.timed("write"):
                save(rows, *split(config, rows, stay, report, not posts.is_html), draft)
                find = partial(leaks_of_slice, draft, config.near_duplicate_similarity)
                report.validation_leaks = len(set().union(*spread(find, range(SLICES))))
        write_curation(note(config, tokenizer), draft)
        if report.quarantined:
            shutil.copy(work / QUARANTINE, draft)
        shutil.rmtree(work)
        seal(draft)
        (draft / "README.md").write_text(dataset_card(config, report, posts), encoding="utf-8")
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


def read(config: Config, work: Path, report: Report, progress: bool) -> Posts:
    """The posts of the source; warns of lines that are no rows, and of what is not used."""
    problem_index(config.benchmarks)  # one that cannot be read should fail here, not in a worker
    given = (config.data_source, work, config.seed, progress, config.validation_source)
    with report.timed("read"):
        posts = open_source(*given)
    report.raw_questions, report.raw_answers = posts.questions, posts.answers
    report.quarantined = posts.quarantined
    if posts.quarantined:
        listed = config.dataset_dir / QUARANTINE
        warnings.warn(f"{posts.quarantined} lines are no rows: see {listed}", stacklevel=3)
    if posts.seen and (posts.seen.unused or posts.seen.not_read):
        names = ", ".join([*posts.seen.unused, *posts.seen.not_read])
        warnings.warn(f"not used of {config.data_source}: {names}", stacklevel=3)
    return posts


def message_of(config: Config, posts: Posts) -> str:
    """The system message of the rows: SYSTEM_MESSAGE, the course's, or the one that all bring."""
    brought = posts.seen.systems if posts.seen else Counter()
    if len(brought) == 1 and brought.total() == posts.questions:
        return next(iter(brought))
    return SYSTEM_MESSAGE if config.system_message is None else config.system_message


def clean(
    config: Config, posts: Posts, encoder: Encoder, spread: Callable, report: Report, progress: bool
) -> np.ndarray:
    """Write the rows of every part, and note what the rules removed; the SKETCH of each row."""
    removed, sketches = [], []
    with report.timed("clean"):
        done = spread(partial(clean_part, config, posts, encoder), posts.parts())
        bar = {"total": len(posts.parts()), "unit": " parts", "disable": not progress}
        for part_removed, part_sketches in tqdm(done, "cleaning", **bar):
            removed += part_removed
            sketches.append(part_sketches)
    for question_id, rule, problem in sorted(removed):
        report.removed[rule].append(question_id)
        if problem:
            report.benchmark_hits.append((question_id, problem))
    return np.concatenate(sketches)


def clean_part(
    config: Config, posts: Posts, encoder: Encoder, part: range
) -> tuple[list[tuple[int, str, str]], np.ndarray]:
    """Write the rows of a part; (question id, rule, benchmark problem) of the pairs it removes."""
    removed, rows, sketches = [], [], []
    for pair in posts.pairs(part):
        question_id, score = pair["question_id"], pair["answer_score"] or 0
        score += HELD in pair["tags"] and not posts.is_html  # of two copies it is the one to stay
        text = judge(pair, config, posts.is_html)
        if text.rule:
            removed.append((question_id, text.rule, text.problem))
            continue
        # `curate` has given the Config a system message.
        said = prompts.Conversation(text.system or str(config.system_message), text.turns)
        try:
            rows.append(training_row(pair, said, posts, encoder, config.template == "model"))
        except prompts.TemplateError:
            removed.append((question_id, "template_marker", ""))
            continue
        asked = " ".join(user for user, _ in text.turns)
        of_row = question_id, score, asked, text.words, text.features
        sketches.append(sketch(*of_row, config.seed))
    write(rows_file(posts, part), list(verified(rows, encoder)))
    return removed, np.array(sketches, SKETCH)


def compare(
    config: Config, posts: Posts, sketches: np.ndarray, report: Report
) -> tuple[pa.Table, np.ndarray]:
    """All rows with their groups, and which of them stay: True for a row that nothing removes."""
    with report.timed("compare"):
        # Rows of one's own may all be cast in one mould: what is no duplicate is split row by row.
        together = {} if posts.is_html else {"together": 1.0}
        groups = deduplicate(sketches, config.near_duplicate_similarity, report, **together)
        rows = pa.concat_tables(read_rows(rows_file(posts, part)) for part in posts.parts())
        group = pa.array([groups.get(name) for name in rows["question_id"].to_pylist()], pa.int64())
    rows = rows.append_column("group", group)
    kept = rows.select(["question_id", "tokens", "problem"]).filter(group.is_valid())
    report.token_lengths = kept["tokens"].to_pylist()
    wrong = pc.not_equal(kept["problem"], "")
    long = pc.and_not(pc.greater(kept["tokens"], config.max_length), wrong)
    report.removed["not_verified"] = kept["question_id"].filter(wrong).to_pylist()
    report.removed["too_many_tokens"] = kept["question_id"].filter(long).to_pylist()
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
    count, seed = report.kept_pairs, config.seed
    held = np.zeros(len(rows), bool)
    kept = rows.select(["group", "tags"]).filter(pa.array(stay))
    held[stay] = [HELD in (tags or ()) for tags in kept["tags"].to_pylist()]
    if not (own and held.any()):
        size = validation_size(config, count)
        held[stay] = choose_validation(kept["group"].to_numpy(), size, seed)
    train = stay & ~held
    if config.max_train_rows:
        train[np.flatnonzero(train)[config.max_train_rows :]] = False
    report.train_rows, report.validation_rows = int(train.sum()), int(held.sum())
    if min(report.train_rows, report.validation_rows) == 0:
        raise report.too_few(
            f"too few rows survive: {count} of {report.raw_questions} questions, "
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
