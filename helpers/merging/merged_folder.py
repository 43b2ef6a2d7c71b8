"""Is the merged model whole, and was it made from the adapter that lies beside it?"""

import json
from pathlib import Path

from peft.utils import CONFIG_NAME

from helpers.config import Config
from helpers.data.curation_note import curation_of, write_curation
from helpers.merging.adapter_folder import ADAPTER_WEIGHTS
from helpers.model.model_folder import check_model
from helpers.runs.inventory import ArtefactError, again, check_seal, read_json, seal, sha256

MERGE_RECORD = "merge.json"


def seal_merged(folder: Path, into: str, config: Config) -> None:
    """Seal a merged model, with a record of how it was merged, of its adapter and of its rows."""
    write_curation(curation_of(config, config.adapter_dir), folder)
    by = "the rule of lesson 05" if config.merge_into == "auto" else "MERGE_INTO"
    record: dict = {"merged_into": into, "taken_by": by}
    adapter = config.adapter_dir / ADAPTER_WEIGHTS
    if adapter.is_file():  # else the model came from elsewhere
        said = read_json(config.adapter_dir / CONFIG_NAME, again("04"))
        targets = said["target_modules"]  # one name may stand for several
        record |= {
            "adapter_sha256": sha256(adapter),
            "rank": said["r"],
            "alpha": said["lora_alpha"],
            "target_modules": [targets] if isinstance(targets, str) else sorted(targets),
        }
    (folder / MERGE_RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
    seal(folder)


def check_merged(config: Config) -> Path:
    """The merged model's folder, when it is whole and made from the adapter that lies beside it.

    Raises FileNotFoundError and ArtefactError. One that came from elsewhere is taken as it is.
    """
    folder = config.require(config.merged_dir, "05")
    check_seal(folder, "05")
    check_model(str(folder))
    adapter = config.adapter_dir / ADAPTER_WEIGHTS
    merged_from = merge_record(folder).get("adapter_sha256")
    if merged_from and adapter.is_file() and merged_from != sha256(adapter):
        raise ArtefactError(
            f"the model in {folder} was merged from another adapter than notebook 04 has "
            f"written since: {again('05')}"
        )
    return folder


def merge_record(folder: Path) -> dict:
    """What `seal_merged` noted in a folder; {} for a model that came from elsewhere."""
    record = folder / MERGE_RECORD
    return read_json(record, again("05")) if record.is_file() else {}
