"""Asks a Hub that misbehaves for one thing after the other; prints each answer as a line of JSON.

It is a program of its own, since huggingface_hub reads HF_ENDPOINT when it is imported.
"""

import json
import os
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import huggingface_hub.constants

from helpers.config import Config
from helpers.data import sources
from helpers.merging import publishing
from helpers.model import loading

time.sleep = lambda seconds: None  # the client waits longer and longer between its attempts
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 100_000


def say(what: str, function, *arguments) -> None:
    """One line: what was asked, the kind of answer or error, and the error's text."""
    try:
        answer = [type(function(*arguments)).__name__, ""]
    except Exception as error:
        answer = [type(error).__name__, str(error)]
    print(json.dumps([what, *answer]), flush=True)


def switch(name: str) -> None:
    urllib.request.urlopen(f"{os.environ['HF_ENDPOINT']}/switch/{name}").read()


def load_model(name: str):
    return loading.load_model(Config.from_profile("smoke", model_name=name), quantized=False)


def main() -> None:
    for kind in ("unauthorized", "gated", "busy", "broken", "slow"):
        say(kind, loading.load_tokenizer, f"any/{kind}")
    say("upload", publishing.own_repository, "any/upload")
    with tempfile.TemporaryDirectory() as model:
        for name in ("README.md", "config.json", "model.safetensors"):
            (Path(model) / name).write_text(name, encoding="utf-8")
        for kind in ("full", "whole"):
            say(f"push {kind}", publishing.upload, f"any/{kind}", model, "model")
    say("good", load_model, "any/good")
    say("good tokenizer", loading.load_tokenizer, "any/good")
    say("cut", load_model, "any/cut")
    switch("healed")
    say("second try", load_model, "any/cut")
    switch("down")
    say("cached", load_model, "any/good")
    say("cached tokenizer", loading.load_tokenizer, "any/good")
    say("offline", loading.load_tokenizer, "any/other")
    config = Config.from_profile("demo", data_source="any/data")
    say("data", sources.open_source, config, Path(tempfile.mkdtemp()))
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    say("offline mode", load_model, "any/good")


if __name__ == "__main__":
    sys.exit(main())
