"""The adapter as its folder says it: what it adds, and whether it was made for this run."""

import math
import re
import warnings
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file

from helpers.config import Config
from helpers.data.curation_note import lasting_rules, tokenizer_rules
from helpers.data.dataset_folder import dataset_fingerprint
from helpers.model.loading import load_tokenizer
from helpers.model.model_folder import check_weights
from helpers.runs.inventory import (
    TRAINING_LOG,
    ArtefactError,
    ArtefactWarning,
    again,
    check_seal,
    read_json,
)

ADAPTER_WEIGHTS = SAFETENSORS_WEIGHTS_NAME
TOKENIZER = "tokenizer.json"


class Adapter:
    """The matrices of a LoRA adapter by layer, and how much of them is added.

    Nothing here comes from the Config, whose LORA_R and LORA_ALPHA are those of the next training.
    Raises ArtefactError for an adapter that adds anything but `scale * B A` to a layer.
    """

    def __init__(self, folder: Path):
        self.settings = LoraConfig.from_pretrained(folder)
        self.pairs: dict[str, dict[str, torch.Tensor]] = {}  # layer -> {"A": ..., "B": ...}
        for name, tensor in load_file(folder / ADAPTER_WEIGHTS).items():
            found = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)
            if not found:
                raise ArtefactError(
                    f"the adapter in {folder} holds {name}, which is no A or B of a layer: its "
                    "update cannot be worked out by hand, train one with plain LoRA"
                )
            self.pairs.setdefault(found[1], {})[found[2]] = tensor

    def scale(self, layer: str) -> float:
        """alpha / rank of a layer, or alpha / sqrt(rank) with rsLoRA (arXiv 2312.03732)."""
        said = self.settings
        rank = said.rank_pattern.get(get_pattern_key(said.rank_pattern, layer), said.r)
        alpha = said.alpha_pattern.get(get_pattern_key(said.alpha_pattern, layer), said.lora_alpha)
        return alpha / (math.sqrt(rank) if said.use_rslora else rank)

    def update(self, layer: str, device: str = "cpu") -> torch.Tensor:
        """scale * B A of a layer, (outputs, inputs), in float32."""
        A, B = (self.pairs[layer][part].to(device).float() for part in "AB")
        return (B @ A) * self.scale(layer)


def check_adapter(config: Config) -> Path:
    """The adapter's folder, when it is whole and made for this base model and tokenizer.

    Raises FileNotFoundError and ArtefactError. Warns, ArtefactWarning, when it has other settings
    than the Config, or was trained on another dataset than the one that lies there now.
    """
    folder = config.require(config.adapter_dir, "04")
    weights = folder / ADAPTER_WEIGHTS
    if not weights.is_file():
        raise ArtefactError(f"{weights} is missing, and no other form is read: {again('04')}")
    check_weights(weights, again("04"))
    check_seal(folder, "04")
    settings = read_json(folder / CONFIG_NAME, again("04"))
    _check_base(config, folder, settings.get("base_model_name_or_path"))
    log = folder / TRAINING_LOG
    trained = read_json(log, again("04")) if log.is_file() else {}
    other = _other_recipe(config, trained) or _other_settings(config, settings)
    for complaint in (*other, *_other_dataset(config, trained)):
        warnings.warn(f"{complaint}, or {again('04')}", ArtefactWarning, stacklevel=3)
    return folder


def _check_base(config: Config, folder: Path, trained_on: str | None) -> None:
    """Names are compared by their last part: folders are moved, and users have mirrors."""
    if trained_on and Path(trained_on).name != Path(config.model_name).name:
        raise ArtefactError(
            f"the adapter in {folder} was trained on {trained_on} and MODEL_NAME is "
            f"{config.model_name}: set MODEL_NAME to the former, or {again('04')}"
        )
    if (folder / TOKENIZER).is_file():
        described = read_json(folder / TOKENIZER, again("04"))
        if tokenizer_rules(load_tokenizer(config.model_name)) != lasting_rules(described):
            raise ArtefactError(
                f"the adapter in {folder} was trained with another tokenizer than that of "
                f"{config.model_name}: {again('04')}"
            )


def _other_recipe(config: Config, trained: dict) -> list[str]:
    found = trained.get("recipe", config.recipe)
    if found == config.recipe:
        return []
    return [
        f"RECIPE is {config.recipe!r}, the adapter was trained with {found!r}, and perhaps on a "
        f"base that was quantized in another way: set RECIPE = {found!r}"
    ]


def _other_settings(config: Config, settings: dict) -> list[str]:
    pairs = {
        "LORA_R": (config.lora_r, settings.get("r")),
        "LORA_ALPHA": (config.lora_alpha, settings.get("lora_alpha")),
        "TARGET_MODULES": (
            sorted(config.target_modules),
            sorted(settings.get("target_modules") or ()),
        ),
    }
    return [
        f"{name} is {wanted}, the adapter was trained with {found}: set {name} = {found}"
        for name, (wanted, found) in pairs.items()
        if wanted != found
    ]


def _other_dataset(config: Config, trained: dict) -> list[str]:
    before, now = trained.get("dataset"), dataset_fingerprint(config)
    if not before or not now or before == now:
        return []
    return [
        "the adapter was trained on another dataset than notebook 02 has written since, so rows "
        "held out now may be rows that it has seen: run notebook 02 with its old settings"
    ]
