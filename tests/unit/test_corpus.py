"""The data itself:

enough of it, every kept answer's code parses and runs, problems are solvable and kept apart.
"""

import ast
import csv
import json
import subprocess
import sys

import pytest
from datasets import concatenate_datasets, load_from_disk

from helpers.config import PROJECT_DIR, Config
from helpers.data.contamination import problem_index
from helpers.data.markdown import fenced_blocks
from helpers.data.similarity import words_of
from helpers.data.sources import SAMPLE_DIR
from helpers.data.split import row_pairs
from tests.notebook_code import curate

RUNNER = """
import json, os, signal, sys, tempfile, types
os.chdir(tempfile.mkdtemp())
failed = []
for name, program in json.load(sys.stdin):
    signal.alarm(10)
    # A module of its own, as the program would have: dataclasses and doctest look it up.
    module = sys.modules["answer"] = types.ModuleType("answer")
    try:
        exec(compile(program, name, "exec"), module.__dict__)
    except BaseException as error:
        failed.append(f"{name}: {type(error).__name__}: {error}")
print("\\n" + json.dumps(failed))
"""


def run_all(programs: dict[str, str]) -> list[str]:
    """What fails of some programs of this course's own, run one after the other in a child
    process.
    """
    done = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps(list(programs.items())),
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    config = Config.from_profile("demo", run_dir=tmp_path_factory.mktemp("corpus"))
    curate(config)
    return concatenate_datasets(list(load_from_disk(str(config.dataset_dir)).values())).to_list()


@pytest.fixture(scope="module")
def problems():
    return lines(PROJECT_DIR / "data" / "problems.jsonl")


def test_the_corpus_is_large_enough(rows):
    with (SAMPLE_DIR / "Questions.csv").open(encoding="latin-1", newline="") as file:
        assert sum(1 for _ in csv.DictReader(file)) == 780
    assert len(rows) == 629
    assert len({tag for row in rows for tag in row["tags"]}) > 100


def test_all_python_of_every_surviving_answer_parses(rows):
    for row in rows:
        blocks = fenced_blocks(row["completion"])
        assert any(language in ("python", "pycon") for language, _ in blocks), row["answer_id"]
        for language, code in blocks:
            if language == "python":
                ast.parse(code)


def test_nine_of_ten_surviving_answers_pass_their_assertions(rows):
    assertions = {r["answer_id"]: r["assertions"] for r in lines(SAMPLE_DIR / "assertions.jsonl")}
    programs = {
        str(row["answer_id"]): "\n\n".join(
            [c for language, c in fenced_blocks(row["completion"]) if language == "python"]
            + [assertions[row["answer_id"]]]
        )
        for row in rows
        if row["answer_id"] in assertions
    }
    assert len(programs) >= 0.9 * len(rows)
    assert all("assert" in program for program in programs.values())
    assert run_all(programs) == []


def test_a_wrong_answer_would_be_noticed():
    assert len(run_all({"good": "assert True", "bad": "assert 1 == 2", "exits": "exit()"})) == 2


def test_every_problem_is_solved_by_its_reference(problems):
    assert len(problems) >= 100 and len({p["id"] for p in problems}) == len(problems)
    programs = {}
    for problem in problems:
        code = "\n".join(code for _, code in fenced_blocks(problem["solution"]))
        asserts = sum(isinstance(n, ast.Assert) for n in ast.walk(ast.parse(problem["tests"])))
        assert asserts >= 4, problem["id"]
        assert problem["entry_point"] in code, problem["id"]
        programs[problem["id"]] = code + "\n\n" + problem["tests"]
    assert run_all(programs) == []


def test_no_surviving_row_restates_a_problem(rows):
    index = problem_index(("problems", "humaneval"))
    for row in rows:
        user = row["prompt"].split("<</SYS>>")[1]
        words = words_of(f"{user} {row['completion']}")
        assert index.match(user.strip().split("\n")[0], words, row_pairs(row)) == "", user


def test_no_surviving_row_reverses_a_linked_list(rows):
    for row in rows:
        text = (row["prompt"].split("<</SYS>>")[1] + row["completion"]).lower()
        if "linked list" in text or ".next" in text:
            assert "revers" not in text and "turn around" not in text, row["question_id"]


def test_no_post_points_at_a_real_one(rows):
    assert min(min(row["question_id"], row["answer_id"]) for row in rows) > 900_000_000
