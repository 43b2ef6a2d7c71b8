"""The Kaggle set: Questions.csv, Answers.csv and Tags.csv, read strictly and repaired.

The files are ISO-8859-1. A post whose bytes are valid UTF-8 was converted wrongly on its way.
"""

import contextlib
import csv
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from helpers.data.posts import INSERT, DataError

DATASET = "stackoverflow/pythonquestions"
LONGEST = 1 << 20  # a post on Stack Overflow has at most 30,000 characters: more is damage
COLUMNS = {
    "Questions": ("Id", "OwnerUserId", "Score", "Title", "Body"),
    "Answers": ("Id", "OwnerUserId", "Score", "ParentId", "Body"),
    "Tags": ("Id", "Tag"),
}
NUMBERS = ("Id", "OwnerUserId", "Score", "ParentId")
NUMBER = re.compile(r"\s*(-?\d{1,18})(?:\.0+)?\s*")  # other programs write ids as 7.0


def download() -> Path:
    """The folder of the set, fetched by the package kagglehub. Raises DataError."""
    try:
        import kagglehub  # here: only who asks for it needs the package
    except ImportError as error:
        raise DataError(
            "DATA_SOURCE is 'kagglehub', and the package is not installed: run `pip install "
            f"kagglehub`, or download {DATASET} by hand and give its folder"
        ) from error
    try:
        return Path(kagglehub.dataset_download(DATASET))
    except Exception as error:  # credentials, network, licence: the client has no common base class
        raise DataError(
            f"Kaggle did not deliver {DATASET} ({error}): check ~/.kaggle/kaggle.json and the "
            "network"
        ) from error


def read(folder: Path, database: sqlite3.Connection, progress: bool) -> None:
    """Put the posts of a folder into an empty database. Raises DataError."""
    for table, wanted in COLUMNS.items():
        path = folder / f"{table}.csv"
        if table == "Tags" and not path.exists():
            continue
        rows = tqdm(_rows(path, wanted), path.name, unit=" rows", disable=not progress)
        read = database.executemany(INSERT[table.lower()], rows).rowcount
        if read < 1:
            raise DataError(f"{path.name} has a header and no row: get the file again")
    for table in ("questions", "answers"):
        _check_unique(database, table)


def _rows(path: Path, wanted: tuple[str, ...]) -> Iterator[list]:
    if not path.exists():
        raise DataError(
            f"{path.name} is missing in {path.parent.name}/: the folder must hold Questions.csv "
            "and Answers.csv (Tags.csv is optional), or rows of yours as .jsonl, .json, .csv, .tsv "
            "or .parquet"
        )
    csv.field_size_limit(LONGEST)
    with path.open(encoding="latin-1", newline="") as file:
        reader = csv.reader(file, strict=True)
        if not (header := next(reader, [])):
            raise DataError(f"{path.name} is empty (0 bytes): get the file again")
        _check_header(path, header, wanted)
        places = [(name, header.index(name)) for name in wanted]
        end = reader.line_num
        try:
            for row in reader:
                yield _values(row, places, len(header))
                end = reader.line_num
        except (csv.Error, ValueError) as error:
            raise DataError(f"{path.name}, line {end + 1}, {_reason(error)}") from error


def _check_header(path: Path, header: list[str], wanted: tuple[str, ...]) -> None:
    """DataError when a file is in UTF-16, split by other signs or lacks a column."""
    if header[0].startswith(("\xff\xfe", "\xfe\xff")):
        raise DataError(f"{path.name} begins as UTF-16 does, it is UTF-16: save it as ISO-8859-1")
    header[0] = header[0].removeprefix("\xef\xbb\xbf")  # a UTF-8 byte-order mark
    missing = [name for name in wanted if name not in header]
    if missing and len(header) == 1 and (marks := re.findall(r"[;\t|]", header[0])):
        raise DataError(f"{path.name} separates its columns with {marks[0]!r}: save it with commas")
    if missing:
        raise DataError(
            f"{path.name} has no column {', '.join(missing)}; its columns are {', '.join(header)}: "
            "rename yours, or take the files of the Kaggle set"
        )


def _values(row: list[str], places: list[tuple[str, int]], columns: int) -> list:
    """The wanted values, numbers as int or None. Raises ValueError, which says what is wrong."""
    if len(row) != columns:
        raise ValueError(f"has {len(row)} fields and not {columns}")
    return [_number(row[at], name) if name in NUMBERS else repair(row[at]) for name, at in places]


def _number(text: str, column: str) -> int | None:
    if column == "OwnerUserId" and text in ("NA", ""):  # an author who has left
        return None
    if found := NUMBER.fullmatch(text):
        return int(found[1])
    raise ValueError(f"holds {text[:40]!r} where a whole number must stand ({column})")


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


def _reason(error: Exception) -> str:
    said = str(error)
    if "unexpected end of data" in said:
        return "holds a quoted text that is never closed: the file is cut off, get it again"
    if "field larger than" in said:
        said = f"holds a row of more than {LONGEST >> 20} MB, a quotation mark may not be closed"
    elif isinstance(error, csv.Error):
        said = f"cannot be read ({said})"
    return f"{said}: repair or remove that row"


def _check_unique(database: sqlite3.Connection, table: str) -> None:
    query = f"SELECT id FROM {table} GROUP BY id HAVING count(*) > 1 ORDER BY id"
    if twice := database.execute(query).fetchall():
        raise DataError(
            f"{table.capitalize()}.csv holds {len(twice)} ids more than once, the first is "
            f"{twice[0][0]}: remove the repeated rows"
        )
