"""The lessons in Colab: their set-up cell, what it installs, and the badges that open them.

The set-up cell calls `python -m setup.colab install`. `python -m setup.colab owner/name` writes
a repository's address into the notebooks and the README. Importing this needs no other package.
"""

import re
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
TAG = "colab"
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
OPEN = "https://colab.research.google.com/github/{repository}/blob/main/notebooks/{name}"

# Outside Colab this cell does nothing. The folder `course` and the import make it idempotent.
SET_UP = """# @title For Colab only: fetch the course and what Colab lacks (a minute, once)
import os
import subprocess
import sys

if "google.colab" in sys.modules and "helpers" not in sys.modules:
    os.chdir("/content")
    if not os.path.isdir("course"):
        address = "https://github.com/{repository}"
        subprocess.run(["git", "clone", "--depth=1", "--quiet", address, "course"], check=True)
    sys.path.insert(0, "/content/course")
    os.chdir("course/notebooks")
    command = [sys.executable, "-m", "setup.colab", "install"]
    subprocess.run(command, cwd="/content/course", check=True)"""
UNNAMED = "OWNER/NAME"

# The running kernel may have imported these, and a new version would force a restart.
KEPT = (
    "torch numpy pandas ipykernel ipython ipywidgets jupyter-client transformers peft accelerate"
).split()
NOT_NEEDED = ("jupyterlab", "playwright", "pytest", "pytest-xdist", "ruff", "import-linter", "mypy")


def set_up_source(repository: str = UNNAMED) -> str:
    """The set-up cell for a repository `owner/name`, the same in all six notebooks."""
    return SET_UP.replace("{repository}", repository)


def missing_requirements() -> list[str]:
    """Pinned lines of requirements.txt for what is not installed here in any version."""
    lines = (PROJECT / "requirements.txt").read_text("utf-8").splitlines()
    pins = [line.partition("#")[0].strip() for line in lines]
    names = {pin: pin.partition("==")[0] for pin in pins if pin}
    return [pin for pin, name in names.items() if name not in NOT_NEEDED and not _installed(name)]


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def install() -> None:
    """Install what Colab lacks without moving what its kernel may have loaded.

    peft refuses to work beside the torchao that Colab carries, and nothing here uses it.
    Raises CalledProcessError when pip fails; pip's own message stands above it then.
    """
    pip = [sys.executable, "-m", "pip"]
    if _installed("torchao"):
        subprocess.run([*pip, "uninstall", "--quiet", "--yes", "torchao"], check=True)
    missing = missing_requirements()
    if not missing:
        return
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        kept = [f"{name}=={_installed(name)}\n" for name in KEPT if _installed(name)]
        constraints.write_text("".join(kept), encoding="utf-8")
        subprocess.run(
            [*pip, "install", "--quiet", "--constraint", str(constraints), *missing], check=True
        )


def write(repository: str, project: Path = PROJECT) -> None:
    """Write `owner/name` into set-up cells and badges of the notebooks, and into the README.

    A recorded notebook stays recorded: the set-up cell's address is no code that outputs depend on.
    Raises ValueError when `repository` is not of that form.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ValueError(f"REPO is {repository!r}: write it as owner/name, as in REPO=ada/course")
    paths = sorted((project / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    for path in paths:
        _write_notebook(path, repository)
    links = [f"[{p.name[:2]}]({OPEN.format(repository=repository, name=p.name)})" for p in paths]
    readme = project / "README.md"
    text = re.sub(
        "(?<=<!-- colab -->).*?(?=<!-- /colab -->)",
        f"\n[![Open in Colab]({BADGE})](#the-lessons) {' '.join(links)}\n",
        readme.read_text("utf-8"),
        flags=re.DOTALL,
    )
    readme.write_text(text, encoding="utf-8")


def _write_notebook(path: Path, repository: str) -> None:
    import nbformat

    from helpers.runs.lessons import code_hash

    notebook = nbformat.read(path, as_version=4)
    recorded = notebook.metadata.get("recorded", {})
    fresh = recorded.get("code_sha256") == code_hash(path)
    (cell,) = [cell for cell in notebook.cells if TAG in cell.metadata.get("tags", [])]
    cell.source = set_up_source(repository)
    overview, address = notebook.cells[1], OPEN.format(repository=repository, name=path.name)
    unbadged = re.sub(r"^\[!\[Open in Colab\].*\n\n", "", overview.source)
    overview.source = f"[![Open in Colab]({BADGE})]({address})\n\n{unbadged}"
    nbformat.write(notebook, path)
    if fresh:
        recorded["code_sha256"] = code_hash(path)
        nbformat.write(notebook, path)


if __name__ == "__main__":
    try:
        install() if sys.argv[1:] == ["install"] else write("".join(sys.argv[1:]))
    except (ValueError, subprocess.CalledProcessError) as error:
        sys.exit(f"stopped: {error}")
