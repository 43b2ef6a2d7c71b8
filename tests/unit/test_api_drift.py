"""Every keyword we pass to trl, peft, transformers and bitsandbytes exists where it is installed.

The keywords are read from our own source, so that the next rename is caught without a GPU and
without a call.
"""

import ast
import inspect

import bitsandbytes
import peft
import pytest
import transformers
import trl

from helpers.config import PROFILES, PROJECT_DIR, Config
from helpers.training import machine
from tests.notebook_code import NOTEBOOKS, notebook_source

LIBRARIES = (trl, peft, transformers, bitsandbytes.nn)
# Old names that tutorials still use. None may come back, in code or in a profile.
GONE = {
    "evaluation_strategy",
    "max_seq_length",
    "torch_dtype",
    "load_in_8bit",
    "overwrite_output_dir",
    "save_safetensors",
    "no_cuda",
    "gradient_checkpointing",
    "trust_remote_code",  # but for =False: transformers would ask on the terminal
    "use_temp_dir",
}


OURS = {"Trainer": "SFTTrainer"}  # notebook 04 chooses between it and a subclass


def sources():
    for path in sorted((PROJECT_DIR / "helpers").rglob("*.py")):
        yield path.name, path.read_text("utf-8")
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        yield path.name, notebook_source(path)


def calls():
    """(file, callable's name, keywords) of every call with keywords in helpers and notebooks."""
    for name, text in sources():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call):
                refused = "trust_remote_code=False"
                given = [each for each in node.keywords if ast.unparse(each) != refused]
                keywords = {keyword.arg for keyword in given if keyword.arg}
                function = getattr(
                    node.func, "orelse", node.func
                )  # (Ours if fast else Theirs)(...)
                called = getattr(function, "attr", getattr(function, "id", None))
                yield name, OURS.get(called, called), keywords


def library_object(name):
    for library in LIBRARIES:
        if name and name[0].isupper() and hasattr(library, name):
            return getattr(library, name)
    return None


CHECKED = [(f, n, k) for f, n, k in calls() if library_object(n) is not None and k]


def test_the_calls_that_matter_are_found():
    assert {"SFTConfig", "SFTTrainer", "LoraConfig", "BitsAndBytesConfig"} <= {
        name for _, name, _ in CHECKED
    }


def identifier(value):
    """A set has another order in each process, and pytest-xdist wants the same names in all."""
    return str(sorted(value) if isinstance(value, set) else value)[:40]


@pytest.mark.parametrize(("file", "name", "keywords"), CHECKED, ids=identifier)
def test_keywords_exist(file, name, keywords):
    signature = inspect.signature(library_object(name))
    known = set(signature.parameters)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    assert keywords <= known or open_ended, f"{file}: {name} has no {keywords - known}"


def test_from_pretrained_gets_no_old_keyword():
    for file, name, keywords in calls():
        assert not keywords & GONE, f"{file}: {name}({keywords & GONE})"


@pytest.mark.parametrize("profile", PROFILES)
def test_what_follows_from_the_machine_are_arguments_of_sft_config(profile):
    known = inspect.signature(trl.SFTConfig).parameters
    assert machine.for_this_machine(Config.from_profile(profile)).keys() <= known.keys()
