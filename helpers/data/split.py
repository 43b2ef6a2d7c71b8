"""The split into training and validation rows, and whether a row stands on both sides of it."""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from helpers import prompts
from helpers.config import Config
from helpers.data.posts import question_hash
from helpers.data.rows import read_rows
from helpers.data.similarity import RarestIndex, jaccard, word_pairs, words_of

SLICES, STEP = 8, 2_000  # the leaks of a dataset are looked for in 8 slices, 2,000 rows at a time


def validation_size(config: Config, rows: int) -> int:
    """Rows to hold out: a share, at most `validation_rows`, at most half of `max_train_rows`."""
    cap = config.max_train_rows // 2 if config.max_train_rows else rows
    return max(1, min(config.validation_rows, round(config.validation_share * rows), cap))


def choose_validation(groups: np.ndarray, wanted: int, seed: int) -> np.ndarray:
    """True for the validation rows: whole groups in a seeded order, up to `wanted` rows.

    Where each group is larger than that, the smallest.
    """
    names, which, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    chosen, left = np.zeros(len(names), bool), wanted
    for index in np.argsort(question_hash(names, seed + 1), kind="stable"):
        if sizes[index] <= left:
            chosen[index], left = True, left - sizes[index]
    if wanted and not chosen.any():
        chosen[sizes.argmin()] = True
    return chosen[which]


def find_leaks(held: list[dict], train: Iterable[dict], similarity: float) -> set[int]:
    """Places in `held` of the rows that leak into the training rows.

    A row leaks into one of the same group, or one that is as similar in words, by the exact Jaccard
    similarity and not the MinHash that removed duplicates.
    """
    features = [row_pairs(row) for row in held]
    index, leaked = RarestIndex(features, similarity), set[int]()
    groups = set()
    for row in train:
        own = row_pairs(row)
        groups.add(row["group"])
        leaked.update(n for n in index.find(own) if jaccard(features[n], own) >= similarity)
    return leaked | {place for place, row in enumerate(held) if row["group"] in groups}


def leaks_of_slice(dataset: Path, similarity: float, number: int) -> set[int]:
    """`find_leaks` of a saved dataset and one of SLICES parts of its training rows."""
    held, train = (
        pa.concat_tables(map(read_rows, sorted((dataset / name).glob("data-*.arrow"))))
        for name in ("validation", "train")
    )
    if not str(held["prompt"][0]).startswith(prompts.OPENING):  # all begin with a system message
        skip = len(os.path.commonprefix([*held["prompt"].to_pylist(), str(train["prompt"][0])]))
        held, train = (
            part.set_column(0, "prompt", pc.utf8_slice_codeunits(part["prompt"], skip))
            for part in (held, train)
        )
    starts = range(number * STEP, len(train), SLICES * STEP)
    rows = (row for start in starts for row in train.slice(start, STEP).to_pylist())
    return find_leaks(held.to_pylist(), rows, similarity)


def row_pairs(row: dict) -> set[str]:
    """The word pairs of a training row, without the system message that all rows share."""
    user = row["prompt"].split(prompts.CLOSE_SYSTEM, 1)[-1].removesuffix(prompts.CLOSE_USER)
    return word_pairs(words_of(f"{user} {row['completion']}"))
