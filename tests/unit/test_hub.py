"""Uploads: under one's own name, with a card, and nothing without a login."""

import dataclasses
import shutil
from pathlib import Path
from unittest.mock import MagicMock

import datasets
import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError
from peft import LoraConfig, get_peft_model

from helpers.merging import publishing
from helpers.model import loading, precision
from helpers.runs import inventory
from tests.notebook_code import cell_source, curate, definitions_from, save_merged

SCORES = {"problems": 32, "problems_merged": 16, "stop_rate_base": 5 / 32, "stop_rate_merged": 0.25}


@pytest.fixture
def merged(tiny_config, tokenizer):
    base = loading.load_model(tiny_config, quantized=False)
    save_merged(base, tokenizer, tiny_config)
    inventory.record_metrics(tiny_config, "04", {"eval_loss_before": 2.5, "eval_loss_after": 1.5})
    return tiny_config


@pytest.fixture
def api(monkeypatch):
    api = MagicMock()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    return api


def test_without_a_token_nothing_is_sent(merged, api, monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: None)
    with pytest.raises(publishing.NotLoggedIn, match="nothing was uploaded: .* `hf auth login`"):
        publishing.push_model(merged)
    assert api.mock_calls == []


def test_with_a_token_the_hub_refuses_nothing_is_sent_and_the_token_is_not_shown(
    merged, api, monkeypatch
):
    refusal = MagicMock(side_effect=HfHubHTTPError("401 hf_secret", response=MagicMock()))
    monkeypatch.setattr(huggingface_hub, "whoami", refusal)
    with pytest.raises(publishing.NotLoggedIn, match="did not accept the login") as caught:
        publishing.push_model(merged)
    assert "hf_secret" not in str(caught.value)
    assert api.mock_calls == []


def test_the_model_goes_up_in_one_commit_under_ones_own_name(merged, api, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "whoami", lambda: {"name": "reader"})
    name = publishing.push_model(merged)
    assert name == "reader/SmolLM2-135M-minipython-instruct"
    assert api.upload_folder.call_count == 1
    assert api.upload_folder.call_args.kwargs["repo_id"] == name
    card = (merged.merged_dir / "README.md").read_text("utf-8")
    assert "| eval_loss_after | 1.5 |" in card


def test_without_a_merged_model_the_notebook_is_named(tiny_config):
    with pytest.raises(FileNotFoundError, match="run notebook 05"):
        publishing.push_model(tiny_config)


def test_a_folder_that_has_lost_its_weights_is_not_uploaded(merged, api):
    (merged.merged_dir / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="model.safetensors is gone .* run notebook 05 again"):
        publishing.push_model(merged)
    assert api.mock_calls == []


@pytest.mark.parametrize("asked", [True, False])
def test_notebook_05_pushes_model_tokenizer_and_card_in_one_commit_when_asked(
    merged, api, capsys, asked
):
    api.create_repo = lambda name, exist_ok: MagicMock(repo_id=f"reader/{name}")
    sent = []
    api.create_commit = lambda repo_id, operations, commit_message: sent.append(
        (repo_id, {operation.path_in_repo for operation in operations})
    )
    lesson = definitions_from("05") | {"config": dataclasses.replace(merged, push_to_hub=asked)}
    exec(cell_source("05", "push"), lesson)
    assert [name for name, _ in sent] == ["reader/SmolLM2-135M-minipython-instruct"] * asked
    for _, files in sent:
        assert {"README.md", "model.safetensors", "tokenizer.json", "config.json"} <= files
    said = capsys.readouterr().out
    assert ("uploaded as reader/" in said) == asked and "| merged into | the base in 16" in said


# -- The card.


def test_the_card_gives_each_rate_with_its_interval(merged):
    assert "greedy answers" not in publishing.model_card(merged)
    inventory.record_metrics(merged, "06", SCORES)
    card = publishing.model_card(merged)
    # 5 of 32 as notebook 06 prints it; 4 of 16 with the wider interval of fewer problems.
    assert "| stop by themselves | 0.16 [0.07, 0.32] | 0.25 [0.10, 0.49] |" in card
    assert "| share of greedy answers that | base | merged |" in card
    assert "On 32 problems" in card and "merged models answered 16 of\nthem" in card
    for line in card.splitlines():
        assert "_rate" not in line, "no rate without its interval"


def test_the_card_says_how_the_model_was_made_and_not_what_the_config_says_now(
    tiny_config, tokenizer
):
    settings = LoraConfig(r=8, lora_alpha=12, target_modules=["q_proj", "down_proj"])
    tuned = get_peft_model(loading.load_model(tiny_config, quantized=False), settings)
    tuned.save_pretrained(tiny_config.adapter_dir)
    save_merged(tuned.merge_and_unload(), tokenizer, tiny_config, "dequantized")
    assert (tiny_config.lora_r, tiny_config.lora_alpha) == (64, 16)
    for merge_into in ("16bit", "4bit"):
        card = publishing.model_card(dataclasses.replace(tiny_config, merge_into=merge_into))
        assert "| adapter | rank 8, alpha 12 |" in card
        assert "| adapter on | down_proj, q_proj |" in card and "gate_proj" not in card
        words = (
            "the 4-bit base, unpacked to 16 bits (`dequantized`), taken by the rule of lesson 05"
        )
        assert f"| merged into | {words} |" in card
    shutil.rmtree(tiny_config.adapter_dir)
    assert "| adapter | rank 8, alpha 12 |" in publishing.model_card(tiny_config)


def test_the_card_of_a_model_from_elsewhere_leaves_out_what_nobody_noted(merged):
    (merged.merged_dir / "merge.json").unlink()
    card = publishing.model_card(merged)
    assert "| adapter" not in card and "| merged into" not in card and "| optimizer |" in card


@pytest.mark.parametrize(
    ("name", "tag", "words"),
    [
        ("smollm2-135m", "license: apache-2.0", "Base model: Apache-2.0."),
        ("TinyLlama/TinyLlama-1.1B-step", "license: apache-2.0", "Base model: Apache-2.0."),
        ("meta-llama/Llama-2-7b-hf", "license: llama2", "Copyright (c) Meta Platforms, Inc. All"),
        ("somebody/else", "license: other", "read its page before you use or share this"),
    ],
)
def test_the_card_names_the_licence_of_the_base(tiny_config, name, tag, words):
    card = publishing.model_card(dataclasses.replace(tiny_config, model_name=name))
    assert tag in card.splitlines() and words in card
    assert ("they were unpacked from a file in 4 bits" in card) == (name == "smollm2-135m")
    assert ("base_model: HuggingFaceTB/SmolLM2-135M-Instruct" in card) == (name == "smollm2-135m")


def test_the_card_names_the_licence_of_the_data_and_its_authors_columns(tiny_config, monkeypatch):
    curate(tiny_config)
    card = publishing.model_card(tiny_config)
    assert "Training data: `sample`, CC BY-SA 4.0. Every row" in card and "`answer_author`" in card
    rows = datasets.load_from_disk(str(tiny_config.dataset_dir))
    posts = rows.map(lambda row: {"url": "https://stackoverflow.com/a/1"})
    monkeypatch.setattr(datasets, "load_from_disk", lambda path: posts)
    assert "`sample`, posts of Stack Overflow, CC BY-SA" in publishing.model_card(tiny_config)


def test_the_card_tells_the_recipe_and_the_limits_and_no_path(tiny_config):
    card = publishing.model_card(tiny_config)
    computed = str(precision.compute_dtype(tiny_config)).removeprefix("torch.")
    for words in (
        "| base in 4 bits | nf4, double quantization, but for v_proj, down_proj, computed in "
        f"{computed} |",
        "2 steps, 2 rows a step",
        "| seed | 42 |",
        "has to be tested",
        "up to 400 tokens",
    ):
        assert words in card
    kept = dataclasses.replace(tiny_config, keep_in_16bit=("o_proj", "down_proj"))
    assert "| nf4, double quantization, but for o_proj, down_proj, " in publishing.model_card(kept)
    folder = str(Path(tiny_config.model_name).parent)
    assert folder not in card and str(tiny_config.run_dir) not in card
