"""What is installed: one lock of the whole tree, floors against known holes, checked weights."""

import re
from importlib.metadata import PackageNotFoundError, distribution, version

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from helpers.config import PROJECT_DIR, Config
from helpers.model import embedded, loading
from setup import install

LINE = re.compile(r"([A-Za-z0-9_.-]+)==([^\s#]+)")
# torch pins these itself, and which of them it brings depends on the platform.
OF_TORCH = ("nvidia-", "cuda-", "triton")
# The oldest versions without a known hole that lets a file or a page run code.
FLOORS = {
    "torch": "2.10",  # CVE-2026-24747
    "transformers": "5.3",  # CVE-2026-4372: code from a config, without trust_remote_code
    "jupyter-server": "2.18",  # CVE-2026-40934
}


def pins(name: str) -> dict[str, str]:
    """Versions in a requirements file, by canonical package name."""
    lines = (PROJECT_DIR / name).read_text("utf-8").splitlines()
    found = [LINE.match(line) for line in lines if line.strip() and not line.startswith("#")]
    return {canonicalize_name(match[1]): match[2] for match in found}


def dependencies(name: str, extras: frozenset):
    """What an installed package asks for here, as (name, extras)."""
    try:
        lines = distribution(name).requires or []
    except PackageNotFoundError:
        return
    for requirement in map(Requirement, lines):
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": e}) for e in extras | {""}):
            yield canonicalize_name(requirement.name), frozenset(requirement.extras)


@pytest.fixture(scope="module")
def tree():
    """Names of the direct requirements and of all that they bring with them."""
    direct = [*pins("requirements.txt"), *pins("requirements-serving.txt")]
    todo, seen = [(name, frozenset()) for name in direct], set()
    while todo:
        if (item := todo.pop()) not in seen and not item[0].startswith(OF_TORCH):
            seen.add(item)
            todo += dependencies(*item)
    return {name for name, _ in seen}


def test_the_lock_holds_the_whole_tree_and_nothing_else(tree):
    lock = pins("constraints.txt")
    assert len(tree) > 100
    assert sorted(tree - lock.keys()) == [], "not locked: make constraints.txt again"
    # Some packages are asked for on one platform or Python alone.
    extra = {name for name in lock.keys() - tree if not name.startswith(OF_TORCH)}
    assert not {name for name in extra if _is_installed(name)}


def _is_installed(name):
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


def test_the_lock_is_in_step_with_the_requirements_and_with_what_is_installed(tree):
    lock = pins("constraints.txt")
    direct = pins("requirements.txt") | pins("requirements-serving.txt")
    assert {name: lock[name] for name in direct} == direct
    for name in filter(_is_installed, tree):
        assert version(name).split("+")[0] == lock[name], name


@pytest.mark.parametrize(("name", "floor"), FLOORS.items())
def test_no_version_has_a_known_hole(name, floor):
    assert Version(pins("constraints.txt")[name]) >= Version(floor)
    assert Version(version(name)) >= Version(floor)


def test_the_installation_uses_the_lock_and_notices_when_it_changes(monkeypatch, tmp_path):
    commands = []
    monkeypatch.setattr(install, "is_installed", lambda: False)
    monkeypatch.setattr(install, "DONE_MARK", tmp_path / "mark")
    monkeypatch.setattr(install.shutil, "disk_usage", lambda path: type("", (), {"free": 1e12}))
    done = type("", (), {"returncode": 0})
    monkeypatch.setattr(install.subprocess, "run", lambda c, **o: commands.append(c) or done)
    install.install()
    (command,) = [c for c in commands if "requirements.txt" in c]
    assert command[-4:] == ["-r", "requirements.txt", "-c", "constraints.txt"]
    assert "constraints.txt" in install.INPUTS and "-c constraints.txt" in install.OFFLINE


def test_the_workflow_with_the_newest_versions_lifts_the_lock_too():
    workflow = (PROJECT_DIR / ".github" / "workflows" / "test.yml").read_text("utf-8")
    (line,) = [line for line in workflow.splitlines() if "sed -i" in line]
    assert "requirements.txt constraints.txt requirements-serving.txt" in line


# -- The embedded model.


@pytest.fixture
def damaged(tmp_path):
    """A copy of the embedded model with one bit of its weights flipped."""
    folder = tmp_path / "smollm2-135m"
    folder.mkdir()
    content = bytearray((embedded.EMBEDDED_DIR / "model.safetensors").read_bytes())
    content[200_000_000] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    return folder


def test_one_flipped_bit_is_refused_with_the_way_out(damaged):
    message = rf"model.safetensors is damaged .* \w{{64}} and not 7ef9.*delete {damaged} and run"
    with pytest.raises(embedded.ModelUnavailable, match=message):
        embedded.fetch_embedded_model(damaged)
    assert (damaged / "model.safetensors").exists()


@pytest.mark.parametrize("use", ["tokenizer", "model"])
def test_every_use_checks_the_weights(monkeypatch, use):
    monkeypatch.setattr(embedded, "EMBEDDED_WEIGHTS_SHA256", "0" * 64)
    with pytest.raises(embedded.ModelUnavailable, match="is damaged or another one"):
        if use == "tokenizer":
            loading.load_tokenizer(embedded.EMBEDDED_NAME)
        else:
            loading.load_model(Config.from_profile("smoke"))
