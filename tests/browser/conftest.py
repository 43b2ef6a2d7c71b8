"""JupyterLab on loopback behind a token, Chromium to look at it, and the lessons to open there."""

import json
import os
import secrets
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from helpers.config import PROJECT_DIR, Config
from helpers.runs.lessons import notebooks
from tests.walking import first_tokens, save_random_model

SCREENSHOTS = PROJECT_DIR / "runs" / "browser"
NEEDS = {"03": ("02",), "04": ("02",), "05": ("04",), "06": ("05",)}
SECONDS = 1000  # Playwright counts in milliseconds
# To end a lesson that hangs, not to judge a slow one: on two cores that other work shares, lesson
# 05 has taken more than three minutes.
LESSON_LIMIT = 600
SETTINGS = {
    # JupyterLab takes cells that are off screen out of the page; a test has to see them.
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}

# Added to the copy of notebook 06: an answerer that repeats the question and is hostile.
HOSTILE = "</pre><img src=x onerror=\"document.title='attacked'\"><b>bold</b>"
HOSTILE_CELL = f"""
hostile = {HOSTILE!r}
text_views.show_side_by_side(hostile, hostile, hostile)
widgets.side_by_side({{"hostile": lambda text: [text, hostile]}})
"""


RUN_ALL = """async () => {
    const {restored, shell, commands} = window.jupyterapp;
    await restored;
    await shell.currentWidget.sessionContext.ready;
    window.ended = null;
    commands.execute("notebook:run-all-cells").then(good => { window.ended = good });
}"""


def wait_until(condition, seconds: float) -> None:
    """Ask until the answer is yes; the test fails when it is not in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.1)


class Lab:
    """A running JupyterLab, and the one lesson that is open in it. `lesson` is what tests ask."""

    def __init__(self, browser, url: str, token: str, folder: Path, config: Config):
        self.context = browser.new_context(viewport={"width": 1280, "height": 900})
        self.url, self.token, self.folder, self.config = url, token, folder, config
        self.open, self.page = None, None

    def lesson(self, number: str):
        """The page of a lesson after Run All; lessons that it needs are run before."""
        if self.open != number:
            for needed in NEEDS.get(number, ()):
                if not (self.config.metrics_dir / f"{needed}.json").exists():
                    self.lesson(needed)
            self.close()
            self.page, self.open = self._run_all(number), number
        return self.page

    def _run_all(self, number: str):
        (path,) = self.folder.glob(f"{number}_*.ipynb")
        page = self.context.new_page()
        page.goto(f"{self.url}lab/tree/{path.name}?token={self.token}&reset")
        page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").wait_for(
            timeout=60 * SECONDS
        )
        page.evaluate(RUN_ALL)
        wait_until(lambda: page.evaluate("window.ended !== null"), LESSON_LIMIT)
        return page

    def picture(self, name: str) -> None:
        """Keep a screenshot of the whole notebook, or of as much as Chromium can draw at once."""
        panel = "document.querySelector('.jp-WindowedPanel-outer')"
        height = self.page.evaluate(f"{panel}.scrollHeight")
        self.page.set_viewport_size({"width": 1280, "height": min(height + 120, 16_000)})
        self.page.evaluate(f"{panel}.scrollTop = 0")
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SCREENSHOTS / f"{name}.png")
        self.page.set_viewport_size({"width": 1280, "height": 900})

    def close(self) -> None:
        """Shut the open lesson's kernel down, so that one model at a time lies in memory."""
        if self.page is not None:
            self.page.evaluate("window.jupyterapp.serviceManager.sessions.shutdownAll()")
            self.page.close()
        self.page, self.open = None, None


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """(url, token, folder): a server with settings of its own that shows an empty folder."""
    home, folder = tmp_path_factory.mktemp("jupyter"), tmp_path_factory.mktemp("lessons")
    for name, settings in SETTINGS.items():
        path = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings), encoding="utf-8")
    token = secrets.token_hex(16)
    options = {
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.port": 0,
        "ServerApp.root_dir": folder,
        "ServerApp.allow_root": True,
        "IdentityProvider.token": token,
        "LabApp.user_settings_dir": home / "settings",
        "LabApp.workspaces_dir": home / "workspaces",
        "LabApp.expose_app_in_browser": True,
    }
    command = [sys.executable, "-m", "jupyterlab", "--no-browser"]
    command += [f"--{name}={value}" for name, value in options.items()]
    places = {"JUPYTER_RUNTIME_DIR": home, "JUPYTER_CONFIG_DIR": home, "IPYTHONDIR": home}
    environment = {
        **os.environ,
        "PYTHONPATH": str(PROJECT_DIR),
        **{k: str(v) for k, v in places.items()},
    }
    with open(home / "log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        yield _address(home, process), token, folder
    finally:
        process.terminate()
        process.wait(30)


def _address(home: Path, process, patience: float = 60) -> str:
    """The address that the server writes down once it listens."""
    end = time.monotonic() + patience
    while time.monotonic() < end and process.poll() is None:
        for path in home.glob("jpserver-*.json"):
            return json.loads(path.read_text("utf-8"))["url"]
        time.sleep(0.2)
    pytest.fail(f"JupyterLab did not start: {(home / 'log').read_text('utf-8')[-2000:]}")


@pytest.fixture(scope="session")
def lab(browser, server, tmp_path_factory, tokenizer):
    """JupyterLab over copies of the six lessons, with profile smoke and one fresh run folder.

    The model is a tiny random one: what is looked at is the page. test_smoke.py runs the real one.
    """
    url, token, folder = server
    model = tmp_path_factory.mktemp("model")
    save_random_model("LlamaConfig", first_tokens(tokenizer, 2000, model), model)
    config = Config.from_profile("smoke", run_dir=tmp_path_factory.mktemp("run"))
    # Where this machine can isolate nothing, generated code still runs under limits, by name.
    parameters = {"PROFILE": "smoke", "RUN_DIR": str(config.run_dir), "SANDBOX": "limits-only"}
    parameters |= {"MODEL_NAME": str(model)}
    for path in notebooks():
        notebook = parameterize_notebook(load_notebook_node(str(path)), parameters)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        if path.name.startswith("06_"):
            notebook.cells.append(new_code_cell(HOSTILE_CELL.strip()))
        nbformat.write(notebook, folder / path.name)
    running = Lab(browser, url, token, folder, config)
    yield running
    running.close()
