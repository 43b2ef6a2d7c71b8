"""The record of a run folder: what was run, on what, and the SHA-256 of all that came of it.

`write` makes manifest.json after a run, `verify` names everything that is no longer as it says.
"""

import dataclasses
import hashlib
import json
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import nbformat

from helpers.config import PROJECT_DIR, Config
from helpers.data.sources import local_path
from helpers.model.identity import base_model
from helpers.runs import folders, inventory

NAME = "manifest.json"
# Rewritten from these whenever they are asked for: report.html and the pages of the notebooks.
ARTEFACTS = ("dataset/**/*", "adapter/**/*", "merged/**/*", "metrics/*", "executed/*.ipynb")


class ManifestError(ValueError):
    """A run folder is not as its manifest says. The message names everything that differs."""


def write(config: Config, parameters: dict, environment: dict[str, str]) -> Path:
    """Write manifest.json to the run folder; `parameters` are those that were given."""
    record = {
        "environment": environment,
        "parameters": parameters,
        "settings": {**dataclasses.asdict(config), "run_dir": None},
        "versions": {name: _version(name) for name in requirements()},
        "code": code(),
        "data": data(config.data_source),
        "base_model": base_model(config.model_name),
        "artefacts": inventory.hashes(config.run_dir, ARTEFACTS),
    }
    text = json.dumps(record, indent=1, default=str) + "\n"
    return folders.write_text(config.run_dir / NAME, text)


def verify(run_dir: Path) -> int:
    """The number of artefacts, all of them as recorded.

    Raises ManifestError, which names what is missing, changed or new among the artefacts, and which
    code, data and versions here are not those of the run.
    """
    path = run_dir / NAME
    if not path.exists():
        raise ManifestError(f"{path} is missing: `python -m helpers run` writes it")
    record = json.loads(path.read_text("utf-8"))
    found = {
        "artefacts": inventory.hashes(run_dir, ARTEFACTS),
        "code": code(),
        "data": data(record["settings"]["data_source"]),
        "base_model": base_model(record["settings"]["model_name"]),
        "versions": {name: _version(name) for name in record["versions"]},
    }
    problems = [text for part in found for text in _differences(record[part], found[part])]
    if problems:
        raise ManifestError(f"{run_dir} differs from its manifest: {'; '.join(problems)}")
    return len(record["artefacts"])


def _differences(recorded: dict[str, str], found: dict[str, str]) -> list[str]:
    both = recorded.keys() & found.keys()
    return [
        *(f"{name} is missing" for name in sorted(recorded.keys() - found.keys())),
        *(f"{name} is not part of the run" for name in sorted(found.keys() - recorded.keys())),
        *(
            f"{name} was {recorded[name][:12]} and is {found[name][:12]}"
            for name in sorted(both)
            if recorded[name] != found[name]
        ),
    ]


def code_hash(path: Path) -> str:
    """SHA-256 over the sources of a notebook's code cells, in order."""
    cells = nbformat.read(path, as_version=4).cells
    code = "\0".join(cell.source for cell in cells if cell.cell_type == "code")
    return hashlib.sha256(code.encode()).hexdigest()


def code() -> dict[str, str]:
    """SHA-256 of the helpers, the lists of versions, and the code cells of the notebooks."""
    notebooks = sorted((PROJECT_DIR / "notebooks").glob("*.ipynb"))
    return {
        **inventory.hashes(PROJECT_DIR, ("helpers/**/*.py", "*.txt")),
        **{f"notebooks/{path.name}": code_hash(path) for path in notebooks},
    }


def data(source: str) -> dict[str, str]:
    """SHA-256 of the files of a data source, or its name where it is not on this disk."""
    folder = local_path(source)
    if folder.is_file():
        return inventory.hashes(folder.parent, [folder.name])
    return inventory.hashes(folder, ("*.csv",)) if folder.is_dir() else {source: "not on this disk"}


def requirements() -> list[str]:
    """The packages that requirements.txt names."""
    lines = (PROJECT_DIR / "requirements.txt").read_text("utf-8").splitlines()
    return [found[0] for line in lines if (found := re.match(r"[\w.-]+(?===)", line))]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
