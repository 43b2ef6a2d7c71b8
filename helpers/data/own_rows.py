"""Rows of one's own: a JSONL, CSV or Parquet file or a Hub dataset with prompts and answers.

A line that is no row is put aside, with its number and the reason, and the others are read.
"""

import codecs
import csv
import itertools
import json
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pyarrow
from pyarrow import parquet

from helpers.data.posts import INSERT, DataError
from helpers.prompts import read_completion

LONGEST = 1 << 20  # bytes of a line
QUARANTINE = "quarantine.jsonl"
# Names under which a prompt and its answer are commonly stored, the first that is there is taken.
PROMPT_NAMES = ("prompt", "question", "instruction", "input", "user")
ANSWER_NAMES = ("answer", "completion", "response", "output", "assistant")
ARTICLE_TEXT = re.compile(
    r"(?:<s>)?\s*\[INST\](?:\s*<</?SYS>>.*?<</SYS>>)?(?P<prompt>.*?)\[/INST\]"
    r"(?P<answer>.*?)(?:</s>)?",
    re.DOTALL,
)
# Half of a character (a lone surrogate, which JSON can hold and UTF-8 cannot), and NUL.
UNUSABLE = re.compile("[\0\ud800-\udfff]")

Records = Iterator[tuple[int, dict]]  # with their line numbers


class Quarantine:
    """Lines of a source that are no rows: written to a file with number and reason, and counted."""

    def __init__(self, source: str, folder: Path):
        self.source, self.path, self.count, self.first = source, folder / QUARANTINE, 0, ""

    def add(self, number: int, reason: str, content: bytes | dict) -> None:
        text = content.decode("utf-8", "replace") if isinstance(content, bytes) else str(content)
        line = {"line": number, "reason": reason, "content": text[:200]}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.first = self.first or f"{self.source}, line {number}, {reason}"
        self.count += 1

    def check(self, good: int) -> None:
        """DataError when there is no row, or when lines that are none outnumber the `good` ones."""
        if self.count > good:
            raise DataError(
                f"{self.first}; {self.count} of {self.count + good} lines cannot be used: "
                "repair or remove them"
            )
        if good == 0:
            raise DataError("the data source holds no row: check DATA_SOURCE")


def read(source: str | Path, database: sqlite3.Connection, folder: Path) -> int:
    """Put the rows of a file (a Path) or a Hub dataset (a name) into an empty database.

    They become posts without scores and authors, whose ids are their numbers. Returns how many
    lines were put into quarantine, in `folder`. Raises DataError.
    """
    name, number = source.name if isinstance(source, Path) else source, 0
    quarantine = Quarantine(name, folder)
    try:
        records = _of_file(source, quarantine) if isinstance(source, Path) else _of_hub(source)
        for number, (prompt, answer) in enumerate(_pairs(records, name, quarantine), 1):
            database.execute(INSERT["questions"], (number, None, None, "", prompt))
            database.execute(INSERT["answers"], (number, None, None, number, answer))
    except UnicodeDecodeError as error:
        said = f"{error.reason} at position {error.start}"
        raise DataError(f"{name} is not UTF-8 text ({said}): save it as UTF-8") from error
    quarantine.check(number)
    return quarantine.count


def _pairs(records: Records, name: str, quarantine: Quarantine) -> Iterator[list[str]]:
    """[prompt, answer] of each record: two columns, or one `text` in Llama 2's template.

    The second is how the article stored its dataset, with its own spelling of the opening tag.
    """
    columns = None
    for number, record in records:
        columns = columns or _pair_columns(record, name)
        values = [record.get(column) for column in columns]
        if reason := _not_text(columns, values):
            quarantine.add(number, reason, record)
            continue
        if len(columns) == 1:
            found = ARTICLE_TEXT.fullmatch(str(values[0]).strip())
            texts = found.groups() if found else ("", "")
            values = [read_completion(text) for text in texts]  # a space on either side here too
        yield [str(text).replace("\r\n", "\n").replace("\r", "\n") for text in values]


def _pair_columns(record: dict, name: str) -> tuple[str, ...]:
    prompt = next((column for column in PROMPT_NAMES if column in record), None)
    answer = next((column for column in ANSWER_NAMES if column in record), None)
    if prompt and answer:
        return prompt, answer
    if "[/INST]" in str(record.get("text")):
        return ("text",)
    raise DataError(
        f"{name} has no column for the prompt ({', '.join(PROMPT_NAMES)}) or none for the answer "
        f"({', '.join(ANSWER_NAMES)}); its columns are {', '.join(map(str, record))}: rename yours"
    )


def _not_text(columns: tuple[str, ...], values: list) -> str:
    """Why the values cannot be used, or ""."""
    kinds = [type(value).__name__ for value in values]
    if set(kinds) != {"str"}:
        return f"has {kinds} in {columns}, where text must stand"
    if any(UNUSABLE.search(value) for value in values):
        return "holds NUL or half of a character (a lone surrogate)"
    return ""


def _of_file(path: Path, quarantine: Quarantine) -> Records:
    if path.stat().st_size == 0:
        raise DataError(f"{path.name} is empty (0 bytes): get the file again")
    if path.suffix == ".jsonl":
        return json_records(path, quarantine)
    readers = {".csv": _of_csv, ".parquet": _of_parquet}
    if path.suffix not in readers:
        ending = path.suffix or "nothing"
        raise DataError(f"{path.name} ends in {ending!r}: give a .jsonl, .csv or .parquet file")
    return readers[path.suffix](path)


def json_records(path: Path, quarantine: Quarantine | None = None) -> Records:
    """(line number, object) of each line of a JSONL file that is not blank.

    Lines that hold none go to `quarantine`; without one the first of them raises DataError.
    """
    for number, line in _lines(path):
        record, reason = _parse(line)
        if reason and quarantine:
            quarantine.add(number, reason, line)
        elif reason:
            raise DataError(f"{path.name}, line {number}, {reason}: repair or remove it")
        elif record is not None:
            yield number, record


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number, bytes) of each line; one that is longer than LONGEST is cut off there."""
    with path.open("rb") as file:
        if file.read(3) != codecs.BOM_UTF8:
            file.seek(0)
        for number in itertools.count(1):
            if not (line := file.readline(LONGEST)):
                return
            yield number, line
            while len(line) == LONGEST and not line.endswith(b"\n"):
                line = file.readline(LONGEST)


def _parse(line: bytes) -> tuple[dict | None, str]:
    """The object of a line of JSON (None for a blank one), or why it holds none."""
    if len(line) == LONGEST:
        return None, f"is longer than {LONGEST >> 20} MB"
    try:
        text = line.decode("utf-8")
        record = json.loads(text) if text.strip() else None
    except UnicodeDecodeError as error:
        return None, f"is not UTF-8 text ({error.reason} at byte {error.start})"
    except (ValueError, RecursionError) as error:
        return None, f"is no JSON ({error})"
    if record is not None and not isinstance(record, dict):
        return None, f"is {type(record).__name__}, not an object"
    return record, "is an empty object" if record == {} else ""


def _of_csv(path: Path) -> Records:
    csv.field_size_limit(LONGEST)
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        try:
            for row in rows:
                yield rows.line_num, row
        except csv.Error as error:
            raise DataError(
                f"{path.name}, line {rows.line_num}, cannot be read ({error}): repair or remove it"
            ) from error


def _of_parquet(path: Path) -> Records:
    try:
        batches = parquet.ParquetFile(path).iter_batches(1000)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path.name} is no Parquet file ({error}): get it again") from error
    yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)


def _of_hub(name: str) -> Records:
    import datasets  # here: a second that other sources need not wait

    try:
        splits = datasets.load_dataset(name)
    except Exception as error:  # the Hub client raises a dozen kinds, all mean the same here
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"the Hub dataset {name} could not be loaded ({first}): check the name and the "
            "network, or set DATA_SOURCE to 'sample', which needs neither"
        ) from error
    return enumerate((row for split in splits.values() for row in split), 1)
