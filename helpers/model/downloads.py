"""Weights from the Hub, where a download that was cut goes on in a later call, or process.

huggingface_hub resumes within one call. A later call begins the file again, on purpose: each try
writes to a file of its own, since on disks that honour no lock two writers would mix their bytes
(its _download_to_tmp_and_move, https://github.com/huggingface/huggingface_hub/pull/4228). Here the
partial file keeps its name, under the library's own lock, and mixed bytes are found by the SHA-256
that the Hub states. The whole file is put where the library looks for it.

Files on Xet storage come over plain HTTP too: hf_xet uses more connections, but cannot go on.
Everything else is left to the library: small files, weights under other names, or above 50 GB.
A partial file that nobody goes on with is removed by `hf cache prune`, as the library's own are.
"""

import re
from pathlib import Path
from typing import NamedTuple

import httpx2
from huggingface_hub import constants, hf_hub_url, model_info
from huggingface_hub.file_download import are_symlinks_supported, http_get, repo_folder_name
from huggingface_hub.utils import WeakFileLock, build_hf_headers

from helpers.runs import folders, inventory

WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")  # what transformers loads


class DamagedDownload(OSError):
    """A file came through with another SHA-256 than the Hub states, and was removed."""


class _File(NamedTuple):
    """One file at one commit, and its places in the library's cache; size in bytes."""

    name: str
    url: str
    size: int
    sha256: str
    blob: Path
    link: Path  # to the blob; where there are no symbolic links, the file itself
    lock: Path

    def partial(self) -> Path:
        return self.blob.with_suffix(".resume.incomplete")

    def is_here(self) -> bool:
        return self.blob.exists() or self.link.exists()

    def bytes_left(self) -> int:
        return self.size - (self.partial().stat().st_size if self.partial().exists() else 0)


def fetch_weights(model: str) -> None:
    """Bring a Hub model's weights into the library's cache; a folder is passed over.

    Does nothing where the Hub cannot be asked: the library then finds its copy or says why not.
    Raises DiskFull before the first byte, DamagedDownload, and the errors of the library's client.
    """
    missing = [] if Path(model).is_dir() else [f for f in _weights(model) if not f.is_here()]
    needed = sum(file.bytes_left() for file in missing)
    folders.need_space(Path(constants.HF_HUB_CACHE), needed, f"downloading {model}")
    for file in missing:
        for folder in (file.blob.parent, file.lock.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(file.lock):
            if not file.is_here():  # another process may have been first
                _fetch(file)


def _weights(model: str) -> list[_File]:
    """The weights of the newest commit; none where the Hub cannot be asked."""
    try:
        found = model_info(model, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except (OSError, ValueError, httpx2.HTTPError):
        return []
    cache, folder = Path(constants.HF_HUB_CACHE), repo_folder_name(repo_id=model, repo_type="model")
    return [
        _File(
            name=entry.rfilename,
            # The Hub's address, not the one it leads to: that is signed and runs out.
            url=hf_hub_url(model, entry.rfilename, revision=found.sha),
            size=entry.lfs.size,
            sha256=entry.lfs.sha256,
            blob=cache / folder / "blobs" / entry.lfs.sha256,
            link=cache / folder / "snapshots" / found.sha / entry.rfilename,
            lock=cache / ".locks" / folder / f"{entry.lfs.sha256}.lock",
        )
        for entry in found.siblings or ()
        if WEIGHTS.fullmatch(entry.rfilename)
        and entry.lfs
        and entry.lfs.size <= constants.MAX_HTTP_DOWNLOAD_SIZE
    ]


def _fetch(file: _File) -> None:
    """Append to the partial file what it lacks, compare its SHA-256, and put it in its place."""
    partial, left = file.partial(), file.bytes_left()
    # A server that packs its answer may ignore the range that is asked for.
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if left > 0:
        with folders.full_disk_said(partial.with_name(file.name)), partial.open("ab") as to:
            http_get(
                file.url, to, resume_size=file.size - left, expected_size=file.size, headers=headers
            )
    if (found := inventory.sha256(partial)) != file.sha256:
        partial.unlink()
        raise DamagedDownload(f"{file.name} came through with SHA-256 {found}, not {file.sha256}")
    # Without symbolic links the library would copy a blob, and keep both.
    place = file.blob if are_symlinks_supported() else file.link
    place.parent.mkdir(parents=True, exist_ok=True)
    partial.replace(place)
