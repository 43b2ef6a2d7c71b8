"""The far side of helpers.answers.sandbox: what starts a program, watches it and reports.

`sandbox` hands this text to `python -I -S -c`; nothing imports it. At the isolated level the
supervisor is process 1: the kernel lets nobody inside kill it, and all inside end with it. It is
not dumpable, so no program can read its memory or take its descriptors, and its standard output,
which leads to the notebook's side, is not the program's.
"""

import contextlib
import ctypes
import errno
import json
import os
import resource
import select
import signal
import sys
import time

NOBODY = 65534
TASKS = 32  # processes and threads of one run, the supervisor's among them
OPEN_FILES = 64
FILE_BYTES = FOLDER_BYTES = 16 * 2**20
POLL_SECONDS = 0.05
NOSUID, NODEV, NOEXEC, READ_ONLY, REMOUNT, BIND, RECURSIVE = 2, 4, 8, 1, 32, 4096, 16384
PRIVATE, DETACH = 1 << 18, 2
NEW_MOUNTS, NEW_UTS, NEW_IPC, NEW_USERS = 0x20000, 0x4000000, 0x8000000, 0x10000000
NEW_PIDS, NEW_NETWORK = 0x20000000, 0x40000000
NEW_KEYRING = 1
DEATH_SIGNAL, DUMPABLE, SECURE_BITS, SUBREAPER, NO_NEW_PRIVILEGES = 1, 4, 28, 36, 38


def supervise():
    """Read the job from standard input, run it to its end, and write the report as JSON."""
    # Process 1 gets only signals that it has a handler for, and Python has one for this.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    job = json.loads(sys.stdin.buffer.readline())
    leave_keyring()
    if job["method"] == "namespaces":
        processes = enter_namespaces(job)
    else:
        processes = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
        os.chdir(job["folder"])
    if job["method"] == "none" and os.getuid() == 0:
        # Count root's processes as `nobody`'s, for root has no limit. Its files stay, and Python's;
        # a program that root starts gains nothing.
        libc("prctl", SECURE_BITS, 0b11, 0, 0, 0)
        os.setresuid(NOBODY, 0, 0)
    others = running_tasks(processes, os.getuid()) if job["method"] == "none" else 0
    lower_limits(job, TASKS + others)
    drop_privileges()
    child, finished, output = start(job)
    reason, exit_code, printed = watch(job, child, output, processes)
    # Nobody is left to write, so that reading ends.
    sent = os.read(finished, 200) if reason is None else b""
    texts = [data.decode("utf-8", "replace") for data in (sent, printed)]
    print(json.dumps([reason, exit_code, *texts]))


def libc(function: str, *arguments) -> None:
    """Call a function of the C library. OSError names it when it fails."""
    if getattr(ctypes.CDLL(None, use_errno=True), function)(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{function}{arguments}: {os.strerror(number)}")


def leave_keyring():
    """Let go of the session's keyring: it may hold keys of yours, and no namespace hides it."""
    keyctl = 250 if os.uname().machine == "x86_64" else 219
    try:
        libc("syscall", keyctl, NEW_KEYRING, None)
    except OSError as error:  # as in Docker: then nobody in here has keys
        if error.errno not in (errno.EPERM, errno.ENOSYS):
            raise


def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None):
    texts = [text and text.encode() for text in (source, target, kind)]
    libc("mount", *texts, flags, options and options.encode())


def enter_namespaces(job: dict) -> int:
    """Go on as process 1 of new namespaces, without network, in a root that holds Python alone.

    Returns a descriptor of a /proc that no path leads to. A user namespace gives the right to it to
    whoever is not root. Root becomes `nobody` and enters an empty one in the end: the kernel
    exempts root from the limit on processes.
    """
    user, group = os.getuid(), os.getgid()
    parts = NEW_MOUNTS | NEW_UTS | NEW_IPC | NEW_PIDS | NEW_NETWORK
    libc("unshare", parts | (NEW_USERS if user else 0))
    if user:
        write_text("/proc/self/setgroups", "deny")
        write_text("/proc/self/gid_map", f"{group} {group} 1")
        write_text("/proc/self/uid_map", f"{user} {user} 1")
    if child := os.fork():
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF)
    processes = change_root(job)
    if not user:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        libc("unshare", NEW_USERS)
    # A further user namespace would make the program its root, free to mount and fill a tmpfs.
    write_text("sys/user/max_user_namespaces", "0", processes)
    libc("prctl", DEATH_SIGNAL, 9, 0, 0, 0)
    return processes


def change_root(job: dict) -> int:
    """Build a root of read-only binds and one small writable folder, and let go of the old root."""
    root = job["folder"]
    mount("none", "/", None, PRIVATE | RECURSIVE)
    mount("none", root, "tmpfs", NOSUID | NODEV, "size=1m,mode=0755")
    for path in job["visible"]:
        show(path, root + path)
    for name in ("box", "proc", "hidden"):
        os.mkdir(f"{root}/{name}")
    mount("none", f"{root}/proc", "proc", NOSUID | NODEV | NOEXEC)
    for path in job["hidden"]:
        mount(f"{root}/hidden", root + path, None, BIND)
    mount("none", f"{root}/box", "tmpfs", NOSUID | NODEV, f"size={FOLDER_BYTES},nr_inodes=1k")
    os.chmod(f"{root}/box", 0o777)
    os.chdir(root)
    libc("pivot_root", b".", b".")
    libc("umount2", b".", DETACH)
    processes = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    libc("umount2", b"/proc", DETACH)
    mount("none", "/", None, REMOUNT | READ_ONLY | NOSUID | NODEV)
    os.chdir("/box")
    return processes


def show(path: str, target: str):
    """Make a folder or file of the machine visible, read-only; a link stays a link."""
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):
        return os.symlink(os.readlink(path), target)
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    else:
        os.close(os.open(target, os.O_CREAT, 0o644))
    mount(path, target, None, BIND | RECURSIVE)
    if not path.startswith("/dev/"):
        # A user namespace may add to the flags of a mount but not take any away.
        kept = os.statvfs(target).f_flag & (NOSUID | NODEV | NOEXEC)
        mount("none", target, None, REMOUNT | BIND | READ_ONLY | NOSUID | NODEV | kept)


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


def start(job: dict) -> tuple[int, int, int]:
    """Start the program; its process, the descriptor on which it may report, that of its prints."""
    finished, finished_end = os.pipe()
    output, output_end = os.pipe()
    program, program_end = os.pipe()
    child = os.fork()
    if child == 0:
        for inside, outside in enumerate((program, output_end, output_end)):
            os.dup2(outside, inside)
        os.set_inheritable(finished_end, True)
        options = ["-I", "-S", "-B", "-u", "-X", "utf8", "-c", job["source"], str(finished_end)]
        folder = os.getcwd()
        environment = {"HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8"}
        os.execve(job["python"], [job["python"], *options], environment)
    for descriptor in (finished_end, output_end, program):
        os.close(descriptor)
    with os.fdopen(program_end, "w", encoding="utf-8") as file:
        json.dump([job["program"], job["tests"], job["token"]], file)
    return child, finished, output


def watch(job: dict, child: int, output: int, processes: int) -> tuple:
    """End all that the child started; why it was ended, its exit code, the end of its prints."""
    deadline, limit = time.monotonic() + job["timeout_seconds"], job["output_bytes"]
    ended, reason, codes, printed = os.pidfd_open(child), None, {}, b""
    sources = [0, ended, output]
    while reason is None:
        ready = select.select(sources, [], [], POLL_SECONDS)[0]
        if ended in ready:
            break
        if output in ready:
            printed += (data := os.read(output, 65536))
            sources = sources if data else [0, ended]  # closed, and the child may go on
        if 0 in ready:  # the other side let go of standard input
            reason = "killed"
        elif used_bytes(processes) > job["memory_bytes"]:
            reason = "memory"
        elif time.monotonic() > deadline:
            reason = "timeout"
        elif len(printed) > limit:
            reason = "output"
        codes |= reap()
    codes |= end_all(processes)
    while data := os.read(output, 65536):
        printed += data
    if len(printed) > limit:
        reason = "output"
    return reason, codes.get(child) if reason is None else None, printed[-limit:]


def end_all(processes: int) -> dict[int, int]:
    """Kill all processes below this one; returns exit codes by process id."""
    codes = {}
    while alive := descendants(processes):
        for number in alive:
            with contextlib.suppress(ProcessLookupError):  # it ended on its own since it was listed
                os.kill(number, 9)
        codes |= reap()
    return codes | reap()


def reap() -> dict[int, int]:
    """Exit codes, by process id, of the children that ended since the last call."""
    codes = {}
    with contextlib.suppress(ChildProcessError):  # there is none, ended or not
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            codes[found[0]] = os.waitstatus_to_exitcode(found[1])
    return codes


def descendants(processes: int) -> list[int]:
    """Ids of the living processes below this one, orphans too: they become its children."""
    parents = {}
    for name in filter(str.isdigit, os.listdir(processes)):
        fields = read_text(f"{name}/stat", processes).rpartition(")")[2].split()
        if fields and fields[0] not in "ZX":
            parents[int(name)] = int(fields[1])
    found = {os.getpid()}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found - {os.getpid()})


def used_bytes(processes: int) -> int:
    """Resident memory of all processes below this one, and of the shared memory they left."""
    numbers = [read_text(f"{n}/statm", processes).split() for n in descendants(processes)]
    pages = sum(int(fields[1]) for fields in numbers if fields)
    return pages * os.sysconf("SC_PAGE_SIZE") + shared_bytes(processes)


def shared_bytes(processes: int) -> int:
    """Resident System V memory of this namespace; a program may detach it and leave it behind."""
    if os.getpid() != 1:
        return 0  # without a namespace of its own it would count other people's
    heading, *rows = read_text("sysvipc/shm", processes).splitlines() or [""]
    column = heading.split().index("rss") if rows else 0
    return sum(int(row.split()[column]) for row in rows)


def running_tasks(processes: int, user: int) -> int:
    """Threads that run under a real user id: the kernel's limit counts them all."""
    total = 0
    for name in filter(str.isdigit, os.listdir(processes)):
        text = read_text(f"{name}/status", processes)
        fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
        if fields and int(fields["Uid"].split()[0]) == user:
            total += int(fields["Threads"])
    return total


def read_text(path: str, folder: int) -> str:
    """The text of a file below /proc, empty when its process is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY, dir_fd=folder)
        with os.fdopen(descriptor, encoding="utf-8", errors="replace") as file:
            return file.read()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def write_text(path: str, text: str, folder: int | None = None):
    descriptor = os.open(path, os.O_WRONLY, dir_fd=folder)
    os.write(descriptor, text.encode())
    os.close(descriptor)


if __name__ == "__main__":
    supervise()
