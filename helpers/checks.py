"""How a setting is checked, and the sentence that says what is wrong with it.

Written here: pydantic takes 0.4 s to import, longer than all else that a Config needs, and its
sentences would have to be replaced one by one.
"""

import dataclasses
import difflib
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import field
from typing import Any

from helpers.prompts import MARKERS

HALF_A_CHARACTER = re.compile("[\ud800-\udfff]")  # a lone surrogate, which UTF-8 cannot hold


class ConfigError(ValueError):
    """A setting is unknown, of the wrong type, out of range, or contradicts another one.

    The message names every such setting, not only the first.
    """


def checked(default, check: Callable[[Any], bool], rule: str) -> Any:
    """A field with its default, what a value must satisfy, and how a sentence says that."""
    return field(default=default, metadata={"check": check, "rule": rule})


def worked_out() -> Any:
    """A field that is given as None where it is to follow from the others."""
    return field(default=None)


def between(default, low, high) -> Any:
    return checked(default, lambda v: low <= v <= high, f"must lie between {low:,} and {high:,}")


def count(default: int | None, high: int) -> Any:
    return between(default, 1, high)


def counts(default: tuple[int, ...], names: tuple[str, ...], high: int) -> Any:
    """As many whole numbers as there are names, from 0 on, the first of them at least 1."""
    rule = (
        f"must be {len(names)} whole numbers from 0 to {high:,}, for {', '.join(names)}, the first "
        "at least 1"
    )
    return checked(
        default,
        lambda v: len(v) == len(names) and all(0 <= n <= high for n in v) and v[0] > 0,
        rule,
    )


def up_to(default: float, high: int) -> Any:
    return checked(default, lambda v: 0 < v <= high, f"must be greater than 0 and at most {high}")


def one_of(default: str | None, *choices: str) -> Any:
    return checked(default, lambda v: v in choices, f"must be one of {', '.join(choices)}")


def some_of(default: tuple[str, ...], *choices: str) -> Any:
    rule = f"must name one or more of {', '.join(choices)}, each once"
    return checked(default, lambda v: len({*v} & {*choices}) == len(v) > 0, rule)


def none_or_some_of(*choices: str) -> Any:
    rule = f"must name none, one or more of {', '.join(choices)}, each once"
    return checked((), lambda v: len({*v} & {*choices}) == len(v), rule)


def not_blank(default: str) -> Any:
    return checked(default, lambda v: bool(v.strip()), "must not be blank")


def prompt_text(default: str | None) -> Any:
    rule = f"must hold none of {', '.join(MARKERS)}, and no half of a character"
    return checked(
        default,
        lambda v: not any(m in v for m in MARKERS) and not HALF_A_CHARACTER.search(v),
        rule,
    )


def one_device(default: int) -> Any:
    rule = """must put the whole model on one device, as {"": 0} or {"": "cpu"} does"""
    return field(
        default_factory=lambda: {"": default}, metadata={"check": _is_one_device, "rule": rule}
    )


def _is_one_device(value: dict) -> bool:
    place = value.get("")
    named = isinstance(place, str) and re.fullmatch(r"cpu|cuda(:\d+)?", place)
    return len(value) == 1 and bool(named or (type(place) is int and place >= 0))


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
    try:
        text = repr(value)
    except ValueError:
        return "a number of thousands of digits"  # more than Python is willing to write
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text):,} characters)"


def _fits(value, annotation) -> bool:
    if isinstance(annotation, types.UnionType):
        return any(_fits(value, part) for part in typing.get_args(annotation))
    if typing.get_origin(annotation) is tuple:
        kind = typing.get_args(annotation)[0]
        return isinstance(value, tuple) and all(type(part) is kind for part in value)
    if annotation in (int, float) and isinstance(value, bool):
        return False
    if annotation is float:  # NaN is not below any number
        return isinstance(value, int | float) and abs(value) <= sys.float_info.max
    return isinstance(value, annotation)
