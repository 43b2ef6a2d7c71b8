"""Rows as they are stored: in files, a folder of them, a dataset saved to disk, on the Hub.

Lines and CSV are not read by `datasets`, which stops at the first line that is no row, gives it no
number, and reads the answer "007" as 7.
"""

import codecs
import csv
import functools
import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import pandas
import pyarrow
from pyarrow import parquet

from helpers.data.posts import DataError

LONGEST = 1 << 20  # bytes of a line
QUARANTINE = "quarantine.jsonl"
TEXTS = (".jsonl", ".json", ".csv", ".tsv")
ENDINGS = (*TEXTS, *(f"{ending}.gz" for ending in TEXTS), ".parquet")
NO_ROWS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", QUARANTINE}
SPLIT = re.compile(r"(?i)(?:^|[^a-z])(train|valid|val|dev|eval|test)(?=ing|ation|uation|[^a-z]|$)")
UNREADABLE = (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError)

Records = Iterator[tuple[int, dict]]  # with their line numbers


class Quarantine:
    """Lines of a source that are no rows: written to a file with number and reason, and counted."""

    def __init__(self, folder: Path):
        self.path, self.count, self.first, self.places = folder / QUARANTINE, 0, "", ""

    def add(self, source: str, number: int, reason: str, content: bytes | dict | list) -> None:
        text = content.decode("utf-8", "replace") if isinstance(content, bytes) else str(content)
        entry = {"line": number, "reason": reason, "content": text[:200], "source": source}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        self.first = self.first or f"{source}, line {number}, {reason}"
        self.places += f", {number}" if self.count < 50 else ""
        self.count += 1

    def check(self, good: int) -> None:
        """DataError when there is no row, or when lines that are none outnumber the `good` ones."""
        if self.count > good:
            raise DataError(
                f"{self.first}; {self.count} of {self.count + good} lines cannot be used "
                f"({self.places[2:]}{' ...' * (self.count > 50)}): repair or remove them"
            )
        if good == 0:
            raise DataError("the data source holds no row: check DATA_SOURCE")


class Part(NamedTuple):
    """A file or a split of a source."""

    name: str
    split: str  # "train", "validation", "test"
    records: Callable[[Quarantine], Records]


def parts_of(source: Path | str) -> tuple[list[Part], list[str]]:
    """The parts of a file, a folder (a Path) or a Hub dataset (a name), and what is not read."""
    if isinstance(source, str):
        return _of_splits(_of_hub(source), source), []
    if source.is_file():
        return _of_file(source, source.name, "train")
    if is_saved(source):  # by `save_to_disk`
        return _of_splits(_loaded(str(source), "load_from_disk", str(source)), source.name), []
    parts, others = list[Part](), list[str]()
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        name = path.relative_to(source).as_posix()
        if is_rows(path) and path.name not in NO_ROWS and path.name[0] != ".":
            found, left = _of_file(path, name, split_of(name))
            parts, others = parts + found, others + left
        else:
            others.append(name)
    return parts, others


def is_rows(path: Path) -> bool:
    return path.name.lower().endswith(ENDINGS)


def is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def holds_rows(folder: Path) -> bool:
    """Whether a folder holds rows of one's own, and not Kaggle's two files."""
    kaggles = any((folder / name).exists() for name in ("Questions.csv", "Answers.csv"))
    return not kaggles and (is_saved(folder) or any(map(is_rows, folder.rglob("*"))))


def split_of(name: str) -> str:
    """The split that a name says: "train" unless it is one to validate or to test with."""
    said = {word.lower() for word in SPLIT.findall(name)} - {"train"}
    return "test" if said == {"test"} else "validation" if said else "train"


def _of_file(path: Path, name: str, split: str) -> tuple[list[Part], list[str]]:
    """The parts of a file: one, but for JSON with a list of rows for each split."""
    if path.stat().st_size == 0:
        raise DataError(f"{name} is empty (0 bytes): get the file again")
    if not is_rows(path):
        raise DataError(
            f"{name} ends in {path.suffix or 'nothing'!r}: give a .jsonl, .json, .csv, .tsv or "
            ".parquet file; all but the last may end in .gz besides"
        )
    kind = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    if read := {"parquet": _of_parquet, "csv": _of_csv, "tsv": _of_csv}.get(kind):
        return [Part(name, split, functools.partial(read, path, name))], []
    try:
        with opened(path) as file:  # a list of rows may be called .jsonl
            listed = re.match(rb"(?:\xef\xbb\xbf)?\s*\[\s*\{", file.read(100))
        lists, others = _json_lists(path, name) if kind == "json" or listed else ({}, [])
    except UNREADABLE as error:
        raise unreadable(name, error) from error
    if not lists:
        return [Part(name, split, lambda lost: json_records(path, lost, name))], []
    parts = []
    for key, rows in lists.items():
        said = split if split_of(key) == "train" else split_of(key)
        parts.append(Part(f"{name}[{key}]" if key else name, said, _of_list(rows, name)))
    return parts, [f"{name}[{key}]" for key in others]


def opened(path: Path) -> BinaryIO:
    """The bytes of a text file: unpacked where it is gzip, in UTF-8 where it is UTF-16."""
    with path.open("rb") as start:
        packed = start.read(2) == b"\x1f\x8b"
    file = gzip.GzipFile(path) if packed else path.open("rb")
    head = file.peek(2)[:2]
    marked = head in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    if not (marked or b"\0" in head):
        return file  # type: ignore[return-value]
    encoding = "utf-16" if marked else "utf-16-be" if head[:1] == b"\0" else "utf-16-le"
    with file:
        return io.BytesIO(file.read().decode(encoding).encode())


def unreadable(name: str, error: Exception) -> DataError:
    if isinstance(error, UnicodeDecodeError):
        said = f"{error.reason} at position {error.start}"
        return DataError(f"{name} is not UTF-8 text ({said}): save it as UTF-8")
    return DataError(f"{name} is no whole gzip file ({error}): get it again")


# -- JSON.


def json_records(path: Path, quarantine: Quarantine | None = None, name: str = "") -> Records:
    """(line number, object) of each line of a JSONL file that is not blank.

    Lines that hold none go to `quarantine`; without one the first of them raises DataError.
    """
    for number, line in _lines(path):
        record, reason = _parse(line)
        if reason and quarantine:
            quarantine.add(name or path.name, number, reason, line)
        elif reason:
            raise DataError(f"{path.name}, line {number}, {reason}: repair or remove it")
        elif record is not None:
            yield number, record


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number, bytes) of each line; one that is longer than LONGEST is cut off there."""
    with opened(path) as file:
        for number in itertools.count(1):
            if not (line := file.readline(LONGEST)):
                return
            yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            while len(line) == LONGEST and not line.endswith(b"\n"):
                line = file.readline(LONGEST)


def _parse(line: bytes) -> tuple[dict | None, str]:
    """The object of a line of JSON (None for a blank one), or why it holds none."""
    if len(line) == LONGEST:
        return None, f"is longer than {LONGEST >> 20} MB"
    try:
        text = line.decode("utf-8")
        record = json.loads(text, object_pairs_hook=_object) if text.strip() else None
    except UnicodeDecodeError as error:
        return None, f"is not UTF-8 text ({error.reason} at byte {error.start})"
    except (ValueError, RecursionError) as error:
        return None, f"is no JSON ({error})"
    if record is not None and not isinstance(record, dict):
        return None, f"is {type(record).__name__}, not an object"
    return record, "is an empty object" if record == {} else ""


def _object(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object; ValueError when it names one thing twice: json would keep the last."""
    if len(found := dict(pairs)) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} stands there twice")
    return found


def _json_lists(path: Path, name: str) -> tuple[dict[str, list], list[str]]:
    """The rows of a JSON file by split ("" for none), and the names of what is no row.

    Both are empty when it holds one object in each line.
    """
    try:
        with opened(path) as file:
            found = json.loads(file.read().decode("utf-8-sig"), object_pairs_hook=_object)
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        first = next((line for _, line in _lines(path) if line.strip()), b"")
        if _parse(first)[0]:
            return {}, []
        raise DataError(f"{name} is no JSON ({error}): repair it or get it again") from error
    if isinstance(found, list) or not found:
        return {"": found or []}, []
    if not isinstance(found, dict):
        raise DataError(f"{name} holds {str(found)[:40]!r}, where a list of rows must stand")
    return _of_object(found)


def _of_object(found: dict) -> tuple[dict[str, list], list[str]]:
    """The rows of an object: lists of them, rows under their names, columns, or one row."""
    first = {key: value[0] for key, value in found.items() if isinstance(value, list) and value}
    messages = any(map(is_message, first.values()))
    lists = [key for key, row in first.items() if isinstance(row, dict) and not messages]
    if lists:
        others = [key for key, value in found.items() if key not in lists and value != []]
        return {key: found[key] for key in lists}, others
    inner = [value for value in found.values() if isinstance(value, dict)]
    if len(inner) == len(found) == 1 and not any(isinstance(v, str) for v in inner[0].values()):
        return _of_object(inner[0])  # a level more, as in {"data": {"train": [], "test": []}}
    if len(inner) == len(found) and not all(key.isdigit() for row in inner for key in row):
        return {"": inner}, []
    if len(found) in (len(inner), 0 if messages else len(first)):
        return {"": pandas.DataFrame(found).to_dict("records")}, []
    return {"": [found]}, []


def is_message(value) -> bool:
    """Whether a value is one message of a conversation, of OpenAI's form or ShareGPT's."""
    return isinstance(value, dict) and bool({"role", "from"} & set(value))


def _of_list(rows, name: str) -> Callable[[Quarantine], Records]:
    def records(quarantine: Quarantine) -> Records:
        for number, row in enumerate(rows, 1):
            if isinstance(row, dict) and row:
                yield number, row
            else:
                reason = f"is {type(row).__name__}, not an object" if row != {} else "is empty"
                quarantine.add(name, number, reason, [row])

    return records


# -- Tables.


def _of_csv(path: Path, name: str, quarantine: Quarantine) -> Records:
    """The rows of a CSV file, by whichever separator gives its header the most columns.

    A row with more or fewer fields goes to quarantine, and so does one whose quotes do not close.
    """
    csv.field_size_limit(LONGEST)
    with io.TextIOWrapper(opened(path), "utf-8-sig", newline="") as file:
        above, head = next(((n, line) for n, line in enumerate(file) if line.strip()), (0, ""))
        separator = max(",;\t|", key=head.count)
        rows = csv.reader(itertools.chain([head], file), delimiter=separator, strict=True)
        fields = enumerate(next(rows, []), 1)
        header = [field.strip() or f"column {number}" for number, field in fields]
        if twice := [field for field in header if header.count(field) > 1]:
            raise DataError(f"{name} has two columns that are called {twice[0]!r}: rename one")
        while True:
            number = above + rows.line_num + 1
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                for lost in range(number, above + rows.line_num + 1):
                    quarantine.add(name, lost, f"cannot be read ({error})", [])
                continue
            if len(row) == len(header):
                yield number, dict(zip(header, row, strict=True))
            elif row:
                reason = f"has {len(row)} fields and the header {len(header)}: a text that holds "
                quarantine.add(name, number, f"{reason}{separator!r} stands in quotes", row)


def _of_parquet(path: Path, name: str, quarantine: Quarantine) -> Records:
    try:
        batches = parquet.ParquetFile(path).iter_batches(1000)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{name} is no Parquet file ({error}): get it again") from error
    yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)


# -- Datasets of the Hub's library.


def _of_hub(name: str):
    """The splits of "owner/name", with ":configuration" and ":split" behind it where there are."""
    place, configuration, split, *_ = f"{name}::".split(":")
    splits = _loaded(name, "load_dataset", place, *([configuration] if configuration else []))
    if not split:
        return splits
    if split not in splits:
        raise DataError(f"{place} has no split {split!r}: it has {', '.join(splits)}")
    return {"train": splits[split]}


def _loaded(name: str, function: str, *given: str):
    import datasets  # here: a second that other sources need not wait

    try:
        return getattr(datasets, function)(*given)
    except Exception as error:  # the library raises a dozen kinds, all mean the same here
        first = " ".join(str(error).split())[:300] or type(error).__name__
        what = "the folder" if function == "load_from_disk" else "the Hub dataset"
        raise DataError(
            f"{what} {name} could not be loaded ({first}): check the name and the network (a "
            'configuration and a split stand behind it, "owner/name:configuration:split"), or set '
            "DATA_SOURCE to 'sample', which needs neither"
        ) from error


def _of_splits(splits, name: str) -> list[Part]:
    """The parts of a Dataset, or of several by the names of their splits."""
    splits = splits if isinstance(splits, dict) else {"train": splits}
    for column, kind in (item for rows in splits.values() for item in rows.features.items()):
        if hasattr(kind, "decode"):  # of pictures, sound: reading them needs further packages
            what = type(kind).__name__.lower()
            raise DataError(f"{name} holds {what}s in {column}, and this course trains on text")
    return [
        Part(f"{name}[{key}]" if len(splits) > 1 else name, split_of(key), _of_list(rows, name))
        for key, rows in splits.items()
    ]
