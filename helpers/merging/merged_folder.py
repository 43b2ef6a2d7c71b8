"""Is the merged model whole, and was it made from the adapter that lies beside it?"""

import json
from pathlib import Path

from helpers.config import Config
from helpers.data.curation_note import curation_of, write_curation
from helpers.merging.adapter_folder import ADAPTER_WEIGHTS
from helpers.model.model_folder import check_model
from helpers.runs.inventory import ArtefactError, again, check_seal, read_json, seal, sha256

MERGE_RECORD = "merge.json"


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
        if read_json(record, again("05")).get("adapter_sha256") != sha256(adapter):
            raise ArtefactError(
                f"the model in {folder} was merged from another adapter than notebook 04 has "
                f"written since: {again('05')}"
            )
    return folder
