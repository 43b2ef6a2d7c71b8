"""Weights from elsewhere: safetensors only, and no code of theirs is run, as a canary shows."""

import ast
import dataclasses
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from helpers.config import PROJECT_DIR
from helpers.merging import merging
from helpers.model import loading
from helpers.runs.inventory import ArtefactError
from helpers.training import checkpoints
from tests.faults.finished_run import contents, copy_run, make_run
from tests.faults.train_tiny import build
from tests.notebook_code import NOTEBOOKS, notebook_source

# Calls that run what a file says, and the keyword that lets transformers do it.
UNSAFE_CALLS = {
    "torch.load",
    "pickle.load",
    "pickle.loads",
    "joblib.load",
    "dill.load",
    "pd.read_pickle",
    "pandas.read_pickle",
    "yaml.load",
    "yaml.unsafe_load",
    "marshal.loads",
    "shelve.open",
}
UNSAFE_KEYWORDS = {"trust_remote_code", "allow_pickle", "weights_only"}


class Payload:
    """Leaves a canary file when it is unpickled."""

    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return os.mkdir, (self.canary,)


@pytest.fixture
def canary(tmp_path):
    """A path that must not come to exist."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "the payload was run"


@pytest.fixture(scope="module")
def finished(tiny_model_dir, tokenizer, tmp_path_factory):
    return make_run(tiny_model_dir, tokenizer, tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def config(finished, tmp_path):
    config = copy_run(finished, tmp_path / "run")
    folder = shutil.copytree(config.model_name, tmp_path / Path(config.model_name).name)
    return dataclasses.replace(config, model_name=str(folder))


def test_the_payload_does_run_where_a_pickle_is_simply_loaded(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


# -- A model's folder.


def poison(folder, name, canary):
    """Write a payload under the name of a weights file, as torch and as bare pickle do."""
    path = folder / name
    torch.save({"weight": Payload(canary)}, path)
    path.with_suffix(".pkl").write_bytes(pickle.dumps(Payload(canary)))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_folder_with_pickled_weights_alone_is_refused(config, canary, name):
    folder = Path(config.model_name)
    (folder / "model.safetensors").unlink()
    poison(folder, name, canary)
    before = contents(folder)
    with pytest.raises(ArtefactError, match="holds no .safetensors file, and no other form of"):
        loading.load_model(config)
    assert contents(folder) == before


def test_pickled_weights_beside_safetensors_are_not_looked_at(config, canary):
    wanted = loading.load_model(config, quantized=False).state_dict()
    poison(Path(config.model_name), "pytorch_model.bin", canary)
    found = loading.load_model(config, quantized=False).state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_pickle_under_the_name_of_safetensors_is_refused(config, canary):
    path = Path(config.model_name) / "model.safetensors"
    path.write_bytes(pickle.dumps(Payload(canary)))
    with pytest.raises(ArtefactError, match="model.safetensors is cut off or damaged"):
        loading.load_model(config)


def bring_code(folder, canary, name: str, kind: str) -> None:
    """Code in a model's folder that leaves a trace when it is run, named by one of its files."""
    (folder / "code.py").write_text(
        f"import os\nos.mkdir({str(canary)!r})\nclass Own: pass\n", encoding="utf-8"
    )
    settings = json.loads((folder / name).read_text("utf-8"))
    classes = {"AutoConfig": "code.Own", "AutoModelForCausalLM": "code.Own"}
    settings["auto_map"] = {**classes, "AutoTokenizer": ["code.Own", "code.Own"]}
    if name == "config.json":
        settings["model_type"] = kind
    (folder / name).write_text(json.dumps(settings), encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "kind"), [("config.json", "unknown-to-transformers"), ("tokenizer_config.json", "")]
)
def test_code_that_a_model_brings_is_not_run(config, canary, name, kind):
    folder = Path(config.model_name)
    bring_code(folder, canary, name, kind)
    for load in (lambda: loading.load_model(config), lambda: loading.load_tokenizer(str(folder))):
        with pytest.raises(ArtefactError, match=f"{name} names code to be run .* never run here"):
            load()


def test_code_of_a_model_that_transformers_knows_is_left_alone(config, canary):
    """Phi-3's config names code, from the time when transformers had none for it."""
    bring_code(Path(config.model_name), canary, "config.json", "llama")
    assert loading.load_model(config) and loading.load_tokenizer(config.model_name)


# -- An adapter and a checkpoint.


def test_an_adapter_as_a_pickle_is_refused(config, canary):
    poison(config.adapter_dir, "adapter_model.bin", canary)
    (config.adapter_dir / merging.ADAPTER_WEIGHTS).unlink()
    before = contents(config.adapter_dir)
    with pytest.raises(
        ArtefactError, match="no other form of weights is read: run notebook 04 again"
    ):
        merging.load_tuned(config)
    assert contents(config.adapter_dir) == before


def test_an_adapter_without_its_file_is_refused_whatever_lies_beside_it(config):
    weights = config.adapter_dir / merging.ADAPTER_WEIGHTS
    weights.rename(weights.with_name("other.safetensors"))
    with pytest.raises(ArtefactError, match="has no adapter_model.safetensors: run notebook 04"):
        merging.load_tuned(config)


def test_an_adapter_with_a_pickle_beside_it_loads_without_it(config, canary):
    poison(config.adapter_dir, "adapter_model.bin", canary)
    assert merging.load_tuned(config)


@pytest.fixture(scope="module")
def checkpoint(finished, tokenizer):
    """The folder of a checkpoint after two steps."""
    config = dataclasses.replace(finished, max_steps=2)
    trainer = build(config)
    trainer.train()
    return checkpoints.latest(Path(trainer.args.output_dir))


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"]
)
def test_a_payload_in_a_checkpoint_does_not_run(finished, checkpoint, tokenizer, canary, name):
    config = dataclasses.replace(finished, max_steps=2)
    whole = contents(checkpoint)
    torch.save({"state": Payload(canary)}, checkpoint / name)
    trainer = build(config)
    try:
        if name == "training_args.bin":  # nothing reads it
            trainer.train(resume_from_checkpoint=str(checkpoint))
        else:
            with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
                trainer.train(resume_from_checkpoint=str(checkpoint))
    finally:
        for path in checkpoint.iterdir():
            path.unlink()
        for path, data in whole.items():
            (checkpoint / path).write_bytes(data)


# -- Our own code.


def sources():
    for folder in ("helpers", "benchmarks"):
        for path in sorted((PROJECT_DIR / folder).rglob("*.py")):
            yield str(path.relative_to(PROJECT_DIR)), path.read_text("utf-8")
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        yield path.name, notebook_source(path)


def unsafe(text):
    """Calls and keywords of a program that would run what a file says."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            if ast.unparse(node.func) in UNSAFE_CALLS:
                yield ast.unparse(node.func)
            given = (k.arg for k in node.keywords if ast.unparse(k) != "trust_remote_code=False")
            yield from (name for name in given if name in UNSAFE_KEYWORDS)
        if isinstance(node, ast.Dict):  # keywords that are handed over by **
            keys = (key.value for key in node.keys if isinstance(key, ast.Constant))
            yield from (key for key in keys if key in UNSAFE_KEYWORDS)


@pytest.mark.parametrize(("name", "text"), list(sources()), ids=lambda value: value[:40])
def test_no_program_here_runs_what_a_file_says(name, text):
    assert list(unsafe(text)) == []


def test_the_search_above_finds_what_it_is_for():
    program = (
        "torch.load(p, weights_only=False)\nf(trust_remote_code=True)\ng(**{'allow_pickle': 1})"
    )
    assert set(unsafe(program)) == {"torch.load", *UNSAFE_KEYWORDS}
    assert not list(unsafe("f(trust_remote_code=False)"))


def test_every_model_is_loaded_from_safetensors_or_a_pinned_gguf():
    """Each from_pretrained of a model says so, or reads a GGUF whose checksum was compared."""
    calls = [
        ast.unparse(node)
        for _, text in sources()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call)
        and "AutoModelForCausalLM.from_pretrained" in map(ast.unparse, (node.func, *node.args))
    ]
    assert calls
    assert all("use_safetensors=True" in call or "gguf_file=" in call for call in calls)
