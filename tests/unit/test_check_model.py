"""`check-model`: what stops a model is said from its config and tokenizer, a sentence each."""

import copy
import dataclasses
import json

import pytest
import transformers
from tokenizers import pre_tokenizers
from transformers import LlamaConfig

from helpers.__main__ import main
from helpers.config import Config, ConfigError
from helpers.model import architecture, check_model, loading
from tests.conftest import write_bos_twice
from tests.walking import HABITS, bare_tokenizer, first_tokens, tokenizer_like


@pytest.fixture
def save_shape(tmp_path, tokenizer):
    """A function: kind of config and its changes -> the Config of a model without any weights."""

    def save(kind="Llama", profile="demo", **changes):
        changes = {"vocab_size": len(tokenizer), **changes}
        getattr(transformers, f"{kind}Config")(**changes).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        return Config.from_profile(profile, model_name=str(tmp_path))

    return save


def sentences(config, answer=check_model.STOP) -> list[str]:
    return [found[3] for found in check_model.check(config) if found[2] == answer]


REFUSED = {
    "T5": ({}, "of an encoder and a decoder, and here a model goes on with one text"),
    "Gemma3": ({}, "that takes pictures or sound too, and here a model reads text alone"),
    "Qwen3Moe": ({"num_experts": 4}, "of several experts a layer, which are not packed"),
    "Mixtral": ({"num_hidden_layers": 2}, "of several experts a layer, which are not packed"),
    "Phi": ({"num_hidden_layers": 2}, "without o_proj, gate_proj"),
    "FalconH1": ({"num_hidden_layers": 2}, "without gate_proj, up_proj, down_proj"),
    "GPTNeoX": ({"num_hidden_layers": 2}, "without q_proj"),
    "ViT": ({}, "that is not made to go on with a text"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_cannot_go_through_is_told_so(save_shape, capsys, kind):
    changes, words = REFUSED[kind]
    config = save_shape(kind, **changes)
    (says,) = sentences(config)
    assert says.startswith(f"MODEL_NAME is {config.model_name!r}, a ")
    assert words in says and says.endswith(architecture.CHOOSE)
    assert main(["check-model", config.model_name]) == 1
    told = capsys.readouterr()
    assert "03  layers     STOP" in told.out and "does not go through" in told.err


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "bitsandbytes"])
def test_weights_that_are_packed_already_are_refused(save_shape, method):
    (says,) = sentences(save_shape(quantization_config={"quant_method": method}))
    assert f"whose weights are packed already ({method}), and here 16 bits are packed" in says


def test_a_merged_model_in_four_bits_may_be_loaded(save_shape):
    config = save_shape(num_hidden_layers=1, quantization_config={"quant_method": "bitsandbytes"})
    shape = loading.load_shape(config.model_name)
    architecture.check_shape(config.model_name, shape, base=False)
    with pytest.raises(ConfigError, match="packed already"):
        architecture.check_shape(config.model_name, shape)


@pytest.mark.parametrize(
    ("code", "words"), [(False, "does not know by itself"), (True, "auto_map")]
)
def test_a_kind_that_transformers_does_not_know_is_refused(save_shape, tmp_path, code, words):
    config, path = save_shape(), tmp_path / "config.json"
    said = {**json.loads(path.read_text("utf-8")), "model_type": "own"}
    said |= {"auto_map": {"AutoConfig": "code.Own"}} if code else {}
    path.write_text(json.dumps(said), encoding="utf-8")
    assert all(words in says for says in sentences(config)) and sentences(config)


def test_a_tokenizer_that_is_not_fast_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "is_fast", property(lambda self: False))
    with pytest.raises(ConfigError, match="has no tokenizer.json, or names .*choose another"):
        loading.load_tokenizer("smollm2-135m")


def test_rows_that_begin_twice_are_refused(save_shape, tmp_path, tokenizer):
    config = save_shape()
    write_bos_twice(tmp_path, tokenizer)
    (says,) = sentences(config)
    assert "a row does not come through its tokenizer (" in says and "choose another model" in says


def test_a_tokenizer_that_is_too_large_for_the_embedding_is_refused(save_shape):
    (says,) = sentences(save_shape(vocab_size=49_000))
    assert says.startswith("has 152 rows less than the tokenizer has tokens: take the tokenizer")


def test_a_layer_to_keep_that_has_no_name_of_its_own_is_named(save_shape):
    config = save_shape("Phi3", num_hidden_layers=1, pad_token_id=0)
    assert sentences(config) == []
    with pytest.raises(
        ConfigError, match="k_proj, and 'any' has no layer of that name: name qkv_proj ins"
    ):
        architecture.check_shape("any", loading.load_shape(config.model_name), ("k_proj",))


def test_a_model_without_weights_goes_through(save_shape, capsys):
    assert main(["check-model", save_shape().model_name, "--profile", "llama2_7b"]) == 0
    text = capsys.readouterr().out
    assert "03  memory     yes   fits " in text
    assert "beside q_proj, k_proj" in text and text.endswith("goes through all six lessons\n")


@pytest.mark.parametrize(
    ("gib", "says"), [(24, "fits 24 GB: "), (1, "does not fit your card of 1")]
)
def test_the_card_that_is_there_is_the_one_that_is_asked(save_shape, monkeypatch, gib, says):
    monkeypatch.setattr(check_model.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(check_model.torch.cuda, "mem_get_info", lambda: (0, gib * 2**30))
    config = dataclasses.replace(save_shape("Llama", "llama2_7b"), fast_path=False)
    answer, sentence = check_model.of_memory(config, loading.load_shape(config.model_name))
    assert answer == ("no" if gib == 1 else "yes") and says in sentence


def test_a_layer_of_phi_is_trained_under_its_own_names(save_shape):
    config = save_shape("Phi3", "article", num_hidden_layers=1, pad_token_id=0)
    assert loading.for_model(config).target_modules == ("qkv_proj",)
    assert "'phi3', 0.42 billion weights; beside qkv_proj" in "".join(sentences(config, "yes"))


WAYS_ROUND = {
    "padding": ("llama3", "'<|finetune_right_pad_id|>' fills short rows up, for it names none, or"),
    "padding, as EOS": (
        "phi3",
        "'<unk>' fills short rows up, for it names none, or one that would hide",
    ),
    "no template": ("llama2", 'has no chat template: set TEMPLATE to "llama2"'),
    "no fast path": ("llama2", "it trains without the fast path, which needs a GPU"),
}


@pytest.mark.parametrize("way", WAYS_ROUND)
def test_a_no_names_the_way_round(save_shape, tmp_path, tokenizer, way):
    habits, words = WAYS_ROUND[way]
    config = save_shape()
    tokenizer_like(habits, tokenizer, tmp_path)
    assert sentences(config) == [] and any(words in says for says in sentences(config, "no"))


@pytest.mark.parametrize("habits", [*HABITS, "bare"])
def test_habits_of_known_tokenizers_go_through(save_shape, tmp_path, tokenizer, habits):
    config = save_shape()
    if habits == "bare":
        first_tokens(tokenizer, 2000, tmp_path)
        bare_tokenizer(tmp_path)
    else:
        tokenizer_like(habits, tokenizer, tmp_path)
    assert sentences(config) == []


def test_gguf_is_refused_by_architecture_by_positions_and_by_tokenizer(save_shape, tokenizer):
    scaled = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}
    scaled |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    qwen, llama3 = transformers.Qwen2Config(), transformers.LlamaConfig(rope_parameters=scaled)
    for shape, words in ((qwen, "'qwen2' with positions 'default'"), (llama3, "'llama3'")):
        assert words in check_model.why_not_gguf(shape, tokenizer)
    assert check_model.why_not_gguf(transformers.LlamaConfig(), tokenizer) == ""
    cut = copy.deepcopy(tokenizer)
    cut.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel()]
    )
    assert "name in llama.cpp is not known" in check_model.why_not_gguf(LlamaConfig(), cut)
