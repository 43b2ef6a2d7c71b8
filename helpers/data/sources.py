"""Where rows come from: the sample, the Kaggle set, files of one's own, or the Hub."""

import re
from dataclasses import replace
from pathlib import Path

from helpers.config import PROJECT_DIR
from helpers.data import kaggle, own_rows, posts
from helpers.data.posts import DataError, Posts
from helpers.runs.folders import public_name

SAMPLE_DIR = PROJECT_DIR / "data" / "sample"


def local_path(source: str) -> Path:
    """Where a source lies if it is on this disk: the sample's folder, or what its name says."""
    return SAMPLE_DIR if source == "sample" else Path(source).expanduser()


def open_source(source: str, folder: Path, seed: int, progress: bool = False) -> Posts:
    """Read a source into a database in `folder`; with `progress`, a bar for each file.

    It is "sample", "kagglehub", a folder of CSVs, a JSONL, CSV or Parquet file, or a Hub dataset.
    Raises DataError for what cannot be read.
    """
    path = kaggle.download() if source == "kagglehub" else local_path(source)
    with posts.new_database(folder) as database:
        if path.is_dir():
            kaggle.read(path, database, progress)
            found = _of_kaggle(path, folder)
        else:
            given = path if path.is_file() else _hub_name(source)
            licence = "as in " if path.is_file() else "as stated on the Hub: "
            licence += public_name(path.name if path.is_file() else source)
            lost = own_rows.read(given, database, folder)
            found = Posts(folder / posts.DATABASE, False, licence, quarantined=lost)
        questions, answers, orphans = posts.shuffle(database, seed)
        return replace(found, questions=questions, answers=answers, orphans=orphans)


def _of_kaggle(source: Path, folder: Path) -> Posts:
    """The sample was written for this course and is on no site; an address would look like one."""
    if source == SAMPLE_DIR:
        return Posts(folder / posts.DATABASE, True, "CC BY-SA 4.0")
    url = "https://stackoverflow.com/a/{answer_id}"
    return Posts(folder / posts.DATABASE, True, "CC BY-SA 3.0", url)


def _hub_name(source: str) -> str:
    if Path(source).suffix or not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise DataError(
            f"DATA_SOURCE is {source!r}, and there is no such file or folder: give a folder with "
            "Questions.csv and Answers.csv, a .jsonl, .csv or .parquet file, the id of a Hub "
            "dataset, 'kagglehub' or 'sample'"
        )
    return source
