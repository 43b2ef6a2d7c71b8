"""Where rows come from: the sample, the Kaggle set, rows of one's own on this disk or the Hub."""

import re
from dataclasses import replace
from pathlib import Path

from helpers.config import PROJECT_DIR, Config
from helpers.data import conversations, kaggle, posts
from helpers.data.files import holds_rows, is_rows
from helpers.data.posts import DataError, Posts
from helpers.runs.folders import public_name

SAMPLE_DIR = PROJECT_DIR / "data" / "sample"


def local_path(source: str) -> Path:
    """Where a source lies if it is on this disk: the sample's folder, or what its name says."""
    return SAMPLE_DIR if source == "sample" else Path(source).expanduser()


def open_source(config: Config, folder: Path, progress: bool = False) -> Posts:
    """Read DATA_SOURCE into a database in `folder`; with `progress`, a bar for each file.

    It is "sample", "kagglehub", a folder with Kaggle's files, or rows of one's own: a file, a
    folder of files, one that `save_to_disk` wrote, a Hub dataset. VALIDATION_SOURCE is one of the
    latter. Raises DataError for what cannot be read.
    """
    source, held = config.data_source, config.validation_source
    path = kaggle.download() if source == "kagglehub" else local_path(source)
    place = folder / "posts.sqlite"
    with posts.new_database(place) as database:
        if path.is_dir() and not holds_rows(path):
            if held:
                raise DataError(f"VALIDATION_SOURCE is {held!r}: posts of a forum take none")
            kaggle.read(path, database, progress)
            # The sample was written for this course: an address would look like a real post's.
            found = Posts(place, "CC BY-SA 3.0", "https://stackoverflow.com/a/{answer_id}")
            found = Posts(place, "CC BY-SA 4.0") if path == SAMPLE_DIR else found
        else:
            given = _own(source, "DATA_SOURCE")
            seen = conversations.read(given, database, held and _own(held, "VALIDATION_SOURCE"))
            where = "as in" if isinstance(given, Path) else "as stated on the Hub:"
            found = Posts(place, f"{where} {public_name(path.name if path.exists() else source)}")
            found = replace(found, seen=seen)
        questions, answers = posts.shuffle(database, config.seed)
        return replace(found, questions=questions, answers=answers)


def _own(source: str, setting: str) -> Path | str:
    """A file or folder that is there, or the id of a Hub dataset. Raises DataError."""
    path = local_path(source)
    if path.is_file() or holds_rows(path):
        return path
    if path.exists() or is_rows(path) or not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]*){,2}", source):
        raise DataError(
            f"{setting} is {source!r}, and there is no such file, or no row in that folder: give a "
            "folder with Questions.csv and Answers.csv, a .jsonl, .json, .csv or .parquet file or "
            "a folder of them, the id of a Hub dataset, 'kagglehub' or 'sample'"
        )
    return source
