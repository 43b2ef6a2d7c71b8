"""The hostile programs of the sandbox's own tests, by each method and as each user; and no method.

pytest runs that list in a process of its own, in which one method is left.
"""

import functools
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest

from helpers import sandbox
from helpers.config import PROJECT_DIR

NOBODY = 65534
ONE_METHOD = """
import sys
import pytest
from helpers import sandbox
sandbox.METHODS["isolated"] = (sys.argv[1],)
try:
    print("level", sandbox.level("isolated"), "by", sandbox._method("isolated"))
except sandbox.SandboxUnavailable as error:
    sys.exit(f"refused: {error}")
options = ["-q", "--noconftest", "-p", "no:cacheprovider", "-o", "addopts="]
sys.exit(pytest.main(["tests/unit/test_sandbox.py", *options, "--basetemp", sys.argv[2]]))
"""
# What plain Docker does: to unshare and mount the kernel answers that they are not permitted.
NO_METHOD = """
import ctypes, errno, json, platform, struct, sys
from helpers import sandbox

class Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("steps", ctypes.c_void_p)]

unshare, mount = {"x86_64": (272, 165), "aarch64": (97, 40)}[platform.machine()]
load, equal, answer, refuse, allow = 0x20, 0x15, 0x06, 0x50000 | errno.EPERM, 0x7FFF0000
steps = [(load, 0, 0, 0), (equal, 1, 0, unshare), (equal, 0, 1, mount), (answer, 0, 0, refuse)]
steps.append((answer, 0, 0, allow))
packed = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
program = Filter(len(steps), ctypes.addressof(packed))
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, ctypes.byref(program), 0, 0) == 0

canary = f"open({sys.argv[1]!r}, 'w')"
found = {}
for name, act in {
    "level": lambda: sandbox.level("isolated"),
    "run": lambda: sandbox.run(canary),
    "run_tests": lambda: sandbox.run_tests(canary, "assert True"),
    "off": lambda: sandbox.run(canary, "off"),
}.items():
    try:
        found[name] = str(act())
    except sandbox.SandboxUnavailable as error:
        found[name] = f"refused: {error}"
outcome = sandbox.run("print('ran')", "limits-only")
found["limits-only"] = [sandbox.level("limits-only"), outcome.level, outcome.output]
print(json.dumps(found))
"""


def environment(home):
    paths = [str(PROJECT_DIR), sysconfig.get_path("purelib")]
    keep = {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
    return {**keep, "PYTHONPATH": os.pathsep.join(paths)}


def as_user(user, program, *arguments, home):
    """Run a program with the helpers, as this user or as the ordinary one that root becomes."""
    identity, python = {}, sys.executable
    if user == "ordinary user" and os.getuid() == 0:
        python = python_for_everyone()
        identity = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
    return subprocess.run(
        [python, "-c", program, *arguments],
        cwd=PROJECT_DIR,
        env=environment(home),
        capture_output=True,
        encoding="utf-8",
        **identity,
    )


@functools.cache
def python_for_everyone():
    """A Python that the ordinary user may start and that finds pytest and the helpers."""
    for python in (sys.executable, shutil.which("python3", path="/usr/bin:/usr/local/bin")):
        if python:
            command = [python, "-c", "import pytest, helpers.sandbox"]
            identity = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
            try:
                subprocess.run(
                    command,
                    env=environment("/"),
                    cwd="/",
                    check=True,
                    capture_output=True,
                    **identity,
                )
            except (OSError, subprocess.CalledProcessError):
                continue
            return python
    pytest.skip("an ordinary user can read no Python with pytest here")


@pytest.fixture
def home():
    """A folder that every user may write to; pytest's own is closed to others."""
    folder = Path(tempfile.mkdtemp(prefix="sandbox-levels-"))
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


USERS = ["this user", *["ordinary user"] * (os.getuid() == 0)]


@pytest.mark.slow
@pytest.mark.parametrize("method", sandbox.METHODS["isolated"])
@pytest.mark.parametrize("user", USERS)
def test_every_hostile_program_is_held_by_each_method(user, method, home):
    done = as_user(user, ONE_METHOD, method, str(home / "tmp"), home=home)
    if done.stderr.startswith("refused: "):
        assert "there is a network" not in done.stderr and "is visible" not in done.stderr
        pytest.skip(f"{user}: {done.stderr.strip()}")
    assert done.stdout.startswith(f"level isolated by {method}\n")
    assert done.returncode == 0, done.stdout[-3000:]
    summary = done.stdout.strip().splitlines()[-1]
    assert int(summary.split()[0]) > 90 and "skipped" not in summary, summary


@pytest.mark.parametrize("user", USERS)
def test_where_no_method_can_be_had_nothing_runs_and_the_level_is_said(user, home):
    done = as_user(user, NO_METHOD, str(home / "canary"), home=home)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for name in ("level", "run", "run_tests"):
        text = found[name]
        assert text.startswith("refused: SANDBOX is 'isolated', which this machine does not offer")
        assert (
            "namespaces: " in text and "Operation not permitted" in text and "bubblewrap: " in text
        )
        assert 'set SANDBOX to "limits-only" to accept limits without isolation, or "off"' in text
    assert found["off"].startswith('refused: SANDBOX is "off", so no generated code is run')
    assert not (home / "canary").exists()
    assert found["limits-only"] == ["limits-only", "limits-only", "ran\n"]
