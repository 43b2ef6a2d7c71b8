"""Says in the last lines of a test run what did not run and why. Nothing is skipped in silence.

A test that needs a GPU is marked `needs_gpu`. Under CI=true no other test may be skipped: what is
wanting there can be installed. `make test` is two runs of pytest: with `--part first` and
`--part second` the second one's lines speak for both.
"""

import os
from collections import defaultdict

import pytest

NO_GPU = "there is no CUDA GPU with bfloat16 and flash attention"
# Tests that the call itself leaves out, by their marker: what they are, and who runs them.
LEFT_OUT = {
    "slow": ("slow test", "`make test-slow`"),
    "alone": ("timed test", "`make test` at its end"),
    "": ("other test", "`make test`"),
}


def pytest_addoption(parser):
    parser.addoption("--part", choices=["first", "second"], help="which run of two this is")


def pytest_configure(config):
    config.addinivalue_line("markers", "needs_gpu: skipped where no GPU runs the fast path")
    config.pluginmanager.register(NotRun(config))


def pytest_runtest_setup(item):
    if item.get_closest_marker("needs_gpu") and not has_gpu():
        pytest.skip(NO_GPU)


def has_gpu() -> bool:
    """As fast_path.is_supported, which takes ten seconds to import."""
    import torch  # two seconds, which only the tests that ask this pay

    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


class NotRun:
    """Collects what was skipped or left out, from pytest-xdist's workers too."""

    def __init__(self, config):
        self.config = config
        self.skipped, self.left_out = set(), set()  # of (test or file, reason), (test, marker)
        self.reached = set()

    def pytest_deselected(self, items):
        for item in items:
            marker = next(filter(item.get_closest_marker, ("slow", "alone")), "")
            self.left_out.add((item.nodeid, marker))

    def pytest_runtest_logreport(self, report):
        self.reached.add(report.nodeid)
        # An expected failure did run.
        if report.skipped and not hasattr(report, "wasxfail"):
            self.skipped.add((report.nodeid, report.longrepr[2].removeprefix("Skipped: ")))

    def pytest_collectreport(self, report):
        if report.skipped:
            self.skipped.add((report.nodeid, report.longrepr[2].removeprefix("Skipped: ")))

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node):
        """A worker of pytest-xdist has ended: files that it skipped are not reported elsewhere."""
        self._add(getattr(node, "workeroutput", {}).get("not_run", ([], [])))

    def _add(self, found):
        for mine, theirs in zip((self.skipped, self.left_out), found, strict=True):
            mine.update(map(tuple, theirs))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self, session):
        if hasattr(self.config, "workeroutput"):
            self.config.workeroutput["not_run"] = [sorted(self.skipped), sorted(self.left_out)]
            return (yield)
        result = yield  # pytest's own last line comes here
        self._join_the_parts()
        lines = list(self._lines(session.testscollected - len(self.reached)))
        if os.environ.get("CI") == "true" and any(why != NO_GPU for _, why in self.skipped):
            lines.append("CI=true: only tests that need a GPU may be skipped, so this run failed")
            session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED
        for line in ["", *lines]:
            self.config.get_terminal_writer().line(line)
        return result

    def _join_the_parts(self):
        """Hand the first part over, or take it: what one part runs the other did not leave out."""
        part, left_out = self.config.option.part, self.left_out.copy()
        if part == "first":
            found = [sorted(self.skipped), sorted(self.left_out)]
            self.config.cache.set("not_run/first", found)
        elif part == "second":
            first = self.config.cache.get("not_run/first", [[], []])
            self._add(first)
            self.left_out = left_out & set(map(tuple, first[1]))

    def _lines(self, unreached: int):
        groups = defaultdict(set)
        for name, why in self.skipped:
            groups[why].add(name)
        for why, names in sorted(groups.items()):
            files = sorted({name.partition("::")[0] for name in names})
            # A file that is skipped as a whole has no number of tests.
            number = len(names - set(files))
            what = counted(number, "test") if number else "all tests"
            yield f"did not run: {what} ({', '.join(files)}): {why}"
        if unreached > 0:
            yield f"did not run: {unreached} more, because the run ended before"
        elif not groups:
            yield "did not run: nothing, no test was skipped"
        for marker, (kind, command) in LEFT_OUT.items():
            if number := sum(marker == found for _, found in self.left_out):
                yield f"not part of this run: {counted(number, kind)}, run by {command}"


def counted(number: int, kind: str) -> str:
    return f"{number} {kind}{'s' * (number != 1)}"
