"""What several test files need: a tiny Llama, and no way to the network."""

import contextlib
import json
import os

# Nothing in the tests may reach for the network; a library that tries fails at once.
os.environ["HF_HUB_OFFLINE"] = "1"

import helpers  # noqa: F401, I001  before torch, since it says how torch's threads wait

import pytest
import torch
from peft import LoraConfig
from playwright.sync_api import sync_playwright
from transformers import LlamaConfig, LlamaForCausalLM

from helpers import prompts
from helpers.model import loading
from helpers.model import embedded
from helpers.config import PROJECT_DIR, Config
from setup import for_tests

pytest_plugins = ["tests.not_run"]
WATCH_DIR = PROJECT_DIR / "tests" / "faults" / "watch"


@pytest.fixture(scope="session")
def browser():
    """One Chromium for all tests: two Playwrights in one process stand in each other's way."""
    with sync_playwright() as driver:
        path = for_tests.find_browser(driver)
        if path is None:
            command = for_tests.command_for_browser(driver)
            pytest.skip(f"no Chromium starts here: run `{command}` as root")
        yield driver.chromium.launch(executable_path=path, args=["--no-sandbox"])


@pytest.fixture(scope="session")
def tokenizer():
    return loading.load_tokenizer(embedded.EMBEDDED_NAME)


def tiny_llama(**settings) -> LlamaForCausalLM:
    """A random Llama, 64 wide, in float32; `settings` of its shape come besides."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    shape = {**sizes, **heads, "initializer_range": 0.2, **settings}
    return LlamaForCausalLM(LlamaConfig(**shape))


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory, tokenizer):
    """A random 2-layer Llama with the embedded model's tokenizer, 64 wide, saved as bfloat16."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    model = tiny_llama(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_config(tiny_model_dir, tmp_path):
    """Profile smoke on the tiny model, in a run folder of its own."""
    return Config.from_profile("smoke", model_name=str(tiny_model_dir), run_dir=tmp_path / "run")


def lora_of(config) -> LoraConfig:
    """The adapter of a Config, in peft's terms."""
    return LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(config.target_modules),
        task_type="CAUSAL_LM",
    )


def fill_adapters(model, std: float = 0.02) -> None:
    """Give each B numbers: zero as it starts, it would hide half of the arithmetic."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)


def relative_error(ours, theirs) -> float:
    """The norm of the difference, as a share of their norm."""
    return ((ours - theirs).float().norm() / theirs.float().norm()).item()


def write_bos_twice(folder, tokenizer) -> None:
    """Change the tokenizer's files in a model folder so that each text begins with two BOS."""
    path = folder / "tokenizer.json"
    described = json.loads(path.read_text(encoding="utf-8"))
    bos = {"SpecialToken": {"id": tokenizer.bos_token, "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    ids = {"id": tokenizer.bos_token, "ids": [tokenizer.bos_token_id]}
    described["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, bos, text],
        "pair": [bos, bos, text],
        "special_tokens": {tokenizer.bos_token: {**ids, "tokens": [tokenizer.bos_token]}},
    }
    path.write_text(json.dumps(described), encoding="utf-8")
    names = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token")}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


@contextlib.contextmanager
def watch_the_network(folder):
    """Processes that start in this with-statement fail at any call beyond this machine.

    Gives a function that returns the hosts that were asked for.
    """
    log = folder / "outside-calls"
    paths = [str(WATCH_DIR), str(PROJECT_DIR), os.environ.get("PYTHONPATH", "")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        patch.setenv("OUTSIDE_CALLS", str(log))
        # Offline mode would hide a call that a reader's run makes.
        patch.delenv("HF_HUB_OFFLINE")
        yield lambda: log.read_text("utf-8").splitlines() if log.exists() else []


@pytest.fixture
def outside_calls(tmp_path):
    with watch_the_network(tmp_path) as calls:
        yield calls


def problems_of(tokenizer, prompt: str, completion: str) -> list[str]:
    """What `prompts.verify_rows` says of one row."""
    ((_, problems),) = prompts.verify_rows(tokenizer, [(prompt, completion)])
    return problems
