"""Which base model is it? Two runs with the same answer start from the same weights."""

from collections.abc import Callable
from pathlib import Path

import huggingface_hub

from helpers.model import embedded
from helpers.runs import inventory

NOT_HERE = "not on this disk"


def base_model(name: str, sha256: Callable[[Path], str] = inventory.sha256) -> dict[str, str]:
    """SHA-256 of the files in a folder, or the commit of a Hub model as far as it is known."""
    folder = embedded.EMBEDDED_DIR if name == embedded.EMBEDDED_NAME else Path(name).expanduser()
    if folder.is_dir():
        return inventory.hashes(folder, ("*.safetensors", "*.json"), sha256)
    cached = huggingface_hub.try_to_load_from_cache(name, "config.json")
    return {name: Path(cached).parent.name if isinstance(cached, str) else NOT_HERE}
