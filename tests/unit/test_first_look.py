"""What lesson 01 opens with comes from notebook 06 of a real run, and from nowhere else."""

import json

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from helpers.config import Config, ConfigError
from helpers.runs import inventory, lessons, recording
from helpers.runs.provenance import KEY, settings_of
from helpers.view import text_views

METRICS = {
    **{f"pass_rate_level{level}_{who}": 0.25 for level in (1, 2, 3) for who in recording.ASKED},
    **{f"stop_rate_{who}": 0.5 for who in recording.ASKED},
    "pass_rate_level2_tuned": 0.75,
}
ANSWERS = ("Why?\n\nSay it.", "Because:\n\n-- so", "1. So.\n\n✓ done")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder as notebook 06 leaves it: call it with the metrics."""
    config = Config.from_profile("demo", run_dir=tmp_path)
    config.executed_dir.mkdir()

    def leave(metrics=METRICS, show=True):
        bundles = []
        monkeypatch.setattr(text_views, "display", lambda data, raw: bundles.append(data))
        text_views.show_side_by_side(*ANSWERS)
        outputs = [new_output("display_data", bundles[0])] if show else []
        cell = new_code_cell("text_views.show_side_by_side(*pair)", outputs=outputs)
        about = {"hardware": "2 cores", "date": "2026-01-02"}
        record = {KEY: {"settings": settings_of(config), "environment": about}}
        name = lessons.notebooks("06")[0].name
        nbformat.write(new_notebook(cells=[cell], metadata=record), config.executed_dir / name)
        inventory.record_metrics(config, "06", metrics)
        return config

    return leave


def test_it_holds_the_pair_that_was_shown_and_the_rates(run, tmp_path):
    path = recording.write_first_look(run(), tmp_path / "look.json")
    look = json.loads(path.read_text("utf-8"))
    assert (look["question"], look["base"], look["tuned"]) == ANSWERS
    assert [row["who"] for row in look["rates"]] == list(recording.ASKED.values())
    assert look["rates"][2]["passes, level 2"] == 0.75
    assert look["rates"][0]["stops by itself"] == 0.5
    assert (look["hardware"], look["date"]) == ("2 cores", "2026-01-02")


def test_a_run_without_the_levels_is_refused_by_name(run, tmp_path):
    metrics = {name: rate for name, rate in METRICS.items() if name != "pass_rate_level3_base"}
    with pytest.raises(ConfigError, match="shows no pass_rate_level3_base: run it to its end"):
        recording.write_first_look(run(metrics=metrics), tmp_path / "look.json")
    assert not (tmp_path / "look.json").exists()


def test_a_run_without_a_pair_of_answers_is_refused(run, tmp_path):
    with pytest.raises(ConfigError, match="shows no pair of answers: run it to its end"):
        recording.write_first_look(run(show=False), tmp_path / "look.json")


def test_a_folder_without_a_run_is_refused(tmp_path):
    config = Config.from_profile("demo", run_dir=tmp_path)
    with pytest.raises(ConfigError, match="shows no pass_rate_level1_base_chat, no pass_rate"):
        recording.write_first_look(config, tmp_path / "look.json")


def test_the_committed_pair_is_the_one_recorded_in_notebook_06():
    look = json.loads(recording.FIRST_LOOK.read_text("utf-8"))
    recorded = recording._first_pair(lessons.notebooks("06")[0])
    message = "notebook 06 is recorded anew: run `python -m helpers first-look`"
    assert {name: look[name] for name in ("question", "base", "tuned")} == recorded, message
