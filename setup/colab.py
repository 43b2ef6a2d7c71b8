"""The lessons in Colab and Kaggle: their set-up cell, what it installs, the badges that open them.

The set-up cell calls `prepare`. `python -m setup.colab owner/name` writes a repository's address
into the notebooks and the README. Importing this needs no other package.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
TAG = "colab"
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
OPEN = "https://colab.research.google.com/github/{repository}/blob/main/notebooks/{name}"

# Elsewhere this cell does nothing. The folder `course` and the import make it idempotent.
SET_UP = """# @title For Colab and Kaggle only: fetch the course and what it needs (a minute, once)
import os
import subprocess
import sys
from pathlib import Path

address = "https://github.com/{repository}"
keep_on_drive = False  # @param {type:"boolean"}
# True, in Colab: RUN_DIR lies on your Drive, where a disconnect loses nothing and lessons meet.

on_kaggle = "KAGGLE_KERNEL_RUN_TYPE" in os.environ
if (on_kaggle or "google.colab" in sys.modules) and "helpers" not in sys.modules:
    course = Path("/kaggle/working/course" if on_kaggle else "/content/course")
    if not course.exists() and address.endswith("OWNER/NAME"):
        how = f"`make colab REPO=owner/name` writes it; or upload the course's folder as {course}"
        raise RuntimeError(f"the course's address is not set: {how}")
    clone = ["git", "clone", "--depth=1", "--quiet", address, str(course)]
    if not course.exists() and subprocess.run(clone).returncode:
        raise RuntimeError(f"git could not fetch {address}: is it right, and is the internet on?")
    os.chdir(course / "notebooks")
    sys.path.insert(0, str(course))
    from setup import colab

    colab.prepare(keep_on_drive)"""
UNNAMED = "OWNER/NAME"

# The running kernel may have imported these, and a new version would force a restart.
KEPT = (
    "torch numpy pandas ipykernel ipython ipywidgets jupyter-client transformers peft accelerate"
).split()
NOT_NEEDED = ("jupyterlab", "playwright", "pytest", "pytest-xdist", "ruff", "import-linter", "mypy")


def set_up_source(repository: str = UNNAMED) -> str:
    """The set-up cell for a repository `owner/name`, the same in all six notebooks."""
    return SET_UP.replace("{repository}", repository)


def prepare(keep_on_drive: bool = False) -> None:
    """Make a machine of Colab or Kaggle ready, from the set-up cell, before torch is imported.

    Errors: CalledProcessError of pip; RuntimeError where a Drive is wanted and there is none.
    """
    install()
    use_one_gpu()
    if keep_on_drive:
        keep_runs_on_drive()
    elif "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
        print(f"Results go to {PROJECT / 'runs'}. Save Version keeps them with your notebook.")


def use_one_gpu() -> None:
    """Hide all GPUs but the first, and say so; Kaggle lends two T4s."""
    if "CUDA_VISIBLE_DEVICES" in os.environ or not shutil.which("nvidia-smi"):
        return
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, encoding="utf-8").stdout
    names = [line for line in listed.splitlines() if line.startswith("GPU ")]
    if len(names) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = "0"
        print(f"This machine has {len(names)} GPUs; the course uses the first: {names[0]}")


def keep_runs_on_drive(mounted: Path = Path("/content/drive")) -> None:
    """Let `runs`, where each RUN_DIR lies, be a folder of your Drive, in this and later sessions.

    Raises RuntimeError outside Colab, or where results lie in `runs` already.
    """
    if "google.colab" not in sys.modules:
        raise RuntimeError("keep_on_drive is True, and only Colab has a Drive: set it to False")
    from google.colab import drive  # is there in Colab alone

    drive.mount(str(mounted))
    kept, runs = mounted / "MyDrive" / "fine-tuning-course" / "runs", PROJECT / "runs"
    if runs.exists() and not runs.is_symlink():
        raise RuntimeError(f"{runs} holds results already: move it to {kept}, then run this again")
    kept.mkdir(parents=True, exist_ok=True)
    if not runs.is_symlink():
        runs.symlink_to(kept, target_is_directory=True)
    print(f"RUN_DIR is a folder in {kept}, in all six notebooks.")


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
    """Install what is missing without moving what the kernel may have loaded.

    peft refuses to work beside the torchao that such machines carry, and nothing here uses it.
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
        write("".join(sys.argv[1:]))
    except ValueError as error:
        sys.exit(f"stopped: {error}")
