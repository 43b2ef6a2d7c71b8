"""A token in the environment goes nowhere; a token as a parameter is refused before it is written.

The six notebooks themselves run with the same token in tests/notebooks/test_smoke.py.
"""

import pytest

from helpers.__main__ import main
from helpers.config import ConfigError
from helpers.merging.publishing import model_card
from helpers.runs import inventory, lessons, runner
from tests.faults.staging import record_cell, run_notebooks, write_notebook
from tests.notebook_code import curate

CANARY = "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"
# Asks the Hub for what is not there, so that the client's own error is in the output.
ASK_THE_HUB = """from helpers.model import embedded, loading
try:
    loading.load_tokenizer("meta-llama/Llama-2-7b-hf")
except embedded.ModelUnavailable as error:
    print("the error:", error)"""


@pytest.fixture(autouse=True)
def planted(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.setattr(lessons, "NOTEBOOKS_DIR", lessons.NOTEBOOKS_DIR)  # put back afterwards


@pytest.fixture
def nothing_starts(monkeypatch):
    monkeypatch.setattr(runner, "_run_in_order", lambda *a: pytest.fail("notebooks were started"))


def holds_canary(folder):
    return [path for path in folder.rglob("*") if path.is_file() and CANARY in _text(path)]


def _text(path):
    return path.read_bytes().decode("latin-1")


def test_no_output_metadata_manifest_or_report_holds_the_token(tmp_path, capfd):
    write_notebook(tmp_path / "notebooks", "01_one.ipynb", ASK_THE_HUB, record_cell("01"))
    write_notebook(tmp_path / "notebooks", "02_two.ipynb", "raise RuntimeError('to be reported')")
    with pytest.raises(runner.RunStopped):
        run_notebooks(tmp_path / "notebooks", tmp_path / "run")
    run = tmp_path / "run"
    assert "the error: meta-llama" in _text(run / "executed" / "01_one.ipynb")
    assert "to be reported" in _text(run / "report.html")
    assert (run / "manifest.json").exists() and holds_canary(run) == []
    out, err = capfd.readouterr()
    assert CANARY not in out + err


def test_no_dataset_and_no_card_holds_the_token(tiny_config):
    curate(tiny_config)
    inventory.record_metrics(tiny_config, "04", {"eval_loss_after": 1.5})
    assert holds_canary(tiny_config.run_dir) == []
    assert CANARY not in model_card(tiny_config)


def test_the_search_finds_a_token_that_is_there(tmp_path):
    write_notebook(
        tmp_path / "notebooks", "01_one.ipynb", "import os; print(os.environ['HF_TOKEN'])"
    )
    run_notebooks(tmp_path / "notebooks", tmp_path / "run")
    assert {path.name for path in holds_canary(tmp_path / "run")} == {"01_one.ipynb"}


@pytest.mark.parametrize("name", ["HF_TOKEN", "hf_token", "TOKEN", "API_KEY", "WANDB_API_KEY"])
def test_a_parameter_called_like_a_token_is_refused(tmp_path, nothing_starts, name):
    message = rf"parameter {name} looks like a token.*leave it out and run `hf auth login`"
    with pytest.raises(ConfigError, match=message) as caught:
        runner.run("smoke", str(tmp_path / "run"), parameters={name: CANARY})
    assert CANARY not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_token_under_an_innocent_name_is_refused_too(tmp_path, nothing_starts, capsys):
    command = ["run", "--run-dir", str(tmp_path / "run"), "-p", "MODEL_NAME", CANARY]
    assert main(command) == 1
    err = capsys.readouterr().err
    assert "parameter MODEL_NAME looks like a token" in err and CANARY not in err
    assert list(tmp_path.iterdir()) == []


def test_a_name_in_small_letters_would_be_ignored_and_is_refused(tmp_path, nothing_starts):
    with pytest.raises(ConfigError, match="max_steps is not in capitals: write MAX_STEPS"):
        runner.run("smoke", str(tmp_path / "run"), parameters={"max_steps": 3})


def test_max_new_tokens_is_no_token(tmp_path):
    write_notebook(tmp_path / "notebooks", "01_one.ipynb", record_cell("01", "MAX_NEW_TOKENS"))
    parameters = {"MAX_NEW_TOKENS": 5}
    config = run_notebooks(tmp_path / "notebooks", tmp_path / "run", parameters=parameters)
    assert config.max_new_tokens == 5
