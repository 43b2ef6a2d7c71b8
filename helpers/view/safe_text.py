"""Text from data or a model, made fit to be looked at. HTML views escape it besides."""

import re

# Control characters but for tab and line feed, marks that turn the direction of writing, ends of
# lines that only some programs see, and halves of characters.
ACTING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def visible(text: str) -> str:
    r"""The text with each character that acts and is not seen written out: \x1b, \u202e."""
    return ACTING.sub(lambda found: ascii(found[0])[1:-1], text)
