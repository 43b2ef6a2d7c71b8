"""A model's files: the embedded one's, a folder's or the Hub's, and whether they may be read.

Where the Hub fails, the copy that an earlier load left is taken, or one sentence says why not.
huggingface_hub takes a cut connection up again within one call; a later call keeps whole files.
"""

from pathlib import Path

import httpx2
import huggingface_hub
from huggingface_hub import constants
from safetensors import SafetensorError, safe_open

from helpers.model import embedded
from helpers.model.architecture import KNOWN
from helpers.model.embedded import EMBEDDED_NAME, ModelUnavailable
from helpers.runs import folders, inventory
from helpers.runs.inventory import ArtefactError, read_json

NOT_HERE = "not on this disk"
GET_AGAIN = "get the model again"


def resolve(model_name: str) -> str:
    """What `from_pretrained` takes: a folder or a Hub id. ModelUnavailable, see embedded."""
    if model_name == EMBEDDED_NAME:
        return str(embedded.fetch_embedded_model())
    local = Path(model_name).expanduser()
    return str(local) if local.is_dir() else model_name


def identity(name: str) -> dict[str, str]:
    """Two runs with the same answer start from the same weights: SHA-256 of the files in a folder,
    or the commit of a Hub model as far as it is known.
    """
    folder = embedded.EMBEDDED_DIR if name == EMBEDDED_NAME else Path(name).expanduser()
    if folder.is_dir():
        return inventory.hashes(folder, ("*.safetensors", "*.json"))
    cached = huggingface_hub.try_to_load_from_cache(name, "config.json")
    return {name: Path(cached).parent.name if isinstance(cached, str) else NOT_HERE}


def need_room(name: str) -> None:
    """Raise DiskFull, before the first byte, for weights of the Hub that the disk cannot hold."""
    if Path(name).is_dir():
        return
    weights = ["model*.safetensors"]  # what transformers loads
    try:
        files = huggingface_hub.snapshot_download(name, allow_patterns=weights, dry_run=True)
    except (OSError, ValueError, httpx2.HTTPError):
        return  # loading finds its copy, or says why not
    needed = sum(file.file_size or 0 for file in files if file.will_download)
    folders.need_space(Path(constants.HF_HUB_CACHE), needed, f"downloading {name}")


def from_hub(name: str, load, check):
    """load(check(path)), or from the copy of an earlier load; ModelUnavailable, DiskFull."""
    path = resolve(name)
    try:
        return load(check(path))
    except folders.DiskFull:
        raise
    except (OSError, httpx2.HTTPError) as error:
        try:
            return load(check(huggingface_hub.snapshot_download(path, local_files_only=True)))
        except (OSError, ValueError):  # no copy, or half of one; ValueError: no name on the Hub
            cause: BaseException = error
            while earlier := cause.__cause__ or cause.__context__:
                cause = earlier
            first = (str(cause).strip() or type(error).__name__).splitlines()[0]
            raise ModelUnavailable(
                f"{name} could not be loaded ({first}): check its name and the network, accept the "
                "licence on its Hub page if it has one, run `hf auth login`, and try again; "
                "PROFILE = 'demo' needs no account and no network"
            ) from error


def check_weights(folder: Path, advice: str) -> None:
    """Raise ArtefactError for a folder without whole safetensors files. Reads only headers."""
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        says = f"{folder} holds no .safetensors file, and no other form of weights is read"
        raise ArtefactError(f"{says}: {advice}")
    for path in weights:
        try:
            with safe_open(path, "numpy"):
                pass
        except SafetensorError as error:
            raise ArtefactError(
                f"{path} is cut off or damaged ({error}), or a Git-LFS pointer: {advice}, or run "
                "`git lfs pull` there"
            ) from error


def check_code(model: str) -> str:
    """The name of a model; ArtefactError for a folder with code to run for a kind not KNOWN."""
    for name in ("config.json", "tokenizer_config.json"):
        path = Path(model) / name
        said = read_json(path, GET_AGAIN) if path.is_file() else {}
        if "auto_map" in said and said.get("model_type") not in KNOWN:
            raise ArtefactError(
                f"{path} names code to be run (auto_map), and code of a model is never run here: "
                "remove that entry, or choose a model that transformers knows by itself"
            )
    return model


def check_model(model: str) -> str:
    """The name of a model, unless it is a folder without whole safetensors, or with code."""
    if Path(model).is_dir():
        check_weights(Path(model), GET_AGAIN)
    return check_code(model)
