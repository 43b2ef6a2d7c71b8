"""Which files lie in a folder, by their SHA-256, and are they still the ones that were written?

A folder is sealed when it is complete: SHA256SUMS lists its files, in the form that `sha256sum
--check` reads. A folder without a seal came from elsewhere; of it only what it says itself is
checked.
"""

import functools
import hashlib
import json
import math
import time
from collections.abc import Iterable
from pathlib import Path

from helpers.config import Config, ConfigError
from helpers.runs import folders

SEAL = "SHA256SUMS"
# Beside the adapter: by what it was trained. Here, since training writes it and merging reads it.
TRAINING_LOG = "training_log.json"


class ArtefactError(ValueError):
    """A result cannot be used. The message names the file and the notebook that writes it again."""


class ArtefactWarning(UserWarning):
    """A result can be used, but it was not made from what lies beside it."""


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal; about 0.15 s for 270 MB."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remembered(path: Path) -> str:
    """`sha256`, which reads a file again only when its size or one of its times is another, or was
    set less than two seconds ago: not every disk's clock tells two changes in one second apart.
    """
    status = path.stat()
    if time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) < 2e9:
        return sha256(path)
    return _sha256_at(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@functools.cache
def _sha256_at(path: Path, *marks: int) -> str:
    return sha256(path)


def hashes(folder: Path, patterns: Iterable[str] = ("**/*",)) -> dict[str, str]:
    """SHA-256 of the files below a folder that match one of the patterns, by name, in order.

    Left out is what others add later: hidden files, caches of datasets, and cards (*.md).
    """
    paths = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    return {name: remembered(names[name]) for name in sorted(names) if _is_lasting(name)}


def _is_lasting(name: str) -> bool:
    added = name.endswith(".md") or Path(name).match("cache-*.arrow")
    return not added and "/." not in f"/{name}"


def seal(folder: Path) -> None:
    """Write SHA256SUMS over the files of a folder, but for hidden ones and cards."""
    lines = [f"{found}  {name}\n" for name, found in hashes(folder).items() if name != SEAL]
    (folder / SEAL).write_text("".join(lines), encoding="utf-8")


def sealed(folder: Path) -> dict[str, str]:
    """SHA-256 of each file that the seal of a folder covers, by name; {} where there is none."""
    path = folder / SEAL
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {name: found for found, _, name in (line.partition("  ") for line in lines)}


def check_seal(folder: Path, notebook: str) -> None:
    """Raise ArtefactError for a file that is gone or is not the one that was sealed."""
    for name, wanted in sealed(folder).items():
        path = folder / name
        if not path.is_file() or sha256(path) != wanted:
            state = "damaged or changed" if path.is_file() else "gone"
            raise ArtefactError(f"{path} is {state} since it was written: {again(notebook)}")


def read_json(path: Path, advice: str) -> dict:
    """The object of a JSON file. Raises ArtefactError, which ends with the advice."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtefactError(f"{path} cannot be read ({error}): {advice}") from error
    if not isinstance(found, dict):
        raise ArtefactError(f"{path} holds no JSON object: {advice}")
    return found


def record_metrics(config: Config, lesson: str, metrics: dict) -> Path:
    """Write the named numbers of a notebook to metrics/<lesson>.json, whole or not at all.

    Raises ConfigError for a value that is no finite number.
    """
    bad = {name: value for name, value in metrics.items() if not _is_number(value)}
    if bad:
        raise ConfigError(f"metrics of notebook {lesson} must be finite numbers: {bad}")
    path = folders.writable(config.metrics_dir) / f"{lesson}.json"
    return folders.write_text(path, json.dumps(metrics, indent=1) + "\n")


def read_metrics(config: Config) -> dict[str, dict]:
    """The named numbers of every lesson that has recorded some, by lesson number.

    Raises ArtefactError for a file that does not hold numbers.
    """
    metrics = {}
    for path in sorted(config.metrics_dir.glob("[0-9][0-9].json")):
        metrics[path.stem] = read_json(path, again(path.stem))
        for name, value in metrics[path.stem].items():
            if not _is_number(value):
                raise ArtefactError(f"{path} says {name} is {value!r}: {again(path.stem)}")
    return metrics


def _is_number(value) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def again(notebook: str) -> str:
    """What to do about a result that cannot be used."""
    return f"run notebook {notebook} again"
