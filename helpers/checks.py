"""How a setting is checked, and the sentence that says what is wrong with it.

Written here: pydantic takes 0.4 s to import, longer than all else that a Config needs, and its
sentences would have to be replaced one by one.
"""

import dataclasses
import difflib
import re
import sys
import typing
from collections.abc import Callable, Iterable
from dataclasses import field
from typing import Any

from helpers.prompts import MARKERS


class ConfigError(ValueError):
    """A setting is unknown, of the wrong type, out of range, or contradicts another one.

    The message names every such setting, not only the first.
    """


def checked(default, check: Callable[[Any], bool], rule: str) -> Any:
    """A field with its default, what a value must satisfy, and how a sentence says that."""
    return field(default=default, metadata={"check": check, "rule": rule})


def between(default, low, high) -> Any:
    return checked(default, lambda v: low <= v <= high, f"must lie between {low:,} and {high:,}")


def one_of(default: str | None, *choices: str) -> Any:
    return checked(default, lambda v: v in choices, f"must be one of {', '.join(choices)}")


def some_of(default: tuple[str, ...], *choices: str) -> Any:
    """Some of the choices; none too where that is the default."""
    rule = f"must name some of {', '.join(choices)}, each once"
    return checked(default, lambda v: bool(default) <= len({*v} & {*choices}) == len(v), rule)


def not_blank(default: str | None) -> Any:
    return checked(default, lambda v: bool(v.strip()), "must not be blank")


def prompt_text(default: str | None) -> Any:
    rule = f"must hold none of {', '.join(MARKERS)}"
    return checked(default, lambda v: not any(marker in v for marker in MARKERS), rule)


def one_device(default: int) -> Any:
    """Where the whole model lies: a GPU's number, "cuda:1", "cuda" or "cpu", under the name ""."""

    def check(value: dict) -> bool:
        named = re.fullmatch(r"\d+|cuda(:\d+)?|cpu", str(value.get("")))
        return len(value) == 1 and named is not None

    rule = """must put the whole model on one device, as {"": 0} or {"": "cpu"} does"""
    metadata = {"check": check, "rule": rule}
    return field(default_factory=lambda: {"": default}, metadata=metadata)


def problem(item: dataclasses.Field, value) -> str:
    """What is wrong with a value, as a sentence that names the parameter in capitals, or ""."""
    key = item.name.upper()
    if not _fits(value, item.type):
        wanted = item.type.__name__ if isinstance(item.type, type) else str(item.type)
        return f"{key} is {shown(value)}, of type {type(value).__name__}; it must be {wanted}"
    if value is not None and "check" in item.metadata and not item.metadata["check"](value):
        return f"{key} is {shown(value)}; it {item.metadata['rule']}"
    return ""


def did_you_mean(key: str, names: Iterable[str]) -> str:
    known = sorted(names)
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f": did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"


def shown(value) -> str:
    """The value as Python writes it, cut to a length that leaves room for the sentence."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}..."


def _fits(value, annotation) -> bool:
    if typing.get_origin(annotation) is tuple:
        kind = typing.get_args(annotation)[0]
        return isinstance(value, tuple) and all(type(part) is kind for part in value)
    if isinstance(value, bool):  # is an int to Python
        return annotation is bool
    if annotation is float:  # NaN is not below any number
        return isinstance(value, int | float) and abs(value) <= sys.float_info.max
    return isinstance(value, annotation)
