"""Text files are UTF-8 whatever the machine's code page: each call that opens one says so."""

import ast
import json
import os
import subprocess
import sys

import datasets
import nbformat

from helpers import prompts
from helpers.config import PROJECT_DIR
from tests.unit.test_curation import OWN_ROWS

FOLDERS = ("helpers", "setup", "benchmarks", "tests")
SOURCES = [path for name in FOLDERS for path in PROJECT_DIR.glob(f"{name}/**/*.py")]
NOTEBOOKS = sorted(PROJECT_DIR.glob("notebooks/*.ipynb"))


def code_of(path):
    if path.suffix == ".py":
        return path.read_text("utf-8")
    cells = nbformat.read(path, as_version=4).cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "code")


def nameless(code):
    """The calls in a text of Python that read or write text in an encoding they do not name.

    ruff's PLW1514 holds this too, where it can tell that a value is a path, and knows no
    subprocess.
    """
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    return [ast.unparse(call) for call in calls if _is_nameless(call)]


def _is_nameless(call):
    keywords = {word.arg: ast.unparse(word.value) for word in call.keywords}
    owner, _, name = ast.unparse(call.func).rpartition(".")
    if "encoding" in keywords or owner in ("os", "folders", "webbrowser"):
        return False
    if name in ("read_text", "write_text") and owner:
        return len(call.args) == (name == "write_text")
    if name == "open":
        before = 0 if owner else 1  # the built-in function has the path before the mode
        mode = [keywords.get("mode", ""), *map(ast.unparse, call.args[before : before + 1])]
        return "b" not in "".join(mode)
    return keywords.get("text") == "True" or "universal_newlines" in keywords


def test_what_names_no_encoding_is_found():
    for code in (
        "open('a')",
        "open('a', 'w')",
        "path.open('w', newline='')",
        "path.read_text()",
        "path.write_text('a')",
        "subprocess.run(['a'], text=True)",
    ):
        assert nameless(code) == [code]
    for code in (
        "open('a', 'rb')",
        "path.open('wb')",
        "path.read_text('utf-8')",
        "os.open('a', 0)",
        "webbrowser.open('a')",
    ):
        assert nameless(code) == []


def test_each_call_that_opens_a_text_file_names_its_encoding():
    found = {path.name: nameless(code_of(path)) for path in [*SOURCES, *NOTEBOOKS]}
    assert len(found) > 100 and not {name: calls for name, calls in found.items() if calls}


# The system message is no ASCII; the name of the source comes as the shell hands it over.
CURATE = """
import sys
from helpers.config import Config
from tests.notebook_code import curate
source, run_dir = sys.argv[1:]
curate(
    Config.from_profile(
        "smoke",
        data_source=source,
        run_dir=run_dir,
        system_message="R\\u00e9ponds.",
        near_duplicate_similarity=0.9,
    )
)
"""


def run_in_ascii(code, *arguments):
    """What a program prints where the locale is ASCII and Python is not told to use UTF-8."""
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", code, *arguments]
    said = {"capture_output": True, "encoding": "utf-8", "errors": "replace"}
    done = subprocess.run(command, env={**os.environ, **ascii_only}, cwd=PROJECT_DIR, **said)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_dataset_is_written_whole_where_the_locale_is_ascii(tmp_path):
    source = tmp_path / "donn\u00e9es.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in OWN_ROWS), encoding="utf-8")
    run_in_ascii(CURATE, source, tmp_path / "run")
    folder = tmp_path / "run" / "dataset"
    row = datasets.load_from_disk(str(folder))["train"][0]
    assert (
        prompts.parse(row["prompt"]).system == "R\u00e9ponds."
        and row["licence"] == "as in donn\u00e9es.jsonl"
    )
    card = (folder / "README.md").read_text("utf-8")
    assert '"R\u00e9ponds."' in card and "`donn\u00e9es.jsonl`" in card


ASK = """
import sys
from helpers import __main__
from helpers.answers import inference
answer = inference.Answer("q", "caf\\u00e9, done", 9, True)
inference.answer_alone = lambda *arguments: ([answer], 1.0)
sys.exit(__main__.main(["ask", "base"]))
"""


def test_an_answer_is_printed_whole_on_a_terminal_that_lacks_its_characters():
    assert run_in_ascii(ASK) == "caf\\xe9, done\n"
