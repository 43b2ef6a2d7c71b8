"""HTML posts to Markdown with their code kept.

The parser is selectolax (lexbor, an HTML5 parser), which repairs markup as a browser does. A
language model reads the result: text is not escaped, links lose their address, pictures disappear.
What would read as something else without its tag keeps a sign of it: 10^3, ~~struck out~~.
"""

import html
import re
import textwrap

from selectolax.lexbor import LexborHTMLParser

from helpers.data.code_kinds import code_kind
from helpers.prompts import FENCE

SPACES = re.compile(r"[ \t\r\n\f]+")
TAG = re.compile(r"<(/?[a-zA-Z][\w-]*)([^>]*)>")  # the parser writes > in attributes as &gt;
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
START = re.compile(r' start="\s*(-?\d{1,9})\s*"')  # the number of a list's first item
NO_TEXT = re.compile(r"<(?:script|style|iframe)\b", re.IGNORECASE)
MARKS = {"b": "**", "strong": "**", "i": "*", "em": "*", "del": "~~", "s": "~~", "strike": "~~"}
RAISED = {"sup": "^", "sub": "_"}
BREAK = "\0"  # stands for <br> within running text, where it cannot occur
DEEPEST = 20  # levels of lists and of quotations that are indented; posts nest 3, attacks 10,000
FENCE_LANGUAGE = {"python": "python", "session": "pycon"}


def fenced_blocks(markdown: str) -> list[tuple[str, str]]:
    """(language, code) of every fence, the language "" where none is given."""
    return [(found[2], found[3]) for found in FENCE.finditer(markdown)]


def fence(code: str, language: str = "") -> str:
    """The code between fences long enough that no line of it can close them."""
    runs = re.findall(r"^ {0,3}(`{3,})", code, re.MULTILINE) if "```" in code else []
    marks = "`" * (1 + max(map(len, runs), default=2))
    return f"{marks}{language}\n{code}\n{marks}"


def html_to_markdown(source: str, kinds: list[str] | None = None) -> str:
    """The post as Markdown, `<pre>` as fenced code with its indentation untouched.

    With `kinds`, a list, each block's `code_kind` is appended to it and Python fences say so:
    ```python, or ```pycon for a session. Without it fences carry no language.
    """
    body = LexborHTMLParser(source).body
    if body is None:
        return ""
    if NO_TEXT.search(source):
        body.strip_tags(["script", "style", "iframe"])
    repaired = (body.inner_html or "").replace("\0", "")  # every tag closed and in its place
    writer = _Writer(kinds)
    plain = COMMENT.sub("", repaired) if "<!--" in repaired else repaired
    pieces = [*TAG.split(plain), "end", ""]  # behind each text a tag
    for text, tag, attributes in zip(pieces[::3], pieces[1::3], pieces[2::3], strict=True):
        if text:
            writer.text(html.unescape(text) if "&" in text else text)
        act = (IN_PRE if writer.in_pre else ACTIONS).get(tag)
        if act is not None:
            writer.attributes = attributes
            act(writer, tag)
    writer.close_paragraph()
    return "".join(writer.blocks)


def _marked(text: str, mark: str) -> str:
    """The text between two marks, with the spaces at its ends outside of them."""
    core = text.strip()
    before, _, after = text.partition(core) if core else (text, "", "")
    return f"{before}{mark}{core}{mark}{after}" if core else text


class _Writer:
    """Collects Markdown blocks while texts and tags go by, in one pass and without recursion."""

    def __init__(self, kinds: list[str] | None):
        self.kinds = kinds
        self.blocks: list[str] = []
        self.inline: list[str] = []
        self.attributes = ""  # of the tag that is going by
        self.code: list[str] | None = None  # the texts of an open <code> or <pre>
        self.in_pre = self.after_item = False
        self.marks: list[
            tuple[int, str]
        ] = []  # each open one: where in `inline` it begins, its sign
        # Of each open list its last item's number, None in <ul>, and the indent of its items.
        self.lists: list[tuple[int | None, str]] = []
        self.marker, self.heading, self.quotes = "", "", 0

    def text(self, text: str) -> None:
        if self.code is not None:
            self.code.append(text)
        elif self.inline or not text.isspace():
            plain = "  " not in text and "\n" not in text and "\t" not in text
            self.inline.append(text if plain else SPACES.sub(" ", text))

    def close_paragraph(self, tag: str = "") -> None:
        """End the running text, as any tag of a block does; open marks go on in the next."""
        if not self.inline and self.code is None:
            return
        self.close_code()
        for start, sign in reversed(self.marks):
            self.mark_since(start, sign)
        self.marks = [(0, sign) for _, sign in self.marks]
        text = "".join(self.inline).strip()
        self.inline.clear()
        if BREAK in text:
            lines = filter(None, map(str.strip, text.split(BREAK)))
            text = (" " if self.heading else "  \n").join(lines)
        if text:
            self.add(self.heading + text)

    def add(self, text: str) -> None:
        """Append a block, with what its list item and its quotation put in front of it."""
        separator = "\n" if self.marker and self.after_item else "\n\n"
        if self.lists:
            indent = "".join(indent for _, indent in self.lists[-DEEPEST:])
            text = textwrap.indent(text, indent)
            if self.marker:
                text = indent[: -len(self.marker)] + self.marker + text[len(indent) :]
        if self.quotes:
            text = textwrap.indent(text, "> " * min(self.quotes, DEEPEST))
        self.blocks.append(separator + text if self.blocks else text)
        self.marker, self.after_item = "", bool(self.lists)

    def open_pre(self, tag: str) -> None:
        self.close_paragraph()
        self.code, self.in_pre = [], True

    def close_pre(self, tag: str) -> None:
        code = "".join(self.code or ()).replace("\r\n", "\n").strip("\n").rstrip()
        self.code, self.in_pre, language = None, False, ""
        if not code.strip():
            return
        if self.marker:
            self.add("")
        if self.kinds is not None:
            self.kinds.append(code_kind(code))
            language = FENCE_LANGUAGE.get(self.kinds[-1], "")
        # At the margin even inside of lists and quotations: only there is it found again as code.
        self.blocks.append(("\n\n" if self.blocks else "") + fence(code, language))
        self.after_item = False

    def open_code(self, tag: str) -> None:
        self.code = self.code or []

    def close_code(self, tag: str = "") -> None:
        if self.code is None or self.in_pre:
            return
        code, self.code = SPACES.sub(" ", "".join(self.code)), None
        lines = filter(None, map(str.strip, code.split(BREAK)))
        if spans := [f"`` {line} ``" if "`" in line else f"`{line}`" for line in lines]:
            self.inline.append(BREAK.join(spans))

    def open_mark(self, tag: str) -> None:
        inner = any(sign == MARKS[tag] for _, sign in self.marks)
        self.marks.append((len(self.inline), "" if inner else MARKS[tag]))

    def close_mark(self, tag: str) -> None:
        if self.marks:
            self.mark_since(*self.marks.pop())

    def mark_since(self, start: int, sign: str) -> None:
        lines = "".join(self.inline[start:]).split(BREAK)
        self.inline[start:] = [BREAK.join(_marked(line, sign) for line in lines)]

    def raise_text(self, tag: str) -> None:
        """10^3, H_2O; small print, which stands on no other text, stays as it is."""
        written = self.inline if self.code is None else self.code
        if written and not written[-1][-1:].isspace():
            written.append(RAISED[tag])

    def line_break(self, tag: str) -> None:
        self.text("\n" if self.in_pre else BREAK)

    def open_list(self, tag: str) -> None:
        self.close_paragraph()
        start = START.search(self.attributes)
        first = int(start[1]) if start else 1
        self.lists.append((None if tag == "ul" else first - 1, "  "))

    def close_list(self, tag: str) -> None:
        self.close_paragraph()
        self.marker = ""
        del self.lists[-1:]
        self.after_item = bool(self.lists)

    def open_item(self, tag: str) -> None:
        self.close_paragraph()
        if self.lists:
            number, _ = self.lists[-1]
            number = None if number is None else number + 1
            self.marker = "- " if number is None else f"{number}. "
            self.lists[-1] = number, " " * len(self.marker)

    def open_cell(self, tag: str) -> None:
        """A bar between this cell and what stands before it in its row."""
        if self.inline:
            self.inline[:] = ["".join(self.inline).rstrip(), " | "]

    def quote(self, tag: str) -> None:
        self.close_paragraph()
        self.quotes = max(0, self.quotes + (-1 if tag[0] == "/" else 1))

    def head(self, tag: str) -> None:
        self.close_paragraph()
        self.heading = "" if tag[0] == "/" else "#" * int(tag[1]) + " "


BLOCKS = "p div dl dt dd section article header footer details summary table caption tr".split()
ACTIONS = {"br": _Writer.line_break, "hr": _Writer.close_paragraph}
ACTIONS |= dict.fromkeys(("td", "th"), _Writer.open_cell) | dict.fromkeys(
    RAISED, _Writer.raise_text
)
for tags, opened, closed in (
    (BLOCKS, _Writer.close_paragraph, _Writer.close_paragraph),
    (MARKS, _Writer.open_mark, _Writer.close_mark),
    (("code", "kbd", "tt"), _Writer.open_code, _Writer.close_code),
    (("pre",), _Writer.open_pre, _Writer.close_pre),
    ("h1 h2 h3 h4 h5 h6".split(), _Writer.head, _Writer.head),
    (("ul", "ol"), _Writer.open_list, _Writer.close_list),
    (("li",), _Writer.open_item, _Writer.close_paragraph),
    (("blockquote",), _Writer.quote, _Writer.quote),
):
    ACTIONS |= dict.fromkeys(tags, opened) | {f"/{tag}": closed for tag in tags}
IN_PRE = {tag: ACTIONS[tag] for tag in ("/pre", "br", *RAISED)}
