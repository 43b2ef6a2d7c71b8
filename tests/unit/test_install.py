"""Set-up: one place for versions, clear errors, and nothing done twice."""

import ast
import re
import subprocess
import sys
from importlib.metadata import packages_distributions, version

import pytest
import yaml

from helpers.config import PROJECT_DIR
from setup import install
from tests.notebook_code import NOTEBOOKS, notebook_source

PIN = re.compile(r"^([A-Za-z0-9_.-]+)==(\S+)")


def requirement_lines(name="requirements.txt"):
    lines = (PROJECT_DIR / name).read_text("utf-8").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def test_every_requirement_is_pinned():
    for name in ("requirements.txt", "requirements-serving.txt"):
        assert all(PIN.match(line) for line in requirement_lines(name))


def test_the_installed_versions_are_the_pinned_ones():
    for line in requirement_lines():
        name, pinned = PIN.match(line).groups()
        assert version(name).split("+")[0] == pinned, name


def test_environment_yml_installs_the_same_requirements():
    environment = yaml.safe_load((PROJECT_DIR / "environment.yml").read_text("utf-8"))
    assert environment["name"] == "fine_tune_llama2"
    (pip,) = [item for item in environment["dependencies"] if isinstance(item, dict)]
    # conda hands these lines to pip as a requirements file, which takes few options.
    assert pip["pip"] == ["-r requirements.txt", "-c constraints.txt", "-e ."]
    conda = [item for item in environment["dependencies"] if isinstance(item, str)]
    assert "python=3.11" in conda


def imported_packages():
    """Top-level packages that helpers, set-up, notebooks, benchmarks and tests import."""
    folders = ("helpers", "setup", "benchmarks", "tests")
    texts = [
        path.read_text("utf-8") for name in folders for path in (PROJECT_DIR / name).rglob("*.py")
    ]
    texts += [notebook_source(path) for path in NOTEBOOKS.glob("*.ipynb")]
    for node in (node for text in texts for node in ast.walk(ast.parse(text))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


def test_every_package_we_import_is_a_direct_requirement():
    lines = requirement_lines() + requirement_lines("requirements-serving.txt")
    required = {PIN.match(line).group(1).replace("-", "_").lower() for line in lines}
    providers = packages_distributions()
    # kagglehub is for readers with Kaggle credentials; without it the error says how to get it.
    # llama_cpp and unsloth are built for the benchmarks that ask them.
    # google.colab is there in Colab alone, and imported there alone.
    own = {"helpers", "setup", "tests", "benchmarks"}
    own |= {"google", "kagglehub", "llama_cpp", "unsloth"} | sys.stdlib_module_names
    for package in sorted(set(imported_packages()) - own):
        names = {name.replace("-", "_").lower() for name in providers.get(package, [package])}
        assert names & required, f"{package} is imported, and no requirement brings it"


def test_an_old_python_is_told_which_one_is_needed():
    with pytest.raises(install.SetupError, match=r"Python 3\.10 is too old.*3\.11 or newer"):
        install.check_python((3, 10, 4))


def test_a_full_disk_is_said_before_anything_is_installed():
    with pytest.raises(install.SetupError, match="1.0 GB are free.*needs 4 GB"):
        install.check_disk(1_000_000_000)


def test_an_unreachable_index_says_what_to_do_offline(monkeypatch):
    failed = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(install.SetupError, match="PIP_NO_INDEX=1 and PIP_FIND_LINKS"):
        install.pip("-r", "requirements.txt")


def test_a_second_call_installs_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(install, "DONE_MARK", tmp_path / "mark")
    (tmp_path / "mark").write_text(install.fingerprint(), encoding="utf-8")
    calls = []
    monkeypatch.setattr(subprocess, "run", lambda command, **options: calls.append(command))
    install.install()
    assert [command[1:] for command in calls] == [["-m", "helpers", "fetch-model"]]


def test_a_changed_requirement_installs_again(monkeypatch, tmp_path):
    monkeypatch.setattr(install, "DONE_MARK", tmp_path / "mark")
    (tmp_path / "mark").write_text("the fingerprint of other files", encoding="utf-8")
    assert not install.is_installed()


def test_the_script_runs_before_anything_is_installed():
    """It may import the standard library alone."""
    tree = ast.parse((PROJECT_DIR / "setup" / "install.py").read_text("utf-8"))
    names = {
        alias.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    } | {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names <= sys.stdlib_module_names


def makefile_targets():
    text = (PROJECT_DIR / "Makefile").read_text("utf-8")
    return set(re.findall(r"^([a-z_0-9]+):", text, flags=re.MULTILINE))


def test_the_makefile_has_the_articles_targets():
    assert makefile_targets() >= {
        *("setup", "install", "generate_dataset", "push_dataset", "fine_tune", "merge_models"),
        *("push_model", "new_model_inference", "llama2_inference", "all", "run", "test", "lab"),
    }
