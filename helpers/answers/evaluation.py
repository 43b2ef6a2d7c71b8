"""What an answer is worth: does it stop, hold code that parses, go in steps, pass its tests?

Each score is a yes or no for each problem; rates come with Wilson's 95 % interval, and base and
tuned model are compared on the same problems by McNemar's exact test.
"""

import re
from collections.abc import Callable, Iterator
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
SEQUENCE_WORD = re.compile(r"\b(first|second|then|next|after that|finally|lastly)\b", re.IGNORECASE)
# The fields of Score under the names that metrics files give them: stop_rate_<which> and so on.
RATES = {
    "stop": "stops",
    "varied": "varied",
    "code": "code",
    "parse": "parses",
    "steps": "steps",
    "pass": "passes",
}


@dataclass(frozen=True)
class Score:
    """Yes or no for one answer. `passes` is None where generated code is not run."""

    stops: bool
    varied: bool
    code: bool
    parses: bool
    steps: bool
    passes: bool | None


# -- One answer.


def score(answer: Answer, problem: Problem | None, level: str) -> Score:
    """Score one answer. Its code runs only in the sandbox, at a level of `sandbox.LEVELS`.

    An answer is varied when less than half of its runs of four words are repetitions. Without a
    problem there are no tests, and its code is not run.
    """
    code = code_of(answer.text)
    readable, passes = parses(code), None
    if problem and level != "off":
        solution = f"{problem.preamble}\n{code}"
        passes = readable and sandbox.run_tests(solution, problem.tests, level).passed
    return Score(
        stops=answer.stopped,
        varied=repetition(answer.text) < 0.5,
        code=code is not None,
        parses=readable,
        steps=explains_in_steps(answer.text),
        passes=passes,
    )


def code_of(text: str) -> str | None:
    """The code of an answer's fenced blocks, joined; None when there is no closed block."""
    blocks = [code for _, code in fenced_blocks(text)]
    return "\n".join(blocks) if blocks else None


def parses(code: str | None) -> bool:
    """Whether there is code and Python can read it."""
    return bool(code and code.strip()) and parse_python(code) is not None


def steps_of(text: str) -> list[str]:
    """The numbered lines of an answer's prose, without their numbers."""
    return NUMBERED_STEP.findall(FENCE.sub("", text))


def explains_in_steps(text: str) -> bool:
    """Whether the prose has two numbered steps, or two different words of sequence.

    A coarse check: it accepts numbered nonsense and misses steps that are only implied.
    """
    words = {word.lower() for word in SEQUENCE_WORD.findall(FENCE.sub("", text))}
    return len(steps_of(text)) >= 2 or len(words) >= 2


def repetition(text: str, width: int = 4) -> float:
    """Share of the runs of `width` words that stood in the text before, from 0 to 1."""
    words = text.split()
    runs = [tuple(words[i : i + width]) for i in range(len(words) - width + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


# -- Many answers.


def rates(scores: list[Score], suffix: str) -> dict[str, float]:
    """Shares from 0 to 1 under the names of the metrics file: stop_rate_<suffix> and so on."""
    return {
        f"{name}_rate_{suffix}": sum(bool(getattr(score, field)) for score in scores) / len(scores)
        for name, field in RATES.items()
        if all(getattr(score, field) is not None for score in scores)
    }


def paired_p_value(before: list[bool], after: list[bool]) -> float:
    """McNemar's exact test: how likely so uneven a split of the changed answers is by chance."""
    gained = sum(b and not a for a, b in zip(before, after, strict=True))
    lost = sum(a and not b for a, b in zip(before, after, strict=True))
    return binomtest(gained, gained + lost).pvalue if gained + lost else 1.0


def compare(columns: dict[str, list[Score]], against: str = "tuned") -> list[dict]:
    """A row for each score: `<which>_rate`, `_low` and `_high` of every column (who -> scores).

    The others also have `<which>_p_value`, of the paired test against `against`; a column that
    answered only the first problems is tested on those. Scores that were not taken (`passes` with
    the sandbox off) are left out.
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
    return rows


def losses(before: list[Score], after: list[Score]) -> list[tuple[int, list[str]]]:
    """(position, names of the scores that `before` has and `after` lacks), the most lost first."""
    lost = [
        (place, [name for name in RATES.values() if getattr(b, name) and not getattr(a, name)])
        for place, (b, a) in enumerate(zip(before, after, strict=True))
    ]
    return sorted([item for item in lost if item[1]], key=lambda item: -len(item[1]))


# -- Asking for them.


def sampled_passes(config: Config, which: str, tokenizer, problems) -> list[int]:
    """For each problem, how many of `config.samples_per_problem` sampled answers pass.

    Raises ValueError where generated code is not run.
    """
    if config.sandbox == "off":
        raise ValueError('pass@k runs generated code, and SANDBOX is "off": set it to "isolated"')
    many = [problem for problem in problems for _ in range(config.samples_per_problem)]
    system = inference.system_message(config, which)
    asked = [prompts.render_prompt(problem.prompt, system) for problem in many]
    answers, _ = inference.answer_alone(
        config, which, tokenizer, asked, config.sampling_temperature
    )
    passed = [score(a, p, config.sandbox).passes for a, p in zip(answers, many, strict=True)]
    size = config.samples_per_problem
    return [sum(passed[start : start + size]) for start in range(0, len(passed), size)]


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
