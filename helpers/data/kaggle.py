"""The Kaggle set: Questions.csv, Answers.csv and Tags.csv, read strictly and repaired.

The files are ISO-8859-1. A post whose bytes are valid UTF-8 was converted wrongly on its way.
"""

import contextlib
import csv
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from helpers.data.posts import INSERT, LONGEST, DataError

DATASET = "stackoverflow/pythonquestions"
COLUMNS = {
    "Questions": ("Id", "OwnerUserId", "Score", "Title", "Body"),
    "Answers": ("Id", "OwnerUserId", "Score", "ParentId", "Body"),
    "Tags": ("Id", "Tag"),
}


def download() -> Path:
    """The folder of the set, fetched by the package kagglehub. Raises DataError."""
    try:
        import kagglehub  # here: only who asks for it needs the package

        return Path(kagglehub.dataset_download(DATASET))
    except Exception as error:  # credentials, network, licence: the client has no common base class
        raise DataError(
            f"Kaggle did not deliver {DATASET} ({error}): run `pip install kagglehub`, check "
            "~/.kaggle/kaggle.json and the network, or download it by hand and give its folder"
        ) from error


def read(folder: Path, database: sqlite3.Connection, progress: bool) -> None:
    """Put the posts of a folder into an empty database. Raises DataError."""
    csv.field_size_limit(LONGEST)
    for table, wanted in COLUMNS.items():
        path = folder / f"{table}.csv"
        if table == "Tags" and not path.exists():
            continue
        if not path.exists():
            raise DataError(
                f"{path.name} is missing in {folder.name}/: the folder must hold Questions.csv and "
                "Answers.csv (Tags.csv is optional), or rows of yours as .jsonl, .json, .csv, .tsv "
                "or .parquet"
            )
        with path.open(encoding="latin-1", newline="") as file:
            lines = csv.reader(file, strict=True)
            rows = tqdm(lines, path.name, unit=" rows", disable=not progress)
            header = next(lines, [])
            posts = _posts(rows, _places(header, wanted, path.name), len(header))
            try:
                found = database.executemany(INSERT[table.lower()], posts).rowcount
            except (csv.Error, ValueError, OverflowError, sqlite3.IntegrityError) as error:
                raise DataError(
                    f"{path.name}, line {lines.line_num}, {error}: repair or remove that row, or "
                    "get the file again"
                ) from error
        if found < 1:
            raise DataError(f"{path.name} has a header and no row: get the file again")


def _places(header: list[str], wanted: tuple[str, ...], name: str) -> list[tuple[int, Callable]]:
    """Where each wanted column stands, and what reads its values."""
    header = [field.removeprefix("\xef\xbb\xbf") for field in header]  # a byte-order mark
    if missing := [column for column in wanted if column not in header]:
        raise DataError(
            f"{name} has no column {', '.join(missing)}; its header is {','.join(header)[:99]!r}: "
            "save it with commas and in ISO-8859-1, under the names of the Kaggle set"
        )
    readers = {"Id": _number, "Score": _number, "ParentId": _number, "OwnerUserId": _author}
    return [(header.index(column), readers.get(column, repair)) for column in wanted]


def _posts(rows: Iterable, places: list[tuple[int, Callable]], columns: int) -> Iterator[list]:
    """The wanted values of each row. Raises ValueError, which says what is wrong."""
    for row in rows:
        if len(row) != columns:
            raise ValueError(f"has {len(row)} fields and not {columns}")
        yield [value(row[place]) for place, value in places]


def _number(text: str) -> int:
    return int(text.removesuffix(".0"))  # other programs write ids as 7.0


def _author(text: str) -> int | None:
    return None if text in ("NA", "") else _number(text)  # NA: an author who has left


def repair(text: str) -> str:
    """The text with its characters put right and lines that end in a line feed alone.

    `text` was read as ISO-8859-1. Raises ValueError for one with a NUL byte.
    """
    if "\0" in text:
        raise ValueError("holds a NUL byte and is damaged or not ISO-8859-1 text (UTF-16?)")
    if not text.isascii():
        with contextlib.suppress(UnicodeDecodeError):  # then it is what it was read as
            text = text.encode("latin-1").decode("utf-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")
