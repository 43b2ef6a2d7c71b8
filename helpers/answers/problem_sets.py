"""What models are asked, and what a right answer is: the course's problems, rows of one's own."""

import json
import statistics
from dataclasses import dataclass

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
    tests: str = ""
    part: str = ""  # one of config.PARTS, or OWN
    row: str = ""
    answer: str = ""
    preamble: str = ""  # code that stands before the answer's own, such as imports


def load_ladder(wanted: tuple[int, ...]) -> list[Problem]:
    """So many problems of each of PARTS, in that order; `config.evaluation_problems` is meant."""
    counts = zip(PARTS, wanted, strict=True)
    found = [load_problems(int(part[5]), n, part.endswith("held_back")) for part, n in counts]
    return sum(found, [])


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
    """Up to `most` held-out rows of one's own, and a sentence on how they are judged: none of a
    forum's posts, which have scores, or the article's set. Of a conversation the first answer is
    asked for. Answers with a median longer than SHORT are compared by their loss alone.
    """
    rows = held_out(config)
    posts = any(row.get("question_score", 0) is not None for row in rows)
    note = curation_note.curation_of(config, config.dataset_dir)
    if posts or note.get("source") == Config.data_source:
        return []
    tokenizer = loading.load_tokenizer(config.model_name)
    chosen, found = spread(rows, min(most, len(rows))), []
    answers = [prompts.first_answer(tokenizer, r["prompt"], r["completion"]) for r in chosen]
    short = statistics.median(map(len, answers)) <= SHORT
    for number, (row, answer) in enumerate(zip(chosen, answers, strict=True)):
        prompt, tests = row["prompt"], row.get("tests") or ""
        judge = {"row": prompt, "answer": answer if short and not tests else ""}
        found.append(Problem(f"own_{number}", prompts.question_in(prompt), tests, OWN, **judge))
    by_tests, by_answer = sum(bool(p.tests) for p in found), sum(bool(p.answer) for p in found)
    print(
        f"part {OWN!r}: {len(found)} of your {len(rows)} held-out rows; {by_tests} are judged by "
        f"their tests, {by_answer} by their short answer, whatever case, punctuation and spaces, "
        "and all by their loss"
    )
    return found


def load_problems(level: int, wanted: int | None = None, held_back: bool = False) -> list[Problem]:
    """Problems of one level, spread evenly over its topics; all of them when `wanted` is None.

    held_back=True gives those that are kept for a last run, and False the others. The article's
    linked-list request is the first of its level. Raises ValueError when there are too few.
    """
    lines = [json.loads(line) for line in PROBLEMS_FILE.read_text("utf-8").splitlines()]
    part = f"level{level}" + "_held_back" * held_back
    found = [
        Problem(line["id"], line["prompt"], line["tests"], part)
        for line in lines
        if line["level"] == level and line.get("held_back", False) == held_back
    ]
    wanted = len(found) if wanted is None else wanted
    if wanted > len(found):
        raise ValueError(f"there are {len(found)} problems of {part}, not {wanted}: ask for fewer")
    first = [problem for problem in found if problem.prompt == LINKED_LIST_PROMPT][:wanted]
    rest = [problem for problem in found if problem not in first]
    return first + spread(rest, wanted - len(first))


def spread(items: list, wanted: int) -> list:
    """So many of the items, evenly spread over them."""
    return [items[i * len(items) // wanted] for i in range(wanted)]
