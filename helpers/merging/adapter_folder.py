"""Is the adapter whole, and was it made for this run?"""

import warnings
from pathlib import Path

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from helpers.config import Config
from helpers.data.curation_note import lasting_rules, tokenizer_rules
from helpers.data.dataset_folder import dataset_fingerprint
from helpers.model.loading import for_model, load_tokenizer
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
    for complaint in _other_than_now(config, settings, trained):
        warnings.warn(f"{complaint}, or {again('04')}", ArtefactWarning, stacklevel=3)
    return folder


def _check_base(config: Config, folder: Path, trained_on: str | None) -> None:
    # Names are compared by their last part: folders are moved, and users have mirrors.
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


def _other_than_now(config: Config, settings: dict, trained: dict) -> list[str]:
    """What the Config says in another way than the adapter was trained; settings, or its recipe.

    settings: of adapter_config.json. trained: the training log, {} for an adapter from elsewhere.
    """
    found = {"lora_r": settings.get("r"), "lora_alpha": settings.get("lora_alpha")}
    found |= {"target_modules": settings.get("target_modules") or (), **trained.get("base", {})}
    config = for_model(config)
    if trained.get("recipe", config.recipe) != config.recipe:
        found = {"recipe": trained["recipe"]}  # which sets the others
    sentences = []
    for name, value in found.items():
        wanted = getattr(config, name)
        if isinstance(wanted, tuple):
            wanted, value = sorted(wanted), sorted(value)
        if wanted != value:
            sentences.append(
                f"{name.upper()} is {wanted!r}, the adapter was trained with {value!r}: "
                f"set {name.upper()} = {value!r}"
            )
    before, now = trained.get("dataset"), dataset_fingerprint(config)
    if before and now and before != now:
        sentences.append(
            "the adapter was trained on another dataset than notebook 02 has written since, so "
            "rows held out now may be rows that it has seen: run notebook 02 with its old settings"
        )
    return sentences
