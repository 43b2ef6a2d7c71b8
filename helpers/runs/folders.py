"""Results on the disk: whole or not at all, with room for them, and one writer at a time.

A process may be killed between any two lines here: what stands under a final name is then complete,
what is not is found by the next run, which removes it.
"""

import contextlib
import datetime
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import filelock
import psutil
from safetensors import SafetensorError

FULL_DISK_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class DiskFull(OSError):
    """There is no room. The message says for what, how much is free, and that nothing was lost."""


class InUse(RuntimeError):
    """Another process writes there. The message names its pid and since when it runs."""


def writable(folder: Path) -> Path:
    """The folder, made if need be. Raises OSError that says what to do."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)
    except OSError as error:
        raise OSError(
            f"the run folder {folder} cannot be written ({error.strerror}): set RUN_DIR to a "
            "folder of your own"
        ) from error
    return folder


def need_space(folder: Path, needed: int, what: str) -> None:
    """Raise DiskFull when fewer than `needed` bytes are free where `folder` is or will be."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise DiskFull(
            f"{what} needs {needed / 1e6:,.1f} MB in {folder}, {free / 1e6:,.1f} MB are free: "
            "make room and try again"
        )


@contextlib.contextmanager
def whole_folder(final: Path, needed: int = 0) -> Iterator[Path]:
    """A draft to fill, in a with-statement; at its end, and only then, it replaces `final`.

    `needed` is its size in bytes, if known. Raises DiskFull, before or while it is written; InUse.
    """
    draft, earlier = (final.with_name(f".{final.name}.{state}") for state in ("partial", "earlier"))
    with writing_in(final.parent):
        if earlier.exists() and not final.exists():  # killed between the two renames below
            earlier.rename(final)
        for left_over in (draft, earlier):
            shutil.rmtree(left_over, ignore_errors=True)
        need_space(final.parent, needed, f"writing {final.name}")
        draft.mkdir()
        try:
            with full_disk_said(final):
                yield draft
            follow_umask(draft)
            # Moved aside and not deleted in place: a folder that is half deleted looks complete.
            if final.exists():
                final.rename(earlier)
            draft.rename(final)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(earlier, ignore_errors=True)


def follow_umask(folder: Path) -> None:
    """Open the files below a folder to whom the umask opened it: safetensors does so to nobody."""
    mode = folder.stat().st_mode & 0o666
    for path in filter(Path.is_file, folder.rglob("*")):
        path.chmod(mode)


@contextlib.contextmanager
def full_disk_said(final: Path) -> Iterator[None]:
    """Turn any library's error about a full disk, in a with-statement, into DiskFull."""
    try:
        yield
    except Exception as error:
        if isinstance(error, DiskFull) or _number(error) not in FULL_DISK_ERRNOS:
            raise
        free = shutil.disk_usage(final.parent).free
        raise DiskFull(
            f"{final.name} could not be written whole, {free / 1e6:,.1f} MB are free in "
            f"{final.parent} ({error}): make room and run it again; what was there before is intact"
        ) from error


def _number(error: Exception) -> int | None:
    """The operating system's number of an error, None for an error of another kind."""
    # The Rust of safetensors and tokenizers gives it at the end of a text, in errors of these two
    # types. No other error's text is read: it may quote a cell, or a row of somebody's data.
    if type(error) in (SafetensorError, Exception):
        found = re.search(r"\(os error (\d+)\)$", str(error))
        return int(found[1]) if found else None
    return getattr(error, "errno", None)


def write_text(path: Path, text: str) -> Path:
    """Write a file whole or not at all; returns its path."""
    draft = path.with_name(f".{path.name}.partial")
    with full_disk_said(path):
        draft.write_text(text, encoding="utf-8")
    return draft.replace(path)


@contextlib.contextmanager
def writing_in(folder: Path) -> Iterator[None]:
    """Hold a folder against other processes, in a with-statement. Raises InUse, at once.

    What the holder itself calls or starts is let in: a run's kernels, and what a training saves.
    The operating system drops the lock of a process that dies, whatever it dies of.
    """
    lock = filelock.FileLock(writable(folder) / ".run.lock")
    owner = folder / ".run.lock.pid"  # beside it: Windows lets nobody read a locked file
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(lock.acquire(timeout=0))
            held.callback(owner.unlink, missing_ok=True)
            owner.write_text(str(os.getpid()), encoding="utf-8")
        except filelock.Timeout as error:
            holder, this = _process(owner), psutil.Process()
            if holder not in [this, *this.parents()]:
                raise InUse(_in_use(folder, holder)) from error
        yield


def _process(owner: Path) -> psutil.Process | None:
    """The process whose id stands in a file; None of one who just starts or just ends."""
    try:
        return psutil.Process(int(owner.read_text("utf-8")))
    except (OSError, ValueError, psutil.Error):
        return None


def _in_use(folder: Path, holder: psutil.Process | None) -> str:
    who = "another process"
    if holder:
        started = datetime.datetime.fromtimestamp(holder.create_time())
        who = f"process {holder.pid}, which started at {started:%Y-%m-%d %H:%M:%S}"
    advice = "wait until it ends, stop it, or give this run another folder by RUN_DIR"
    return f"{folder} is being written by {who}: {advice}"


def public_name(name: str) -> str:
    """A path's last part, a Hub id as it is: no card tells where a disk keeps its files."""
    shown = Path(name).name if Path(name).expanduser().is_absolute() else name
    # Where the locale is ASCII, Python keeps each other byte of a file's name as half a character.
    return shown.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
