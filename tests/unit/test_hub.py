"""Uploads: under one's own name, with a card, and nothing without a login."""

from unittest.mock import MagicMock

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError

from helpers import hub, merging


@pytest.fixture
def merged(tiny_config):
    tiny_config.merged_dir.mkdir(parents=True)
    tiny_config.record("04", {"eval_loss_before": 2.5, "eval_loss_after": 1.5})
    return tiny_config


@pytest.fixture
def api(monkeypatch):
    api = MagicMock()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    return api


def test_without_a_token_nothing_is_sent(merged, api, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(hub.NotLoggedIn, match="nothing was uploaded: run `hf auth login`"):
        merging.push_model(merged)
    assert api.mock_calls == []


def test_with_a_token_the_hub_refuses_nothing_is_sent_and_the_token_is_not_shown(
    merged, api, monkeypatch
):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    refusal = MagicMock(side_effect=HfHubHTTPError("401 hf_secret", response=MagicMock()))
    monkeypatch.setattr(huggingface_hub, "whoami", refusal)
    with pytest.raises(hub.NotLoggedIn, match="did not accept the login") as caught:
        merging.push_model(merged)
    assert "hf_secret" not in str(caught.value)
    assert api.mock_calls == []


def test_the_model_goes_up_in_one_commit_under_ones_own_name(merged, api, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    monkeypatch.setattr(huggingface_hub, "whoami", lambda: {"name": "reader"})
    name = merging.push_model(merged)
    assert name == "reader/Llama-2-7b-minipython-instruct"
    assert api.upload_folder.call_count == 1
    assert api.upload_folder.call_args.kwargs["repo_id"] == name
    card = (merged.merged_dir / "README.md").read_text()
    assert "| eval_loss_after | 1.5 |" in card and "rank 64" in card


def test_without_a_merged_model_the_notebook_is_named(tiny_config):
    with pytest.raises(FileNotFoundError, match="run notebook 05"):
        merging.push_model(tiny_config)
