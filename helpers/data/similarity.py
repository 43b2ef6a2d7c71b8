"""How alike two texts are, and how to find all that are alike without comparing every pair.

A text is the set of its neighbouring words; two texts are as alike as their Jaccard similarity.
MinHash (Broder 1997) estimates it from a signature of fixed size; the prefix filter (Chaudhuri et
al. 2006) finds exact matches among few texts.
"""

import hashlib
import itertools
import re
import string
from collections import Counter

import numpy as np
import rensa

WORD = re.compile(r"\w+")
# For plain ASCII `translate` and `split` give what the pattern gives, four times as fast.
NO_LETTERS = {ord(sign): " " for sign in string.punctuation if sign != "_"}
PERMUTATIONS = 128
BAND_ROWS = 4  # 32 bands of 4: a pair of similarity 0.7 is compared with probability 0.9998
SHARED = 16  # rare members that a candidate must have in common
WINDOW = 16  # neighbours compared within a bucket


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case, without punctuation."""
    text = text.lower()
    return text.translate(NO_LETTERS).split() if text.isascii() else WORD.findall(text)


def word_pairs(words: list[str]) -> set[str]:
    """Neighbouring words, what all comparisons here use; a single word stands for itself."""
    return set(map(" ".join, zip(words, words[1:], strict=False))) or set(words)


def contained(part: set, whole: set) -> float:
    """Share of `part` that occurs in `whole`, from 0 to 1."""
    return len(part & whole) / len(part) if part else 0.0


def jaccard(first: set, second: set) -> float:
    """Members in both divided by members in either, from 0 to 1."""
    shared = len(first & second)
    return shared / (len(first) + len(second) - shared) if first or second else 1.0


def sketch(words: list[str], features: set[str], seed: int) -> dict[str, bytes | list[int]]:
    """What stands for a text: `digest`, 8 bytes, of its words, `signature` of its features."""
    minhash = rensa.RMinHash(num_perm=PERMUTATIONS, seed=seed)
    minhash.update(list(features))
    digest = hashlib.blake2b(" ".join(words).encode(), digest_size=8).digest()
    return {"digest": digest, "signature": np.array(minhash.digest(), np.uint32)}


class RarestIndex:
    """Finds the sets of which at least a share is contained in another set, without comparing all.

    A set of n members that is contained to the share s lacks at most (1-s)n of them. So of its
    (1-s)n + SHARED rarest members at least SHARED are in the other set, and only those are indexed
    (the prefix filter of similarity joins, Chaudhuri et al. 2006). `candidates` misses no set; the
    caller measures the overlap.
    """

    def __init__(self, sets: list[set[str]], share: float):
        frequency: dict[str, int] = {}
        for members in sets:
            for member in members:
                frequency[member] = frequency.get(member, 0) + 1
        self.where: dict[str, list[int]] = {}
        self.needed: list[int] = []
        for number, members in enumerate(sets):
            lacking = int((1 - share) * len(members) + 1e-9)
            rarest = sorted(members, key=lambda member: (frequency[member], member))
            self.needed.append(max(1, min(SHARED, len(members) - lacking)))
            for member in rarest[: lacking + self.needed[-1]]:
                self.where.setdefault(member, []).append(number)
        self.members = set(self.where)

    def candidates(self, other: set[str]) -> list[int]:
        """Numbers, in order, of the sets that may be contained in `other` to the share."""
        shared = map(self.where.__getitem__, self.members & other)
        counts = Counter(itertools.chain.from_iterable(shared))
        return sorted(number for number, count in counts.items() if count >= self.needed[number])


def similar_pairs(signatures: np.ndarray, threshold: float) -> tuple[np.ndarray, ...]:
    """(left, right, similarity) of rows whose MinHash similarity reaches the threshold.

    left < right, sorted by right, then left. Locality-sensitive hashing: rows that agree on all
    values of one band land in one bucket and are compared. In a bucket of more than WINDOW + 1 rows
    each row meets its WINDOW neighbours only, so that the cost stays linear.
    """
    count, found = len(signatures), []
    multipliers = np.random.default_rng(0).integers(
        1, 2**63, BAND_ROWS, dtype=np.uint64
    ) | np.uint64(1)
    for start in range(0, PERMUTATIONS, BAND_ROWS):
        band = signatures[:, start : start + BAND_ROWS].astype(np.uint64)
        keys = (band * multipliers).sum(axis=1, dtype=np.uint64)
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        for distance in range(1, WINDOW + 1):
            same = np.flatnonzero(keys[:-distance] == keys[distance:]) if count > distance else []
            if not len(same):
                break
            found.append(order[same] * count + order[same + distance])
    pairs = np.unique(np.concatenate(found)) if found else np.zeros(0, np.int64)
    left, right = pairs // max(count, 1), pairs % max(count, 1)
    left, right = np.minimum(left, right), np.maximum(left, right)
    similarity = np.concatenate(
        [
            (signatures[left[i : i + 5_000]] == signatures[right[i : i + 5_000]]).mean(axis=1)
            for i in range(0, len(left), 5_000)
        ]
        or [np.zeros(0)]
    )
    near = similarity >= threshold
    left, right, similarity = left[near], right[near], similarity[near]
    order = np.lexsort((left, right))
    return left[order], right[order], similarity[order]


def find(parent: list[int], index: int) -> int:
    while parent[index] != index:
        parent[index] = parent[parent[index]]
        index = parent[index]
    return index


def union(parent: list[int], a: int, b: int) -> None:
    a, b = find(parent, a), find(parent, b)
    parent[max(a, b)] = min(a, b)
