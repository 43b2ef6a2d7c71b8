"""HTML posts to Markdown with their code kept.

The parser is selectolax (lexbor, an HTML5 parser), so broken markup is repaired as a browser
repairs it. Text is not escaped, links lose their address, pictures disappear: the result is to be
read by a language model, not to be rendered again. What a reader would take for something else
without its tag keeps a sign of it: numbers of lists, cells of tables, 10^3, ~~struck out~~.
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
UNSETTLED = re.compile(r"<(?:table|script|style|iframe)\b|<ol [^>]*reversed")
MORE_THAN_LINES = "table:has(pre, ul, ol, li, blockquote, hr, table)"
MARKS = {"b": "**", "strong": "**", "i": "*", "em": "*"}
MARKS |= dict.fromkeys(("del", "s", "strike"), "~~")
RAISED = {"sup": "^", "sub": "_"}
CHARACTER_OR_NUMBER = re.compile(r".|[-+\u2212]?\d+")
BREAK = "\0"  # stands for <br> within running text, where it cannot occur
DEEPEST = 20  # levels of lists and of quotations that are indented; posts nest 3, attacks 10,000
WIDEST = 20  # columns or rows that one cell of a table may span
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
    repaired = body.inner_html or ""  # every tag closed and in its place
    if UNSETTLED.search(repaired):
        _settle(body)
        repaired = body.inner_html or ""
    repaired = repaired.replace("\0", "")
    if "<!--" in repaired:
        repaired = COMMENT.sub("", repaired)
    writer = _Writer(kinds)
    pieces = TAG.split(repaired)
    for text, tag, attributes in zip(
        pieces[::3], [*pieces[1::3], "end"], [*pieces[2::3], ""], strict=True
    ):
        if text:
            writer.text(html.unescape(text) if "&" in text else text)
        act = (IN_PRE if writer.in_pre else ACTIONS).get(tag)
        if act is not None:
            writer.attributes = attributes
            act(writer, tag)
    writer.close_paragraph()
    return "".join(writer.blocks)


def _settle(body) -> None:
    """Change in the tree what the writer, to which the tags come one by one, would learn too late.

    A table becomes one in Markdown only if its cells hold nothing but lines of text; a list that
    counts down begins at the number of its items. Scripts and the like are no text.
    """
    body.strip_tags(["script", "style", "iframe"])
    for table in body.css(MORE_THAN_LINES):
        table.unwrap()
    for numbered in body.css("ol[reversed]:not([start])"):
        numbered.attrs["start"] = str(sum(child.tag == "li" for child in numbered.iter()))


def _number(attributes: str, name: str, default: int) -> int:
    """The whole number that a tag's attribute holds, or the default."""
    found = re.search(rf' {name}="\s*(-?\d{{1,9}})\s*"', attributes) if attributes else None
    return int(found[1]) if found else default


def _marked(text: str, mark: str) -> str:
    """The text between two marks, with the spaces at its ends outside of them."""
    core = text.strip()
    before, _, after = text.partition(core) if core else (text, "", "")
    return f"{before}{mark}{core}{mark}{after}" if core else text


def _code_span(code: str) -> str:
    return f"`` {code} ``" if "`" in code else f"`{code}`"


class _Writer:
    """Collects Markdown blocks while texts and tags go by, in one pass and without recursion."""

    def __init__(self, kinds: list[str] | None):
        self.kinds = kinds
        self.blocks: list[str] = []
        self.inline: list[str] = []
        self.attributes = ""  # of the tag that is going by
        self.code: list[str] | None = None  # the texts of an open <code> or <pre>
        self.in_pre = self.after_item = False
        # For each open mark where in `inline` it begins, and how many tags have opened it.
        self.marks: dict[str, list[int]] = {}
        self.raised: list[int] = []  # where each open <sup> or <sub> begins
        # For each open list the number of its last item and the step to the next, None for <ul>.
        self.lists: list[list[int] | None] = []
        self.indents: list[str] = []  # of what stands in an item of each open list
        self.marker, self.heading, self.quotes = "", "", 0
        self.rows: list[list[str]] | None = None  # of the open table
        self.column: int | None = None  # of the open cell
        self.has_header = False
        self.spanned: dict[int, int] = {}  # column: the last row that a cell covers there

    def text(self, text: str) -> None:
        if self.code is not None:
            self.code.append(text)
        elif self.inline or not text.isspace():
            plain = "  " not in text and "\n" not in text and "\t" not in text
            self.inline.append(text if plain else SPACES.sub(" ", text))

    def close_paragraph(self, tag: str = "") -> None:
        """End the running text, as any tag of a block does; within a cell, its line."""
        if not self.inline and self.code is None:
            return
        self.close_code()
        if self.column is not None:
            self.inline.append(BREAK)
        elif text := self.take_lines(" " if self.heading else "  \n"):
            self.add(self.heading + text)

    def take_lines(self, separator: str) -> str:
        """The running text, which begins anew; open marks end in it and go on in the next."""
        for mark, opened in reversed(self.marks.items()):
            self.mark_since(opened[0], mark)
            opened[0] = 0
        text = "".join(self.inline).strip()
        self.inline.clear()
        if BREAK in text:
            lines = (line.strip() for line in text.split(BREAK))
            text = separator.join(line for line in lines if line)
        return text

    def add(self, text: str) -> None:
        """Append a block, with what its list item and its quotation put in front of it."""
        separator = "\n" if self.marker and self.after_item else "\n\n"
        if self.lists:
            indent = "".join(self.indents[-DEEPEST:])
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
        code, self.code, self.in_pre = "".join(self.code or ()), None, False
        code = code.replace("\r\n", "\n").strip("\n").rstrip()
        if not code.strip():
            return
        if self.marker:
            self.add("")
        language = ""
        if self.kinds is not None:
            self.kinds.append(code_kind(code))
            language = FENCE_LANGUAGE.get(self.kinds[-1], "")
        # At the margin even inside of lists and quotations: only there is a fence found again as
        # code.
        self.blocks.append(("\n\n" if self.blocks else "") + fence(code, language))
        self.after_item = False

    def open_code(self, tag: str) -> None:
        if self.code is None:
            self.code = []

    def close_code(self, tag: str = "") -> None:
        if self.code is None or self.in_pre:
            return
        code, self.code = SPACES.sub(" ", "".join(self.code)), None
        lines = filter(None, map(str.strip, code.split(BREAK)))
        if code := BREAK.join(map(_code_span, lines)):
            self.inline.append(code)

    def open_mark(self, tag: str) -> None:
        self.marks.setdefault(MARKS[tag], [len(self.inline), 0])[1] += 1

    def close_mark(self, tag: str) -> None:
        """Put the mark around what the outermost of its tags held."""
        mark = MARKS[tag[1:]]
        if mark in self.marks:
            self.marks[mark][1] -= 1
            if self.marks[mark][1] == 0:
                self.mark_since(self.marks.pop(mark)[0], mark)

    def mark_since(self, start: int, mark: str) -> None:
        lines = "".join(self.inline[start:]).split(BREAK)
        self.inline[start:] = [BREAK.join(_marked(line, mark) for line in lines)]

    def open_raised(self, tag: str) -> None:
        self.raised.append(len(self.inline if self.code is None else self.code))

    def close_raised(self, tag: str) -> None:
        """10^3, H_2O, x^(n+1); small print, which stands on no other text, stays as it is."""
        written = self.inline if self.code is None else self.code
        start = self.raised.pop() if self.raised else len(written)
        text = "".join(written[start:]).strip()
        if text and start and not written[start - 1][-1:].isspace():
            text = text if CHARACTER_OR_NUMBER.fullmatch(text) else f"({text})"
            written[start:] = [RAISED[tag[1:]] + text]

    def line_break(self, tag: str) -> None:
        self.text("\n" if self.in_pre else BREAK)

    def rule(self, tag: str) -> None:
        self.close_paragraph()
        self.add("---")

    def open_list(self, tag: str) -> None:
        self.close_paragraph()
        step = -1 if " reversed" in self.attributes else 1
        before_first = _number(self.attributes, "start", 1) - step
        self.lists.append([before_first, step] if tag == "ol" else None)
        self.indents.append("  ")

    def close_list(self, tag: str) -> None:
        self.close_paragraph()
        self.marker = ""
        if self.lists:
            self.lists.pop()
            self.indents.pop()
        self.after_item = bool(self.lists)

    def open_item(self, tag: str) -> None:
        self.close_paragraph()
        if not self.lists:
            return
        self.marker = "- "
        if numbered := self.lists[-1]:
            numbered[0] = _number(self.attributes, "value", sum(numbered))
            self.marker = f"{numbered[0]}. "
        self.indents[-1] = " " * len(self.marker)

    def open_table(self, tag: str) -> None:
        self.close_paragraph()
        self.rows, self.has_header, self.spanned = [], False, {}

    def open_row(self, tag: str) -> None:
        self.close_paragraph()
        if self.rows is not None:
            self.rows.append([])

    def open_cell(self, tag: str) -> None:
        self.close_paragraph()
        if not self.rows:
            return
        row, number = self.rows[-1], len(self.rows)
        if number == 1:
            self.has_header = tag == "th"  # the last cell of the row decides
        while self.spanned.get(len(row), 0) >= number:
            row.append("")
        self.column = len(row)
        row += [""] * max(1, min(_number(self.attributes, "colspan", 1), WIDEST))
        last = number - 1 + min(_number(self.attributes, "rowspan", 1), WIDEST)
        self.spanned |= dict.fromkeys(range(self.column, len(row)), last)

    def close_cell(self, tag: str) -> None:
        self.close_paragraph()
        if self.rows and self.column is not None:
            self.rows[-1][self.column] = self.take_lines("<br>").replace("|", "\\|")
            self.column = None

    def close_table(self, tag: str) -> None:
        self.close_paragraph()
        rows, self.rows = [row for row in self.rows or () if any(row)], None
        if rows:
            width = max(map(len, rows))
            header = rows.pop(0) if self.has_header else []
            header += [""] * (width - len(header))
            lines = (" | ".join(row) for row in (header, ["---"] * width, *rows))
            self.add("\n".join(f"| {line} |" for line in lines))

    def open_quote(self, tag: str) -> None:
        self.close_paragraph()
        self.quotes += 1

    def close_quote(self, tag: str) -> None:
        self.close_paragraph()
        self.quotes = max(0, self.quotes - 1)

    def open_heading(self, tag: str) -> None:
        self.close_paragraph()
        self.heading = "#" * int(tag[1]) + " "

    def close_heading(self, tag: str) -> None:
        self.close_paragraph()
        self.heading = ""


BLOCKS = (
    "p div dl dt dd section article aside header footer main nav address center figure figcaption "
    "details summary form fieldset caption"
).split()
ACTIONS = {
    **{slash + tag: _Writer.close_paragraph for tag in BLOCKS for slash in ("", "/")},
    **dict.fromkeys(MARKS, _Writer.open_mark),
    **{"/" + tag: _Writer.close_mark for tag in MARKS},
    **dict.fromkeys(("code", "kbd", "tt"), _Writer.open_code),
    **dict.fromkeys(("/code", "/kbd", "/tt"), _Writer.close_code),
    **{f"h{level}": _Writer.open_heading for level in range(1, 7)},
    **{f"/h{level}": _Writer.close_heading for level in range(1, 7)},
    "pre": _Writer.open_pre,
    "/pre": _Writer.close_pre,
    **dict.fromkeys(RAISED, _Writer.open_raised),
    **{"/" + tag: _Writer.close_raised for tag in RAISED},
    "br": _Writer.line_break,
    "hr": _Writer.rule,
    "ul": _Writer.open_list,
    "ol": _Writer.open_list,
    "/ul": _Writer.close_list,
    "/ol": _Writer.close_list,
    "li": _Writer.open_item,
    "/li": _Writer.close_paragraph,
    "blockquote": _Writer.open_quote,
    "/blockquote": _Writer.close_quote,
    "table": _Writer.open_table,
    "/table": _Writer.close_table,
    "tr": _Writer.open_row,
    **dict.fromkeys(("td", "th"), _Writer.open_cell),
    **dict.fromkeys(("/td", "/th"), _Writer.close_cell),
}
IN_PRE = {tag: ACTIONS[tag] for tag in ("/pre", "br", "sup", "/sup", "sub", "/sub")}
