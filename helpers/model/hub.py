"""Where a model's files come from: the embedded one, a local folder, or the Hub.

Where the Hub fails, the copy that an earlier load left is taken, or one sentence says why not.
huggingface_hub takes a cut connection up again within one call; a later call keeps whole files.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from safetensors import safe_open

from helpers.model import embedded
from helpers.model.embedded import EMBEDDED_NAME, ModelUnavailable
from helpers.runs import folders, inventory

NOT_HERE = "not on this disk"
HUB_REASONS = {
    GatedRepoError: "access to {name} is gated: accept its licence on its Hub page, then run "
    "`hf auth login`",
    RepositoryNotFoundError: "{name} is neither a local folder nor a model on the Hub that you may "
    "see: check the name, or run `hf auth login`",
}
STATUS_ADVICE = {
    401: "it does not accept the login, run `hf auth login` again",
    403: "the login may not read it, ask its owner or log in as another user",
    429: "these are too many requests, wait some minutes and try again",
}


def resolve(model_name: str) -> str:
    """What `from_pretrained` takes: a folder or a Hub id. ModelUnavailable, see embedded."""
    if model_name == EMBEDDED_NAME:
        return str(embedded.fetch_embedded_model())
    local = Path(model_name).expanduser()
    return str(local) if local.is_dir() else model_name


def identity(name: str, sha256: Callable[[Path], str] = inventory.sha256) -> dict[str, str]:
    """Two runs with the same answer start from the same weights: SHA-256 of the files in a folder,
    or the commit of a Hub model as far as it is known.
    """
    folder = embedded.EMBEDDED_DIR if name == EMBEDDED_NAME else Path(name).expanduser()
    if folder.is_dir():
        return inventory.hashes(folder, ("*.safetensors", "*.json"), sha256)
    cached = huggingface_hub.try_to_load_from_cache(name, "config.json")
    return {name: Path(cached).parent.name if isinstance(cached, str) else NOT_HERE}


def need_room(name: str) -> None:
    """Raise DiskFull, before the first byte, for weights of the Hub that the disk cannot hold.

    Where the Hub cannot be asked, loading finds its copy or says why not.
    """
    if Path(name).is_dir():
        return
    weights = ["model*.safetensors"]  # what transformers loads
    try:
        files = huggingface_hub.snapshot_download(name, allow_patterns=weights, dry_run=True)
    except (OSError, ValueError, httpx2.HTTPError):
        return
    needed = sum(file.file_size or 0 for file in files if file.will_download)
    folders.need_space(Path(constants.HF_HUB_CACHE), needed, f"downloading {name}")


def stored_tensors(folder: Path) -> Iterator[tuple]:
    """(name, tensor that is read when it is sliced) of every safetensors file in a folder."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():
                yield name, opened.get_slice(name)


def from_hub(name: str, load, check):
    """load(check(path)); where the Hub fails, from the copy that an earlier load left.

    Raises ModelUnavailable, one sentence with the reason and the way out, and DiskFull.
    """
    path = resolve(name)
    try:
        return load(check(path))
    except (OSError, httpx2.HTTPError) as error:
        try:
            return load(check(huggingface_hub.snapshot_download(path, local_files_only=True)))
        except (OSError, ValueError):  # no copy, or half of one; ValueError: no name on the Hub
            if isinstance(error, folders.DiskFull):
                raise error from None
            raise ModelUnavailable(
                f"{_reason(name, error)}. PROFILE = 'demo' needs no account and no network"
            ) from error


def _reason(name: str, error: BaseException) -> str:
    """What kept a model from being loaded, from the error and its causes."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    for kind, sentence in HUB_REASONS.items():
        if any(isinstance(cause, kind) for cause in causes):
            return sentence.format(name=name)
    for cause in causes:
        if isinstance(cause, HfHubHTTPError):
            status = cause.response.status_code
            advice = STATUS_ADVICE.get(status, "try again later")
            return f"the Hub answered {status} when asked for {name}: {advice}"
    first = (str(causes[-1]).strip() or type(error).__name__).splitlines()[0]
    return (
        f"{name} could not be loaded ({first}): check the network and try again, files that "
        "came whole are kept; or name a local folder in MODEL_NAME"
    )
