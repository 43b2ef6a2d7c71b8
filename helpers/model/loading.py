"""How a model is loaded: its shape, its tokenizer, the weights in 16 bits or in 4."""

import dataclasses
import os
from functools import partial
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from helpers.config import Config, ConfigError
from helpers.model import hub, precision
from helpers.model.architecture import check_shape, own_names
from helpers.model.embedded import ModelUnavailable
from helpers.model.hub import check_code, check_model, from_hub

# The settings that decide what the weights of a base model in 4 bits are.
PACKED_BY = ("use_4bit", "bnb_4bit_compute_quant_type", "use_nested_quant", "keep_in_16bit")


def load_shape(model_name: str):
    """transformers' config of a model: its shape without weights. ModelUnavailable, ConfigError."""
    return from_hub(model_name, _shape, check_code)


def _shape(path: str):
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except ValueError as error:
        raise ConfigError(
            f"MODEL_NAME is {path!r}, a kind of model that transformers does not know by itself, "
            "and code of a model is never run here: choose one that it knows"
        ) from error


def load_tokenizer(model_name: str):
    """The tokenizer of a model, see `choose_padding`. Raises ModelUnavailable too."""
    load = partial(AutoTokenizer.from_pretrained, trust_remote_code=False)
    return choose_padding(from_hub(model_name, load, check_code), model_name)


def choose_padding(tokenizer, model_name: str):
    """The tokenizer, padding on the right with a token that is not EOS; raises ConfigError.

    With EOS the end of an answer would be masked as padding is, and the model never learn to stop.
    Else `unk` is taken, as in Llama 2, or a special token, first one that is there for padding.
    """
    tokenizer.padding_side = "right"
    if not tokenizer.is_fast or tokenizer.eos_token is None:
        raise ConfigError(
            f"MODEL_NAME is {model_name!r}, whose tokenizer has no tokenizer.json, or names no "
            "`eos_token` to end an answer in tokenizer_config.json: add it, or choose another model"
        )
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    special.sort(key=lambda token: "pad" not in token.lower())
    usable = [
        token
        for token in (tokenizer.unk_token, *special)
        if token not in (None, tokenizer.eos_token, tokenizer.bos_token)
    ]
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        if not usable:
            raise ConfigError(
                f"MODEL_NAME is {model_name!r}, whose tokenizer has no special token for padding "
                f"but {tokenizer.eos_token!r}, the end of an answer: set `pad_token` in its "
                "tokenizer_config.json to a token that your text does not use"
            )
        tokenizer.pad_token = usable[0]
    return tokenizer


def is_sharded() -> bool:
    """Whether `accelerate launch` started this process under FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP") == "true"


def quantization_config(config: Config) -> BitsAndBytesConfig:
    """The 4-bit settings of a Config in bitsandbytes' terms."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.bnb_4bit_compute_quant_type,
        bnb_4bit_compute_dtype=precision.compute_dtype(config),
        bnb_4bit_use_double_quant=config.use_nested_quant,
        llm_int8_skip_modules=["lm_head", *config.keep_in_16bit],
    )


def use_device(config: Config, name: str) -> None:
    """Make the GPU of a Config the current one, where kernels start; else ModelUnavailable."""
    if config.device == "cpu":
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if torch.device(config.device).index >= count:
        raise ModelUnavailable(
            f"profile {config.profile!r} puts {name} on {config.device}, and torch sees "
            f"{count or 'no'} GPU here, numbered from 0: set DEVICE_MAP to a smaller number, run "
            "it on a machine with a GPU, or choose PROFILE = 'demo', which needs none"
        )
    torch.cuda.set_device(config.device)


def for_model(config: Config) -> Config:
    """The Config with TARGET_MODULES as its model calls them: Phi-3's q, k and v are `qkv_proj`."""
    shape = load_shape(config.model_name)
    return dataclasses.replace(config, target_modules=own_names(shape, config.target_modules))


def find_model(config: Config) -> str:
    """The folder or Hub id to give to `from_pretrained`; makes the Config's GPU the current one.

    Raises ModelUnavailable, DiskFull, ConfigError for a model that cannot be trained here, and
    ArtefactError for a damaged one or one with code.
    """
    use_device(config, config.model_name)
    return from_hub(config.model_name, partial(_checked_path, config), check_model)


def _checked_path(config: Config, path: str, base: bool = True) -> str:
    # A model that cannot be built, or not be used, is not downloaded first.
    check_shape(path, _shape(path), config.keep_in_16bit, base)
    hub.need_room(path)
    return path


def load_model(config: Config, quantized: bool = True, source: str | Path | None = None):
    """The base model of a Config, or the one in `source`, in eval mode, all on `config.device_map`.

    quantized=True gives 4-bit linear layers, if `config.use_4bit`; what is not packed lies in
    `precision.compute_dtype`. Raises what `find_model` does.
    """
    name = str(source or config.model_name)
    use_device(config, name)
    dtype = precision.compute_dtype(config)
    options = {"dtype": dtype, "device_map": {"": config.device}}
    if quantized and config.use_4bit:
        options["quantization_config"] = quantization_config(config)
    if is_sharded():  # FSDP takes each share from the host: no GPU holds all of the model
        options["device_map"] = {"": "cpu"}
        if "quantization_config" in options:  # and moves packed bytes as numbers of one type
            options["quantization_config"].bnb_4bit_quant_storage = dtype

    def load(path: str):
        found = _checked_path(config, path, base=source is None)
        return AutoModelForCausalLM.from_pretrained(found, use_safetensors=True, **options)

    return guard_cpu_weights(from_hub(name, load, check_model)).eval()


def guard_cpu_weights(model):
    """Keep bitsandbytes from repacking 4-bit weights in place; returns the model, just loaded.

    On CPUs with avx512_bf16 the first forward pass in eval mode would leave weights that only one
    kernel can read: from then on gradients, dequantization and merges are silently wrong.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model
