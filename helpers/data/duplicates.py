"""Exact and near duplicates among all rows, found without comparing every pair.

MinHash (Broder 1997) estimates the Jaccard similarity of two texts from signatures of fixed size.
"""

import hashlib

import numpy as np
import rensa
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from helpers.data.report import Report

PERMUTATIONS = 128
BAND_ROWS = 4  # 32 bands of 4: a pair of similarity 0.7 is compared with probability 0.9998
WINDOW = 16  # neighbours compared within a bucket
# Pairs at least this much like each other stay on one side of the split.
GROUP_SIMILARITY = 0.5

# So many rows may ask the same and stay on one side; what more ask is a form ("Tell me a joke.").
SAME_QUESTION = 10

# What the comparison needs of a row: its id and score, hashes of what it asks and of its words, its
# MinHash; no text.
HASHES = [("id", "i8"), ("score", "i8"), ("asked", "u8"), ("digest", "u8")]
SKETCH = np.dtype([*HASHES, ("signature", "u4", PERMUTATIONS)])


def sketch(
    question_id: int, score: int, asked: str, words: list[str], features: set[str], seed: int
) -> tuple:
    """A SKETCH of a row that asks `asked`, with these words and word pairs in all."""
    minhash = rensa.RMinHash(num_perm=PERMUTATIONS, seed=seed)
    minhash.update(list(features))
    texts = " ".join(asked.lower().split()), " ".join(words)
    hashes = (hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return question_id, score, *(int.from_bytes(h, "little") for h in hashes), minhash.digest()


def deduplicate(
    sketches: np.ndarray, threshold: float, report: Report, together: float = GROUP_SIMILARITY
) -> dict[int, int]:
    """Remove exact and near duplicates, the best-scored of each kind stays (then the oldest).

    Returns the kept question ids with their group: the smallest id among all rows that are linked
    by a similarity of `together` or more, or by what they ask.
    """
    best_first = sketches[np.lexsort((sketches["id"], -sketches["score"]))]
    _, first = np.unique(best_first["digest"], return_index=True)
    best = best_first[np.sort(first)]
    ids = best["id"]
    report.removed["exact_duplicate"] = np.setdiff1d(sketches["id"], ids).tolist()
    left, right, similarity = similar_pairs(best["signature"], min(together, threshold))
    kept = np.ones(len(best), bool)
    near = similarity >= threshold
    # `left` is the better one of a pair; going through the worse ones in order makes the choice
    # greedy.
    for a, b, value in zip(left[near].tolist(), right[near], similarity[near], strict=True):
        if kept[a] and kept[b]:
            report.removed["near_duplicate"].append(int(ids[b]))
            report.near_pairs.append((int(ids[a]), int(ids[b]), float(value)))
            kept[b] = False
    _, first, which, counts = np.unique(
        best["asked"], return_index=True, return_inverse=True, return_counts=True
    )
    same = np.flatnonzero(counts[which] <= SAME_QUESTION)
    left, right = np.append(left, first[which][same]), np.append(right, same)
    links = coo_array((np.ones(len(left)), (left, right)), shape=(len(best), len(best)))
    _, linked = connected_components(links, directed=False)
    smallest = np.full(len(best), np.iinfo(np.int64).max)
    np.minimum.at(smallest, linked, ids)
    return dict(zip(ids[kept].tolist(), smallest[linked][kept].tolist(), strict=True))


def similar_pairs(signatures: np.ndarray, threshold: float) -> tuple[np.ndarray, ...]:
    """(left, right, similarity) of rows whose MinHash similarity reaches the threshold.

    left < right, sorted by right, then left. Rows that agree on all values of one band land in one
    bucket and are compared; in a large one with WINDOW neighbours, so that the cost stays linear.
    """
    pairs = _candidates(signatures)
    left, right = np.divmod(pairs, max(len(signatures), 1))
    left, right = np.minimum(left, right), np.maximum(left, right)
    similarity = np.zeros(len(pairs))
    for start in range(0, len(pairs), 5_000):
        some = slice(start, start + 5_000)
        similarity[some] = (signatures[left[some]] == signatures[right[some]]).mean(axis=1)
    near = similarity >= threshold
    left, right, similarity = left[near], right[near], similarity[near]
    order = np.lexsort((left, right))
    return left[order], right[order], similarity[order]


def _candidates(signatures: np.ndarray) -> np.ndarray:
    """The pairs that share a bucket, each as first * rows + second, in order and once."""
    count, found = len(signatures), [np.zeros(0, np.int64)]
    generator = np.random.default_rng(0)
    multipliers = generator.integers(1, 2**63, BAND_ROWS, dtype=np.uint64) | np.uint64(1)
    for start in range(0, PERMUTATIONS, BAND_ROWS):
        band = signatures[:, start : start + BAND_ROWS].astype(np.uint64)
        keys = (band * multipliers).sum(axis=1, dtype=np.uint64)
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        for distance in range(1, min(WINDOW + 1, count)):
            same = np.flatnonzero(keys[:-distance] == keys[distance:])
            if not len(same):
                break
            found.append(order[same] * count + order[same + distance])
    return np.unique(np.concatenate(found))
