"""Where rows come from: the sample, the Kaggle set, rows of one's own on this disk or the Hub."""

import re
from dataclasses import replace
from pathlib import Path

from helpers.config import PROJECT_DIR
from helpers.data import conversations, kaggle, posts
from helpers.data.formats import holds_rows, is_rows
from helpers.data.posts import DataError, Posts
from helpers.runs.folders import public_name

SAMPLE_DIR = PROJECT_DIR / "data" / "sample"


def local_path(source: str) -> Path:
    """Where a source lies if it is on this disk: the sample's folder, or what its name says."""
    return SAMPLE_DIR if source == "sample" else Path(source).expanduser()


def open_source(
    source: str, folder: Path, seed: int, progress: bool = False, held: str | None = None
) -> Posts:
    """Read a source into a database in `folder`; with `progress`, a bar for each file.

    It is "sample", "kagglehub", a folder with Kaggle's files, or rows of one's own: a file, a
    folder of files, one that `save_to_disk` wrote, a Hub dataset. `held` is a source of one's own
    rows to validate with. Raises DataError for what cannot be read.
    """
    path = kaggle.download() if source == "kagglehub" else local_path(source)
    with posts.new_database(folder) as database:
        if path.is_dir() and not holds_rows(path):
            if held:
                raise DataError(f"VALIDATION_SOURCE is {held!r}: posts of a forum take none")
            kaggle.read(path, database, progress)
            found = _of_kaggle(path, folder)
        else:
            given = _own(source, "DATA_SOURCE")
            licence = "as in " if isinstance(given, Path) else "as stated on the Hub: "
            licence += public_name(path.name if isinstance(given, Path) else source)
            beside = held and _own(held, "VALIDATION_SOURCE")
            seen = conversations.read(given, database, folder, beside)
            lost = seen.quarantined
            found = Posts(folder / posts.DATABASE, False, licence, quarantined=lost, seen=seen)
        questions, answers = posts.shuffle(database, seed)
        return replace(found, questions=questions, answers=answers)


def _of_kaggle(source: Path, folder: Path) -> Posts:
    """The sample was written for this course and is on no site; an address would look like one."""
    if source == SAMPLE_DIR:
        return Posts(folder / posts.DATABASE, True, "CC BY-SA 4.0")
    url = "https://stackoverflow.com/a/{answer_id}"
    return Posts(folder / posts.DATABASE, True, "CC BY-SA 3.0", url)


def _own(source: str, setting: str) -> Path | str:
    """A file or folder that is there, or the id of a Hub dataset. Raises DataError."""
    path = local_path(source)
    if path.is_dir() and not holds_rows(path):
        raise DataError(f"{setting} is {source!r}, a folder without a file of rows: give another")
    if path.exists():
        return path
    if is_rows(path) or not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]*){0,2}", source):
        raise DataError(
            f"{setting} is {source!r}, and there is no such file or folder: give a folder with "
            "Questions.csv and Answers.csv, a .jsonl, .json, .csv or .parquet file or a folder of "
            "them, the id of a Hub dataset, 'kagglehub' or 'sample'"
        )
    return source
