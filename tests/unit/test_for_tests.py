"""What tests need beside Python packages: found where it is, installed where that can be done."""

import subprocess
import time
from types import SimpleNamespace

import pytest

from helpers.config import PROJECT_DIR
from setup import for_tests


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine of shell scripts: `machine(name, text)` adds a program, and returns its path."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(for_tests, "PLAYWRIGHT", str(tmp_path / "playwright"))
    monkeypatch.setattr(for_tests.os, "geteuid", lambda: 0)
    monkeypatch.setattr(for_tests.sys, "platform", "linux")

    def add(name, text):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n", "utf-8")
        (tmp_path / name).chmod(0o755)
        return str(tmp_path / name)

    add("playwright", "echo Downloading; echo 'Error: no such host'; echo '  at line 1'; exit 1")
    return add


@pytest.fixture
def playwright(tmp_path):
    return SimpleNamespace(chromium=SimpleNamespace(executable_path=str(tmp_path / "own")))


def writes(path):
    """A script that makes a program which starts."""
    return f"{{ printf '#!/bin/sh\\n' > {path}; /bin/chmod 755 {path}; }}"


def test_a_browser_is_playwrights_own_or_else_one_of_the_systems_that_starts(machine, playwright):
    assert for_tests.find_browser(playwright) is None
    machine("chromium-browser", "echo 'install the snap for this'; exit 1")
    assert for_tests.find_browser(playwright) is None
    chrome = machine("google-chrome", "")
    assert for_tests.find_browser(playwright) == chrome
    own = machine("own", "exit 127")
    assert for_tests.find_browser(playwright) == chrome, "its libraries are wanting"
    machine("own", "")
    assert for_tests.find_browser(playwright) == own


def test_a_browser_that_is_there_is_left_alone(machine, playwright, capsys):
    machine("chromium", "")
    machine("apt-get", "exit 1")
    for_tests.install_browser(playwright)
    assert capsys.readouterr().out == ""


def test_playwrights_download_is_tried_first(machine, playwright, tmp_path, capsys):
    machine(
        "playwright", f'test "$*" = "install --no-shell chromium" && {writes(tmp_path / "own")}'
    )
    machine("apt-get", "exit 1")
    for_tests.install_browser(playwright)
    assert for_tests.find_browser(playwright) == str(tmp_path / "own")
    assert "apt-get" not in capsys.readouterr().out


def test_where_it_cannot_be_had_root_takes_the_systems(machine, playwright, tmp_path, capsys):
    machine("apt-get", f'test "$*" = update || {writes(tmp_path / "chromium")}')
    for_tests.install_browser(playwright)
    assert for_tests.find_browser(playwright) == str(tmp_path / "chromium")
    _, failure, second = capsys.readouterr().out.splitlines()
    assert failure.endswith("install --no-shell chromium` failed: Error: no such host")
    assert second.startswith("setting up a Chromium: `apt-get update && apt-get install")


def test_a_download_that_lacks_libraries_gets_them(machine, playwright, tmp_path):
    machine("own", "exit 127")
    machine("playwright", f'test "$*" = "install-deps chromium" && {writes(tmp_path / "own")}')
    for_tests.install_browser(playwright)
    assert for_tests.find_browser(playwright) == str(tmp_path / "own")


def test_who_is_not_root_is_told_the_command(machine, playwright, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(for_tests.os, "geteuid", lambda: 1000)
    machine("apt-get", f"echo > {tmp_path}/was-run")
    for_tests.install_browser(playwright)
    for_tests.install_bubblewrap()
    *_, browser, bubblewrap = capsys.readouterr().out.splitlines()
    command = "`apt-get update && apt-get install --yes --no-install-recommends {}`"
    assert browser == "the tests need a Chromium: as root run " + command.format("chromium")
    assert bubblewrap == "the tests need bubblewrap: as root run " + command.format("bubblewrap")
    assert not (tmp_path / "was-run").exists()


def test_bubblewrap_is_installed_once(machine, tmp_path, capsys):
    machine("apt-get", f'test "$*" = update || {writes(tmp_path / "bwrap")}')
    for_tests.install_bubblewrap()
    assert "setting up bubblewrap: `apt-get" in capsys.readouterr().out
    for_tests.install_bubblewrap()
    assert capsys.readouterr().out == ""


def test_a_command_over_its_time_ends_with_all_that_it_started(tmp_path, capsys):
    late = tmp_path / "late"
    started = time.monotonic()
    for_tests.run(f"(sleep 3; echo > {late}) & wait", 0.3)
    assert time.monotonic() - started < 2
    assert capsys.readouterr().out.endswith("failed: it was not done in 0.3 seconds\n")
    time.sleep(3)
    assert not late.exists()


@pytest.mark.parametrize(
    ("target", "expected"), [("run", False), ("test", True), ("test-slow", True)]
)
def test_only_tests_ask_for_a_browser(target, expected):
    command = ["make", "--dry-run", "--directory", str(PROJECT_DIR), target]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
    assert ("setup/for_tests.py" in done.stdout) is expected
