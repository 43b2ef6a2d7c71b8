"""The set-up cell is the same in all lessons, inert elsewhere, and runs once in Colab or Kaggle."""

import os
import shutil
import subprocess
import sys
import types

import nbformat
import pytest

from helpers.config import PROJECT_DIR
from helpers.runs.lessons import code_hash, notebooks
from setup import colab


def set_up_cells(path):
    cells = nbformat.read(path, as_version=4).cells
    return [cell for cell in cells if colab.TAG in cell.metadata.get("tags", [])]


@pytest.mark.parametrize("path", notebooks(), ids=lambda path: path.stem)
def test_every_lesson_has_the_same_cell(path):
    (cell,) = set_up_cells(path)
    address = colab.set_up_source().partition(colab.UNNAMED)
    assert cell.source.startswith(address[0]) and cell.source.endswith(address[2])


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """What the cell would run, in a place where /content is a folder of the test."""
    ran = []

    def run(command, **options):
        ran.append(command)
        if command[0] == "git":
            (tmp_path / command[-1] / "notebooks").mkdir(parents=True)
        listed = "GPU 0: Tesla T4 (UUID: GPU-1)\nGPU 1: Tesla T4 (UUID: GPU-2)\n"
        return subprocess.CompletedProcess(command, 0, stdout=listed)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(colab, "_installed", lambda name: None)
    monkeypatch.setattr(colab.shutil, "which", lambda name: None)
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delitem(sys.modules, "google.colab", raising=False)
    monkeypatch.chdir(tmp_path)
    return ran


@pytest.fixture
def in_colab(monkeypatch):
    """As in Colab: its module is loaded, and can mount a Drive."""
    module = types.ModuleType("google.colab")
    module.drive = types.SimpleNamespace(mount=lambda folder: None)
    monkeypatch.setitem(sys.modules, "google.colab", module)
    monkeypatch.setitem(sys.modules, "google", types.ModuleType("google"))
    monkeypatch.delitem(sys.modules, "helpers")


@pytest.fixture
def in_kaggle(monkeypatch):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    monkeypatch.delitem(sys.modules, "helpers")


def cell_for(folder, repository="ada/course", **changes) -> str:
    """The set-up cell, with /content and /kaggle/working moved into a folder."""
    source = colab.set_up_source(repository)
    for place in ("/content", "/kaggle/working"):
        source = source.replace(f'"{place}/', f'"{folder}{place}/')
    return source.replace("keep_on_drive = False", f"keep_on_drive = {changes.get('drive', False)}")


def test_does_nothing_outside_colab_and_kaggle(commands, tmp_path):
    path = list(sys.path)
    exec(cell_for(tmp_path, colab.UNNAMED), {})
    assert commands == [] and sys.path == path and os.getcwd() == str(tmp_path)


@pytest.mark.parametrize("place", ["colab", "kaggle"])
def test_clones_and_installs_once(commands, monkeypatch, request, tmp_path, place):
    request.getfixturevalue(f"in_{place}")
    course = tmp_path / {"colab": "content", "kaggle": "kaggle/working"}[place] / "course"
    exec(cell_for(tmp_path), {})
    assert [command[0] for command in commands] == ["git", sys.executable]
    assert "https://github.com/ada/course" in commands[0]
    assert sys.path[0] == str(course) and os.getcwd() == str(course / "notebooks")
    exec(cell_for(tmp_path), {})
    assert [command[0] for command in commands[2:]] == [sys.executable], "no second clone"
    monkeypatch.setitem(sys.modules, "helpers", types.ModuleType("helpers"))
    exec(cell_for(tmp_path), {})
    assert len(commands) == 3, "a second run in the same kernel does nothing"


@pytest.mark.parametrize("place", ["colab", "kaggle"])
def test_without_an_address_one_sentence_says_what_to_do(commands, request, tmp_path, place):
    request.getfixturevalue(f"in_{place}")
    with pytest.raises(RuntimeError, match="address is not set.*make colab REPO=.*or upload"):
        exec(cell_for(tmp_path, colab.UNNAMED), {})
    assert commands == []


def test_an_uploaded_folder_needs_no_address(commands, in_colab, tmp_path):
    (tmp_path / "content/course/notebooks").mkdir(parents=True)
    exec(cell_for(tmp_path, colab.UNNAMED), {})
    assert [command[0] for command in commands] == [sys.executable]


def test_a_failed_clone_is_explained(commands, in_kaggle, monkeypatch, tmp_path):
    failed = subprocess.CompletedProcess([], 128)
    monkeypatch.setattr(subprocess, "run", lambda command, **options: failed)
    with pytest.raises(RuntimeError, match="could not fetch https.*ada/course.*internet"):
        exec(cell_for(tmp_path), {})


def test_of_two_gpus_one_is_used_and_named(commands, monkeypatch, capsys):
    monkeypatch.setattr(colab.shutil, "which", lambda name: f"/usr/bin/{name}")
    colab.use_one_gpu()
    assert os.environ.pop("CUDA_VISIBLE_DEVICES") == "0"
    assert "2 GPUs; the course uses the first: GPU 0: Tesla T4" in capsys.readouterr().out
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    colab.use_one_gpu()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1", "a choice of one's own stays"


def test_runs_lie_on_the_drive(commands, in_colab, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(colab, "PROJECT", tmp_path / "course")
    (tmp_path / "course").mkdir()
    for _ in range(2):  # the second is that of a later session, or of the next lesson
        colab.keep_runs_on_drive(tmp_path / "drive")
    kept = tmp_path / "drive/MyDrive/fine-tuning-course/runs"
    (tmp_path / "course/runs/demo").mkdir()
    assert (kept / "demo").is_dir() and str(kept) in capsys.readouterr().out


def test_results_of_this_machine_are_not_hidden_by_the_drive(
    commands, in_colab, monkeypatch, tmp_path
):
    monkeypatch.setattr(colab, "PROJECT", tmp_path)
    (tmp_path / "runs/demo").mkdir(parents=True)
    with pytest.raises(RuntimeError, match="holds results already"):
        colab.keep_runs_on_drive(tmp_path / "drive")
    assert (tmp_path / "runs/demo").is_dir()


def test_kaggle_has_no_drive(commands, in_kaggle, tmp_path):
    with pytest.raises(RuntimeError, match="only Colab has a Drive"):
        exec(cell_for(tmp_path, drive=True), {})


def test_kaggle_is_told_where_results_are_kept(commands, in_kaggle, tmp_path, capsys):
    exec(cell_for(tmp_path), {})
    assert "Save Version" in capsys.readouterr().out


def test_install_moves_nothing_that_the_kernel_may_have_loaded(commands, monkeypatch):
    here = {"torch": "2.11.0", "ipywidgets": "7.7.1", "torchao": "0.10.0", "datasets": "4.0.0"}
    monkeypatch.setattr(colab, "_installed", here.get)
    constraints = []
    monkeypatch.setattr(
        colab.Path, "write_text", lambda self, text, encoding: constraints.extend(text.split())
    )
    colab.install()
    removal, addition = commands
    assert removal[3:] == ["uninstall", "--quiet", "--yes", "torchao"]
    assert constraints == ["torch==2.11.0", "ipywidgets==7.7.1"]
    added = {pin.partition("==")[0] for pin in addition if "==" in pin}
    assert {"trl", "bitsandbytes", "papermill", "gguf"} <= added
    assert not added & {"torch", "ipywidgets", "datasets", "jupyterlab", "pytest", "playwright"}


def test_a_second_install_does_nothing(commands, monkeypatch):
    monkeypatch.setattr(colab, "_installed", lambda name: None if name == "torchao" else "1")
    colab.install()
    assert commands == []


def test_write_names_the_repository_everywhere_and_keeps_recordings_fresh(tmp_path):
    shutil.copytree(PROJECT_DIR / "notebooks", tmp_path / "notebooks")
    shutil.copy(PROJECT_DIR / "README.md", tmp_path)
    for path in (tmp_path / "notebooks").glob("*.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        notebook.metadata["recorded"] = {"code_sha256": code_hash(path)}
        nbformat.write(notebook, path)
    for name in ("ada/other", "ada/course"):  # the second replaces the first
        colab.write(name, tmp_path)
    assert "ada/course/blob/main/notebooks/06_" in (tmp_path / "README.md").read_text("utf-8")
    for path in (tmp_path / "notebooks").glob("*.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        text = path.read_text("utf-8")
        assert "github.com/ada/course" in text and "ada/other" not in text
        assert notebook.cells[1].source.count("colab-badge.svg") == 1
        assert notebook.metadata.recorded.code_sha256 == code_hash(path)


@pytest.mark.parametrize("name", ["", "course", "ada/course/x", "https://github.com/ada/course"])
def test_a_wrong_repository_is_named(name, tmp_path):
    with pytest.raises(ValueError, match="write it as owner/name"):
        colab.write(name, tmp_path)
