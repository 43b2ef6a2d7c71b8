"""Run the code of answers without trusting it: in a process of its own, isolated and limited.

Level "isolated": no network, no file but Python's own (read-only) and one small folder, no process
but its own, none of your environment variables and keys. Level "limits-only" has the limits alone:
it guards against accidents and not against malice, since such code reads your files and reaches the
network. "off" runs nothing. No level falls back to a weaker one. Limited are time, memory,
processes, and the number and size of files. sandbox_supervisor.py is the other side.
"""

import ast
import functools
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

# How a level is reached: by the kernel's namespaces, or by bubblewrap where these are refused.
METHODS = {"isolated": ("namespaces", "bubblewrap"), "limits-only": ("none",), "off": ()}
SUPERVISOR = Path(__file__).with_name("sandbox_supervisor.py")
GRACE_SECONDS = 3  # for the start, and for ending what a program started
# Of one run. Memory is each process's address space, and the resident memory of all together.
LIMITS = {"timeout_seconds": 10, "memory_bytes": 512 * 2**20}


class SandboxUnavailable(RuntimeError):
    """The wanted level cannot be had here. The message says why and how to set SANDBOX."""


@dataclass(frozen=True)
class Outcome:
    """How tests ended: "passed", "failed", "timeout" or "memory", and the last that was printed."""

    reason: str
    output: str  # untrusted

    @property
    def passed(self) -> bool:
        return self.reason == "passed"


def run_tests(solution: str, tests: str, wanted: str = "isolated", **limits) -> Outcome:
    """Run a solution and then its tests. It passes only when the last statement of the tests ended.

    An exit is no pass, and tests see no builtin that a solution replaced. Both share a process all
    the same: this stops code that cheats, not an attack on Python itself. `limits` change LIMITS.
    Raises SandboxUnavailable, ValueError for tests that assert nothing, SyntaxError.
    """
    if not any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(tests))):
        raise ValueError(f"the tests hold no assert statement, so nothing can fail: {tests[:80]!r}")
    return _execute(solution, tests, method(wanted), LIMITS | limits)


def method(wanted: str) -> str:
    """How a level is reached on this machine, one of METHODS; SandboxUnavailable for none."""
    faults = []
    for tried in METHODS[wanted]:
        if not (fault := probe(tried)):
            return tried
        faults.append(f"{tried}: {fault}")
    why = "; ".join(faults) or "as you asked"
    raise SandboxUnavailable(
        f"SANDBOX is {wanted!r}, and by that no code runs on this machine ({why}): set it to "
        '"isolated", to "limits-only" to accept limits without isolation, or to "off" to run none'
    )


@functools.cache
def probe(method: str) -> str:
    """Try a method once. Returns "" when a program ran as it should, else what went wrong."""
    if not sys.platform.startswith("linux"):
        return f"it needs Linux, and this is {sys.platform}"
    if method == "bubblewrap" and os.getuid() == 0:
        return "root does without it"  # it would leave root's processes without a limit
    checks = (
        "import os, socket\n"
        f"assert not os.path.exists({str(SUPERVISOR)!r}), 'the project is visible'\n"
        "assert [n for _, n in socket.if_nameindex()] in ([], ['lo']), 'there is a network'\n"
    )
    try:
        outcome = _execute("", "" if method == "none" else checks, method, LIMITS)
    except OSError as error:  # bubblewrap is not installed
        return str(error)
    last_line = outcome.output.strip().rpartition("\n")[2] or "no output"
    return "" if outcome.passed else f"{outcome.reason}, {last_line}"


def _execute(solution: str, tests: str, method: str, limits: dict) -> Outcome:
    """Hand a job to a supervisor, and read its report."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "env": {}}
    with tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as folder:
        job = {"solution": solution, "tests": tests, "method": method, "folder": folder}
        job |= {"visible": _visible()} | limits
        try:
            said = subprocess.run(
                _command(method),
                input=json.dumps(job).encode(),
                timeout=limits["timeout_seconds"] + GRACE_SECONDS,
                start_new_session=True,  # Ctrl-C is ours alone; all in there ends with us
                **streams,
            ).stdout
        except subprocess.TimeoutExpired:
            return Outcome("timeout", "")
    try:
        return Outcome(*json.loads(said))
    except (ValueError, TypeError):
        return Outcome("failed", said.decode("utf-8", "replace"))


def _visible() -> list[str]:
    """What a program sees of this machine: Python and the libraries that it is made of."""
    base, python = os.path.realpath(sys.base_prefix), os.path.realpath(sys.executable)
    wanted = [f"{base}/lib", f"{base}/lib64", python, "/lib", "/lib64", "/usr/lib", "/usr/lib64"]
    wanted += ["/etc/ld.so.cache", "/dev/null", "/dev/urandom"]
    return [path for path in dict.fromkeys(wanted) if os.path.exists(path)]


def _command(method: str) -> list[str]:
    """The command line of the supervisor, inside bubblewrap where that is the method."""
    prefix = []
    if method == "bubblewrap":
        prefix = ["bwrap", "--unshare-all", "--unshare-user", "--disable-userns", "--clearenv"]
        prefix += ["--die-with-parent", "--as-pid-1"]
        for path in _visible():
            prefix += ["--dev-bind" if path.startswith("/dev/") else "--ro-bind", path, path]
        prefix += ["--proc", "/proc", "--size", str(16 * 2**20), "--tmpfs", "/box"]
        prefix += ["--remount-ro", "/", "--chdir", "/box"]
    options = ["-I", "-S", "-B", "-u", "-X", "utf8", "-c"]
    return [*prefix, os.path.realpath(sys.executable), *options, SUPERVISOR.read_text("utf-8")]
