"""Run generated code without trusting it: in a process of its own, isolated and limited.

Level "isolated": no network, no file but Python's own (read-only) and one empty folder, no process
but its own, none of your environment variables and keys. It needs Linux namespaces or bubblewrap.
Level "limits-only" has the same limits and an empty environment; it guards against accidents and
not against malice, since such code reads your files and reaches the network. "off" runs nothing. No
level falls back to a weaker one. Limited are time, memory, processes, open files, file size and
printed text. The other side stands in sandbox_supervisor.py and sandbox_program.py.
"""

import ast
import functools
import json
import os
import secrets
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

LEVELS = ("isolated", "limits-only", "off")
METHODS = {"isolated": ("namespaces", "bubblewrap"), "limits-only": ("none",)}
SUPERVISOR = Path(__file__).with_name("sandbox_supervisor.py")
PROGRAM = Path(__file__).with_name("sandbox_program.py")
GRACE_SECONDS = 3  # for the start, and for ending what a program started
MIB = 2**20
# Of one run. Memory is each process's address space, and the resident memory of all together.
LIMITS = {"timeout_seconds": 10, "memory_bytes": 512 * MIB, "output_bytes": 64 * 1024}


class SandboxUnavailable(RuntimeError):
    """The wanted level cannot be had here. The message says why and how to set SANDBOX."""


@dataclass(frozen=True)
class Outcome:
    """How a program ended. `passed` is the only verdict, the rest explains it.

    reason: "passed", "failed" (exit code not 0, or tests not run to their end), "timeout",
    "memory", "output" (printed too much), "killed" (by a signal, or without a report). exit_code:
    None when ended from outside, negative after a signal. output: the last printed, untrusted.
    """

    passed: bool
    exit_code: int | None
    reason: str
    output: str
    seconds: float
    level: str


def level(wanted: str = "isolated") -> str:
    """`wanted`, tried once: SandboxUnavailable when it cannot be had, ValueError when unknown."""
    if wanted not in LEVELS:
        raise ValueError(f"SANDBOX is {wanted!r}; it must be one of {', '.join(LEVELS)}")
    if wanted != "off":
        _method(wanted)
    return wanted


def run(program: str, wanted: str = "isolated", **limits) -> Outcome:
    """Run a program as `__main__`. It passes when it ends by itself with exit code 0.

    Raises SandboxUnavailable when the level cannot be had or is "off", ValueError for a bad limit.
    """
    return _execute(program, None, wanted, _method(wanted), _limits(limits))


def run_tests(solution: str, tests: str, wanted: str = "isolated", **limits) -> Outcome:
    """Run a solution and then its tests. It passes only when the last statement of the tests ended.

    `os._exit(0)` is no pass: a random token has to come back, which is sent after the tests and
    kept where the solution's code does not get to. Tests see no builtin that a solution replaced.
    Both share a process all the same: this stops code that cheats, not an attack on Python itself,
    and an object that claims to equal everything does pass `==`. Raises what `run` does, ValueError
    for tests that assert nothing, SyntaxError when they do not parse.
    """
    if not any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(tests))):
        raise ValueError(f"the tests hold no assert statement, so nothing can fail: {tests[:80]!r}")
    return _execute(solution, tests, wanted, _method(wanted), _limits(limits))


def _limits(changes: dict) -> dict:
    limits = LIMITS | changes
    if bad := {name: value for name, value in limits.items() if name not in LIMITS or value <= 0}:
        raise ValueError(f"limits are {', '.join(LIMITS)}, each greater than 0, and not {bad}")
    return limits


def _method(wanted: str) -> str:
    """How a level is reached here, or SandboxUnavailable."""
    if wanted == "off":
        raise SandboxUnavailable(
            'SANDBOX is "off", so no generated code is run: set SANDBOX to "isolated"'
        )
    if method := next((method for method in METHODS[wanted] if not probe(method)), None):
        return method
    why = "; ".join(f"{method}: {probe(method)}" for method in METHODS[wanted])
    weaker = '"limits-only" to accept limits without isolation, or ' * (wanted == "isolated")
    raise SandboxUnavailable(
        f"SANDBOX is {wanted!r}, which this machine does not offer ({why}): "
        f'set SANDBOX to {weaker}"off" to run no generated code'
    )


@functools.cache
def probe(method: str) -> str:
    """Try a method once. Returns "" when a program ran as it should, else what went wrong."""
    if not sys.platform.startswith("linux"):
        return f"it needs Linux, and this is {sys.platform}"
    if method == "bubblewrap" and (os.getuid() == 0 or not shutil.which("bwrap")):
        return "root does without it" if os.getuid() == 0 else "bwrap is not installed"
    checks = (
        "import os, socket\n"
        f"assert not os.path.exists({str(SUPERVISOR)!r}), 'the project is visible'\n"
        "assert [n for _, n in socket.if_nameindex()] in ([], ['lo']), 'there is a network'\n"
    )
    outcome = _execute("" if method == "none" else checks, None, "probe", method, LIMITS)
    last_line = outcome.output.strip().rpartition("\n")[2] or "no output"
    return "" if outcome.passed else f"{outcome.reason}, {last_line}"


def _execute(program: str, tests: str | None, name: str, method: str, limits: dict) -> Outcome:
    """Have a supervisor run a job, and judge its report. `name` is the level's."""
    started = time.monotonic()
    token = secrets.token_hex(32)
    with tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as folder:
        job = _job(method, folder) | limits | {"program": program, "tests": tests, "token": token}
        said = _converse(job)
    try:  # why it was ended, or None; exit code; token; output
        reason, exit_code, sent, text = json.loads(said)
    except (ValueError, TypeError):
        text = said.decode("utf-8", "replace") or "the supervisor did not answer"
        reason, exit_code, sent = "killed", None, ""
    if reason is None and exit_code == 0 and tests is not None and sent != token:
        reason, text = "failed", text + "\nThe tests did not run to their end."
    if reason is None and exit_code != 0:
        reason = "killed" if exit_code < 0 else "failed"
        if text.strip().rpartition("\n")[2].startswith("MemoryError"):
            reason = "memory"
    reason = reason or "passed"
    return Outcome(reason == "passed", exit_code, reason, text, time.monotonic() - started, name)


def _job(method: str, folder: str) -> dict:
    """What the supervisor needs to know beside the program and its limits."""
    base = os.path.realpath(sys.base_prefix)
    python = os.path.realpath(sys.executable)
    wanted = [f"{base}/lib", f"{base}/lib64", python, "/lib", "/lib64", "/usr/lib", "/usr/lib64"]
    wanted += ["/etc/ld.so.cache", "/dev/null", "/dev/urandom"]
    packages = f"{os.path.realpath(sysconfig.get_path('stdlib'))}/site-packages"
    return {
        "method": method,
        "folder": "/box" if method == "bubblewrap" else folder,
        "python": python,
        "visible": [path for path in dict.fromkeys(wanted) if os.path.exists(path)],
        "hidden": [packages] if os.path.isdir(packages) else [],
        "source": PROGRAM.read_text(encoding="utf-8"),
    }


def _command(job: dict) -> list[str]:
    """The command line of the supervisor, inside bubblewrap where that is the method."""
    prefix = []
    if job["method"] == "bubblewrap":
        prefix = [shutil.which("bwrap"), "--unshare-all", "--unshare-user", "--disable-userns"]
        prefix += ["--die-with-parent", "--as-pid-1", "--clearenv"]
        for path in job["visible"]:
            link = os.path.islink(path)
            bind = "--dev-bind" if path.startswith("/dev/") else "--ro-bind"
            prefix += ["--symlink", os.readlink(path), path] if link else [bind, path, path]
        for path in job["hidden"]:
            prefix += ["--tmpfs", path, "--remount-ro", path]
        prefix += ["--proc", "/proc", "--size", str(16 * MIB), "--tmpfs", "/box"]
        prefix += ["--remount-ro", "/", "--chdir", "/box"]
    source = SUPERVISOR.read_text(encoding="utf-8")
    return prefix + [job["python"], "-I", "-S", "-B", "-c", source]


def _converse(job: dict) -> bytes:
    """Start a supervisor, hand it a job, and return all that it says; b"" if it does not end."""
    job_end, our_end = os.pipe()
    streams = {"stdin": job_end, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(_command(job), **streams, env={}, start_new_session=True)
    os.close(job_end)
    try:
        # An open standard input is what keeps the supervisor going: it ends when this closes.
        with os.fdopen(our_end, "wb") as file:
            file.write(json.dumps(job).encode() + b"\n")
            file.flush()
            return process.communicate(timeout=job["timeout_seconds"] + GRACE_SECONDS)[0]
    except (BrokenPipeError, subprocess.TimeoutExpired):
        return b""
    finally:  # the supervisor has no standard input any more, and ends, or is ended
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # with process 1 of a namespace, all in it ends
            process.wait()
        process.stdout.close()
