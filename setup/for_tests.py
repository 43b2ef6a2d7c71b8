"""Install what tests need beside Python packages: a Chromium, and on Linux bubblewrap.

`make test` runs it in `.venv`. What is there already stays as it is. As root the system's package
manager helps out, anyone else is told what to run. What cannot be had stops nothing here: the last
lines of the tests say what was left out.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")
PLAYWRIGHT = f"{shlex.quote(sys.executable)} -m playwright"
DOWNLOAD_SECONDS, PACKAGE_SECONDS = 300, 600
PACKAGE_MANAGERS = {
    "apt-get": "apt-get update && apt-get install --yes --no-install-recommends {}",
    "dnf": "dnf install --assumeyes {}",
    "pacman": "pacman -Sy --noconfirm {}",
}


def find_browser(playwright) -> str | None:
    """The path of a Chromium that starts: Playwright's own, else the system's, else None.

    playwright: what `sync_playwright()` gives.
    """
    paths = [playwright.chromium.executable_path, *map(shutil.which, CHROMIUM_NAMES)]
    return next((path for path in paths if path and starts(path)), None)


def starts(program: str) -> bool:
    """Whether a program can say its version: a stub, or one without its libraries, cannot."""
    try:
        return subprocess.run([program, "--version"], capture_output=True).returncode == 0
    except OSError:
        return False


def command_for_browser(playwright) -> str:
    """What root runs for a Chromium where Playwright's download did not bring one that starts."""
    if Path(playwright.chromium.executable_path).exists():
        return f"{PLAYWRIGHT} install-deps chromium"  # the system's libraries, which it lacks
    return command_for_package("chromium")


def command_for_package(name: str) -> str:
    """What root runs for a package of the system."""
    manager = next(filter(shutil.which, PACKAGE_MANAGERS), None)
    if manager is None:
        return f"the installer of this system for {name}"
    return PACKAGE_MANAGERS[manager].format(name)


def run(command: str, seconds: float) -> None:
    """Run a shell command in silence. When it fails, one line says what it met."""
    process = subprocess.Popen(
        command,
        shell=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
        env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        output = f"it was not done in {seconds} seconds"
    finally:
        if process.poll() is None:  # with what it has started: a download would go on by itself
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode != 0:
        lines = output.strip().splitlines() or ["it said nothing"]
        errors = [line for line in lines if line.startswith(("Error", "E: "))]
        print(f"`{command}` failed: {(errors or lines[-1:])[0]}")


def run_as_root(what: str, command: str) -> None:
    """Run what only root may, or say that root should."""
    if os.geteuid() != 0:
        print(f"the tests need {what}: as root run `{command}`")
        return
    print(f"setting up {what}: `{command}`", flush=True)
    run(command, PACKAGE_SECONDS)


def install_browser(playwright) -> None:
    """See to a Chromium that starts."""
    if find_browser(playwright):
        return
    command = f"{PLAYWRIGHT} install --no-shell chromium"
    print(f"setting up a Chromium: `{command}`", flush=True)
    run(command, DOWNLOAD_SECONDS)
    if not find_browser(playwright):
        run_as_root("a Chromium", command_for_browser(playwright))


def install_bubblewrap() -> None:
    """See to bubblewrap, with which the sandbox isolates where plain namespaces are refused."""
    if sys.platform == "linux" and not shutil.which("bwrap"):
        run_as_root("bubblewrap", command_for_package("bubblewrap"))


if __name__ == "__main__":
    with sync_playwright() as driver:
        install_browser(driver)
    install_bubblewrap()
