"""manifest.json: what each notebook of a run ran with, and whether all of it is still so."""

import functools
import json
from pathlib import Path

import nbformat

from helpers.runs import folders, lessons, provenance
from helpers.runs.inventory import read_json, sha256
from helpers.runs.provenance import Sha256

NAME = "manifest.json"


class ManifestError(ValueError):
    """A run folder is not as its manifest says. The message names everything that differs."""


def write(run_dir: Path) -> Path:
    """Gather manifest.json from the records in the finished notebooks, and nothing of today."""
    found = provenance.records_in(run_dir)
    finished = {name: found[name] for name in found if not name.endswith(".failed.ipynb")}
    text = json.dumps({"notebooks": finished}, indent=1) + "\n"
    return folders.write_text(run_dir / NAME, text)


def verify(run_dir: Path) -> int:
    """The number of files that the notebooks wrote, all of them as recorded.

    Raises ManifestError, which names what is gone, changed or new among what they read and wrote,
    and which versions are others here.
    """
    if not (run_dir / NAME).exists():
        raise ManifestError(f"{run_dir / NAME} is missing: `python -m helpers run` writes it")
    records = read_json(run_dir / NAME, "run the notebooks again")["notebooks"]
    once = functools.cache(sha256)  # most notebooks read the same model and helpers
    wrong = [text for name in records for text in _wrong(run_dir, name, records[name], once)]
    if wrong:
        said = "; ".join(dict.fromkeys(wrong))
        raise ManifestError(f"{run_dir} differs from its manifest: {said}")
    return len({name for record in records.values() for name in record["wrote"]})


def _wrong(run_dir: Path, name: str, record: dict, sha256: Sha256) -> list[str]:
    """What is no longer as the record of one notebook says."""
    wrote = provenance.written_by(run_dir, name, sha256)
    if (executed := run_dir / "executed" / name).exists():
        wrote[f"executed/{name}"] = provenance.cells_hash(nbformat.read(executed, as_version=4))
    read = provenance.read_by(record["settings"], run_dir, lessons.NOTEBOOKS_DIR / name, sha256)
    versions = {package: provenance.installed_version(package) for package in record["versions"]}
    now = {"read": read, "wrote": wrote, "versions": versions}
    return [text for part in now for text in provenance.differences(record[part], now[part])]
