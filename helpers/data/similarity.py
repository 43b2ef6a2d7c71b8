"""How alike two texts are, by the words they share, and which of a few texts are like another.

A text is the set of its neighbouring words; two texts are as alike as their Jaccard similarity.
"""

import itertools
import re
import string
from collections import Counter

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
SHARED = 16  # rare members that a candidate must have in common


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case, without punctuation; of signs alone, each sign."""
    text = text.lower()
    words = text.translate(NO_LETTERS).split() if text.isascii() else WORD.findall(text)
    return words or list("".join(text.split()))


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


class RarestIndex:
    """Finds the sets of which at least a share is contained in another set, without comparing all.

    A set of n members that is contained to the share s lacks at most (1-s)n of them. So of its
    (1-s)n + SHARED rarest members at least SHARED are in the other set, and only those are indexed
    (the prefix filter of similarity joins, Chaudhuri et al. 2006). No set is missed.
    """

    def __init__(self, sets: list[set[str]], share: float):
        frequency = Counter(itertools.chain.from_iterable(sets))
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
