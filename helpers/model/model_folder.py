"""May it be loaded as a model? Whole safetensors files, no code of its own, layers like Llama's."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

from helpers.config import ConfigError
from helpers.model.architecture import own_names
from helpers.profiles import ALL_LINEAR_TARGETS
from helpers.runs.inventory import ArtefactError, read_json

POINTER = b"version https://git-lfs"
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
CHOOSE = (
    "choose a Llama, Mistral, Qwen 2 or 3, SmolLM 2 or 3, Gemma 3 (text), Phi-3 or Phi-4 model in "
    "16 bits"
)


def check_weights(path: Path, advice: str) -> None:
    """Raise ArtefactError for a file that is no whole safetensors file. Reads its header alone."""
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise ArtefactError(
                f"{path} is a Git-LFS pointer and not the weights: run `git lfs pull` there, or "
                f"{advice}"
            )
    try:
        with safe_open(path, "numpy"):
            pass
    except SafetensorError as error:
        raise ArtefactError(f"{path} is cut off or damaged ({error}): {advice}") from error


def check_code(model: str) -> str:
    """The name of a model, unless it is a folder with code that would be run: ArtefactError.

    Of a model that transformers knows by itself the config may name code: it is left alone.
    """
    for name in ("config.json", "tokenizer_config.json"):
        path = Path(model) / name
        said = read_json(path, "get the model again") if path.is_file() else {}
        if "auto_map" in said and said.get("model_type") not in KNOWN:
            raise ArtefactError(
                f"{path} names code to be run (auto_map), and code of a model is never run here: "
                "remove that entry, or choose a model that transformers knows by itself"
            )
    return model


def check_model(model: str) -> str:
    """The name of a model, unless it is a folder without whole safetensors, or with code."""
    check_code(model)
    weights = sorted(Path(model).glob("*.safetensors"))
    if Path(model).is_dir() and not weights:
        raise ArtefactError(
            f"{model} holds no .safetensors file, and no other form of weights is read: convert "
            "the model, or choose one that has them"
        )
    for path in weights:
        check_weights(path, "get the model again")
    return model


def check_shape(name: str, shape, kept: tuple[str, ...] = (), base: bool = True) -> None:
    """Raise ConfigError for transformers' config of a model that this course cannot train.

    Also for layers to keep in 16 bits that it has under no name that ends so. A model that is not a
    base, but merged, may be stored in the 4 bits of bitsandbytes.
    """
    if reason := _why_not(shape, base):
        raise ConfigError(f"MODEL_NAME is {name!r}, {reason}: {CHOOSE}")
    for kind in kept:
        (own,) = own_names(shape, [kind])
        if not own.endswith(kind):
            raise ConfigError(
                f"KEEP_IN_16BIT names {kind}, which {name!r} has in one matrix with others: name "
                f"{own} instead"
            )


def _why_not(shape, base: bool) -> str:
    kind = f"a {shape.model_type!r} model"
    method = str((getattr(shape, "quantization_config", None) or {}).get("quant_method", ""))
    if shape.is_encoder_decoder:
        return f"{kind} of an encoder and a decoder, and here a model goes on with one text"
    if any(hasattr(shape, part) for part in ("vision_config", "audio_config")):
        return f"{kind} that takes pictures or sound too, and here a model reads text alone"
    if any((getattr(shape, name, None) or 0) > 1 for name in EXPERTS):
        return f"{kind} of several experts a layer, which are not packed into 4 bits one by one"
    if method and (base or method != "bitsandbytes"):
        return f"{kind} whose weights are packed already ({method}), and here 16 bits are packed"
    if shape.model_type not in KNOWN:
        return f"{kind}, which is not made to go on with a text"
    if missing := missing_layers(shape):
        return f"{kind} without {', '.join(missing)} in its layers, which are not built as Llama's"
    return ""


def missing_layers(shape) -> list[str]:
    """Of the linear parts of Llama's layers, or of Phi-3's, those that a model does not have."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape)
    names, own = {name for name, _ in model.named_modules()}, own_names(shape, ALL_LINEAR_TARGETS)
    places = {name: "mlp" if name[0] in "gud" else "self_attn" for name in own}
    parts = [f"{place}.{name}" for name, place in places.items()]
    return [part for part in parts if f"model.layers.0.{part}" not in names]
