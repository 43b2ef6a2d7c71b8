"""Hostile programs, and what is seen of them from outside: canary files, sockets, processes.

What each level promises is tested at that level. A level that this machine refuses is skipped with
the reason, and then the tests of the refusal below still run.
"""

import contextlib
import ctypes
import os
import resource
import secrets
import signal
import socket
import statistics
import tempfile
import time
from pathlib import Path

import pytest

from helpers.answers import sandbox
from helpers.answers.sandbox import SandboxUnavailable, run_tests

CANARY = "canary-" + secrets.token_hex(8)
MIB = 2**20


def run(program, level="isolated", **limits):
    """A program as a solution of which the tests ask nothing."""
    return run_tests(program, "assert True", level, **limits)


def available(level):
    """The level's name, or a skip that says why this machine refuses it."""
    try:
        sandbox.method(level)
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    return level


@pytest.fixture(params=["isolated", "limits-only"])
def level(request):
    return available(request.param)


@pytest.fixture
def isolated():
    return available("isolated")


@pytest.fixture
def canary(tmp_path):
    path = tmp_path / "canary.txt"
    path.write_text(CANARY, encoding="utf-8")
    return path


def processes_with(marker):
    """Ids of the machine's processes whose command line holds a marker."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if marker.encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def marked(code):
    """A program that goes on as `code` in a process with a marker in its command line."""
    marker = "marker-" + secrets.token_hex(8)
    start = (
        f"import os, sys; os.execv(sys.executable, [sys.executable, '-c', {code!r}, {marker!r}])"
    )
    return start, marker


# -- What must work.


def test_a_correct_solution_passes_and_a_wrong_one_fails(level):
    tests = "assert double(2) == 4\nassert double(-1) == -2"
    good = run_tests("def double(x):\n    return 2 * x", tests, level)
    bad = run_tests("def double(x):\n    return x + 2", tests, level)
    assert (good.passed, good.reason, good.output) == (True, "passed", "")
    assert (bad.passed, bad.reason) == (False, "failed")
    assert "AssertionError" in bad.output


def test_classes_dataclasses_threads_files_and_asyncio_work(level):
    solution = """
import asyncio, dataclasses, tempfile, threading
@dataclasses.dataclass
class Point:
    x: "int"
def work():
    results = []
    thread = threading.Thread(target=lambda: results.append(asyncio.run(asyncio.sleep(0, 5))))
    thread.start(); thread.join()
    with tempfile.TemporaryFile() as file:
        return results + [file.write(b"abc"), Point(1) == Point(1)]
"""
    outcome = run_tests(solution, "assert work() == [5, 3, True]", level)
    assert outcome.passed, outcome.output


def test_what_is_printed_is_reported(level):
    outcome = run("import sys\nprint('out')\nprint('err', file=sys.stderr)\nsys.exit(3)", level)
    assert (outcome.passed, outcome.reason) == (False, "failed")
    assert outcome.output.startswith("out\nerr\nTraceback")
    assert run("print('ok')", level).output == "ok\n"


def test_a_passing_run_takes_well_under_half_a_second(level):
    seconds = []
    for _ in range(5):
        start = time.monotonic()
        assert run("print(1)", level).passed
        seconds.append(time.monotonic() - start)
    assert statistics.median(seconds) < 0.4


# -- Hostile: the outside world. Only isolation holds these.


def test_no_network(isolated):
    name = "\0sandbox-" + secrets.token_hex(8)
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(name)
        unix.listen()
        addresses = [("AF_INET", tcp.getsockname()), ("AF_UNIX", name)]
        program = f"""
import socket
for family, address in {addresses!r}:
    try:
        socket.socket(getattr(socket, family)).connect(address)
        print("connected")
    except OSError as error:
        print(type(error).__name__)
"""
        outcome = run(program, isolated)
        for server in (tcp, unix):
            server.setblocking(False)
            with pytest.raises(BlockingIOError):
                server.accept()
    assert outcome.passed and "connected" not in outcome.output


def test_no_read_of_home_project_or_any_other_folder(isolated, canary):
    with tempfile.NamedTemporaryFile(dir=Path.home(), prefix=".sandbox-test-") as file:
        file.write(CANARY.encode())
        file.flush()
        paths = [file.name, str(canary), sandbox.__file__, "/etc/passwd", "/etc/hostname"]
        program = f"""
import os
for path in {paths!r}:
    try:
        print(open(path).read())
    except OSError as error:
        print("no")
print([f for d, _, names in os.walk("/") for f in names if {Path(file.name).name!r} in f])
"""
        outcome = run(program, isolated, timeout_seconds=60)  # it looks into every folder
    assert outcome.output.split() == ["no"] * 5 + ["[]"]


def test_no_look_at_other_processes(isolated, monkeypatch):
    monkeypatch.setenv("SANDBOX_CANARY", CANARY)
    program = f"""
import glob, os
for path in glob.glob("/proc/*/environ") + ["/proc/{os.getpid()}/environ", "/proc/1/environ"]:
    try:
        print(open(path).read())
    except OSError:
        print("no")
print("seen", os.path.exists("/proc/{os.getpid()}"))
for path in ("/proc/1/root", "/proc/self/root/../..", "/proc/1/cwd", "/proc/1/fd"):
    print(os.path.exists(path) and os.listdir(path))
"""
    outcome = run(program, isolated)
    assert outcome.passed or "PermissionError" in outcome.output
    assert CANARY not in outcome.output and "seen False" in outcome.output


def test_no_key_of_the_session_or_the_user(isolated):
    """The kernel keeps keys, such as Kerberos tickets, where no file and no process shows them."""
    machine = os.uname().machine
    keyctl, add_key, request_key = (250, 248, 249) if machine == "x86_64" else (219, 217, 218)
    call, read, unlink, session, user = ctypes.CDLL(None).syscall, 11, 9, -3, -4
    name, kept = CANARY.encode(), (session, user)
    keys = [call(add_key, b"user", name, name, len(name), keyring) for keyring in kept]
    program = f"""
import ctypes
call, text = ctypes.CDLL(None).syscall, ctypes.create_string_buffer(99)
for key in [*{keys}, call({request_key}, b"user", {name!r}, None, 0)]:
    call({keyctl}, {read}, key, text, 99)
    print(text.value)
"""
    outcome = run(program, isolated)
    for key, keyring in zip(keys, kept, strict=True):
        call(keyctl, unlink, key, keyring)
    assert outcome.output == "b''\n" * 3


def test_no_write_outside_its_folder(isolated, canary):
    name = "sandbox-test-" + secrets.token_hex(8)
    folders = [canary.parent, sandbox.SUPERVISOR.parent, Path(os.__file__).parent, Path.home()]
    targets = [*folders, Path("/"), Path("/etc"), Path("/usr/lib"), Path("/dev"), Path("/var/tmp")]
    new = [str(folder / name) for folder in targets]
    program = f"""
import os
for path in [{str(canary)!r}] + {new!r}:
    for act in (lambda: os.makedirs(os.path.dirname(path)), lambda: open(path, "a").write("x"),
                lambda: os.chmod(path, 0o777), lambda: os.remove(path)):
        try:
            act()
            print(path)
        except OSError:
            pass
    try:
        open(path, "w").write("x")
    except OSError:
        pass
"""
    outcome = run(program, isolated)
    escaped = [path for path in new if os.path.exists(path)]
    for path in escaped:
        os.remove(path)
    assert (outcome.passed, outcome.output, escaped) == (True, "", [])
    assert canary.read_text("utf-8") == CANARY


def test_links_and_odd_paths_lead_nowhere(isolated, canary):
    program = f"""
import os
os.symlink({str(canary)!r}, "link")
os.symlink("/", "top")
for path in ("link", "top" + {str(canary)!r}, "../" * 20 + {str(canary)!r}[1:],
             "/proc/1/root" + {str(canary)!r}, "/proc/self/cwd/../../" + {str(canary)!r}[1:]):
    for mode in ("r", "a"):
        try:
            file = open(path, mode)
            print(file.read() if mode == "r" else file.write("x"))
        except OSError:
            pass
try:
    os.link({str(canary)!r}, "hard")
    print("linked")
except OSError:
    pass
"""
    outcome = run(program, isolated)
    assert outcome.output == "" and canary.read_text("utf-8") == CANARY


def test_no_mount_no_new_namespace_no_privilege(isolated):
    program = """
import ctypes, os
libc = ctypes.CDLL(None)
print(libc.mount(b"none", b"/box", b"tmpfs", 0, None))
print(libc.mount(b"none", b"/", None, 32, None), libc.umount2(b"/box", 2))
print(libc.unshare(0x10000000), libc.unshare(0x20000), libc.chroot(b"/box"))
print(libc.setuid(0) if os.getuid() else -1, libc.sethostname(b"x", 1))
"""
    outcome = run(program, isolated)
    assert set(outcome.output.split()) == {"-1"}, outcome.output


def test_signals_reach_no_process_outside(isolated):
    """Signal 0 only asks whether a process could be signalled: harmless if it could."""
    received = []
    previous = signal.signal(signal.SIGUSR1, lambda number, frame: received.append(number))
    outside = [os.getpid(), os.getppid(), -os.getpgid(0), -1]
    program = f"""
import os, signal
for target, number in [(target, 0) for target in {outside!r}] + [({os.getpid()}, signal.SIGUSR1)]:
    try:
        os.kill(target, number)
        print("reached", target)
    except OSError:
        pass
if os.getppid() == 1:
    for number in range(1, 65):
        try:
            os.kill(1, number)
        except OSError:
            pass
print("end")
"""
    try:
        outcome = run(program, isolated)
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert received == [] and (outcome.passed, outcome.output) == (True, "end\n")


def test_the_folder_cannot_be_filled_without_end(isolated):
    program = """
import os
total = 0
try:
    for number in range(100):
        with open(str(number), "wb") as file:
            total += file.write(bytes(4 * 2**20))
except OSError as error:
    print(type(error).__name__, total < 20 * 2**20)
"""
    assert run(program, isolated).output == "OSError True\n"


def test_shared_memory_left_behind_counts(isolated):
    program = """
import ctypes, time
libc = ctypes.CDLL(None)
libc.shmat.restype = ctypes.c_void_p
for _ in range(20):
    number = libc.shmget(0, 64 * 2**20, 0o1600)
    address = libc.shmat(number, None, 0)
    ctypes.memset(address, 1, 64 * 2**20)
    libc.shmdt(ctypes.c_void_p(address))
    time.sleep(0.1)
"""
    assert run(program, isolated, memory_bytes=256 * MIB).reason == "memory"


# -- Hostile: limits and the process itself. Every level holds these.


def test_the_environment_is_empty(level, monkeypatch):
    monkeypatch.setenv("SANDBOX_CANARY", CANARY)
    outcome = run("import os, subprocess\nprint(dict(os.environ))", level)
    assert outcome.passed and CANARY not in outcome.output and "PATH" not in outcome.output


def test_it_runs_in_another_process_with_no_way_to_the_helpers(level, monkeypatch):
    monkeypatch.chdir(sandbox.SUPERVISOR.parent.parent)
    outcome = run(
        "import os; print(os.getpid(), os.listdir())\nimport helpers.answers.sandbox", level
    )
    assert "ModuleNotFoundError: No module named 'helpers'" in outcome.output
    assert outcome.output.split()[:2] != [str(os.getpid())] and "[]" in outcome.output


def test_the_helpers_cannot_be_imported_by_path_either(isolated):
    path = str(sandbox.SUPERVISOR.parent.parent)
    outcome = run(
        f"import sys; sys.path[:0] = [{path!r}]\nimport helpers.answers.sandbox", isolated
    )
    assert not outcome.passed and "ModuleNotFoundError" in outcome.output


def test_an_endless_loop_times_out(level):
    start = time.monotonic()
    outcome = run("while True: pass", level, timeout_seconds=0.5)
    assert (outcome.passed, outcome.reason) == (False, "timeout")
    assert time.monotonic() - start < 2
    loop = run_tests("def f():\n  while 1: pass", "assert f()", level, timeout_seconds=0.5)
    assert loop.reason == "timeout"


def test_endless_output_is_cut(level):
    outcome = run("while True: print('x' * 1000)", level, timeout_seconds=5)
    assert (outcome.passed, outcome.reason) == (False, "failed")
    assert len(outcome.output) == 2**16


def test_memory_is_limited_in_one_process(level):
    outcome = run("x = bytearray(10**9)", level, memory_bytes=256 * MIB)
    assert not outcome.passed and outcome.output.endswith("MemoryError\n")


def test_memory_is_limited_over_several_processes(level):
    program = "import os, time\n[os.fork() for _ in range(3)]\nx = bytearray(150 * 2**20)\n"
    outcome = run(program + "time.sleep(5)", level, memory_bytes=400 * MIB)
    assert (outcome.passed, outcome.reason) == (False, "memory")


def test_a_fork_bomb_stays_small_and_ends(level):
    code = (
        "import os\nn = 0\nwhile True:\n  try: os.fork()\n  except OSError: os.write(1, b'limit ')"
    )
    program, marker = marked(code)
    outcome = run(program, level, timeout_seconds=1)
    assert not outcome.passed and "limit" in outcome.output
    assert processes_with(marker) == []


def test_daemons_end_with_the_run(level):
    code = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(60)
    os._exit(0)
time.sleep(0.2)
print("end")
"""
    program, marker = marked(code)
    assert run(program, level).output == "end\n"
    assert processes_with(marker) == []


def test_threads_that_linger_do_not_hold_up_the_verdict(level):
    linger = "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()\n"
    assert run(linger, level, timeout_seconds=2).passed


def test_nothing_stays_behind(level, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    program = (
        "import os, tempfile\nprint(os.listdir(), os.listdir(tempfile.gettempdir()))\n"
        "open('left', 'w').write('x'); os.mkdir('folder'); tempfile.mkstemp()"
    )
    for _ in range(2):
        assert run(program, level).output == "[] []\n"
    assert list(tmp_path.iterdir()) == []


def test_limits_are_only_lowered_and_never_here(level):
    names = ["RLIMIT_AS", "RLIMIT_NPROC", "RLIMIT_NOFILE", "RLIMIT_CPU", "RLIMIT_FSIZE"]
    before = [resource.getrlimit(getattr(resource, name)) for name in names]
    program = f"""
import resource
for name in {names!r}:
    number = getattr(resource, name)
    soft, hard = resource.getrlimit(number)
    assert soft == hard != resource.RLIM_INFINITY, name
    try:
        resource.setrlimit(number, (hard + 1, hard + 1))
        print("raised", name)
    except (ValueError, OSError):
        pass
"""
    outcome = run(program, level)
    assert (outcome.passed, outcome.output) == (True, "")
    assert before == [resource.getrlimit(getattr(resource, name)) for name in names]


def test_a_crash_of_the_interpreter_is_a_failure(level):
    outcome = run("import ctypes; ctypes.string_at(0)", level)
    assert (outcome.passed, outcome.reason) == (False, "failed")


def test_a_program_cannot_write_the_report(level):
    program = """
import os, sys
for descriptor in range(3, 100):
    try: os.write(descriptor, b'["passed", ""]')
    except OSError: pass
sys.exit(0)
"""
    assert run(program, level).reason == "failed"


# -- Hostile: tests that do not run, and solutions that claim they did.

FORGERIES = {
    "sys_exit_at_import": "import sys; sys.exit(0)",
    "os_exit_at_import": "import os; os._exit(0)",
    "sys_exit_in_the_function": "import sys\ndef f(): sys.exit(0)",
    "os_exit_in_the_function": "import os\ndef f(): os._exit(0)",
    "exit_in_a_thread": "import os, threading\nthreading.Timer(0.05, lambda: os._exit(0)).start()\n"
    "import time\ndef f(): time.sleep(1)",
    "exec_of_another_program": "import os, sys\n"
    "def f(): os.execv(sys.executable, [sys.executable, '-c', 'print(1)'])",
    "deleted_builtins": "import builtins\nfor n in ('AssertionError', 'Exception', 'len'):\n"
    "    delattr(builtins, n)\ndef f(): return 0",
    "cleared_builtins": "import builtins\ndef f():\n    vars(builtins).clear()",
    "own_builtins": "def isinstance(*a): return True\nall = any = len = lambda *a: 1\n"
    "AssertionError = SystemExit\n__builtins__['all'] = lambda x: True\ndef f(): return 0",
    "replaced_builtins": "import builtins\nbuiltins.all = builtins.isinstance = lambda *a: True\n"
    "def f(): return 0",
    "own_assert_helper": "def check(*a): pass\ndef f(): return 0",
    "replaced_exit_and_hooks": "import os, sys, traceback\nos._exit = lambda code: None\n"
    "sys.exit = sys.excepthook = sys.unraisablehook = traceback.print_exc = lambda *a: None\n"
    "def f(): return 0",
    "raises_system_exit": "class E(SystemExit): code = 0\ndef f(): raise E",
    "exit_hook": "import atexit, os\natexit.register(os._exit, 0)\ndef f(): return 0",
    "kills_itself": "import os\ndef f(): os.kill(os.getpid(), 9)",
    "replaced_exec": "import builtins\nbuiltins.exec = builtins.compile = lambda *a: None\n"
    "def f(): return 0",
    "raises_stop_iteration": "def f(): raise StopIteration",
    "wraps_write": """
import os
old = os.write
def write(descriptor, data):
    print(data)
    return old(descriptor, data)
os.write = write
def f(): return 0
""",
    "claims_to_have_finished": """
import os
for text in (b"finished", b"passed", b"0" * 64, b'["passed", ""]'):
    for descriptor in range(3, 64):
        try: os.write(descriptor, text)
        except OSError: pass
os._exit(0)
""",
}
HIDDEN_TESTS = """
def check(value):
    assert isinstance(value, int) and all([value == 42]), value
check(f())
"""


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_pass_is_a_failure(level, name):
    start = time.monotonic()
    outcome = run_tests(FORGERIES[name], HIDDEN_TESTS, level)
    assert outcome.reason == "failed" and time.monotonic() - start < 5  # of the ten that it has


def test_the_same_tests_pass_when_nothing_is_forged(level):
    assert run_tests("def f(): return 42", HIDDEN_TESTS, level).passed


def test_tests_that_stop_early_or_assert_nothing_are_no_pass(level):
    for tests in ("import sys\nsys.exit(0)\nassert f()", "import os\nos._exit(0)\nassert f()"):
        outcome = run_tests("def f(): return 1", tests, level)
        assert (outcome.passed, outcome.reason) == (False, "failed")
    with pytest.raises(ValueError, match="no assert"):
        run_tests("def f(): return 1", "# nothing\n", level)
    with pytest.raises(SyntaxError):
        run_tests("def f(): return 1", "assert f( == 1", level)


def test_a_solution_that_does_not_parse_fails(level):
    outcome = run_tests("def f(:", "assert f() == 1", level)
    assert not outcome.passed and "SyntaxError" in outcome.output


# -- Refusals.


@pytest.fixture
def nothing_runs(monkeypatch):
    def refuse(*arguments, **named):
        raise AssertionError("a process was started")

    monkeypatch.setattr(sandbox.subprocess, "run", refuse)


def test_it_fails_closed_when_no_level_can_be_had(monkeypatch, nothing_runs):
    monkeypatch.setattr(sandbox, "probe", lambda method: f"no {method}")
    for wanted in ("isolated", "limits-only"):
        for call in (sandbox.method, lambda wanted: run("print(1)", wanted)):
            with pytest.raises(SandboxUnavailable, match=f"SANDBOX is '{wanted}'.*: no "):
                call(wanted)


def test_isolated_never_becomes_limits_only_by_itself(monkeypatch, nothing_runs):
    monkeypatch.setattr(sandbox, "probe", lambda method: "" if method == "none" else "refused")
    with pytest.raises(SandboxUnavailable, match='"limits-only" to accept'):
        run("print(1)")
    assert sandbox.method("limits-only") == "none"


def test_off_runs_nothing(nothing_runs):
    with pytest.raises(SandboxUnavailable, match="SANDBOX is 'off'.*as you asked"):
        run("print(1)", "off")


def test_the_probe_refuses_isolation_that_shows_the_project(isolated, monkeypatch):
    visible = [*sandbox._visible(), str(sandbox.SUPERVISOR.parent)]
    monkeypatch.setattr(sandbox, "_visible", lambda: visible)
    method = sandbox.method("isolated")
    assert "the project is visible" in sandbox.probe.__wrapped__(method)


def test_the_probe_reports_a_machine_that_forbids_namespaces(isolated, monkeypatch, tmp_path):
    source = sandbox.SUPERVISOR.read_text("utf-8").replace(
        'libc("unshare", parts', 'libc("unshare", -1'
    )
    (tmp_path / "supervisor.py").write_text(source, encoding="utf-8")
    monkeypatch.setattr(sandbox, "SUPERVISOR", tmp_path / "supervisor.py")
    assert "unshare" in sandbox.probe.__wrapped__("namespaces")
