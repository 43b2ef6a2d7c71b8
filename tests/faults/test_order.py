"""Notebooks and cells in another order: a guard with a sentence, or the same result.

On a random model of two layers, in this process: what a kernel adds, test_smoke.py runs.
"""

import json
import shutil

import pytest
from peft import LoraConfig, get_peft_model

from helpers.merging import merging
from helpers.model import loading
from helpers.runs import runner
from tests.faults.staging import folder_hashes
from tests.walking import CellFailed, walk

MEASURED = (
    "_seconds",
    "_per_second",
    "peak_memory_bytes",
    "batch_speedup",
    "predicted",
)  # differ from run to run


def each_twice(code):
    return [cell for cell in code for _ in range(2)]


def up_to(words):
    """The cells up to the one that holds the words."""
    return lambda code: code[: _place(code, words) + 1]


def setup_and_from(words):
    """The cell that makes the Config, then those from the one that holds the words on."""
    return lambda code: [code[0], *code[_place(code, words) :]]


def _place(code, words):
    (place,) = [number for number, cell in enumerate(code) if words in cell.source]
    return place


@pytest.fixture(scope="module")
def execute(tiny_model_dir):
    """Walk a notebook by number and edit in a run folder, in a namespace of its own."""
    given = {"PROFILE": "smoke", "MODEL_NAME": str(tiny_model_dir), "SANDBOX": "limits-only"}
    return lambda number, run_dir, edit=list: walk(number, edit, RUN_DIR=str(run_dir), **given)


@pytest.fixture(scope="module")
def straight(execute, tmp_path_factory):
    """The run folder after 02, 04, 05 and 06, each cell once."""
    folder = tmp_path_factory.mktemp("straight")
    for number in ("02", "04", "05", "06"):
        execute(number, folder)
    return folder


@pytest.fixture
def run_dir(straight, tmp_path):
    return shutil.copytree(straight, tmp_path / "run")


def results(folder, number):
    """The metrics of a lesson that must not differ between two runs."""
    metrics = json.loads((folder / "metrics" / f"{number}.json").read_text("utf-8"))
    return {name: value for name, value in metrics.items() if not name.endswith(MEASURED)}


# -- Any notebook first.


@pytest.mark.parametrize(
    ("number", "missing", "first"),
    [
        ("03", "dataset", "02"),
        ("04", "dataset", "02"),
        ("05", "adapter", "04"),
        ("06", "adapter", "04"),
    ],
)
def test_a_notebook_that_comes_too_early_names_the_one_to_run(
    execute, tmp_path, number, missing, first
):
    message = rf"{missing} is missing: run notebook {first} with PROFILE = 'smoke' first"
    with pytest.raises(CellFailed, match=message):
        execute(number, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics").exists()


# -- Cells run twice.


@pytest.mark.slow
@pytest.mark.parametrize("number", ["02", "04", "05", "06"])
def test_each_cell_twice_gives_the_same_result(execute, straight, run_dir, number):
    execute(number, run_dir, each_twice)
    assert results(run_dir, number) == results(straight, number)
    for artefact, weights in [
        ("dataset", "data-*.arrow"), ("adapter", "*.safetensors"), ("merged", "*"), ("gguf", "*"),
    ]:  # fmt: skip
        before, after = (folder_hashes(f / artefact, weights) for f in (straight, run_dir))
        assert before == after != {}


def test_no_adapter_is_loaded_onto_another(tiny_config, tiny_model_dir):
    adapted = get_peft_model(loading.load_model(tiny_config), LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(tiny_config.adapter_dir)
    with pytest.raises(ValueError, match="the model carries an adapter already: load it again"):
        merging.load_tuned(tiny_config, adapted)


# -- Begun anew half-way, as after the kernel's restart.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "last", "artefact"),
    [
        ("02", "curate(", "dataset"),
        ("04", "trainer.train(", "adapter"),
        ("05", "merging.saving(", "merged"),
    ],
)
def test_from_the_start_after_a_stop_half_way_gives_the_same(
    execute, straight, run_dir, number, last, artefact
):
    execute(number, run_dir, up_to(last))
    execute(number, run_dir)
    assert results(run_dir, number) == results(straight, number)
    weights = "data-*.arrow" if number == "02" else "*.safetensors"
    before, after = (folder_hashes(f / artefact, weights) for f in (straight, run_dir))
    assert before == after != {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "middle"), [("04", "trainer.save_model("), ("05", "merging.saving(")]
)
def test_on_from_the_middle_in_a_fresh_namespace_stops_and_loses_nothing(
    execute, straight, run_dir, number, middle
):
    with pytest.raises(CellFailed, match="NameError: name '.*' is not defined"):
        execute(number, run_dir, setup_and_from(middle))
    for artefact in ("dataset", "adapter", "merged", "metrics"):
        assert folder_hashes(run_dir / artefact) == folder_hashes(straight / artefact)


def test_the_runner_runs_any_notebook_first_and_says_what_is_missing(tmp_path):
    message = r"05_merging, cell 4 \(import gc\): FileNotFoundError: .*run notebook 04 with"
    with pytest.raises(runner.RunStopped, match=message):
        runner.run("smoke", str(tmp_path / "run"), only="05")
