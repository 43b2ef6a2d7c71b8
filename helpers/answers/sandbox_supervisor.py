"""The far side of helpers.answers.sandbox: it isolates itself, runs code in a child, and watches.

`sandbox` hands this text to `python -I -S -c`; nothing imports it. At the isolated level it is
process 1: the kernel lets nobody inside kill it, and all inside end with it. It is not dumpable, so
no program can read its memory or take its descriptors.
"""

import builtins
import contextlib
import ctypes
import errno
import glob
import json
import os
import resource
import signal
import sys
import time
import types

NOBODY = 65534
TASKS = 32  # processes and threads of one run, the supervisor's among them
OPEN_FILES = 64
OUTPUT_BYTES, FILE_BYTES = 2**16, 16 * 2**20  # the latter is also all that the folder holds
POLL_SECONDS = 0.02
# From the kernel's sched.h, mount.h, prctl.h and, for the two calls, its tables.
NEW_MOUNTS, NEW_UTS, NEW_IPC, NEW_USERS = 0x20000, 0x4000000, 0x8000000, 0x10000000
NEW_PIDS, NEW_NETWORK = 0x20000000, 0x40000000
READ_ONLY, NOSUID, NODEV, NOEXEC, BIND, RECURSIVE, PRIVATE = 1, 2, 4, 8, 4096, 16384, 1 << 18
DETACH, WHOLE_TREE = 2, 0x8000
DEATH_SIGNAL, DUMPABLE, SECURE_BITS, SUBREAPER, NO_NEW_PRIVILEGES = 1, 4, 28, 36, 38
MOUNT_SETATTR, KEYCTL = 442, 250 if os.uname().machine == "x86_64" else 219


def supervise():
    """Read the job from standard input, run it to its end, and write the report as JSON."""
    # Process 1 gets only signals that it has a handler for, and Python has one for this.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    job, tasks = json.load(sys.stdin), TASKS
    leave_keyring()
    if job["method"] == "namespaces":
        enter_namespaces(job)
    elif job["method"] == "none":
        os.chdir(job["folder"])
        tasks += len(glob.glob("/proc/[0-9]*/task/*"))  # the kernel counts other programs' too
        if os.getuid() == 0:
            # Root has no limit, so its processes count as `nobody`'s. Its files stay, and Python's;
            # a program that root starts gains nothing.
            libc("prctl", SECURE_BITS, 0b11, 0, 0, 0)
            os.setresuid(NOBODY, 0, 0)
    lower_limits(job, tasks)
    drop_privileges()
    print(json.dumps(watch(job)))


def libc(function: str, *arguments) -> None:
    """Call a function of the C library. OSError names it when it fails."""
    if getattr(ctypes.CDLL(None, use_errno=True), function)(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{function}{arguments}: {os.strerror(number)}")


def leave_keyring():
    """Let go of the session's keyring: it may hold keys of yours, and no namespace hides it."""
    try:
        libc("syscall", KEYCTL, 1, None)
    except OSError as error:  # as in Docker: then nobody in here has keys
        if error.errno not in (errno.EPERM, errno.ENOSYS):
            raise


def mount(source: str, target: str, kind: str | None, flags: int, options: str = ""):
    texts = [text and text.encode() for text in (source, target, kind)]
    libc("mount", *texts, flags, options.encode())


def write_text(path: str, text: str):
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def enter_namespaces(job: dict):
    """Go on as process 1 of new namespaces, without network, in a root that holds Python alone.

    A user namespace gives the right to it to whoever is not root. Root becomes `nobody` and enters
    an empty one in the end: the kernel exempts root from the limit on processes.
    """
    user, group = os.getuid(), os.getgid()
    parts = NEW_MOUNTS | NEW_UTS | NEW_IPC | NEW_PIDS | NEW_NETWORK
    libc("unshare", parts | (NEW_USERS if user else 0))
    if user:
        write_text("/proc/self/setgroups", "deny")
        write_text("/proc/self/gid_map", f"{group} {group} 1")
        write_text("/proc/self/uid_map", f"{user} {user} 1")
    if child := os.fork():
        os._exit(os.waitpid(child, 0)[1] and 1)
    change_root(job["folder"], job["visible"])
    if not user:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        libc("unshare", NEW_USERS)
    # A further user namespace would make the program its root, free to mount and fill a tmpfs.
    write_text("/proc/sys/user/max_user_namespaces", "0")
    libc("prctl", DEATH_SIGNAL, 9, 0, 0, 0)


def change_root(root: str, visible: list[str]):
    """Build a root of read-only binds and one small writable folder, and let go of the old root."""
    mount("none", "/", None, PRIVATE | RECURSIVE)
    mount("none", root, "tmpfs", NOSUID | NODEV, "size=1m,mode=0755")
    for path in visible:
        folder = path if os.path.isdir(path) else os.path.dirname(path)
        os.makedirs(root + folder, exist_ok=True)
        if folder != path:
            write_text(root + path, "")
        mount(path, root + path, None, BIND | RECURSIVE)
    for name in ("box", "proc"):
        os.mkdir(f"{root}/{name}")
    attributes = (ctypes.c_uint64 * 4)(READ_ONLY | NOSUID)  # to be set; the others stay
    libc("syscall", MOUNT_SETATTR, -1, root.encode(), WHOLE_TREE, attributes, 32)
    mount("none", f"{root}/proc", "proc", NOSUID | NODEV | NOEXEC)
    mount("none", f"{root}/box", "tmpfs", NOSUID | NODEV, f"size={FILE_BYTES},nr_inodes=1k")
    os.chmod(f"{root}/box", 0o777)
    os.chdir(root)
    libc("pivot_root", b".", b".")
    libc("umount2", b".", DETACH)
    os.chdir("/box")


def lower_limits(job: dict, tasks: int):
    """Lower the limits of this process and its children, never raise one."""
    wanted = {
        resource.RLIMIT_AS: job["memory_bytes"],
        resource.RLIMIT_NPROC: tasks,
        resource.RLIMIT_CPU: int(job["timeout_seconds"]) + 2,
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_CORE: 0,
    }
    for name, value in wanted.items():
        hard = resource.getrlimit(name)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (value, value))


def drop_privileges():
    """Give up every capability, and the ways to win one back."""
    libc("capset", (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
    for option, value in ((NO_NEW_PRIVILEGES, 1), (SUBREAPER, 1), (DUMPABLE, 0)):
        libc("prctl", option, value, 0, 0, 0)


def watch(job: dict) -> tuple[str, str]:
    """Run the program and end all that it started; the outcome's reason and output."""
    output, report, token = os.memfd_create("output"), os.memfd_create("report"), os.urandom(32)
    if (child := os.fork()) == 0:
        libc("prctl", DEATH_SIGNAL, 9, 0, 0, 0)
        for inside, outside in ((1, output), (2, output), (3, report)):
            os.dup2(outside, inside)
        os.closerange(4, OPEN_FILES)
        os.environ.update(HOME=os.getcwd(), TMPDIR=os.getcwd())
        judge(job["solution"], job["tests"], token)
    deadline, reason = time.monotonic() + job["timeout_seconds"], ""
    while not reason and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if sum(living().values()) + left_bytes() > job["memory_bytes"]:
            reason = "memory"
        elif time.monotonic() > deadline:
            reason = "timeout"
        time.sleep(POLL_SECONDS)
    while alive := living():
        for number in alive:
            with contextlib.suppress(ProcessLookupError):  # it ended on its own since it was listed
                os.kill(number, 9)
    passed = os.waitpid(child, 0)[1] == 0 and os.pread(report, 99, 0) == token
    printed = os.pread(output, OUTPUT_BYTES, max(0, os.fstat(output).st_size - OUTPUT_BYTES))
    return reason or ("passed" if passed else "failed"), printed.decode("utf-8", "replace")


def judge(solution: str, tests: str, token: bytes):
    """Run solution and tests, report the token when both came to their end, and leave."""
    # A solution may replace what names mean, so they are looked up before it runs.
    execute, write, leave, show = exec, os.write, os._exit, sys.__excepthook__
    known = {"__name__": "tests", "__builtins__": dict(vars(builtins))}
    module = sys.modules["solution"] = types.ModuleType("solution")
    try:
        steps = compile(solution, "<solution>", "exec"), compile(tests, "<tests>", "exec")
        execute(steps[0], module.__dict__)
        taken = {*known, *known["__builtins__"]}
        known |= {name: value for name, value in module.__dict__.items() if name not in taken}
        execute(steps[1], known)
    except BaseException as error:
        show(type(error), error, error.__traceback__)
        leave(1)
    write(3, token)
    leave(0)


def living() -> dict[int, int]:
    """Resident bytes of living processes below this one, orphans too: they become its children."""
    parents, sizes, found = {}, {}, {os.getpid()}
    for path in glob.glob("/proc/[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            with open(path, encoding="utf-8", errors="replace") as file:
                state, parent, *rest = file.read().rpartition(")")[2].split()
            if state not in "ZX":
                number = int(path.split("/")[2])
                parents[number], sizes[number] = int(parent), int(rest[19])
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    page = os.sysconf("SC_PAGE_SIZE")
    return {number: sizes[number] * page for number in found - {os.getpid()}}


def left_bytes() -> int:
    """Resident System V memory of this namespace; a program may detach it and leave it behind."""
    if os.getpid() != 1:
        return 0  # without a namespace of its own it would count other people's
    with open("/proc/sysvipc/shm", encoding="utf-8") as file:
        return sum(int(row.split()[-2]) for row in file.readlines()[1:])


if __name__ == "__main__":
    supervise()
