"""Each run folder says what it was made of, and `python -m helpers verify` checks it."""

import json
import shutil

import pytest

from helpers.__main__ import main
from helpers.config import PROJECT_DIR, Config
from helpers.runs import inventory, manifest
from tests.faults.staging import record_cell, run_notebooks, write_notebook

SAVE = """from helpers.config import Config
config = Config.from_notebook(globals())
for name in ("dataset/train/data.arrow", "adapter/adapter_model.safetensors"):
    path = config.run_dir / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"content of " + name.encode())"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The run folder of two small notebooks that leave a dataset, an adapter and a number."""
    folder = tmp_path_factory.mktemp("manifest")
    write_notebook(folder / "notebooks", "01_one.ipynb", SAVE, record_cell("01"))
    with pytest.MonkeyPatch.context() as patch:
        from helpers.runs import runner

        patch.setattr(runner, "NOTEBOOKS_DIR", runner.NOTEBOOKS_DIR)  # put back afterwards
        run_notebooks(folder / "notebooks", folder / "run", parameters={"MAX_STEPS": 7})
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def test_it_records_versions_hardware_parameters_and_hashes(finished):
    record = json.loads((finished / "manifest.json").read_text("utf-8"))
    assert record["parameters"] == {"PROFILE": "smoke", "RUN_DIR": str(finished), "MAX_STEPS": 7}
    assert record["settings"]["max_steps"] == 7 and record["settings"]["lora_r"] == 64
    assert "CPU cores" in record["environment"]["hardware"]
    assert record["versions"]["torch"].startswith("2.") and "trl" in record["versions"]
    files = {
        *("dataset/train/data.arrow", "adapter/adapter_model.safetensors"),
        *("metrics/01.json", "executed/01_one.ipynb"),
    }
    assert record["artefacts"].keys() == files
    sample = inventory.sha256(PROJECT_DIR / "data" / "sample" / "Answers.csv")
    assert record["data"]["Answers.csv"] == sample
    assert record["base_model"]["model.safetensors"].startswith("7ef915c9")
    assert {"helpers/training/training.py", "constraints.txt", "notebooks/05_merging.ipynb"} <= set(
        record["code"]
    )


def test_a_package_that_is_not_here_ends_no_run(tmp_path, monkeypatch):
    """Colab has neither JupyterLab nor the test suite."""
    monkeypatch.setattr(manifest, "requirements", lambda: ["torch", "no-such-package"])
    manifest.write(Config.from_profile("smoke", run_dir=tmp_path), {}, {})
    versions = json.loads((tmp_path / "manifest.json").read_text("utf-8"))["versions"]
    assert versions["no-such-package"] == "not installed" and versions["torch"].startswith("2.")
    assert manifest.verify(tmp_path) == 0


def test_an_untouched_run_is_verified(run, capsys):
    assert main(["verify", str(run)]) == 0
    assert capsys.readouterr().out == "4 files as the manifest records them\n"


def test_everything_that_differs_is_named_at_once(run, capsys):
    with (run / "adapter" / "adapter_model.safetensors").open("ab") as file:
        file.write(b"!")
    (run / "metrics" / "01.json").unlink()
    (run / "dataset" / "planted.pkl").write_bytes(b"new")
    assert main(["verify", str(run)]) == 1
    message = capsys.readouterr().err
    assert message.startswith(f"stopped: {run} differs from its manifest: metrics/01.json is missi")
    assert "dataset/planted.pkl is not part of the run" in message
    assert "adapter/adapter_model.safetensors was " in message
    assert "dataset/train/data.arrow" not in message


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        (
            "code",
            "helpers/training/training.py",
            "0" * 64,
            "helpers/training/training.py was 000000000000 and is",
        ),
        ("versions", "torch", "1.0", "torch was 1.0 and is 2."),
        ("data", "Answers.csv", "0" * 64, "Answers.csv was 000000000000 and is"),
        ("base_model", "model.safetensors", "0" * 64, "model.safetensors was 0.* and is 7ef915c9"),
    ],
)
def test_other_code_data_versions_or_weights_are_named(run, part, name, value, message):
    record = json.loads((run / "manifest.json").read_text("utf-8"))
    record[part][name] = value
    (run / "manifest.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(manifest.ManifestError, match=message):
        manifest.verify(run)


def test_what_datasets_caches_and_an_upload_adds_is_no_difference(run):
    (run / "dataset" / "train" / "cache-1a2b.arrow").touch()
    (run / "merged").mkdir()
    (run / "merged" / "README.md").touch()
    assert manifest.verify(run) == 4


def test_a_folder_without_a_manifest_says_what_writes_it(tmp_path):
    with pytest.raises(manifest.ManifestError, match="manifest.json is missing: `python -m help"):
        manifest.verify(tmp_path)
