"""How alike two texts are, by the words they share, and which texts are like one another.

A text is the set of its neighbouring words; two texts are as alike as their Jaccard similarity.
Among all rows, MinHash (Broder 1997) finds the pairs that are alike without comparing every pair.
"""

import hashlib
import itertools
import re
import string
from collections import Counter

import numpy as np
import rensa
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

# Scripts that put no space between words: there each character counts as one.
NO_SPACES = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
# Vowels and accents that are written as signs of their own and belong to the word around them.
MARKS = "\u0300-\u036f\u0591-\u05c7\u0610-\u061a\u064b-\u0670\u06d6-\u06ed\u0900-\u0dff"
SYMBOLS = "\u2190-\u2bff\U0001f000-\U0001faff"  # arrows, signs of mathematics, emoji: a word each
WORD = re.compile(rf"[{NO_SPACES}{SYMBOLS}]|(?:[^\W{NO_SPACES}]|[{MARKS}])+")
# For plain ASCII `translate` and `split` give what the pattern gives, four times as fast.
NO_LETTERS = {ord(sign): " " for sign in string.punctuation if sign != "_"}

PERMUTATIONS = 128
BAND_ROWS = 4  # 32 bands of 4: a pair of similarity 0.7 is compared with probability 0.9998
WINDOW = 16  # neighbours compared within a bucket
# So many rows may ask the same and stay on one side; what more ask is a form ("Tell me a joke.").
SAME_QUESTION = 10

# What the comparison needs of a row: its id and score, hashes of what it asks and of its words, its
# MinHash; no text.
HASHES = [("id", "i8"), ("score", "i8"), ("asked", "u8"), ("digest", "u8")]
SKETCH = np.dtype([*HASHES, ("signature", "u4", PERMUTATIONS)])


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case, without punctuation; of signs alone, each sign."""
    text = text.lower()
    words = text.translate(NO_LETTERS).split() if text.isascii() else WORD.findall(text)
    return words or list("".join(text.split()))


def word_pairs(words: list[str]) -> set[str]:
    """Neighbouring words, what all comparisons here use; a single word stands for itself."""
    return set(map(" ".join, itertools.pairwise(words))) or set(words)


def contained(part: set, whole: set) -> float:
    """Share of `part` that occurs in `whole`, from 0 to 1."""
    return len(part & whole) / len(part) if part else 0.0


def jaccard(first: set, second: set) -> float:
    """Members in both divided by members in either, from 0 to 1."""
    return len(first & second) / len(first | second) if first or second else 1.0


class RarestIndex:
    """Finds the sets of which at least a share is contained in another set, without comparing all.

    A set of n members that is contained to the share s lacks at most (1-s)n of them. So one of its
    (1-s)n + 1 rarest members is in the other set, and only those are indexed (the prefix filter of
    similarity joins, Chaudhuri et al. 2006). No set is missed.
    """

    def __init__(self, sets: list[set[str]], share: float):
        self.sets, self.share = sets, share
        self.where: dict[str, list[int]] = {}
        frequency = Counter(itertools.chain.from_iterable(sets))
        for number, members in enumerate(sets):
            rarest = sorted(members, key=lambda member: (frequency[member], member))
            for member in rarest[: int((1 - share) * len(members) + 1e-9) + 1]:
                self.where.setdefault(member, []).append(number)

    def find(self, other: set[str]) -> list[int]:
        """Numbers, in order, of the sets that are contained in `other` to the share."""
        shared = map(self.where.__getitem__, self.where.keys() & other)
        near = sorted(set(itertools.chain.from_iterable(shared)))
        return [number for number in near if contained(self.sets[number], other) >= self.share]


def sketch(row_id: int, score: int, asked: str, words: list[str], pairs: set[str], seed: int):
    """A SKETCH of a row that asks `asked`, with these words and word pairs in all."""
    minhash = rensa.RMinHash(num_perm=PERMUTATIONS, seed=seed)
    minhash.update(list(pairs))
    texts = " ".join(asked.lower().split()), " ".join(words)
    hashes = (hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return row_id, score, *(int.from_bytes(h, "little") for h in hashes), minhash.digest()


def deduplicate(
    sketches: np.ndarray, threshold: float, together: float
) -> tuple[list[int], list[tuple[int, int, float]], dict[int, int]]:
    """Find exact and near duplicates; the best-scored of each kind stays (then the oldest).

    Returns the ids of exact ones that go, (id that stays, id that goes, similarity) of near ones,
    and all ids that stay with their group: the smallest id among the rows that are linked by a
    similarity of `together` or more, or by what they ask.
    """
    best = sketches[np.lexsort((sketches["id"], -sketches["score"]))]
    _, first = np.unique(best["digest"], return_index=True)
    best = best[np.sort(first)]
    ids, kept = best["id"], np.ones(len(best), bool)
    exact, found = np.setdiff1d(sketches["id"], ids).tolist(), []
    left, right, similarity = similar_pairs(best["signature"], min(together, threshold))
    near = similarity >= threshold
    # `left` is the better one of a pair; going through the worse ones in order makes the choice
    # greedy.
    for a, b, value in zip(left[near].tolist(), right[near], similarity[near], strict=True):
        if kept[a] and kept[b]:
            found.append((int(ids[a]), int(ids[b]), float(value)))
            kept[b] = False
    _, first, which, counts = np.unique(best["asked"], True, True, True)
    same = np.flatnonzero(counts[which] <= SAME_QUESTION)
    left, right = np.append(left, first[which][same]), np.append(right, same)
    links = coo_array((np.ones(len(left)), (left, right)), shape=(len(best), len(best)))
    _, linked = connected_components(links, directed=False)
    smallest = np.full(len(best), np.iinfo(np.int64).max)
    np.minimum.at(smallest, linked, ids)
    groups = zip(ids[kept].tolist(), smallest[linked][kept].tolist(), strict=True)
    return exact, found, dict(groups)


def similar_pairs(signatures: np.ndarray, threshold: float) -> tuple[np.ndarray, ...]:
    """(left, right, similarity) of rows whose MinHash similarity reaches the threshold.

    left < right, sorted by right, then left. Rows that agree on all values of one band land in one
    bucket and are compared; in a large one with WINDOW neighbours, so that the cost stays linear.
    """
    count, found = len(signatures), [np.zeros(0, np.int64)]
    multipliers = np.random.default_rng(0).integers(1, 2**63, BAND_ROWS, np.uint64) | np.uint64(1)
    for start in range(0, PERMUTATIONS, BAND_ROWS):
        keys = signatures[:, start : start + BAND_ROWS] * multipliers
        keys = keys.sum(axis=1, dtype=np.uint64)
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        for distance in range(1, min(WINDOW + 1, count)):
            same = np.flatnonzero(keys[:-distance] == keys[distance:])
            both = np.sort([order[same], order[same + distance]], axis=0)
            found.append(both[1] * count + both[0])
    right, left = np.divmod(np.unique(np.concatenate(found)), max(count, 1))
    parts = np.array_split(np.arange(len(left)), len(left) // 5_000 + 1)
    alike = [(signatures[left[p]] == signatures[right[p]]).mean(axis=1) for p in parts]
    similarity = np.concatenate(alike)
    near = similarity >= threshold
    return left[near], right[near], similarity[near]
