"""What an answer is worth: does it stop, hold code that parses, reason in steps, pass its tests?

Each score is a yes or no for each problem; rates come with Wilson's 95 % interval, and base and
tuned model are compared on the same problems by McNemar's exact test.
"""

import json
import re
from dataclasses import dataclass

from scipy.stats import binomtest

from helpers import sandbox
from helpers.config import LINKED_LIST_PROMPT, PROBLEMS_FILE, Config
from helpers.inference import Answer
from helpers.markdown import parse_python

CODE_BLOCK = re.compile(r"^```[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
NUMBERED_STEP = re.compile(r"^\s*\d+[.)]\s+\S", re.MULTILINE)
SEQUENCE_WORD = re.compile(r"\b(first|second|then|next|after that|finally|lastly)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Problem:
    """A request that is in no training row, with the tests that a right answer passes."""

    id: str
    prompt: str
    entry_point: str
    tests: str


@dataclass(frozen=True)
class Score:
    """Yes or no for one answer. `passes` is None where generated code is not run."""

    stops: bool
    parses: bool
    steps: bool
    passes: bool | None


def load_problems(config: Config) -> list[Problem]:
    """The article's linked-list request, then problems spread evenly over the topics of the file.

    Raises ValueError when the file holds fewer than `config.evaluation_problems`.
    """
    lines = [json.loads(line) for line in PROBLEMS_FILE.read_text("utf-8").splitlines()]
    every = [Problem(**{key: line[key] for key in Problem.__annotations__}) for line in lines]
    wanted = config.evaluation_problems
    if wanted > len(every):
        raise ValueError(
            f"EVALUATION_PROBLEMS is {wanted}; {PROBLEMS_FILE.name} holds {len(every)}"
        )
    first = [problem for problem in every if problem.prompt == LINKED_LIST_PROMPT]
    rest = [problem for problem in every if problem.prompt != LINKED_LIST_PROMPT]
    spread = [rest[i * len(rest) // max(wanted - 1, 1)] for i in range(wanted - 1)]
    return first + spread


def code_of(text: str) -> str | None:
    """The code of an answer's fenced blocks, joined; None when there is no closed block."""
    blocks = CODE_BLOCK.findall(text)
    return "\n".join(blocks) if blocks else None


def parses(code: str | None) -> bool:
    """Whether there is code and Python can read it."""
    return bool(code and code.strip()) and parse_python(code) is not None


def explains_in_steps(text: str) -> bool:
    """Whether the prose has two numbered steps, or two different words of sequence.

    A coarse check: it accepts numbered nonsense and misses steps that are only implied.
    """
    prose = CODE_BLOCK.sub("", text)
    words = {word.lower() for word in SEQUENCE_WORD.findall(prose)}
    return len(NUMBERED_STEP.findall(prose)) >= 2 or len(words) >= 2


def score(answer: Answer, problem: Problem, config: Config) -> Score:
    """Score one answer. Its code runs only in the sandbox, at the level of `config.sandbox`."""
    code = code_of(answer.text)
    readable = parses(code)
    passes = None
    if config.sandbox != "off":
        passes = readable and sandbox.run_tests(code, problem.tests, config.sandbox).passed
    return Score(answer.stopped, readable, explains_in_steps(answer.text), passes)


def rates(scores: list[Score], suffix: str) -> dict[str, float]:
    """Shares from 0 to 1 under the names of the metrics file: stop_rate_<suffix> and so on."""
    fields = {"stop": "stops", "parse": "parses", "steps": "steps", "pass": "passes"}
    return {
        f"{name}_rate_{suffix}": sum(bool(getattr(score, field)) for score in scores) / len(scores)
        for name, field in fields.items()
        if all(getattr(score, field) is not None for score in scores)
    }


def interval(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % confidence interval of a rate (Wilson 1927)."""
    found = binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    return found.low, found.high


def paired_p_value(before: list[bool], after: list[bool]) -> float:
    """McNemar's exact test: how likely so uneven a split of the changed answers is by chance."""
    gained = sum(b and not a for a, b in zip(before, after, strict=True))
    lost = sum(a and not b for a, b in zip(before, after, strict=True))
    return binomtest(gained, gained + lost).pvalue if gained + lost else 1.0


SCORES = ("stops", "parses", "steps", "passes")


def compare(before: list[Score], after: list[Score]) -> list[dict]:
    """One row for each score: the rates of base and tuned, their intervals, and the paired p-value.

    Scores that were not taken (`passes` with the sandbox off) are left out.
    """
    rows = []
    for name in SCORES:
        base, tuned = ([getattr(score, name) for score in scores] for scores in (before, after))
        if None in base + tuned:
            continue
        row = {"score": name}
        for which, values in (("base", base), ("tuned", tuned)):
            low, high = interval(sum(values), len(values))
            row |= {f"{which}_rate": sum(values) / len(values)}
            row |= {f"{which}_low": low, f"{which}_high": high}
        rows.append({**row, "p_value": paired_p_value(base, tuned)})
    return rows


def losses(before: list[Score], after: list[Score]) -> list[tuple[int, list[str]]]:
    """(position, names of the scores that `before` has and `after` lacks), the most lost first."""
    lost = [
        (place, [name for name in SCORES if getattr(b, name) and not getattr(a, name)])
        for place, (b, a) in enumerate(zip(before, after, strict=True))
    ]
    return sorted([item for item in lost if item[1]], key=lambda item: -len(item[1]))
