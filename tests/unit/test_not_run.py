"""The last lines of a test run: what did not run and why, and what CI does not let pass."""

import os
import re
import subprocess
import sys

import pytest

from helpers.config import PROJECT_DIR
from tests.not_run import NO_GPU

PASSES = "def test_good():\n    pass\n"
GPU = "import pytest\n@pytest.mark.needs_gpu\ndef test_gpu():\n    assert False\n"
TOOL = """
import pytest
@pytest.mark.parametrize("number", [1, 2])
def test_tool(number): pytest.skip("no bwrap")
"""
WHOLE = "import pytest\npytest.importorskip('no_such_package')\ndef test_whole():\n    pass\n"
MARKED = """
import pytest
@pytest.mark.slow
def test_slow(): pass
@pytest.mark.alone
def test_alone(): pytest.skip('no quiet here')
def test_plain(): pass
"""
PROCESSES = pytest.mark.parametrize("two_by_two", [False, True], ids=["one process", "two by two"])
NOTHING = "did not run: nothing, no test was skipped"


@pytest.fixture
def run(tmp_path):
    """Runs pytest on throw-away files: (exit code, the lines after pytest's own last one)."""

    def run_pytest(files, *options, ci="", two_by_two=False):
        for name, text in files.items():
            (tmp_path / name).write_text(text, encoding="utf-8")
        (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    slow\n    alone\n", "utf-8")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "xdist",
            "-p",
            "tests.not_run",
            *options,
        ]
        command += ["-n", "2"] if two_by_two else []
        environment = {**os.environ, "CI": ci, "CUDA_VISIBLE_DEVICES": ""}
        environment |= {"PYTHONPATH": str(PROJECT_DIR), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8"
        )
        own_last = re.search(
            r"^.*(passed|skipped|deselected|failed|no tests).* in .*s$", done.stdout, re.M
        )
        assert own_last, done.stdout + done.stderr
        return done.returncode, done.stdout[own_last.end() :].strip().splitlines()

    return run_pytest


@pytest.mark.parametrize(("ci", "two_by_two"), [("", False), ("true", True)])
def test_what_was_skipped_is_grouped_by_its_reason_and_fails_ci(run, ci, two_by_two):
    files = {"test_a.py": PASSES + TOOL, "test_b.py": TOOL, "test_c.py": WHOLE, "test_d.py": GPU}
    code, lines = run(files, ci=ci, two_by_two=two_by_two)
    assert lines[:3] == [
        "did not run: all tests (test_c.py): could not import 'no_such_package': "
        "No module named 'no_such_package'",
        "did not run: 4 tests (test_a.py, test_b.py): no bwrap",
        f"did not run: 1 test (test_d.py): {NO_GPU}",
    ]
    failed = ["CI=true: only tests that need a GPU may be skipped, so this run failed"]
    assert (code, lines[3:]) == ((1, failed) if ci else (0, []))


def test_under_ci_a_gpu_may_be_wanting(run):
    code, lines = run({"test_a.py": PASSES, "test_d.py": GPU}, ci="true")
    assert (code, lines) == (0, [f"did not run: 1 test (test_d.py): {NO_GPU}"])


def test_where_nothing_was_skipped_that_is_said(run):
    assert run({"test_a.py": PASSES}, ci="true") == (0, [NOTHING])


@PROCESSES
def test_tests_that_the_call_leaves_out_are_counted(run, two_by_two):
    options = ("-m", "not slow and not alone")
    assert run({"test_a.py": MARKED}, *options, two_by_two=two_by_two) == (
        0,
        [
            NOTHING,
            "not part of this run: 1 slow test, run by `make test-slow`",
            "not part of this run: 1 timed test, run by `make test` at its end",
        ],
    )
    _, lines = run({"test_a.py": MARKED}, "-m", "slow", two_by_two=two_by_two)
    assert lines[-1] == "not part of this run: 1 other test, run by `make test`"


def test_the_second_of_two_runs_speaks_for_both(run):
    files = {"test_a.py": MARKED, "test_b.py": TOOL}
    run(files, "-m", "not slow and not alone", "--part", "first", two_by_two=True)
    assert run(files, "-m", "alone", "--part", "second") == (
        0,
        [
            "did not run: 2 tests (test_b.py): no bwrap",
            "did not run: 1 test (test_a.py): no quiet here",
            "not part of this run: 1 slow test, run by `make test-slow`",
        ],
    )


@PROCESSES
def test_tests_that_a_run_did_not_reach_are_counted(run, two_by_two):
    bad = (
        "import pytest\n@pytest.mark.parametrize('n', range(50))\ndef test_bad(n):\n    assert 0\n"
    )
    code, lines = run({"test_a.py": bad}, "-x", two_by_two=two_by_two)
    assert code != 0 and len(lines) == 1
    assert re.fullmatch(r"did not run: 4\d more, because the run ended before", lines[0])
