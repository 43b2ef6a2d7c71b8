"""The six notebooks in profile smoke, in order, through papermill: every promise of the metrics."""

import json
import subprocess
import sys

import nbformat
import pytest
from datasets import load_from_disk

from helpers.config import PROBLEMS_FILE
from helpers.runs import inventory, lessons, provenance, runner
from tests.conftest import watch_the_network
from tests.walking import CellFailed, walk

# Names that must be there, notebook by notebook.
NAMES = {
    "01": "full_parameters lora_parameters eckart_young_max_relative_error "
    "hand_lora_max_abs_diff_vs_peft",
    "02": "raw_questions raw_answers kept_pairs train_rows validation_rows validation_leaks "
    "benchmark_hits_removed prompts_failing_verification rows_per_second",
    "03": "nf4_max_abs_diff_vs_bitsandbytes footprint_bytes_predicted footprint_bytes_measured "
    "bits_per_parameter eval_loss_16bit eval_loss_4bit",
    "04": "trainable_parameters trainable_percent eval_loss_before eval_loss_after "
    "train_tokens_per_second exec_time_seconds peak_memory_bytes peak_memory_bytes_predicted",
    "05": "kl_merged_16bit kl_merged_dequantized kl_merged_4bit eval_loss_adapter "
    "eval_loss_merged reload_max_abs_diff by_hand_max_abs_diff_vs_peft merge_rounding_16bit "
    "merge_rounding_dequantized merge_rounding_4bit merge_stop_rate_16bit merge_pass_rate_16bit",
    "06": "problems stop_rate_base stop_rate_tuned parse_rate_base parse_rate_tuned "
    "steps_rate_base steps_rate_tuned pass_rate_base pass_rate_tuned base_tokens_per_second "
    "tuned_tokens_per_second stop_rate_base_chat parse_rate_base_chat steps_rate_base_chat "
    "pass_rate_base_chat problems_merged stop_rate_merged stop_rate_requantized batch_speedup "
    "stop_rate_base_chat_4bit pass_rate_base_chat_4bit pass_p_value_base_chat "
    "pass_p_value_base_chat_4bit pass_rate_level1_tuned pass_rate_level1_held_back_tuned "
    "pass_rate_level2_base_chat pass_rate_level3_base problems_level1",
}


CANARY = "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"


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """One run of profile smoke with a planted token: its Config, and the hosts that were called."""
    folder = tmp_path_factory.mktemp("smoke")
    with watch_the_network(tmp_path_factory.mktemp("watch")) as calls:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HF_TOKEN", CANARY)
            # Where this machine can isolate nothing, generated code still runs under limits.
            config = runner.run("smoke", str(folder), parameters={"SANDBOX": "limits-only"})
        return config, calls()


@pytest.fixture(scope="module")
def smoke(watched):
    return watched[0]


@pytest.fixture(scope="module")
def metrics(smoke):
    return inventory.read_metrics(smoke)


@pytest.mark.parametrize("number", NAMES)
def test_every_named_metric_is_there(metrics, number):
    assert set(NAMES[number].split()) <= set(metrics[number])


def test_01_theory_meets_measurement_to_rounding(metrics):
    assert metrics["01"]["eckart_young_max_relative_error"] <= 1e-5
    assert metrics["01"]["hand_lora_max_abs_diff_vs_peft"] <= 1e-6
    assert metrics["01"]["lora_parameters"] < metrics["01"]["full_parameters"]


def test_02_nothing_leaks_and_every_row_is_well_formed(metrics, smoke):
    assert metrics["02"]["validation_leaks"] == 0
    assert metrics["02"]["prompts_failing_verification"] == 0
    assert metrics["02"]["benchmark_hits_removed"] >= 6
    assert metrics["02"]["train_rows"] == 16
    dataset = load_from_disk(str(smoke.dataset_dir))
    assert {"prompt", "completion", "question_id", "answer_author", "licence"} <= set(
        dataset["train"].column_names
    )


def test_03_nf4_and_the_footprint_are_exact(metrics):
    assert metrics["03"]["nf4_max_abs_diff_vs_bitsandbytes"] == 0
    assert metrics["03"]["footprint_bytes_predicted"] == metrics["03"]["footprint_bytes_measured"]
    assert 4.1 < metrics["03"]["bits_per_parameter"] < 4.2
    assert metrics["03"]["eval_loss_16bit"] < metrics["03"]["eval_loss_4bit"]


def test_04_two_steps_train_the_adapter_that_was_counted(metrics):
    assert metrics["04"]["trainable_parameters"] == 19_537_920
    assert metrics["04"]["eval_loss_after"] <= metrics["04"]["eval_loss_before"]
    assert metrics["04"]["peak_memory_bytes"] > 500_000_000


def test_05_the_saved_model_is_the_merged_one(metrics, smoke):
    assert metrics["05"]["reload_max_abs_diff"] == 0
    assert 0 <= metrics["05"]["kl_merged_dequantized"] < metrics["05"]["kl_merged_4bit"]
    assert metrics["05"]["by_hand_max_abs_diff_vs_peft"] == 0
    assert metrics["05"]["merge_rounding_dequantized"] < 1 < metrics["05"]["merge_rounding_4bit"]
    record = json.loads((smoke.merged_dir / "merge.json").read_text("utf-8"))
    assert record["merged_into"] == "dequantized" and "rule" in record["taken_by"]
    names = {path.name for path in smoke.gguf_dir.iterdir()}
    assert names == {"model.f16.gguf", "model.q8_0.gguf", "Modelfile"}
    assert (smoke.merged_dir / "model.safetensors").exists()
    assert (smoke.adapter_dir / "adapter_model.safetensors").exists()


def test_06_every_rate_is_one(metrics):
    assert metrics["06"]["problems"] == 5
    rates = [value for name, value in metrics["06"].items() if "_rate_" in name]
    assert len(rates) == 6 * 4 + 4 * 4 + 2 and all(0 <= rate <= 1 for rate in rates)
    assert metrics["06"]["problems_merged"] == 2


def test_nothing_but_safetensors_and_arrow_is_left(smoke):
    kinds = {path.suffix for path in smoke.run_dir.rglob("*") if path.is_file()}
    assert not kinds & {".bin", ".pt", ".pth", ".pkl", ".pickle"}
    assert not list(smoke.run_dir.rglob(".*partial*"))


def test_no_problem_is_in_the_training_data(smoke):
    dataset = load_from_disk(str(smoke.dataset_dir))
    texts = [prompt for split in dataset.values() for prompt in split["prompt"]]
    problems = [
        json.loads(line)["prompt"] for line in PROBLEMS_FILE.read_text("utf-8").splitlines()
    ]
    assert not [p for p in problems if any(p in text for text in texts)]


def test_the_executed_notebooks_and_the_report_are_there(smoke):
    names = sorted(path.name for path in smoke.executed_dir.glob("*.ipynb"))
    assert names == [path.name for path in lessons.notebooks()]
    report = (smoke.run_dir / "report.html").read_text("utf-8")
    assert "level 1 passed, tuned" in report


def test_executed_notebooks_print_no_error_and_every_code_cell_shows_something(smoke):
    for path in smoke.executed_dir.glob("*.ipynb"):
        for cell in nbformat.read(path, as_version=4).cells:
            kinds = [output.output_type for output in cell.get("outputs", [])]
            assert "error" not in kinds
            if cell.cell_type == "code" and "Config.from_notebook" in cell.source:
                assert kinds, f"{path.name}: the config cell shows nothing"


def test_no_notebook_calls_beyond_this_machine(watched):
    assert watched[1] == []


def test_the_token_of_the_environment_is_in_no_file(smoke):
    files = [path for path in smoke.run_dir.rglob("*") if path.is_file()]
    assert not [path for path in files if CANARY.encode() in path.read_bytes()]


def test_the_run_is_as_its_manifest_says(smoke):
    assert provenance.verify(smoke.run_dir) > 20


def test_a_second_run_finds_everything_finished(smoke, capsys):
    parameters = {"SANDBOX": "limits-only"}
    runner.run("smoke", str(smoke.run_dir), parameters=parameters)
    assert capsys.readouterr().out.count("finished already") == 6


@pytest.mark.parametrize("number", NAMES)
def test_a_mistyped_parameter_fails_at_once(number, tmp_path):
    with pytest.raises(CellFailed, match="did you mean MAX_STEPS"):
        walk(number, PROFILE="smoke", MAX_STPES=3, RUN_DIR=str(tmp_path))
    assert not (tmp_path / "metrics").exists()


def test_plain_papermill_says_so_too(tmp_path):
    path = lessons.notebooks("01")[0]
    command = [sys.executable, "-m", "papermill", str(path), str(tmp_path / "out.ipynb")]
    options = ["-p", "PROFILE", "smoke", "-p", "MAX_STPES", "3", "-p", "RUN_DIR", str(tmp_path)]
    done = subprocess.run(command + options, capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode != 0
    assert "did you mean MAX_STEPS" in done.stderr
    assert not (tmp_path / "metrics").exists()
