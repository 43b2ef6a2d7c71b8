"""One stored row as a conversation, whatever its columns are called; what is not used is named."""

import ast
import contextlib
import json
import re
import sqlite3
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from helpers.data.formats import UNREADABLE, Part, Quarantine, is_message, parts_of, unreadable
from helpers.data.posts import HELD, INSERT, DataError
from helpers.prompts import CLOSE_USER, OPEN_USER, OPENING, read_completion

# Names of columns, in small letters with _ for a space; of each kind the first there is taken.
SYSTEMS = ("system", "system_prompt", "system_message")
PROMPTS = ("prompt", "instruction", "question", "query", "user", "human", "input")
CONTEXTS = ("question", "input", "context")  # follow the prompt
ANSWERS = ("answer", "completion", "response", "output", "assistant", "target", "reply", "solution")
CHATS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat")
TESTS = ("tests", "test_list")  # assertions on the answer's code, for notebook 06
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
ROLES |= {"model": "assistant", "developer": "system"}
SYSTEM = re.compile(r"\s*<</?SYS>>(?P<system>.*?)<</SYS>>", re.DOTALL)  # the article opens with a /
END = re.compile(r"</s>\s*(?:<s>\s*)?$|<s>\s*$")
# Half of a character (a lone surrogate, which JSON can hold and UTF-8 cannot), and NUL.
UNUSABLE = re.compile("[\0\ud800-\udfff]")
EMPTY: tuple = (None, "", "[]", [], {})  # nothing is lost with it
SEEING = re.compile("(image|video|audio)s?(_(path|url|file|bytes)s?)?|pixel_values")
TEXT_ONLY = "this course trains on text: give rows without them"
CALLING = ("tools", "tool_calls", "function_call", "functions")
CALLERS = ("tool", "function", "function_call", "observation", "ipython")  # roles
NO_TOOLS = "the templates here have no place for tool calls: leave those rows out"
TEXT_PARTS = ("text", "input_text", "output_text")


class NoRow(ValueError):
    """A record that is no conversation, and why."""


@dataclass
class Row:
    """A conversation as it was found."""

    format: str  # the columns that make it
    turns: list[tuple[str, str]]  # of text: `read_row` asks
    system: str | None = None
    unused: list[str] = field(default_factory=list)  # columns, and parts of them
    tests: str = ""


def read_row(record: dict) -> Row:
    """The Row of a record. NoRow when it is none, DataError for a kind that is refused."""
    columns = {re.sub(r"[\s_-]+", "_", str(name).strip().lower()): name for name in record}
    if len(columns) < len(record):
        raise NoRow(f"has two columns of one name among {', '.join(map(str, record))}")
    values = {key: record[name] for key, name in columns.items()}
    _refuse(values)
    if (found := _of_columns(values)) is None:
        raise NoRow(
            f"has no column for the prompt ({', '.join(PROMPTS)}) or none for the answer "
            f"({', '.join(ANSWERS)}), and no conversation ({', '.join(CHATS)}); its columns are "
            f"{', '.join(map(str, record))}: rename yours"
        )
    row, used = found
    there = [key for key, value in values.items() if value not in EMPTY]
    for name in TESTS:
        lines = values.get(name) or []
        lines = [lines] if isinstance(lines, str) else lines
        if lines and isinstance(lines, list) and all(isinstance(line, str) for line in lines):
            row.tests, row.format = "\n".join(lines), f"{row.format} + {name}"
            used.append(name)
    row.unused += [str(columns[key]) for key in there if key not in used]
    texts = [text for turn in row.turns for text in turn]
    texts += [row.system] if row.system is not None else []
    kinds = ["NaN" if text in ("NaN", "nan") else type(text).__name__ for text in texts]
    if set(kinds) - {"str"}:
        raise NoRow(f"has {kinds} in {tuple(used)}, where text must stand: write it as text")
    if any(UNUSABLE.search(text) for text in texts):
        raise NoRow("holds NUL or half of a character (a lone surrogate)")
    row.turns = [(_lines(user), _lines(answer)) for user, answer in row.turns]
    if len(row.turns) > 1 and not row.turns[-1][1].strip():
        row.unused.append(f"a last request without an answer in {row.format}")
        row.turns.pop()
    row.system = _lines(row.system).strip() or None if row.system else None
    return row


def _lines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _refuse(values: dict) -> None:
    """DataError for what cannot be trained on here: preferences, tool calls, images."""
    if "chosen" in values and "rejected" in values:
        raise DataError(
            "holds preference pairs (`chosen`, `rejected`), and this course trains on one answer: "
            "rename `chosen` to `answer` and remove `rejected`, or use trl's DPOTrainer"
        )
    answered = any(name in values for name in (*ANSWERS, *CHATS))
    if answered and str(values.get("label")).lower() in ("true", "false"):
        raise DataError(
            "holds preferences (`label` says whether an answer is liked): keep the liked rows and "
            "remove `label`, or use trl's KTOTrainer"
        )
    for name in values:
        seeing = bool(SEEING.fullmatch(name))
        if (seeing or name in CALLING) and values[name] not in EMPTY:
            raise DataError(f"holds {name}, and {TEXT_ONLY if seeing else NO_TOOLS}")


def _of_columns(values: dict) -> tuple[Row, list[str]] | None:
    """The Row of columns with values, and which of them it holds; None where they are no row."""

    def first(names: tuple[str, ...]) -> str:
        there = [name for name in names if name in values]
        return next((name for name in there if values[name] is not None), (there or [""])[0])

    system, prompt, answer, chat = map(first, (SYSTEMS, PROMPTS, ANSWERS, CHATS))
    if chat and isinstance(values[chat], str) and values[chat].lstrip()[:1] == "[":  # of a table
        values[chat] = _parsed(values[chat], chat)
    used = [system] if system else []
    message = values[system] if system else None
    if prompt and isinstance(values[prompt], list):  # trl's form of a conversation in two columns
        last = values[answer] if answer else []
        last = last if isinstance(last, list) else [{"role": "assistant", "content": last}]
        used += [prompt, answer]
        return _of_messages([*values[prompt], *last], message, prompt), used
    if chat and isinstance(values[chat], list):
        return _of_messages(values[chat], message, chat), [*used, chat]
    if prompt and answer and str(values[prompt]).lstrip().startswith(("<s>[INST]", OPENING)):
        return _of_text(f"{values[prompt]}{values[answer]}", prompt), [prompt, answer]
    if prompt and answer:
        return _of_pair(values, system, prompt, answer)
    for name in ("text", prompt):
        if CLOSE_USER in str(values.get(name)):
            return _of_text(str(values[name]), name), [name]
    if isinstance(values.get("text"), str):
        raise NoRow(
            "has its whole text in `text`, and not in Llama 2's form (<s>[INST] ... [/INST] ... "
            "</s>): split it into the columns prompt and answer"
        )
    return None


def _of_pair(values: dict, system: str, prompt: str, answer: str) -> tuple[Row, list[str]]:
    """A prompt with what it is about, an answer, and the turns before in `history`."""
    contexts = [name for name in CONTEXTS if name in values and name not in (prompt, answer)]
    parts = [values[prompt], *(values[n] for n in contexts if str(values[n] or "").strip())]
    text = "\n\n".join(parts) if all(isinstance(part, str) for part in parts) else parts
    used = [*([system] if system else []), prompt, *contexts, answer]
    turns: list = [(text, values[answer])]
    history = values.get("history")
    if isinstance(history, list) and all(isinstance(p, list) and len(p) == 2 for p in history):
        turns, used = [*map(tuple, history), *turns], [*used, "history"]
    return Row(" + ".join(used), turns, values[system] if system else None), used


def _parsed(value: str, name: str):
    """A list that JSON or Python wrote as text."""
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError):
            return read(value)
    raise NoRow(f"has no list in {name}, but {value[:60]!r}")


def _of_messages(messages: list, system: str | None, name: str) -> Row:
    """OpenAI's messages, or ShareGPT's with `from` and `value`: requests and answers in turn.

    An answer before the first request has nothing to answer, and is named as not used.
    """
    from trl.data_utils import maybe_convert_to_chatml  # here: seconds, which others need not wait

    if not messages or not all(map(is_message, messages)):
        raise NoRow(f"has no messages with a role in {name}")
    form = "ShareGPT's" if "from" in messages[0] else "OpenAI's"
    given = maybe_convert_to_chatml({"messages": [dict(message) for message in messages]})
    said, unused = [], set()
    for message in given["messages"]:
        _refuse(message)
        if (role := str(message.get("role")).lower()) in CALLERS:
            raise DataError(f"holds a message of role {role}, and {NO_TOOLS}")
        kept = [key for key, value in message.items() if value not in EMPTY]
        unused |= {f"{name}.{key}" for key in kept if key not in ("role", "content")}
        said.append((ROLES.get(role, role), _content(message.get("content"))))
    roles = [role for role, _ in said]
    head = next((place for place, role in enumerate(roles) if role != "system"), len(said))
    if texts := [text for _, text in said[:head]]:
        unused |= {f"a system message beside that of {name}"} if system else set()
        system = "\n\n".join(texts) if all(isinstance(text, str) for text in texts) else texts[0]
    if roles[head : head + 2] == ["assistant", "user"]:
        head, unused = head + 1, unused | {f"an answer before the first request in {name}"}
    texts, roles = [text for _, text in said[head:]], roles[head:]
    if roles[-1:] == ["user"] and len(roles) > 1:
        roles, texts = [*roles, "assistant"], [*texts, ""]  # `read_row` names it
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        told = ", ".join(role for role, _ in said)
        raise NoRow(f"has roles in {name} that are not user, assistant in turn: {told}")
    turns = list(zip(texts[::2], texts[1::2], strict=True))
    return Row(f"{name} ({form} form)", turns, system, sorted(unused))


def _content(content):
    """The text of a message, whose parts may stand in a list."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind not in TEXT_PARTS:
            raise DataError(f"holds a message with a part of type {kind}, and {TEXT_ONLY}")
        texts.append(part.get("text") if isinstance(part, dict) else part)
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
    return Row(f"{name} (Llama 2's template)", read, told and told["system"])


# -- All rows of a source.


@dataclass
class Seen:
    """What a source of one's own holds; the counters count rows."""

    not_read: list[str]  # files and splits
    formats: Counter = field(default_factory=Counter)
    unused: Counter = field(default_factory=Counter)  # columns that are not used
    systems: Counter = field(default_factory=Counter)  # system messages that rows bring
    held: int = 0  # rows of an own validation split
    quarantined: int = 0


def read(
    source: str | Path, database: sqlite3.Connection, folder: Path, held: str | Path | None = None
) -> Seen:
    """Put the rows of a file or folder (a Path) or a Hub dataset (a name) into an empty database.

    They become posts without scores and authors, whose ids are their numbers, whose title is their
    tests and whose question is the conversation in JSON. Rows to validate with, of a split or of
    the source `held`, have the tag HELD. What is no row is put into quarantine, in `folder`.
    Raises DataError.
    """
    (parts, others), (given, more) = parts_of(source), parts_of(held) if held else ([], [])
    seen, quarantine, number = Seen([*others, *more]), Quarantine(folder), 0
    for part in _chosen(parts, given, seen):
        for row in _rows(part, quarantine):
            number += 1
            seen.formats[row.format] += 1
            seen.unused.update(row.unused)
            seen.systems.update([row.system] if row.system else [])
            seen.held += part.split == HELD
            turns = json.dumps({"system": row.system, "turns": row.turns})
            database.execute(INSERT["questions"], (number, None, None, row.tests, turns))
            database.execute(INSERT["answers"], (number, None, None, number, ""))
            if part.split == HELD:
                database.execute(INSERT["tags"], (number, HELD))
    quarantine.check(number)
    seen.quarantined = quarantine.count
    return seen


def _rows(part: Part, quarantine: Quarantine) -> Iterator[Row]:
    """The rows of a part. Raises DataError for what cannot be read and what is refused."""
    line = 0
    try:
        for line, record in part.records(quarantine):
            try:
                yield read_row(record)
            except NoRow as error:
                quarantine.add(part.name, line, str(error), record)
            except DataError as error:
                raise DataError(f"{part.name}, line {line}, {error}") from error
    except UNREADABLE as error:
        raise unreadable(part.name, error) from error


def _chosen(parts: list[Part], given: list[Part], seen: Seen) -> list[Part]:
    """The parts to read: those to train on, and those to validate with under the split HELD.

    A split to test with validates where there is no other; else it is not read.
    """
    names = {part.split for part in parts}
    train = [part for part in parts if part.split == "train" or len(names) == 1]
    if parts and not train:
        there = ", ".join(part.name for part in parts)
        raise DataError(
            f"there are rows to validate and to test with ({there}) and none to train on: call one "
            "of them train, or give it by itself"
        )
    among = given or [part for part in parts if part not in train]
    others = {part.split for part in among}
    kind = next(split for split in (HELD, "test", "train") if split in others or split == "train")
    own = [part for part in among if part.split == kind]
    read_too = {part.name for part in [*train, *own]}
    seen.not_read += [part.name for part in [*parts, *given] if part.name not in read_too]
    return [*(p._replace(split="train") for p in train), *(p._replace(split=HELD) for p in own)]
