"""Is the dataset whole, and is it the one that something else was made from?"""

import hashlib
import re
from pathlib import Path

from helpers.config import Config
from helpers.runs.inventory import check_seal, hashes, sealed


def check_dataset(config: Config) -> Path:
    """The dataset's folder. Raises FileNotFoundError, and ArtefactError when it is damaged."""
    folder = config.require(config.dataset_dir, "02")
    check_seal(folder, "02")
    return folder


def dataset_fingerprint(config: Config) -> str:
    """SHA-256 over the checksums of the dataset's rows; "" where there is no dataset."""
    found = sealed(config.dataset_dir) or hashes(config.dataset_dir)
    rows = [f"{found[name]}  {name}" for name in found if re.search(r"/data-[^/]*\.arrow$", name)]
    return hashlib.sha256("\n".join(rows).encode()).hexdigest() if rows else ""
