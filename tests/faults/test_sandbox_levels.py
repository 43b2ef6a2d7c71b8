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

from helpers.answers import sandbox
from helpers.config import PROJECT_DIR

ORDINARY = {"user": 65534, "group": 65534, "extra_groups": []}
# What the copy for every user holds; pytest imports the others.
PYTEST = ("pytest", "_pytest", "py.py", "pluggy", "iniconfig", "packaging", "pygments")
SANDBOX = (
    "helpers/__init__.py",
    "helpers/answers/__init__.py",
    "helpers/answers/sandbox.py",
    "helpers/answers/sandbox_supervisor.py",
)
SANDBOX += ("tests/unit/test_sandbox.py",)
ONE_METHOD = """
import sys
import pytest
from helpers.answers import sandbox
sandbox.METHODS["isolated"] = (sys.argv[1],)
try:
    print("level isolated by", sandbox.method("isolated"))
except sandbox.SandboxUnavailable as error:
    sys.exit(f"refused: {error}")
options = ["-q", "--noconftest", "-p", "no:cacheprovider", "-o", "addopts="]
sys.exit(pytest.main(["tests/unit/test_sandbox.py", *options, "--basetemp", sys.argv[2]]))
"""
# What plain Docker does: to unshare and mount the kernel answers that they are not permitted.
NO_METHOD = """
import ctypes, errno, json, platform, struct, sys
from helpers.answers import sandbox

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
    "method": lambda: sandbox.method("isolated"),
    "run_tests": lambda: sandbox.run_tests(canary, "assert True"),
    "off": lambda: sandbox.run_tests(canary, "assert True", "off"),
}.items():
    try:
        found[name] = str(act())
    except sandbox.SandboxUnavailable as error:
        found[name] = f"refused: {error}"
outcome = sandbox.run_tests("print('ran')", "assert True", "limits-only")
found["limits-only"] = [sandbox.method("limits-only"), outcome.output]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def course():
    """The sandbox, its tests and pytest where every user may read: the project may lie in /root."""
    folder = Path(tempfile.mkdtemp(prefix="sandbox-course-"))
    folder.chmod(0o755)
    for name in PYTEST:
        source = Path(sysconfig.get_path("purelib"), name)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    for name in SANDBOX:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PROJECT_DIR / name, folder / name)
    yield folder
    shutil.rmtree(folder)


def as_user(user, program, *arguments, course, home):
    """Run a program with the helpers, as this user or as the ordinary one that root becomes."""
    identity, python = {}, sys.executable
    if user == "ordinary user" and os.getuid() == 0:
        identity, python = ORDINARY, python_for_everyone(course)
        if python is None:
            pytest.skip("an ordinary user can start no Python here, nor a copy of this one")
    return subprocess.run(
        [python, "-c", program, *arguments],
        cwd=course,
        env=environment(course, home),
        capture_output=True,
        encoding="utf-8",
        **identity,
    )


def environment(course, home):
    keep = {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
    return {**keep, "PYTHONPATH": str(course)}


@functools.cache
def python_for_everyone(course):
    """A Python that the ordinary user may start: this one, the system's, or a copy of this one."""
    this = Path(sys.executable).resolve()
    system = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    for python in filter(None, (this, system, course / "python/bin/python3")):
        if python == course / "python/bin/python3":
            copy_python(this, python.parent.parent)
        command = [python, "-c", "import pytest, helpers.answers.sandbox"]
        options = {"env": environment(course, "/"), "cwd": course, "capture_output": True}
        try:
            subprocess.run(command, check=True, **options, **ORDINARY)
        except (OSError, subprocess.CalledProcessError):
            continue
        return python
    return None


def copy_python(this, folder):
    """A copy of a Python without packages: 50 MB."""
    left_out = shutil.ignore_patterns("site-packages", "test", "__pycache__", "*.a")
    shutil.copytree(Path(sys.base_prefix) / "lib", folder / "lib", ignore=left_out, symlinks=True)
    (folder / "bin").mkdir()
    shutil.copy(this, folder / "bin" / "python3")


@pytest.fixture
def home():
    """A folder that every user may write to; pytest's own is closed to others."""
    folder = Path(tempfile.mkdtemp(prefix="sandbox-levels-"))
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


USERS = ["this user", *["ordinary user"] * (os.getuid() == 0)]
# Root isolates by namespaces alone; bubblewrap is for those to whom plain ones are refused.
WAYS = [
    (user, method)
    for user in USERS
    for method in sandbox.METHODS["isolated"]
    if os.getuid() != 0 or (user, method) != ("this user", "bubblewrap")
]


@pytest.mark.slow
@pytest.mark.parametrize(("user", "method"), WAYS)
def test_every_hostile_program_is_held_by_each_method(user, method, course, home):
    done = as_user(user, ONE_METHOD, method, str(home / "tmp"), course=course, home=home)
    if done.stderr.startswith("refused: "):
        assert "there is a network" not in done.stderr and "is visible" not in done.stderr
        pytest.skip(f"{user}: {done.stderr.strip()}")
    assert done.stdout.startswith(f"level isolated by {method}\n")
    assert done.returncode == 0, done.stdout[-3000:]
    summary = done.stdout.strip().splitlines()[-1]
    assert int(summary.split()[0]) > 90 and "skipped" not in summary, summary


@pytest.mark.parametrize("user", USERS)
def test_where_no_method_can_be_had_nothing_runs_and_the_level_is_said(user, course, home):
    done = as_user(user, NO_METHOD, str(home / "canary"), course=course, home=home)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for name in ("method", "run_tests"):
        text = found[name]
        assert text.startswith("refused: SANDBOX is 'isolated', and by that no code runs")
        assert (
            "namespaces: " in text and "Operation not permitted" in text and "bubblewrap: " in text
        )
        assert '"limits-only" to accept limits without isolation, or to "off"' in text
    assert found["off"].startswith("refused: SANDBOX is 'off', and by that no code runs")
    assert not (home / "canary").exists()
    assert found["limits-only"] == ["none", "ran\n"]
