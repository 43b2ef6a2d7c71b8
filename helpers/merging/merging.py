"""Is an adapter or a merged model whole, and made from what lies there; where a merge has room, and
how its result is made ready, saved and loaded. The merges themselves are cells of notebook 05.
"""

import contextlib
import dataclasses
import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate.big_modeling import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from peft import PeftModel
from peft.utils import CONFIG_NAME
from peft.utils import SAFETENSORS_WEIGHTS_NAME as ADAPTER_WEIGHTS

from helpers import prompts
from helpers.config import Config
from helpers.data import curation_note
from helpers.data.dataset_folder import dataset_fingerprint
from helpers.model import loading, measure, precision, predict
from helpers.model.hub import check_code, check_weights
from helpers.model.steps import Run
from helpers.runs import folders, inventory
from helpers.runs.inventory import ArtefactError, ArtefactWarning, again, read_json

MERGE_RECORD = "merge.json"
# What merging and some hundred tokens of answers take beside the weights.
WORK_BYTES = 500_000_000


def check_adapter(config: Config) -> Path:
    """The adapter's folder, when it is whole and made for this base model and tokenizer.

    Raises FileNotFoundError and ArtefactError. Warns, ArtefactWarning, when it has other settings
    than the Config, or was trained on another dataset than the one that lies there now.
    """
    folder = config.require(config.adapter_dir, "04")
    check_weights(folder, again("04"))
    if not (folder / ADAPTER_WEIGHTS).is_file():  # peft would look for a pickle
        raise ArtefactError(f"{folder} has no {ADAPTER_WEIGHTS}: {again('04')}")
    inventory.check_seal(folder, "04")
    settings = read_json(folder / CONFIG_NAME, again("04"))
    base = settings.get("base_model_name_or_path") or config.model_name
    # Names are compared by their last part: folders are moved, and users have mirrors.
    if Path(base).name != Path(config.model_name).name:
        raise ArtefactError(
            f"the adapter in {folder} was trained on {base} and MODEL_NAME is "
            f"{config.model_name}: set MODEL_NAME to the former, or {again('04')}"
        )
    own, tokenizer = folder / "tokenizer.json", loading.load_tokenizer(config.model_name)
    rules = curation_note.lasting_rules(read_json(own, again("04"))) if own.is_file() else None
    if rules not in (None, curation_note.tokenizer_rules(tokenizer)):
        raise ArtefactError(
            f"the adapter in {folder} was trained with another tokenizer than that of "
            f"{config.model_name}: {again('04')}"
        )
    for complaint in _other_than_now(config, folder, settings):
        warnings.warn(f"{complaint}, or {again('04')}", ArtefactWarning, stacklevel=2)
    return folder


def _other_than_now(config: Config, folder: Path, settings: dict) -> Iterator[str]:
    """What the Config says in another way than the adapter was trained; settings: of peft's."""
    log = folder / inventory.TRAINING_LOG  # not there for an adapter from elsewhere
    trained = read_json(log, again("04")) if log.is_file() else {}
    found = {"lora_r": settings.get("r"), "lora_alpha": settings.get("lora_alpha")}
    found |= {"target_modules": settings.get("target_modules") or (), **trained.get("base", {})}
    now = loading.for_model(config)
    for name, value in found.items():
        wanted = getattr(now, name)
        if isinstance(wanted, tuple):
            wanted, value = sorted(wanted), sorted(value)
        if wanted != value:
            says = f"{name.upper()} is {wanted!r}, the adapter was trained with {value!r}"
            yield f"{says}: set {name.upper()} = {value!r}"
    datasets = trained.get("dataset"), dataset_fingerprint(config)
    if all(datasets) and len({*datasets}) > 1:
        yield (
            "the adapter was trained on another dataset than notebook 02 has written since, so "
            "rows held out now may be rows that it has seen: run notebook 02 with its old settings"
        )


def check_merged(config: Config) -> Path:
    """The merged model's folder, when it is whole and made from the adapter that lies beside it.

    Raises FileNotFoundError and ArtefactError. One that came from elsewhere is taken as it is.
    """
    folder = config.require(config.merged_dir, "05")
    inventory.check_seal(folder, "05")
    check_weights(Path(check_code(str(folder))), again("05"))
    adapter = config.adapter_dir / ADAPTER_WEIGHTS
    merged_from = merge_record(folder).get("adapter_sha256")
    if merged_from and adapter.is_file() and merged_from != inventory.sha256(adapter):
        raise ArtefactError(
            f"the model in {folder} was merged from another adapter than notebook 04 has "
            f"written since: {again('05')}"
        )
    return folder


def merge_record(folder: Path) -> dict:
    """What `saving` noted of a merge in its folder; {} for a model that came from elsewhere."""
    record = folder / MERGE_RECORD
    return read_json(record, again("05")) if record.is_file() else {}


def load_tuned(config: Config, base=None) -> PeftModel:
    """The 4-bit base (or the given one) with the trained adapter on top, in eval mode.

    The adapter keeps the dtype it was saved in: cast to float32, it would slow every layer down.
    Raises ValueError for a base that carries an adapter already, to which a second would add up.
    """
    adapter = check_adapter(config)
    base = base if base is not None else loading.load_model(config)
    if any("lora_" in name for name, _ in base.named_parameters()):
        raise ValueError("the model carries an adapter already: load it again first")
    return PeftModel.from_pretrained(base, adapter, autocast_adapter_dtype=False).eval()


def with_room_for_base(config: Config) -> Config:
    """`with_room` for the base in 16 bits, the run's adapter if there is one, and the work."""
    run = dataclasses.replace(Run.from_config(config), quantization="16bit")
    weights = predict.estimate(loading.load_shape(config.model_name), run).weights
    adapter = config.adapter_dir / ADAPTER_WEIGHTS
    size = adapter.stat().st_size if adapter.is_file() else 0
    return with_room(config, weights + size + WORK_BYTES)


def with_room(config: Config, needed: int) -> Config:
    """The Config, moved to the CPU when its GPU has less than `needed` bytes free for torch."""
    measure.free_memory()
    if config.device == "cpu" or measure.free_bytes(config.device) >= needed:
        return config
    return dataclasses.replace(config, device_map={"": "cpu"})


def as_saved(model, config: Config):
    """A merged model with its weights rounded to what is saved, in eval mode and ready to answer.

    On a CPU 4-bit weights are unpacked once, to the same numbers. Where a model lies on the CPU for
    want of room, the GPU gets each layer's weights when it is their turn.
    """
    # `is_loaded_in_4bit` stays True after `dequantize`, and a cell may run twice.
    if getattr(model, "hf_quantizer", None) is not None and config.device == "cpu":
        model = model.dequantize()
    precision.cast(model.parameters(), precision.storage_dtype(config))
    precision.cast(model.parameters(), precision.compute_dtype(config))
    if model.device.type != torch.device(config.device).type:
        cpu_offload(model, torch.device(config.device))
    return model.eval()


@contextlib.contextmanager
def saving(model, into: str, config: Config) -> Iterator[Path]:
    """A draft of run_dir/merged to save a merged model and its tokenizer to, in a with-statement.

    At the end come the chat template of training, a record of the merge `into`, and the seal, and
    the draft takes its name; GGUF files of the earlier one go. Raises DiskFull, InUse.
    """
    remove_hook_from_submodules(model)  # of `as_saved`: the weights are back in the model
    precision.cast(model.parameters(), precision.storage_dtype(config))
    size = sum(parameter.nbytes for parameter in model.parameters())
    with folders.whole_folder(config.merged_dir, size) as draft:
        yield draft
        trained = config.adapter_dir
        if not curation_note.in_own_template(config, trained):  # else the tokenizer brings it
            template = prompts.chat_template(curation_note.system_message(config, trained))
            (draft / "chat_template.jinja").write_text(template, encoding="utf-8")
        curation_note.write_curation(curation_note.curation_of(config, trained), draft)
        by = "the rule of lesson 05" if config.merge_into == "auto" else "MERGE_INTO"
        record: dict = {"merged_into": into, "taken_by": by}
        if (trained / ADAPTER_WEIGHTS).is_file():  # else the model came from elsewhere
            record["adapter_sha256"] = inventory.sha256(trained / ADAPTER_WEIGHTS)
            said = read_json(trained / CONFIG_NAME, again("04"))
            record["adapter"] = {n: said[n] for n in ("r", "lora_alpha", "target_modules")}
        (draft / MERGE_RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
        inventory.seal(draft)
        shutil.rmtree(config.gguf_dir, ignore_errors=True)
    precision.cast(model.parameters(), precision.compute_dtype(config))


def load_merged(config: Config):
    """The model in run_dir/merged, in the bits it has; on the CPU if it does not fit the GPU."""
    computed = precision.compute_dtype(config)
    size = sum(file.stat().st_size for file in config.merged_dir.glob("*.safetensors"))
    widened = size * computed.itemsize // precision.storage_dtype(config).itemsize
    place = with_room(config, widened + WORK_BYTES)
    # Not asked to pack, transformers goes by what the folder says: 4 bits stay 4 bits.
    model = loading.load_model(place, quantized=False, source=config.merged_dir)
    precision.cast(model.parameters(), computed)  # a packed model comes in the format it was saved
    return model
