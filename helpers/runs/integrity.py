"""Are results on the disk what was written, and do they belong together?

A folder is sealed when it is complete: SHA256SUMS lists its files, in the form that `sha256sum
--check` reads. A folder without a seal came from elsewhere; of it only what it says itself is
checked.
"""

import hashlib
import json
import re
import warnings
from pathlib import Path

from safetensors import SafetensorError, safe_open

from helpers.config import SYSTEM_MESSAGE, Config
from helpers.runs.folders import sha256

SEAL = "SHA256SUMS"
ADAPTER_WEIGHTS, ADAPTER_SETTINGS = "adapter_model.safetensors", "adapter_config.json"
CURATION = "curation.json"  # how notebook 02 made the rows; goes on with adapter and merged model
TRAINING_LOG, TOKENIZER = "training_log.json", "tokenizer.json"
MERGE_RECORD = "merge.json"
POINTER = b"version https://git-lfs"


class ArtefactError(ValueError):
    """A result cannot be used. The message names the file and the notebook that writes it again."""


class ArtefactWarning(UserWarning):
    """A result can be used, but it was not made from what lies beside it."""


def seal(folder: Path) -> None:
    """Write SHA256SUMS over the files of a folder, but for hidden ones and cards."""
    (folder / SEAL).write_text("".join(f"{line}\n" for line in _sums(folder)), encoding="utf-8")


def _sums(folder: Path) -> list[str]:
    """The lines of a seal: the SHA-256 and the name of each file that it covers."""
    names = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    return [
        f"{sha256(folder / name)}  {name.as_posix()}"
        for name in names
        if name.suffix != ".md" and not any(part.startswith(".") for part in name.parts)
    ]


def check_seal(folder: Path, notebook: str) -> None:
    """Raise ArtefactError for a file that is gone or is not the one that was sealed."""
    for line in _sealed(folder):
        wanted, _, name = line.partition("  ")
        path = folder / name
        if not path.is_file() or sha256(path) != wanted:
            state = "damaged or changed" if path.is_file() else "gone"
            raise ArtefactError(f"{path} is {state} since it was written: {_again(notebook)}")


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
    """The name of a model, unless it is a folder that brings code of its own: ArtefactError."""
    for name in ("config.json", "tokenizer_config.json"):
        path = Path(model) / name
        if path.is_file() and "auto_map" in _read(path, "get the model again"):
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


def check_dataset(config: Config) -> Path:
    """The dataset's folder. Raises FileNotFoundError, and ArtefactError when it is damaged."""
    folder = config.require(config.dataset_dir, "02")
    check_seal(folder, "02")
    return folder


def curation_of(config: Config, folder: Path) -> dict:
    """What notebook 02 noted of the rows behind the dataset, adapter or merged model in `folder`.

    One without a note was made by what comes before it in the run; {} where nothing is noted.
    """
    results = [config.merged_dir, config.adapter_dir, config.dataset_dir]
    notes = [result / CURATION for result in results[results.index(folder) :]]
    return next((_read(note, _again("02")) for note in notes if note.is_file()), {})


def write_curation(note: dict, folder: Path) -> None:
    """Put what `curation_of` gives beside the result that is made from those rows."""
    if note:
        text = json.dumps(note, indent=1, ensure_ascii=False) + "\n"
        (folder / CURATION).write_text(text, encoding="utf-8")


def system_message(config: Config, folder: Path) -> str:
    """The one to ask the model with: SYSTEM_MESSAGE, or that of the rows behind `folder`.

    Warns, ArtefactWarning, when they are two: the model was trained on the latter.
    """
    given, trained = config.system_message, curation_of(config, folder).get("system_message")
    if None not in (given, trained) and given != trained:
        warnings.warn(
            f"SYSTEM_MESSAGE is {given!r}, and the training rows have {trained!r}: leave it out "
            "to ask as in training, or run notebook 02 again with it",
            ArtefactWarning,
            stacklevel=1,  # one place, so that it is shown once
        )
    return next(text for text in (given, trained, SYSTEM_MESSAGE) if text is not None)


def tokenizer_note(tokenizer) -> dict:
    """By what two tokenizers are known as the same, in a note of the curation."""
    rules = json.dumps(tokenizer_rules(tokenizer), sort_keys=True)
    return {
        "rules_sha256": hashlib.sha256(rules.encode()).hexdigest(),
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
    }


def dataset_fingerprint(config: Config) -> str:
    """SHA-256 over the checksums of the dataset's rows; "" where there is no dataset."""
    lines = _sealed(config.dataset_dir) or _sums(config.dataset_dir)
    rows = [line for line in lines if re.search(r"/data-[^/]*\.arrow$", line)]  # no cached ones
    return hashlib.sha256("\n".join(rows).encode()).hexdigest() if rows else ""


def check_adapter(config: Config) -> Path:
    """The adapter's folder, when it is whole and made for this base model and tokenizer.

    Raises FileNotFoundError and ArtefactError. Warns, ArtefactWarning, when it has other settings
    than the Config, or was trained on another dataset than the one that lies there now.
    """
    folder = config.require(config.adapter_dir, "04")
    weights = folder / ADAPTER_WEIGHTS
    if not weights.is_file():
        raise ArtefactError(f"{weights} is missing, and no other form is read: {_again('04')}")
    check_weights(weights, _again("04"))
    check_seal(folder, "04")
    settings = _read(folder / ADAPTER_SETTINGS, _again("04"))
    _check_base(config, folder, settings.get("base_model_name_or_path"))
    other = _other_recipe(config, folder) or _other_settings(config, settings)
    for complaint in (*other, *_other_dataset(config, folder)):
        warnings.warn(f"{complaint}, or {_again('04')}", ArtefactWarning, stacklevel=3)
    return folder


def seal_merged(folder: Path, config: Config) -> None:
    """Seal a merged model, with the SHA-256 of the adapter in it, if the run folder has one.

    With it goes what is noted of the rows that the adapter was trained on.
    """
    write_curation(curation_of(config, config.adapter_dir), folder)
    adapter = config.adapter_dir / ADAPTER_WEIGHTS
    if adapter.is_file():
        record = json.dumps({"adapter_sha256": sha256(adapter)})
        (folder / MERGE_RECORD).write_text(record, encoding="utf-8")
    seal(folder)


def check_merged(config: Config) -> Path:
    """The merged model's folder, when it is whole and made from the adapter that lies beside it.

    Raises FileNotFoundError and ArtefactError. One without a record of its adapter came from
    elsewhere and is taken as it is.
    """
    folder = config.require(config.merged_dir, "05")
    check_seal(folder, "05")
    check_model(str(folder))
    record, adapter = folder / MERGE_RECORD, config.adapter_dir / ADAPTER_WEIGHTS
    if record.is_file() and adapter.is_file():
        if _read(record, _again("05")).get("adapter_sha256") != sha256(adapter):
            raise ArtefactError(
                f"the model in {folder} was merged from another adapter than notebook 04 has "
                f"written since: {_again('05')}"
            )
    return folder


def _check_base(config: Config, folder: Path, trained_on: str | None) -> None:
    """Names are compared by their last part: folders are moved, and users have mirrors."""
    if trained_on and Path(trained_on).name != Path(config.model_name).name:
        raise ArtefactError(
            f"the adapter in {folder} was trained on {trained_on} and MODEL_NAME is "
            f"{config.model_name}: set MODEL_NAME to the former, or {_again('04')}"
        )
    if (folder / TOKENIZER).is_file():
        from helpers.model.loading import load_tokenizer

        rules = tokenizer_rules(load_tokenizer(config.model_name))
        if rules != _rules(_read(folder / TOKENIZER, _again("04"))):
            raise ArtefactError(
                f"the adapter in {folder} was trained with another tokenizer than that of "
                f"{config.model_name}: {_again('04')}"
            )


def tokenizer_rules(tokenizer) -> dict:
    """What turns text into tokens, of a loaded tokenizer."""
    return _rules(json.loads(tokenizer.backend_tokenizer.to_str()))


def _rules(tokenizer: dict) -> dict:
    """What turns text into tokens, without what a library sets for one batch."""
    return {key: value for key, value in tokenizer.items() if key not in ("padding", "truncation")}


def _training_log(folder: Path) -> dict:
    log = folder / TRAINING_LOG
    return _read(log, _again("04")) if log.is_file() else {}


def _other_recipe(config: Config, folder: Path) -> list[str]:
    found = _training_log(folder).get("recipe", config.recipe)
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


def _other_dataset(config: Config, folder: Path) -> list[str]:
    before, now = _training_log(folder).get("dataset"), dataset_fingerprint(config)
    if not before or not now or before == now:
        return []
    return [
        "the adapter was trained on another dataset than notebook 02 has written since, so rows "
        "held out now may be rows that it has seen: run notebook 02 with its old settings"
    ]


def read_metrics(config: Config) -> dict[str, dict]:
    """The named numbers of every lesson that has recorded some, by lesson number.

    Raises ArtefactError for a file that does not hold numbers.
    """
    metrics = {}
    for path in sorted(config.metrics_dir.glob("[0-9][0-9].json")):
        metrics[path.stem] = _read(path, _again(path.stem))
        for name, value in metrics[path.stem].items():
            if not isinstance(value, int | float):
                raise ArtefactError(f"{path} says {name} is {value!r}: {_again(path.stem)}")
    return metrics


def _read(path: Path, advice: str) -> dict:
    """The object of a JSON file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtefactError(f"{path} cannot be read ({error}): {advice}") from error
    if not isinstance(found, dict):
        raise ArtefactError(f"{path} holds no JSON object: {advice}")
    return found


def _sealed(folder: Path) -> list[str]:
    path = folder / SEAL
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def _again(notebook: str) -> str:
    return f"run notebook {notebook} again"
