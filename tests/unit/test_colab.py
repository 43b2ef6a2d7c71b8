"""The set-up cell is the same in every lesson, inert outside Colab, and runs once inside it."""

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

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    return ran


def test_does_nothing_outside_colab(commands, tmp_path):
    path = list(sys.path)
    exec(colab.set_up_source(), {})
    assert commands == [] and sys.path == path and os.getcwd() == str(tmp_path)


def test_in_colab_clones_and_installs_once(commands, monkeypatch, tmp_path):
    source = colab.set_up_source("ada/course").replace("/content", str(tmp_path))
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    monkeypatch.delitem(sys.modules, "helpers")
    exec(source, {})
    assert [command[0] for command in commands] == ["git", sys.executable]
    assert "https://github.com/ada/course" in commands[0]
    assert sys.path[0] == str(tmp_path / "course")
    exec(source, {})
    assert [command[0] for command in commands[2:]] == [sys.executable], "no second clone"
    monkeypatch.setitem(sys.modules, "helpers", types.ModuleType("helpers"))
    exec(source, {})
    assert len(commands) == 3, "a second run in the same kernel does nothing"


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
