"""The posts of a source in one SQLite file, to be read in parts of a few thousand questions.

It joins, sorts and counts on the disk, so memory does not grow with the source. Questions come in
the order of a seeded hash of their ids, whatever the order of the file they came from.
"""

import contextlib
import errno
import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

LONGEST = 1 << 20  # characters of a text; a post on Stack Overflow has at most 30,000
HELD = "validation"  # tag of rows whose owner holds them out
PART = 2_000  # questions that are worked on at a time

TABLES = """
PRAGMA journal_mode = OFF;  -- nothing is kept of a reading that fails
CREATE TABLE questions (id INTEGER PRIMARY KEY, author INTEGER, score INTEGER, title, body);
CREATE TABLE answers (
    id INTEGER PRIMARY KEY, author INTEGER, score INTEGER, question_id INTEGER, body
);
CREATE TABLE tags (question_id INTEGER, tag);
CREATE TABLE shuffled (place INTEGER PRIMARY KEY, question_id INTEGER);
"""
INSERT = {
    "questions": "INSERT INTO questions VALUES (?, ?, ?, ?, ?)",
    "answers": "INSERT INTO answers VALUES (?, ?, ?, ?, ?)",
    "tags": "INSERT INTO tags VALUES (?, ?)",
}
INDEXES = """
CREATE INDEX best_answer ON answers (question_id, score DESC, id);
CREATE INDEX tags_of ON tags (question_id);
"""
# Each question with its best answer: highest score, then lowest id; NULL where it has none.
PAIRS = """
SELECT q.id AS question_id, a.id AS answer_id, q.author AS question_author,
    a.author AS answer_author, q.score AS question_score, a.score AS answer_score,
    (SELECT json_group_array(tag) FROM tags WHERE question_id = q.id) AS tags,
    q.title AS title, q.body AS question, a.body AS answer
FROM shuffled JOIN questions AS q ON q.id = shuffled.question_id
LEFT JOIN answers AS a ON a.id = (
    SELECT id FROM answers WHERE question_id = q.id ORDER BY score DESC, id LIMIT 1
)
WHERE place >= ? AND place < ? ORDER BY place
"""


class DataError(ValueError):
    """The data cannot be used. The message names the file, the value seen and what to do."""


@dataclass(frozen=True)
class Posts:
    """A source on the disk, and what is known of it as a whole."""

    database: Path
    licence: str
    url: str = ""  # a pattern with {question_id} and {answer_id}, "" where posts have no address
    questions: int = 0
    answers: int = 0
    seen: Any = None  # of rows of one's own: a conversations.Seen

    @property
    def own(self) -> bool:
        """Whether these are rows of one's own, and no posts of a forum in HTML."""
        return self.seen is not None

    def parts(self) -> list[range]:
        """Places in the shuffled order, PART at a time."""
        places = range(self.questions)
        return [places[start : start + PART] for start in places[::PART]]

    def pairs(self, part: range) -> Iterator[dict]:
        """The questions of a part, each with its best answer and its tags."""
        with contextlib.closing(sqlite3.connect(self.database)) as database:
            database.row_factory = sqlite3.Row
            for row in database.execute(PAIRS, (part.start, part.stop)):
                yield {**row, "tags": json.loads(row["tags"])}


@contextlib.contextmanager
def new_database(path: Path) -> Iterator[sqlite3.Connection]:
    """An empty database, to be filled by INSERT."""
    path.unlink(missing_ok=True)
    try:
        with contextlib.closing(sqlite3.connect(path)) as database:
            database.executescript(TABLES)
            yield database
            database.commit()
    except sqlite3.OperationalError as error:
        if error.sqlite_errorname in ("SQLITE_FULL", "SQLITE_IOERR_WRITE"):
            raise OSError(errno.ENOSPC, str(error)) from error
        raise


def shuffle(database: sqlite3.Connection, seed: int) -> tuple[int, int]:
    """Make a filled database ready to be read; the numbers of questions and answers."""
    database.executescript(INDEXES)
    ids = np.array(database.execute("SELECT id FROM questions").fetchall(), np.int64).ravel()
    order = ids[np.argsort(question_hash(ids, seed))]
    database.executemany("INSERT INTO shuffled VALUES (?, ?)", enumerate(order.tolist()))
    (answers,) = database.execute("SELECT count(*) FROM answers").fetchone()
    return len(ids), answers


def question_hash(ids: np.ndarray, seed: int) -> np.ndarray:
    """A seeded 64-bit hash of ids, for a random order: splitmix64's (Steele, Lea, Flood 2014)."""
    with np.errstate(over="ignore"):
        z = ids.astype(np.uint64) + np.uint64(seed + 1) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
