"""Where posts come from, and how they are read in bounded memory.

Every source ends in the same form: a folder of partitions, each holding the questions, answers and
tags whose question id has a seeded hash within one range. What belongs to one question lies in one
partition, so partitions can be worked on one by one, in any number of processes. Files are read as
a stream, and text stays bytes until a row is wanted.
"""

import codecs
import csv
import itertools
import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv

from helpers.config import PROJECT_DIR
from helpers.prompts import read_completion
from helpers.runs.folders import public_name

SAMPLE_DIR = PROJECT_DIR / "data" / "sample"
SAMPLE_LICENCE = "CC BY-SA 4.0"  # written for this course, unlike the posts of the real set
KAGGLE_DATASET = "stackoverflow/pythonquestions"

# A post on Stack Overflow has at most 30,000 characters: a row longer than a block is damage.
BLOCK_BYTES = 1 << 20
WRITE_BYTES = 4 << 20  # rows are collected up to this size before they are spread over partitions
PARTITION_BYTES = 1 << 20
MAX_PARTITIONS = 128

POST_COLUMNS = {
    "Id": pa.int64(),
    "OwnerUserId": pa.float64(),  # whole numbers, or NA for an author who has left
    "Score": pa.int64(),
    "Body": pa.binary(),
}
SCHEMAS = {
    "Questions": pa.schema({**POST_COLUMNS, "Title": pa.binary()}),
    "Answers": pa.schema({**POST_COLUMNS, "ParentId": pa.int64()}),
    "Tags": pa.schema({"Id": pa.int64(), "Tag": pa.string()}),
}
KEYS = {"Questions": "Id", "Answers": "ParentId", "Tags": "Id"}  # the column with the question's id

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
QUARANTINE = "quarantine.jsonl"


class DataError(ValueError):
    """The data cannot be used. The message names the file, the value seen and what to do."""


@dataclass(frozen=True)
class Partitions:
    """A source on disk, split by question: `folder/<table>-<number>.arrow`."""

    folder: Path
    count: int
    questions: int
    answers: int
    is_html: bool
    licence: str
    url: str  # a pattern with {question_id} and {answer_id}, "" where posts have no address
    quarantined: int = 0  # lines that are no rows; `folder/quarantine.jsonl` lists them


class Quarantine:
    """Lines of a source that are no rows: written to a file with number and reason, and counted."""

    def __init__(self, source: str, path: Path):
        self.source, self.path, self.count, self.first = source, path, 0, ""

    def add(self, number: int, reason: str, content: bytes | dict) -> None:
        text = content.decode("utf-8", "replace") if isinstance(content, bytes) else str(content)
        line = {"line": number, "reason": reason, "content": text[:200]}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.first = self.first or f"{self.source}, line {number}, {reason}"
        self.count += 1

    def check(self, good: int) -> None:
        """DataError when the lines that are no rows outnumber the `good` ones."""
        if self.count > good:
            raise DataError(
                f"{self.first}; {self.count} of {self.count + good} lines cannot be used: "
                "repair or remove them"
            )


def local_path(source: str) -> Path:
    """Where a source lies if it is on this disk: the sample's folder, or what its name says."""
    return SAMPLE_DIR if source == "sample" else Path(source).expanduser()


def open_source(
    source: str, folder: Path, seed: int, progress: Callable[[int, int], None] | None = None
) -> Partitions:
    """Read a source into partitions in `folder`.

    It is "sample", "kagglehub", a folder of CSVs, a JSONL, CSV or Parquet file, or a Hub dataset.
    `progress` gets (bytes just read, bytes in all). Raises DataError for what cannot be read.
    """
    path = local_path(source)
    if source == "kagglehub":
        path = _download_from_kaggle()
    if path.is_dir():
        return _partition_posts(path, folder, seed, progress)
    quarantine = Quarantine(path.name, folder / QUARANTINE)
    if path.is_file():
        pairs = _pairs_of_file(path, quarantine)
        licence = f"as in {public_name(path.name)}"
        return _partition_pairs(pairs, folder, seed, licence, quarantine)
    if path.suffix or not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise DataError(
            f"DATA_SOURCE is {source!r}, and there is no such file or folder: give a folder with "
            f"Questions.csv and Answers.csv, "
            "a .jsonl, .csv or .parquet file, the id of a Hub dataset, 'kagglehub' or 'sample'"
        )
    pairs = _pairs_of_hub(source, quarantine)
    return _partition_pairs(pairs, folder, seed, f"as stated on the Hub: {source}", quarantine)


def question_hash(ids: np.ndarray, seed: int) -> np.ndarray:
    """A seeded 64-bit hash of ids: a random order that does not depend on that of the file.

    The finalizer of splitmix64 (Steele, Lea and Flood 2014).
    """
    with np.errstate(over="ignore"):
        z = ids.astype(np.uint64) + np.uint64(seed + 1) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def read_partition(partitions: Partitions, table: str, number: int) -> pa.Table:
    """One table ("Questions", "Answers" or "Tags") of one partition."""
    path = partitions.folder / f"{table}-{number}.arrow"
    return read_rows(path) if path.exists() else SCHEMAS[table].empty_table()


def read_rows(path: Path) -> pa.Table:
    """The rows of an Arrow stream file, mapped and not copied."""
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_stream(source).read_all()


class Reader:
    """A file for pyarrow that counts bytes and quotation marks, and refuses NUL bytes.

    The bytes are for the progress bar; an odd number of marks shows that the file is cut off.
    """

    def __init__(self, path: Path, progress: Callable[[int], None] | None = None):
        self.path, self.progress = path, progress
        self.file, self.quotes, self.closed = path.open("rb"), 0, False

    def read(self, size: int = -1) -> bytes:
        chunk = self.file.read(size)
        if b"\0" in chunk:
            position = self.file.tell() - len(chunk) + chunk.index(0)
            raise DataError(
                f"{self.path.name} holds a NUL byte at position {position}: the "
                f"file is damaged or not ISO-8859-1 text "
                "(UTF-16?); get it again or save it as ISO-8859-1"
            )
        self.quotes += chunk.count(b'"')
        if not chunk and self.quotes % 2:
            raise DataError(self.truncated())
        if self.progress is not None:
            self.progress(len(chunk))
        return chunk

    def truncated(self) -> str:
        return (
            f"{self.path.name} has an odd number of quotation marks ({self.quotes}): a quoted text "
            f"is never closed"
            f"{_first_bad_line(self.path)}; the file is cut off or damaged, get it again"
        )

    def close(self):
        self.closed = True
        self.file.close()


def _check_header(path: Path, wanted) -> None:
    """DataError when a CSV is missing, empty, not ISO-8859-1, or lacks one of the columns."""
    if not path.exists():
        raise DataError(
            f"{path.name} is missing in {path.parent.name}/: the folder must hold Questions.csv "
            f"and Answers.csv (Tags.csv is optional)"
        )
    with path.open("rb") as file:
        head = file.read(4)
    if not head:
        raise DataError(f"{path.name} is empty (0 bytes): get the file again")
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(
            f"{path.name} begins with {head[:2].hex()}, it is UTF-16: save it as ISO-8859-1"
        )
    with path.open(encoding="latin-1", newline="") as file:
        names = next(csv.reader([file.readline()]), [])
    names = [name.removeprefix("ï»¿") for name in names]  # a UTF-8 byte-order mark
    missing = [name for name in wanted if name not in names]
    if missing and len(names) == 1 and any(mark in names[0] for mark in ";\t|"):
        mark = next(mark for mark in ";\t|" if mark in names[0])
        raise DataError(
            f"{path.name} separates its columns with {mark!r} (first line {names[0]!r}): save it "
            f"with commas"
        )
    if missing:
        raise DataError(
            f"{path.name} has no column {', '.join(missing)}; its columns are {', '.join(names)}: "
            "rename yours, or take the files of the Kaggle set"
        )


def _batches(path: Path, table: str, reader: Reader) -> Iterator[pa.RecordBatch]:
    """The wanted columns of a CSV, block by block. Text is left as bytes."""
    schema = SCHEMAS[table]
    try:
        stream = pa.csv.open_csv(
            pa.PythonFile(reader, mode="r"),
            read_options=pa.csv.ReadOptions(block_size=BLOCK_BYTES),
            parse_options=pa.csv.ParseOptions(newlines_in_values=True),
            convert_options=pa.csv.ConvertOptions(
                column_types=dict(zip(schema.names, schema.types, strict=True)),
                include_columns=schema.names,
                null_values=["NA", ""],
                strings_can_be_null=False,
                check_utf8=False,
            ),
        )
        for batch in stream:
            _check_ids(path, table, batch)
            yield batch
    except pa.ArrowInvalid as error:
        raise DataError(_explain(path, reader, str(error))) from error


def _check_ids(path: Path, table: str, batch: pa.RecordBatch) -> None:
    for name in {"Id", KEYS[table], "Score"} & set(batch.schema.names):
        if batch.column(name).null_count:
            raise DataError(
                f"{path.name} has a row whose {name} is empty or NA: repair or remove it"
            )


def _explain(path: Path, reader: Reader, message: str) -> str:
    """pyarrow's message as a sentence with the place and the way out."""
    bad = re.search(r"column #?\d*:?.*?conversion error to (\w+): invalid value '(.*)'", message)
    if bad:
        return (
            f"{path.name}{_first_bad_line(path)} holds {bad[2]!r} where a whole number must stand "
            "(Id, ParentId, Score or OwnerUserId): repair or remove that row"
        )
    if "straddling" in message:
        return (
            f"{path.name}{_first_bad_line(path)} holds a row of more than {BLOCK_BYTES >> 20} MB, "
            f"and a post has at most 30,000 characters: "
            "a quotation mark is not closed or the row is damaged, repair or remove it"
        )
    place, reason = _first_bad_line(path), message.splitlines()[0]
    return f"{path.name}{place} cannot be read ({reason}): repair or remove that row"


def _first_bad_line(path: Path) -> str:
    """The first damaged row as text to insert (", line 7,"), "" if none is seen.

    Reads the file again, slowly; called only when it is known to be damaged.
    """
    csv.field_size_limit(BLOCK_BYTES)
    with path.open(encoding="latin-1", newline="") as file:
        rows = csv.reader(file, strict=True)
        header, start = next(rows), 1
        numeric = [i for i, name in enumerate(header) if name in ("Id", "ParentId", "Score")]
        try:
            for row in rows:
                if len(row) != len(header):
                    return f", line {start + 1}, has {len(row)} fields and not {len(header)}, and"
                if not all(re.fullmatch(r"\s*-?\d+\s*", row[i]) for i in numeric):
                    return f", line {start + 1},"
                start = rows.line_num
        except csv.Error:
            return f", line {start + 1},"
    return ""


class _Writers:
    """Spreads batches over partition files by the hash of the question id."""

    def __init__(self, folder: Path, count: int, seed: int):
        self.folder, self.count, self.seed = folder, count, seed
        self.open, self.pending, self.pending_bytes = {}, [], 0

    def write(self, table: str, batch: pa.RecordBatch) -> None:
        self.pending.append(batch)
        self.pending_bytes += batch.nbytes
        if self.pending_bytes >= WRITE_BYTES:
            self.flush(table)

    def flush(self, table: str) -> None:
        if not self.pending:
            return
        rows = pa.Table.from_batches(self.pending)
        self.pending, self.pending_bytes = [], 0
        hashes = question_hash(rows[KEYS[table]].to_numpy(), self.seed)
        parts = (hashes >> np.uint64(32)).astype(np.int64) * self.count >> 32
        rows = rows.take(pa.array(np.argsort(parts, kind="stable"))).combine_chunks()
        ends = np.cumsum(np.bincount(parts, minlength=self.count))
        for number, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            if end > start:
                self._writer(table, number).write_table(rows.slice(start, end - start))

    def _writer(self, table: str, number: int):
        if number not in self.open:
            path = str(self.folder / f"{table}-{number}.arrow")
            self.open[number] = pa.ipc.new_stream(path, SCHEMAS[table])
        return self.open[number]

    def finish(self, table: str) -> None:
        """Write what is left of a table and close its files."""
        self.flush(table)
        for writer in self.open.values():
            writer.close()
        self.open.clear()
        pa.default_memory_pool().release_unused()


def _partition_posts(source: Path, folder: Path, seed: int, progress) -> Partitions:
    tables = ["Questions", "Answers"] + ["Tags"] * (source / "Tags.csv").exists()
    paths = {table: source / f"{table}.csv" for table in tables}
    for table, path in paths.items():
        _check_header(path, SCHEMAS[table].names)
    total = sum(path.stat().st_size for path in paths.values())
    count = min(MAX_PARTITIONS, -(-total // PARTITION_BYTES))
    advance = partial(progress, total=total) if progress else None

    def read(table: str) -> int:
        return _partition_table(paths[table], table, _Writers(folder, count, seed), advance)

    # One thread a file: Arrow reads and copies without the interpreter's lock.
    with ThreadPoolExecutor(len(paths)) as threads:
        rows = dict(zip(paths, threads.map(read, paths), strict=True))
    return Partitions(
        folder,
        count,
        rows["Questions"],
        rows["Answers"],
        is_html=True,
        licence=SAMPLE_LICENCE if source == SAMPLE_DIR else "CC BY-SA 3.0",
        # The sample's posts are on no site: an address would only look like one.
        url="" if source == SAMPLE_DIR else "https://stackoverflow.com/a/{answer_id}",
    )


def _partition_table(path: Path, table: str, writers: _Writers, progress) -> int:
    """Spread one CSV over the partitions; its number of rows."""
    ids, reader = [], Reader(path, progress)
    for batch in _batches(path, table, reader):
        ids.append(batch.column("Id").to_numpy().copy())
        writers.write(table, batch)
    writers.finish(table)
    reader.close()
    rows = sum(map(len, ids))
    if rows == 0:
        raise DataError(f"{path.name} has a header and no row: get the file again")
    if table != "Tags":
        _check_unique(path, np.concatenate(ids))
    return rows


def _check_unique(path: Path, ids: np.ndarray) -> None:
    values, counts = np.unique(ids, return_counts=True)
    if len(values) < len(ids):
        twice = values[counts > 1]
        raise DataError(
            f"{path.name} holds {len(twice)} ids more than once, the first is {twice[0]}: remove "
            f"the repeated rows"
        )


def _partition_pairs(
    pairs: Iterator[tuple[str, str]], folder, seed, licence: str, quarantine: Quarantine
) -> Partitions:
    """Prompts and answers as posts without scores, authors or markup; ids are row numbers."""
    writers, rows = {table: _Writers(folder, 1, seed) for table in ("Questions", "Answers")}, 0
    while batch := list(itertools.islice(pairs, 1000)):
        _write_pairs(writers, batch, rows)
        rows += len(batch)
    for table, writer in writers.items():
        writer.finish(table)
    quarantine.check(rows)
    if rows == 0:
        raise DataError("the data source holds no row: check DATA_SOURCE")
    return Partitions(folder, 1, rows, rows, False, licence, url="", quarantined=quarantine.count)


def _write_pairs(writers: dict[str, _Writers], pairs, first: int) -> None:
    ids = pa.array(range(first + 1, first + 1 + len(pairs)), pa.int64())
    none = pa.nulls(len(pairs), pa.int64())
    for table, texts, extra in (
        ("Questions", [p for p, _ in pairs], ("Title", pa.array([b""] * len(pairs), pa.binary()))),
        ("Answers", [a for _, a in pairs], ("ParentId", ids)),
    ):
        body = pa.array([text.encode() for text in texts], pa.binary())
        columns = [ids, none.cast(pa.float64()), none, body, extra[1]]
        writers[table].write(table, pa.RecordBatch.from_arrays(columns, schema=SCHEMAS[table]))


def _pairs_of_file(path: Path, quarantine: Quarantine) -> Iterator[tuple[str, str]]:
    try:
        yield from _pairs(_records(path, quarantine), path.name, quarantine)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path.name} is not UTF-8 text ({error.reason} at position {error.start}): save it as "
            f"UTF-8"
        ) from error


def _records(path: Path, quarantine: Quarantine) -> Iterator[tuple[int, dict]]:
    if path.stat().st_size == 0:
        raise DataError(f"{path.name} is empty (0 bytes): get the file again")
    if path.suffix == ".jsonl":
        return json_records(path, quarantine)
    readers = {".csv": _csv_records, ".parquet": _parquet_records}
    if path.suffix not in readers:
        raise DataError(
            f"{path.name} ends in {path.suffix or 'nothing'!r}: give a .jsonl, .csv or .parquet "
            f"file"
        )
    return readers[path.suffix](path)


def _pairs_of_hub(name: str, quarantine: Quarantine) -> Iterator[tuple[str, str]]:
    import datasets

    try:
        splits = datasets.load_dataset(name)
    except Exception as error:  # the Hub client raises a dozen kinds, all mean the same here
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"the Hub dataset {name} could not be loaded ({first}): check the name and the "
            f"network, "
            "or set DATA_SOURCE to 'sample', which needs neither"
        ) from error
    rows = enumerate((row for split in splits.values() for row in split), 1)
    return _pairs(rows, name, quarantine)


def _pairs(
    records: Iterator[tuple[int, dict]], name: str, quarantine: Quarantine
) -> Iterator[tuple[str, str]]:
    """(prompt, answer) of each record: two columns, or one `text` in Llama 2's template.

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
            found = ARTICLE_TEXT.fullmatch(values[0].strip())
            texts = found.groups() if found else ("", "")
            values = [read_completion(text) for text in texts]  # a space on either side here too
        yield tuple(values)


def _not_text(columns: tuple[str, ...], values: list) -> str:
    """Why the values cannot be used, or ""."""
    kinds = [type(value).__name__ for value in values]
    if set(kinds) != {"str"}:
        return f"has {kinds} in {columns}, where text must stand"
    if any(UNUSABLE.search(value) for value in values):
        return "holds NUL or half of a character (a lone surrogate)"
    return ""


def _pair_columns(record: dict, name: str) -> tuple[str, ...]:
    prompt = next((column for column in PROMPT_NAMES if column in record), None)
    answer = next((column for column in ANSWER_NAMES if column in record), None)
    if prompt and answer:
        return prompt, answer
    if "[/INST]" in str(record.get("text")):
        return ("text",)
    raise DataError(
        f"{name} has no column for the prompt ({', '.join(PROMPT_NAMES)}) or none for the answer "
        f"({', '.join(ANSWER_NAMES)}); "
        f"its columns are {', '.join(map(str, record))}: rename yours"
    )


def json_records(path: Path, quarantine: Quarantine | None = None) -> Iterator[tuple[int, dict]]:
    """(line number, object) of each line of a JSONL file that is not blank.

    Lines that hold none go to `quarantine`; without one the first of them raises DataError.
    """
    for number, line in _lines(path):
        record, reason = _parse(line)
        if reason and quarantine is None:
            raise DataError(f"{path.name}, line {number}, {reason}: repair or remove it")
        if reason:
            quarantine.add(number, reason, line)
        elif record is not None:
            yield number, record


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number, bytes) of each line; one of more than a block is cut off there."""
    with path.open("rb") as file:
        if file.read(3) != codecs.BOM_UTF8:
            file.seek(0)
        for number in itertools.count(1):
            if not (line := file.readline(BLOCK_BYTES)):
                return
            yield number, line
            while len(line) == BLOCK_BYTES and not line.endswith(b"\n"):
                line = file.readline(BLOCK_BYTES)


def _parse(line: bytes) -> tuple[dict | None, str]:
    """The object of a line of JSON (None for a blank one), or why it holds none."""
    if len(line) == BLOCK_BYTES:
        return None, f"is longer than {BLOCK_BYTES >> 20} MB"
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


def _csv_records(path: Path) -> Iterator[tuple[int, dict]]:
    csv.field_size_limit(BLOCK_BYTES)
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        try:
            for row in rows:
                yield rows.line_num, row
        except csv.Error as error:
            raise DataError(
                f"{path.name}, line {rows.line_num}, cannot be read ({error}): repair or remove it"
            ) from error


def _parquet_records(path: Path) -> Iterator[tuple[int, dict]]:
    from pyarrow import parquet

    try:
        batches = parquet.ParquetFile(path).iter_batches(1000)
    except pa.ArrowInvalid as error:
        raise DataError(f"{path.name} is no Parquet file ({error}): get it again") from error
    yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)


def _download_from_kaggle() -> Path:
    try:
        import kagglehub
    except ImportError as error:
        raise DataError(
            "DATA_SOURCE is 'kagglehub', and the package is not installed: run `pip install "
            "kagglehub`, "
            f"or download {KAGGLE_DATASET} by hand and give its folder"
        ) from error
    try:
        return Path(kagglehub.dataset_download(KAGGLE_DATASET))
    except Exception as error:  # credentials, network, licence: the client has no common base class
        raise DataError(
            f"Kaggle did not deliver {KAGGLE_DATASET} ({error}): check ~/.kaggle/kaggle.json and "
            f"the network"
        ) from error
