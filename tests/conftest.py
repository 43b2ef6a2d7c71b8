"""What several test files need: a tiny Llama, and no way to the network."""

import os

# Nothing in the tests may reach for the network; a library that tries fails at once.
os.environ["HF_HUB_OFFLINE"] = "1"

import helpers  # noqa: F401, I001  before torch, since it says how torch's threads wait

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from helpers import models
from helpers.config import Config


@pytest.fixture(scope="session")
def tokenizer():
    return models.load_tokenizer(models.EMBEDDED_NAME)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory, tokenizer):
    """A random 2-layer Llama with the embedded model's tokenizer, 64 wide, saved as bfloat16."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(shape).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_config(tiny_model_dir, tmp_path):
    """Profile smoke on the tiny model, in a run folder of its own."""
    return Config.from_profile("smoke", model_name=str(tiny_model_dir), run_dir=tmp_path / "run")
