"""What an answer is worth: does it stop, hold code that parses, go in steps, pass its tests?

Each score is a yes or no for each problem; rates come with Wilson's 95 % interval, and base and
tuned model are compared on the same problems by McNemar's exact test.
"""

import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from scipy.stats import binomtest

from helpers import prompts
from helpers.answers import inference, sandbox
from helpers.answers.inference import Answer
from helpers.answers.problem_sets import Problem
from helpers.config import Config
from helpers.data.code_kinds import parse_python
from helpers.data.markdown import fenced_blocks
from helpers.model import measure
from helpers.prompts import FENCE
from helpers.runs.scores import interval

NUMBERED_STEP = re.compile(r"^\s*\d+[.)]\s+(\S.*)$", re.MULTILINE)
SEQUENCE_WORD = re.compile(  # at the beginning of a sentence
    r"(?:^|[.!?:])\s*(first|second|third|then|next|after that|finally|lastly)\b", re.MULTILINE
)
# The fields of Score under the names that metrics files give them: stop_rate_<which> and so on.
RATES = {"stop": "stops", "parse": "parses", "steps": "steps", "pass": "passes"}


@dataclass(frozen=True)
class Score:
    """Yes or no for one answer. `passes` is None where generated code is not run.

    An answer that does not stop was cut at the limit of tokens: it might have ended later.
    """

    stops: bool
    parses: bool
    steps: bool
    passes: bool | None
    part: str = ""  # of config.PARTS, to which the problem belongs


# -- One answer.


def score(answer: Answer, problem: Problem | None, level: str) -> Score:
    """Score one answer. Its code runs only in the sandbox, at a level of `sandbox.LEVELS`.

    Without a problem there are no tests, and its code is not run.
    """
    code = code_of(answer.text)
    readable, passes = parses(code), None
    if problem and level != "off":
        solution = f"{problem.preamble}\n{code}"
        passes = readable and sandbox.run_tests(solution, problem.tests, level).passed
    return Score(
        stops=answer.stopped,
        parses=readable,
        steps=explains_in_steps(answer.text),
        passes=passes,
        part=problem.part if problem else "",
    )


def score_all(answers: list[Answer], problems: list[Problem], level: str) -> list[Score]:
    """`score` of each answer, as many at a time as there are cores: each runs in a sandbox."""
    if level != "off":
        sandbox.level(level)  # raises where it cannot be had, before any work
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda pair: score(*pair, level), zip(answers, problems, strict=True)))


def code_of(text: str) -> str | None:
    """The code of an answer's fenced blocks, joined; None when there is no closed block."""
    blocks = [code for _, code in fenced_blocks(text)]
    return "\n".join(blocks) if blocks else None


def parses(code: str | None) -> bool:
    """Whether there is code and Python can read it."""
    return bool(code and code.strip()) and parse_python(code) is not None


def explains_in_steps(text: str) -> bool:
    """Whether the prose has two different numbered lines, or two different sentences of a sequence.

    The latter begin with two different words such as "first" and "then". A coarse check: it accepts
    numbered nonsense and misses steps that are only implied.
    """
    prose = FENCE.sub("", text).lower()
    numbered = {" ".join(line.split()) for line in NUMBERED_STEP.findall(prose)}
    return len(numbered) >= 2 or len(set(SEQUENCE_WORD.findall(prose))) >= 2


# -- Many answers.


def rates(scores: list[Score], which: str) -> dict[str, float]:
    """Shares from 0 to 1 under the names of the metrics file: stop_rate_<which> and so on.

    The pass rate of each part comes besides, as pass_rate_<part>_<which>. Scores that were not
    taken (`passes` with the sandbox off) are left out.
    """
    found = {
        f"{name}_rate_{which}": share([getattr(score, field) for score in scores])
        for name, field in RATES.items()
    }
    for part in dict.fromkeys(score.part for score in scores if score.part):
        passes = [score.passes for score in scores if score.part == part]
        found[f"pass_rate_{part}_{which}"] = share(passes)
    return {name: value for name, value in found.items() if value is not None}


def share(values: list[bool | None]) -> float | None:
    """The share of yes; None where the score was not taken."""
    return None if None in values else sum(values) / len(values)


def paired_p_value(before: list[bool], after: list[bool]) -> float:
    """McNemar's exact test: how likely so uneven a split of the changed answers is by chance."""
    gained = sum(b and not a for a, b in zip(before, after, strict=True))
    lost = sum(a and not b for a, b in zip(before, after, strict=True))
    return binomtest(gained, gained + lost).pvalue if gained + lost else 1.0


def holm(p_values: list[float]) -> list[float]:
    """p-values of several tests, each as it counts among them all (Holm 1979).

    The smallest is multiplied by the number of tests, the next by one less, and so on, so that
    below 0.05 stands a result of chance in at most one of twenty such families.
    """
    corrected, largest = list(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, p_values[place] * (len(p_values) - rank)))
        corrected[place] = largest
    return corrected


def compare(columns: dict[str, list[Score]], against: str = "tuned") -> list[dict]:
    """A row for each score: `<which>_rate`, `_low` and `_high` of every column (who -> scores).

    The others also have `<which>_p_value`, of the paired test against `against`, corrected by
    `holm` for all tests of the rows; a column that answered only the first problems is tested on
    those. Scores that were not taken (`passes` with the sandbox off) are left out.
    """
    rows = []
    for name in RATES.values():
        values = {which: [getattr(s, name) for s in scores] for which, scores in columns.items()}
        if any(None in found for found in values.values()):
            continue
        row = {"score": name}
        for which, found in values.items():
            low, high = interval(sum(found), len(found))
            row |= {f"{which}_rate": sum(found) / len(found)}
            row |= {f"{which}_low": low, f"{which}_high": high}
            if which != against:
                same_problems = values[against][: len(found)]
                row[f"{which}_p_value"] = paired_p_value(found, same_problems)
        rows.append(row)
    tests = [(row, name) for row in rows for name in row if name.endswith("_p_value")]
    for (row, name), value in zip(tests, holm([row[name] for row, name in tests]), strict=True):
        row[name] = value
    return rows


def losses(before: list[Score], after: list[Score]) -> list[tuple[int, list[str]]]:
    """(position, names of the scores that `before` has and `after` lacks), the most lost first."""
    lost = [
        (place, [name for name in RATES.values() if getattr(b, name) and not getattr(a, name)])
        for place, (b, a) in enumerate(zip(before, after, strict=True))
    ]
    return sorted([item for item in lost if item[1]], key=lambda item: -len(item[1]))


# -- Asking for them.


def ask_ladder(
    model, tokenizer, config: Config, problems, template: str = "chat", temperature: float = 0.0
) -> list[Score]:
    """A loaded model's answers to problems, scored: for benchmarks.

    template: one of `inference.TEMPLATES`. For pass@k, give each problem k times and a temperature.
    """
    system = inference.system_message(config, "base")
    asked = inference.requests(tokenizer, [p.prompt for p in problems], system, template)
    answers, _ = inference.answer_all(model, tokenizer, asked, config, temperature)
    return score_all(answers, problems, config.sandbox)


def answerer(config: Config, which: str, tokenizer) -> Callable[[str], Iterator]:
    """Asks one of MODELS, for `widgets.side_by_side`: gives the answer in pieces, then its Score.

    The model is loaded when it is asked and in memory only while it answers.
    """

    def answer(question: str):
        prompt = prompts.render_prompt(question, inference.system_message(config, which))
        model = inference.load(config, which)
        try:
            given = yield from inference.stream(model, tokenizer, prompt, config.max_new_tokens)
        finally:
            del model
            measure.free_memory()
        yield score(given, None, "off")

    return answer
