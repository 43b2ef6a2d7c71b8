"""One stored row as a conversation, whatever its columns are called; what is not used is named."""

import contextlib
import json
import re
import sqlite3
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from helpers.data.files import UNREADABLE, NoRow, Part, is_message, parts_of, unreadable
from helpers.data.posts import HELD, INSERT, LONGEST, DataError
from helpers.prompts import CLOSE_USER, OPEN_USER, read_completion

# Names of columns, in small letters with _ for a space; of each kind the first there is taken.
SYSTEMS = ("system", "system_prompt", "system_message")
PROMPTS = ("prompt", "instruction", "question", "query", "user", "human", "input")
CONTEXTS = ("question", "input", "context")  # follow the prompt
ANSWERS = ("answer", "completion", "response", "output", "assistant", "target", "reply", "solution")
CHATS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat")
TESTS = ("tests", "test_list")  # assertions on the answer's code, for notebook 06
TEXT = ("text",)  # in Llama 2's form
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
ROLES |= {"model": "assistant", "developer": "system"}
SYSTEM = re.compile(r"\s*<</?SYS>>(?P<system>.*?)<</SYS>>", re.DOTALL)  # the article opens with a /
END = re.compile(r"</s>\s*(?:<s>\s*)?$|<s>\s*$")
# NUL, half of a character (which JSON can hold and UTF-8 cannot), and what was not UTF-8.
UNUSABLE = re.compile("[\0\ud800-\udfff\ufffd]")
EMPTY: tuple = (None, "", "[]", [], {})  # nothing is lost with it
REFUSED = {
    r"(input_)?(image|video|audio|pixel_value)s?(_(path|url|file|bytes)s?)?": (
        "this course trains on text: give rows without them"
    ),
    r"tools|tool_calls|functions|function_call|role (tool|function.*|observation|ipython)": (
        "the templates here have no place for tool calls: leave those rows out"
    ),
    r"chosen, rejected": (
        "this course trains on one answer and not on preference pairs: rename `chosen` to `answer` "
        "and remove `rejected`, or use trl's DPOTrainer"
    ),
}


@dataclass
class Row:
    """A conversation as it was found."""

    format: str  # the columns that make it
    turns: list  # of (user, answer); `read_row` asks for text
    system: str | None = None
    unused: list[str] = field(default_factory=list)  # columns, and parts of them
    tests: str = ""


def read_row(record) -> Row:
    """The Row of a record. NoRow when it is none, DataError for a kind that is refused."""
    if not isinstance(record, dict) or not record:
        raise NoRow(f"is {type(record).__name__}, not an object with columns")
    columns = {re.sub(r"[\s_-]+", "_", str(name).strip().lower()): name for name in record}
    if len(columns) < len(record):
        raise NoRow(f"has two columns of one name among {', '.join(map(str, record))}")
    values = {key: record[name] for key, name in columns.items()}
    there = [key for key in values if values[key] not in EMPTY]
    _refuse([*there, ", ".join(key for key in ("chosen", "rejected") if key in values)])
    row, used = _of_columns(values, ", ".join(map(str, record)))
    for name in TESTS:
        lines = values.get(name) or []
        lines = [lines] if isinstance(lines, str) else lines
        if lines and isinstance(lines, list) and all(isinstance(line, str) for line in lines):
            row.tests, used = "\n".join(lines), [*used, name]
    row.unused += [str(columns[key]) for key in there if key not in used]
    _check_texts(row, used)
    return row


def _refuse(names) -> None:
    """DataError for what cannot be trained on here: images, tool calls, preferences."""
    for name in names:
        for pattern, reason in REFUSED.items():
            if re.fullmatch(pattern, str(name).lower()):
                raise DataError(f"holds {name}, and {reason}")


def _check_texts(row: Row, used: list[str]) -> None:
    """NoRow where a text is none or cannot be trained on; line ends become line feeds."""
    texts = [row.system, *(text for turn in row.turns for text in turn)]
    texts = texts if row.system is not None else texts[1:]
    kinds = [type(text).__name__ for text in texts]
    if set(kinds) != {"str"}:
        raise NoRow(f"has {kinds} in {tuple(used)}, where text must stand: write it as text")
    if any(UNUSABLE.search(text) or len(text) > LONGEST for text in texts):
        raise NoRow(
            f"holds NUL, half of a character, one that is not UTF-8 (save the file as UTF-8), or "
            f"more than {LONGEST:,} characters"
        )
    row.turns = [tuple(map(_lines, turn)) for turn in row.turns]
    row.system = _lines(row.system or "").strip() or None


def _lines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _of_columns(values: dict, told: str) -> tuple[Row, list[str]]:
    """The Row of columns with values, and which of them it holds. NoRow where they are no row."""

    def first(names: tuple[str, ...]) -> str:
        there = [name for name in names if name in values]
        return next((name for name in there if values[name] is not None), (there or [""])[0])

    system, prompt, answer, chat, text = map(first, (SYSTEMS, PROMPTS, ANSWERS, CHATS, TEXT))
    used, message = ([system], values[system]) if system else ([], None)
    if chat:
        return _of_messages(values[chat], message, chat), [*used, chat]
    if prompt and isinstance(values[prompt], list):  # trl's form of a conversation in two columns
        messages = [*values[prompt], *((values[answer] if answer else None) or [])]
        return _of_messages(messages, message, prompt), [*used, prompt, answer]
    for names in ((text,), (prompt, answer), (prompt,)):
        whole = "".join(str(values[name]) for name in names if name)
        if whole.lstrip().startswith(("<s>[INST]", OPEN_USER)) and CLOSE_USER in whole:
            return _of_text(whole, names[0]), list(names)
    if not prompt or not answer:
        raise NoRow(
            f"has no column for the prompt ({', '.join(PROMPTS)}) or none for the answer "
            f"({', '.join(ANSWERS)}), no conversation ({', '.join(CHATS)}) and no text of the form "
            f"<s>[INST] ... [/INST] ... </s>; its columns are {told}: rename yours"
        )
    contexts = [name for name in CONTEXTS if name in values and name not in (prompt, answer)]
    parts = [values[prompt], *(values[n] for n in contexts if str(values[n] or "").strip())]
    asked = "\n\n".join(parts) if all(isinstance(part, str) for part in parts) else parts
    used, turns = [*used, prompt, *contexts, answer], [(asked, values[answer])]
    history = values.get("history") or []
    if isinstance(history, list) and all(isinstance(p, list) and len(p) == 2 for p in history):
        used, turns = [*used, *["history"] * bool(history)], [*map(tuple, history), *turns]
    return Row(" + ".join(used), turns, message), used


def _of_messages(messages, system: str | None, name: str) -> Row:
    """OpenAI's messages, or ShareGPT's with `from` and `value`: requests and answers in turn."""
    if isinstance(messages, str) and messages.lstrip().startswith("["):  # of a table
        with contextlib.suppress(ValueError):
            messages = json.loads(messages)
    if not messages or not isinstance(messages, list) or not all(map(is_message, messages)):
        raise NoRow(f"has no messages with a role in {name}")
    said, unused = [], set()
    for message in messages:
        keys = ("from", "value") if "from" in message else ("role", "content")
        kept = {key for key, value in message.items() if value not in EMPTY}
        role, content = str(message.get(keys[0])).lower(), message.get(keys[1])
        _refuse([f"role {role}", *kept])
        unused |= {f"{name}.{key}" for key in kept.difference(keys)}
        said.append((ROLES.get(role, role), _content(content)))
    head = next((place for place, (role, _) in enumerate(said) if role != "system"), len(said))
    if texts := [text for _, text in said[:head]]:
        unused |= {f"a system message beside that of {name}"} if system else set()
        system = "\n\n".join(texts) if all(isinstance(text, str) for text in texts) else texts[0]
    turns = said[head:]
    # Left out and named: an answer to no request, a request without an answer.
    if [role for role, _ in turns[:2]] == ["assistant", "user"]:
        turns, unused = turns[1:], unused | {f"an answer before the first request in {name}"}
    if len(turns) > 1 and turns[-1][0] == "user":
        turns, unused = turns[:-1], unused | {f"a last request without an answer in {name}"}
    if not turns or [role for role, _ in turns] != ["user", "assistant"] * (len(turns) // 2):
        told = ", ".join(role for role, _ in said)
        raise NoRow(f"has roles in {name} that are not user, assistant in turn: {told}")
    texts = [text for _, text in turns]
    form = "ShareGPT's" if "from" in messages[0] else "OpenAI's"
    pairs = list(zip(texts[::2], texts[1::2], strict=True))
    return Row(f"{name} ({form} form)", pairs, system, sorted(unused))


def _content(content):
    """The text of a message, whose parts may stand in a list."""
    if not isinstance(content, list):
        return content
    parts = [part if isinstance(part, dict) else {"text": part} for part in content]
    _refuse(part["type"] for part in parts if "type" in part)
    texts = [part.get("text") for part in parts]
    return "".join(texts) if all(isinstance(text, str) for text in texts) else texts


def _of_text(text: str, name: str) -> Row:
    """Llama 2's text, as the article stored its dataset; one turn or several."""
    head, *parts = text.strip().split(OPEN_USER)
    pairs = [part.partition(CLOSE_USER) for part in parts]
    if head.strip() not in ("", "<s>") or not all(found for _, found, _ in pairs):
        raise NoRow(f"has {name} that is not of the form <s>[INST] ... [/INST] ... </s>")
    told = SYSTEM.match(pairs[0][0])
    turns = [[user, END.sub("", answer)] for user, _, answer in pairs]
    turns[0][0] = turns[0][0][told.end() if told else 0 :]
    read = [(read_completion(user), read_completion(answer)) for user, answer in turns]
    unused = [f"a last request without an answer in {name}"] if not read[-1][1].strip() else []
    read = read[:-1] if unused and len(read) > 1 else read
    return Row(f"{name} (Llama 2's template)", read, told and told["system"], unused)


# -- All rows of a source.


@dataclass
class Seen:
    """What a source of one's own holds; the counters count rows."""

    not_read: list[str]  # files and splits
    formats: Counter = field(default_factory=Counter)
    unused: Counter = field(default_factory=Counter)  # columns that are not used
    systems: Counter = field(default_factory=Counter)  # system messages that rows bring
    held: int = 0  # rows of an own validation split
    lost: list[dict] = field(default_factory=list)  # lines that are no rows, and why


def read(source: str | Path, database: sqlite3.Connection, held: str | Path | None = None) -> Seen:
    """Put the rows of a file or folder (a Path) or a Hub dataset (a name) into an empty database.

    They become posts without scores and authors, whose ids are their numbers, whose title is their
    tests and whose question is the conversation in JSON. Rows to validate with, of a split or of
    the source `held`, have the tag HELD. Raises DataError.
    """
    (parts, others), (given, more) = parts_of(source), parts_of(held) if held else ([], [])
    seen, number = Seen([*others, *more]), 0
    for part in _chosen(parts, given, seen):
        for row in _rows(part, seen):
            number += 1
            seen.formats[row.format + " + tests" * bool(row.tests)] += 1
            seen.unused.update(row.unused)
            seen.systems.update([row.system] if row.system else [])
            turns = json.dumps({"system": row.system, "turns": row.turns})
            database.execute(INSERT["questions"], (number, None, None, row.tests, turns))
            database.execute(INSERT["answers"], (number, None, None, number, ""))
            if part.split == HELD:
                seen.held += 1
                database.execute(INSERT["tags"], (number, HELD))
    if len(seen.lost) > number:
        first, places = seen.lost[0], ", ".join(str(entry["line"]) for entry in seen.lost[:50])
        raise DataError(
            f"{first['source']}, line {first['line']}, {first['reason']}; {len(seen.lost)} of "
            f"{len(seen.lost) + number} lines cannot be used ({places}): repair or remove them"
        )
    if number == 0:
        raise DataError("the data source holds no row: check DATA_SOURCE")
    return seen


def _rows(part: Part, seen: Seen) -> Iterator[Row]:
    """The rows of a part; what is none is put into `seen.lost`. DataError for what is refused."""
    line = 0
    try:
        for line, record in part.records():
            try:
                if isinstance(record, NoRow):
                    raise record
                yield read_row(record)
            except NoRow as error:
                reason, content = error.args[0], str([*error.args[1:], record][0])[:200]
                entry = {"line": line, "reason": reason, "content": content, "source": part.name}
                seen.lost.append(entry)
            except DataError as error:
                raise DataError(f"{part.name}, line {line}, {error}") from error
    except UNREADABLE as error:
        raise unreadable(part.name, error) from error


def _chosen(parts: list[Part], given: list[Part], seen: Seen) -> list[Part]:
    """The parts to read: those to train on, and those to validate with under the split HELD.

    A split to test with validates where there is no other; else it is not read.
    """

    def called(split: str, among: list[Part]) -> list[Part]:
        return [part for part in among if part.split == split]

    train = called("train", parts) or (parts if len({p.split for p in parts}) == 1 else [])
    if parts and not train:
        there = ", ".join(part.name for part in parts)
        raise DataError(
            f"there are rows to validate and to test with ({there}) and none to train on: call one "
            "of them train, or give it by itself"
        )
    others = given or [part for part in parts if part not in train]
    held = called(HELD, others) or called("test", others) or others
    seen.not_read += [part.name for part in [*parts, *given] if part not in [*train, *held]]
    return [*(p._replace(split="train") for p in train), *(p._replace(split=HELD) for p in held)]
