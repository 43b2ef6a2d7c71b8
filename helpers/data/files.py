"""Rows as they are stored: in files, a folder of them, a dataset saved to disk, on the Hub.

Lines and CSV are not read by `datasets`, which stops at the first line that is no row, gives it no
number, and reads the answer "007" as 7.
"""

import codecs
import csv
import functools
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TextIO

import pyarrow
from pyarrow import parquet

from helpers.data.posts import LONGEST, DataError

TEXTS = (".jsonl", ".json", ".csv", ".tsv")
ENDINGS = (*TEXTS, *(f"{ending}.gz" for ending in TEXTS), ".parquet")
SAVED = ("dataset_dict.json", "state.json")  # stand in a folder that `save_to_disk` wrote
NO_ROWS = (*SAVED, "dataset_info.json", "dataset_infos.json", "quarantine.jsonl")
SPLIT = re.compile(r"(?i)(?:^|[^a-z])(train|valid|val|dev|eval|test)(?=ing|ation|uation|[^a-z]|$)")
UNREADABLE = (EOFError, zlib.error, gzip.BadGzipFile, UnicodeError, pyarrow.ArrowInvalid)


class NoRow(ValueError):
    """What stands in a line is no conversation: why, and what stands there."""


class Part(NamedTuple):
    """A file or a split of a source."""

    name: str
    split: str  # "train", "validation", "test"
    records: Callable[[], Iterator[tuple[int, object]]]  # numbered; a NoRow for an unreadable line


def parts_of(source: Path | str) -> tuple[list[Part], list[str]]:
    """The parts of a file, a folder (a Path) or a Hub dataset (a name), and what is not read."""
    if isinstance(source, str):
        return _of_splits(_of_hub(source), source), []
    if source.is_file():
        return _of_file(source, source.name, "train")
    if is_saved(source):
        return _of_splits(_loaded("load_from_disk", str(source)), source.name), []
    paths = {path.relative_to(source).as_posix(): path for path in sorted(source.rglob("*"))}
    files = {name: path for name, path in paths.items() if path.is_file()}
    rows = [n for n in files if is_rows(files[n]) and files[n].name not in NO_ROWS]
    parts, others = list[Part](), [name for name in files if name not in rows]
    for name in rows:
        found, left = _of_file(files[name], name, split_of(name))
        parts, others = parts + found, others + left
    return parts, others


def is_rows(path: Path) -> bool:
    return path.name.lower().endswith(ENDINGS) and not path.name.startswith(".")


def is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in SAVED)


def holds_rows(folder: Path) -> bool:
    """Whether a folder holds rows of one's own, and not Kaggle's two files."""
    kaggles = any((folder / name).exists() for name in ("Questions.csv", "Answers.csv"))
    return not kaggles and (is_saved(folder) or any(map(is_rows, folder.rglob("*"))))


def split_of(name: str) -> str:
    """The split that a name says: "train" unless it is one to validate or to test with."""
    said = {word.lower() for word in SPLIT.findall(name)} - {"train"}
    return "test" if said == {"test"} else "validation" if said else "train"


def _of_file(path: Path, name: str, split: str) -> tuple[list[Part], list[str]]:
    """The parts of a file, one but for JSON with a list of rows for each split; what is none."""
    if path.stat().st_size == 0:
        raise DataError(f"{name} is empty (0 bytes): get the file again")
    if not is_rows(path):
        raise DataError(
            f"{name} ends in {path.suffix or 'nothing'!r}: give a .jsonl, .json, .csv, .tsv or "
            ".parquet file; all but the last may end in .gz besides"
        )
    kind = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    if kind in ("csv", "tsv", "parquet"):
        read = _of_parquet if kind == "parquet" else _of_csv
        return [Part(name, split, functools.partial(read, path))], []
    try:
        with opened(path) as file:
            lines = kind == "jsonl" and file.read(1) == "{"  # and no list that is called so
            file.seek(0)
            found = None if lines else json.load(file, object_pairs_hook=_object)
    except UNREADABLE as error:
        raise unreadable(name, error) from error
    except (ValueError, RecursionError):
        found = None
    if found is None:
        return [Part(name, split, functools.partial(_of_lines, path))], []
    (tables, others), parts = _tables(found), []
    for key, rows in tables.items():
        said = split if split_of(key) == "train" else split_of(key)
        parts.append(Part(f"{name}[{key}]" if key else name, said, _numbered(rows)))
    return parts, [f"{name}[{key}]" for key in others]


def _numbered(rows) -> Callable[[], Iterator[tuple[int, object]]]:
    return functools.partial(enumerate, rows, 1)


def opened(path: Path) -> TextIO:
    """A text file: unpacked where it is gzip, UTF-16 where it says so, else UTF-8.

    What is not UTF-8 becomes U+FFFD, by which `read_row` knows it.
    """
    with path.open("rb") as start:
        opening = gzip.open if start.read(2) == b"\x1f\x8b" else open
    with opening(path, "rb") as start:
        marked = start.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    encoding = "utf-16" if marked else "utf-8-sig"
    return opening(path, "rt", encoding=encoding, errors="replace", newline="")


def unreadable(name: str, error: Exception) -> DataError:
    return DataError(f"{name} is damaged or cut off ({error}): get it again")


def _of_lines(path: Path) -> Iterator[tuple[int, object]]:
    """What each line of JSON holds, but for blank ones."""
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            try:
                if line.strip():
                    yield number, json.loads(line, object_pairs_hook=_object)
            except (ValueError, RecursionError) as error:
                yield number, NoRow(f"is no JSON ({error})", line)


def _object(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object; ValueError when it names one thing twice: json would keep the last."""
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError(f"one of {', '.join(found)} stands there twice")
    return found


def _tables(found) -> tuple[dict[str, list], list[str]]:
    """The rows of a whole file of JSON by the names of their splits ("" for none), what is none."""
    if not isinstance(found, dict) or not found:
        return {"": found if isinstance(found, list) else [found]}, []
    first = {key: value[0] for key, value in found.items() if isinstance(value, list) and value}
    lists = [key for key, row in first.items() if isinstance(row, dict) and not is_message(row)]
    if lists:
        return {key: found[key] for key in lists}, [key for key in found if key not in lists]
    named = all(isinstance(value, dict) for value in found.values())
    return {"": list(found.values()) if named else [found]}, []


def is_message(value) -> bool:
    """Whether a value is one message of a conversation, of OpenAI's form or ShareGPT's."""
    return isinstance(value, dict) and bool({"role", "from"} & set(value))


def _of_csv(path: Path) -> Iterator[tuple[int, object]]:
    """The rows of a CSV file, by whichever separator gives its header the most columns.

    A row with more or fewer fields than the header is none, nor is one whose quotes do not close.
    """
    csv.field_size_limit(LONGEST)
    with opened(path) as file:
        head = next((line for line in file if line.strip()), "")
        file.seek(0)
        rows = csv.reader(file, delimiter=max(",;\t|", key=head.count), strict=True)
        fields = enumerate(next(filter(None, rows), []), 1)
        header = [field.strip() or f"column {number}" for number, field in fields]
        if twice := [field for field in header if header.count(field) > 1]:
            raise DataError(f"{path.name} has two columns called {twice[0]!r}: rename one")
        row: list[str] | None = []
        while row is not None:
            number = rows.line_num + 1
            try:
                row = next(rows, None)
            except csv.Error as error:
                for lost in range(number, rows.line_num + 1):
                    yield lost, NoRow(f"cannot be read ({error})", "")
                continue
            if row and len(row) == len(header):
                yield number, dict(zip(header, row, strict=True))
            elif row:
                reason = f"has {len(row)} fields and the header {len(header)}: put a text that "
                yield number, NoRow(f"{reason}holds the separator in quotes", row)


def _of_parquet(path: Path) -> Iterator[tuple[int, object]]:
    batches = parquet.ParquetFile(path).iter_batches(1000)
    yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)


def _of_hub(name: str):
    """The splits of "owner/name", with ":configuration" and ":split" behind it where there are."""
    place, configuration, split, *_ = f"{name}::".split(":")
    splits = _loaded("load_dataset", place, *filter(None, [configuration]))
    if split and split not in splits:
        raise DataError(f"{place} has no split {split!r}: it has {', '.join(splits)}")
    return {"train": splits[split]} if split else splits


def _loaded(function: str, name: str, *given: str):
    import datasets  # here: a second that other sources need not wait

    try:
        return getattr(datasets, function)(name, *given)
    except Exception as error:  # the library raises a dozen kinds, all mean the same here
        raise DataError(
            f"{name} could not be loaded ({' '.join(str(error).split())[:300]}): check the name, "
            "owner/name or owner/name:configuration:split, and the network, or set DATA_SOURCE to "
            "'sample', which needs neither"
        ) from error


def _of_splits(splits, name: str) -> list[Part]:
    """The parts of a Dataset, or of several by the names of their splits."""
    splits = splits if isinstance(splits, dict) else {"train": splits}
    for column, kind in (item for rows in splits.values() for item in rows.features.items()):
        if hasattr(kind, "decode"):  # of pictures, sound: reading them needs further packages
            what = type(kind).__name__.lower()
            raise DataError(f"{name} holds {what}s in {column}, and this course trains on text")
    return [Part(f"{name}[{key}]", split_of(key), _numbered(rows)) for key, rows in splits.items()]
