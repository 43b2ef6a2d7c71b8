"""Who may read what a run leaves is the umask's to say, and no library's."""

import os
import stat

import pytest
import torch
from safetensors.torch import save_file

from helpers.merging import export
from helpers.model import loading
from helpers.runs import folders
from tests.faults.finished_run import make_run
from tests.faults.staging import record_cell, run_notebooks, start, write_notebook
from tests.faults.train_tiny import build
from tests.notebook_code import fine_tune, merge, save_merged

UMASKS = pytest.mark.parametrize("umask", [0o022, 0o077], ids=oct)
# A library that makes its files for their owner alone is seen under 022, in `make test`.
SLOW_UMASKS = pytest.mark.parametrize(
    "umask", [0o022, pytest.param(0o077, marks=pytest.mark.slow)], ids=oct
)


def wrong_modes(folder, umask):
    """What below a folder has other permissions than a plain write gives it, by name."""
    wanted = {True: 0o777 & ~umask, False: 0o666 & ~umask}
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in [folder, *folder.rglob("*")]}
    return {
        str(path.relative_to(folder)): oct(mode)
        for path, mode in modes.items()
        if mode != wanted[path.is_dir()]
    }


def every_artefact(umask, model_dir, run_dir):
    """Dataset, adapter, checkpoints, merged model and GGUF, in a process of its own."""
    os.umask(umask)
    tokenizer = loading.load_tokenizer(str(model_dir))
    config = make_run(model_dir, tokenizer, run_dir)
    save_merged(merge(config, "16bit"), tokenizer, config)
    export.export_gguf(config)
    fine_tune(build(config))


@SLOW_UMASKS
def test_every_file_of_every_artefact_follows_the_umask(tmp_path, tiny_model_dir, umask):
    assert start(every_artefact, umask, tiny_model_dir, tmp_path / "run") == 0
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"dataset", "adapter", "checkpoints", "merged", "gguf", "metrics"} <= names
    assert list((tmp_path / "run").glob("checkpoints/**/checkpoint-*/adapter_model.safetensors"))
    assert wrong_modes(tmp_path / "run", umask) == {}


def run_job(umask, folder):
    os.umask(umask)
    run_notebooks(folder / "notebooks", folder / "run")


@SLOW_UMASKS
def test_what_the_runner_writes_follows_the_umask(tmp_path, umask):
    write_notebook(tmp_path / "notebooks", "01_one.ipynb", record_cell("01"))
    assert start(run_job, umask, tmp_path) == 0
    assert (tmp_path / "run" / "manifest.json").exists()
    assert wrong_modes(tmp_path / "run", umask) == {}


def write_weights(umask, folder):
    os.umask(umask)
    with folders.whole_folder(folder / "models" / "any") as draft:
        (draft / "inner").mkdir()
        save_file({"weight": torch.zeros(2)}, draft / "inner" / "model.safetensors")


@UMASKS
def test_a_model_in_the_shared_folder_follows_the_umask(tmp_path, umask):
    """As the embedded model is written: safetensors makes its files for their owner alone."""
    assert start(write_weights, umask, tmp_path) == 0
    assert wrong_modes(tmp_path / "models", umask) == {}
