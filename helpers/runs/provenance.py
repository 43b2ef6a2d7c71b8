"""What a notebook ran with: kept in the executed notebook, and gathered in manifest.json.

Its record holds the parameters that were given, the settings they came to, hardware, versions, the
SHA-256 of all that the notebook `read`, and afterwards of what it `wrote`. A file has the path that
it has in the project or in the run folder; one that a parameter names stands below that name.
"""

import dataclasses
import hashlib
import json
import re
from pathlib import Path

import nbformat

from helpers.config import PROJECT_DIR, Config
from helpers.data.sources import local_path
from helpers.model.hub import NOT_HERE, identity
from helpers.runs import folders, lessons
from helpers.runs.environment import environment
from helpers.runs.inventory import hashes, read_json, remembered
from helpers.runs.lessons import code_hash, executed_paths, notebooks

KEY = "ran_with"  # in the metadata of an executed notebook
MANIFEST = "manifest.json"
# What lessons leave in the run folder for later ones, and which files of the project they read.
RESULTS = {"02": ("dataset/**/*",), "04": ("adapter/**/*",), "05": ("merged/**/*", "gguf/**/*")}
MEASURED = ("qlora_step_memory", "layers_in_16bit")
PROJECT_FILES = {
    "01": ("benchmarks/results/first_look.json",),
    "02": ("data/problems.jsonl",),
    "03": tuple(f"benchmarks/results/{name}.json" for name in MEASURED),
    "04": tuple(f"benchmarks/results/{name}.json" for name in ("recipes", "two_gpus")),
    "05": ("data/problems.jsonl", "benchmarks/results/qlora_step_memory.json"),
    "06": ("data/problems.jsonl", "data/general.txt"),
}


class ManifestError(ValueError):
    """A run folder is not as its manifest says. The message names everything that differs."""


def taken_before(config: Config, source: Path, parameters: dict) -> dict:
    """The record of a notebook that is about to run."""
    return {
        "parameters": {name: parameters[name] for name in parameters if name != "RUN_DIR"},
        "settings": settings_of(config),
        "environment": environment(),
        "read": read_by(settings_of(config), config.run_dir, source),
    }


def completed(record: dict, config: Config, source: Path, notebook) -> dict:
    """The record of a notebook that ran to its end, with the model it fetched and what it wrote."""
    before = {name: found for name, found in record["read"].items() if found != NOT_HERE}
    read = read_by(record["settings"], config.run_dir, source) | before
    wrote = written_by(config.run_dir, source.name)
    wrote[f"executed/{source.name}"] = cells_hash(notebook)
    return {**record, "read": read, "wrote": wrote}


def settings_of(config: Config) -> dict:
    """The settings of a Config as JSON has them, but for the folder: a run can be moved."""
    settings = dataclasses.asdict(config)
    del settings["run_dir"]
    return json.loads(json.dumps(settings))


def read_by(settings: dict, run_dir: Path, source: Path) -> dict[str, str]:
    """What a notebook reads, by name: its SHA-256, or how else a version of it is known."""
    number = source.name[:2]
    found = {f"notebooks/{path.name}": code_hash(path) for path in notebooks() if path <= source}
    code = ["helpers/**/*.py", "helpers/**/*.jinja"]
    found |= hashes(PROJECT_DIR, [*code, *PROJECT_FILES.get(number, ())])
    if number == "02":
        for name in filter(None, (settings["data_source"], settings["validation_source"])):
            found |= _below("DATA_SOURCE", data(name))
        for name in settings["benchmarks"]:
            found |= _below("BENCHMARKS", data(name))
    if number > "01":  # 01 takes the embedded model, whose SHA-256 the code demands
        found |= _below("MODEL_NAME", identity(settings["model_name"]))
    earlier = [pattern for other in RESULTS if other < number for pattern in RESULTS[other]]
    return found | hashes(run_dir, earlier)


def _below(parameter: str, found: dict[str, str]) -> dict[str, str]:
    return {f"{parameter}/{name}": value for name, value in found.items()}


def data(source: str) -> dict[str, str]:
    """SHA-256 of the files of a data source, or its name where it is not on this disk."""
    place = local_path(source)
    if place.is_dir():
        return hashes(place)
    return {place.name: remembered(place)} if place.is_file() else {source: NOT_HERE}


def written_by(run_dir: Path, name: str) -> dict[str, str]:
    """SHA-256 of what a notebook of this name leaves for later ones, and of its numbers."""
    patterns = (*RESULTS.get(name[:2], ()), f"metrics/{name[:2]}.json")
    return hashes(run_dir, patterns)


def cells_hash(notebook) -> str:
    """SHA-256 over the cells of an executed notebook, with their outputs."""
    return hashlib.sha256(json.dumps(notebook.cells, sort_keys=True).encode()).hexdigest()


def record_in(executed: Path) -> dict:
    """The record in an executed notebook; {} where there is none."""
    return json.loads(executed.read_text("utf-8"))["metadata"].get(KEY, {})


def records_in(run_dir: Path) -> dict[str, dict]:
    """The record of each notebook that ran, also of those that failed, by the file's name."""
    found = {path.name: record_in(path) for path in sorted(run_dir.glob("executed/[0-9]*.ipynb"))}
    return {name: record for name, record in found.items() if record}


def why_unfinished(config: Config, source: Path) -> str:
    """Why a notebook has to run, in words; "" when all is as it was, and what it wrote is there."""
    final, draft, failed = executed_paths(config, source)
    if not final.exists() or draft.exists() or failed.exists():
        return "its last run did not come to the end"
    if not (record := record_in(final)):
        return "nothing says what it ran with"
    settings = settings_of(config)
    then, now = ({n.upper(): v for n, v in s.items()} for s in (record["settings"], settings))
    wrong = [
        *differences(then, now),
        *differences(record["read"], read_by(settings, config.run_dir, source)),
        *(f"{name} is gone" for name in record["wrote"] if not (config.run_dir / name).exists()),
    ]
    return wrong[0] if wrong else ""


def differences(recorded: dict, found: dict) -> list[str]:
    """A few words for each name whose value is not the recorded one."""
    said = [f"{name} is gone" for name in recorded.keys() - found.keys()]
    said += [f"{name} is new" for name in found.keys() - recorded.keys()]
    for name in recorded.keys() & found.keys():
        then, now = recorded[name], found[name]
        is_hash = re.fullmatch("[0-9a-f]{64}", str(then))
        if then != now:
            said.append(f"{name} " + ("has changed" if is_hash else f"was {then} and is {now}"))
    return sorted(said)


def write_manifest(run_dir: Path) -> Path:
    """Gather manifest.json from the records in the finished notebooks, and nothing of today."""
    found = records_in(run_dir)
    finished = {name: found[name] for name in found if not name.endswith(".failed.ipynb")}
    text = json.dumps({"notebooks": finished}, indent=1) + "\n"
    return folders.write_text(run_dir / MANIFEST, text)


def verify(run_dir: Path) -> int:
    """The number of files that the notebooks wrote, all of them as recorded.

    Raises ManifestError, which names what is gone, changed or new among what they read and wrote,
    and which versions are others here; ArtefactError where there is no manifest.
    """
    records = read_json(run_dir / MANIFEST, "`python -m helpers run` writes it")["notebooks"]
    wrong = [text for name in records for text in _wrong(run_dir, name, records[name])]
    if wrong:
        said = "; ".join(dict.fromkeys(wrong))
        raise ManifestError(f"{run_dir} differs from its manifest: {said}")
    return len({name for record in records.values() for name in record["wrote"]})


def _wrong(run_dir: Path, name: str, record: dict) -> list[str]:
    """What is no longer as the record of one notebook says."""
    wrote = written_by(run_dir, name)
    if (executed := run_dir / "executed" / name).exists():
        wrote[f"executed/{name}"] = cells_hash(nbformat.read(executed, as_version=4))
    read = read_by(record["settings"], run_dir, lessons.NOTEBOOKS_DIR / name)
    same = {name: record["environment"][name] for name in ("date", "hardware")}
    now = {"read": read, "wrote": wrote, "environment": environment() | same}
    return [text for part in now for text in differences(record[part], now[part])]
