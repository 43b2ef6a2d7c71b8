"""HTML posts to Markdown with their code kept, and what kind of code that is.

The parser is selectolax (lexbor, an HTML5 parser), so broken markup is repaired as a browser
repairs it. Text is not escaped, links lose their address, pictures disappear: the result is to be
read by a language model, not to be rendered again.
"""

import ast
import html
import re
import textwrap
import warnings

from selectolax.lexbor import LexborHTMLParser

FENCE = re.compile(r"^ {0,3}(`{3,})(\w*)\n(.*?)^ {0,3}\1[ \t]*$", re.DOTALL | re.MULTILINE)
SPACES = re.compile(r"[ \t\r\n\f]+")

# Statements that only Python 2 accepts (asked when Python 3's parser refuses) ...
PYTHON2_SYNTAX = re.compile(
    r"^[ \t]*(?:print[ \t]+[^\s(=]|print$|exec\s+['\"\w]|raise\s+\w+\s*,)|except\s+[\w., "
    r"()]+,\s*\w+\s*:"
    r"|<>|\b(?:\d+L\b|(?<!\.)0[0-7]+(?![\w.])|ur['\"])",
    re.MULTILINE,
)
TRIPLE = re.compile("\"\"\"|'''")
PYTHON2_PRINT = re.compile(r"^[ \t]*print[ \t]+(?!(?:in|is|and|or|not|if)\b)['\"\w]", re.MULTILINE)
# ... and names that Python 3 moved or dropped (asked when it parses).
PYTHON2_CALLS = "xrange raw_input unicode basestring unichr"
PYTHON2_METHODS = "iteritems itervalues iterkeys has_key"
PYTHON2_MODULES = "urllib2 StringIO cStringIO ConfigParser Tkinter cPickle httplib Queue"
PYTHON2_WORDS = f"{PYTHON2_CALLS} {PYTHON2_METHODS} {PYTHON2_MODULES}".split()
PYTHON2_NAMES = re.compile(
    rf"\b(?:{PYTHON2_CALLS.replace(' ', '|')})\s*\(|\.(?:{PYTHON2_METHODS.replace(' ', '|')})\("
    rf"|^[ \t]*(?:import|from)\s+(?:{PYTHON2_MODULES.replace(' ', '|')})\b",
    re.MULTILINE,
)
LOOKS_LIKE_PYTHON = re.compile(
    r"^[ \t]*(?:def \w+\(|class \w+[(:]|import \w+$|from \w[\w.]* import |@\w+|return\b(?!.*;$)"
    r"|(?:if|elif|while|with|for \w.* in) .*:$|try:$|for \w[\w, ]* in .*\n[ \t])",
    re.MULTILINE,
)
SESSION_LINE = re.compile(r"^(?:>>>|\.\.\.)(?: |$)(.*)$", re.MULTILINE)

TAG = re.compile(r"<(/?[a-zA-Z][\w-]*)[^>]*>")  # the parser writes > in attributes as &gt;
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
MARKS = {"b": "**", "strong": "**", "i": "*", "em": "*"}
BREAK = "\0"  # stands for <br> within running text, where it cannot occur
BULLETS = -1
DEEPEST = 20  # levels of lists and of quotations that are indented; posts nest 3, attacks 10,000
FENCE_LANGUAGE = {"python": "python", "session": "pycon"}


def code_kind(code: str) -> str:
    """What a code block is: "python", "session", "python2", "broken" or "other".

    A session has `>>>`, broken is Python that does not parse, other is output, a shell, another
    language. A block that parses and only names values, such as `3` or `done`, is output too.
    """
    if code.lstrip().startswith(">>>"):
        code, kind = "\n".join(SESSION_LINE.findall(code)), "session"
    else:
        code, kind = textwrap.dedent(code) if code[:1].isspace() else code, "python"
    if "print " in code and not TRIPLE.search(code) and PYTHON2_PRINT.search(code):
        return "python2"  # outside of a text of several lines no Python 3 has such a line
    tree = parse_python(code)
    if tree is None:
        if PYTHON2_SYNTAX.search(code):
            return "python2"
        return "broken" if LOOKS_LIKE_PYTHON.search(code) or kind == "session" else "other"
    if any(word in code for word in PYTHON2_WORDS) and PYTHON2_NAMES.search(code):
        return "python2"
    return kind if any(_does_something(statement) for statement in tree.body) else "other"


def parse_python(code: str) -> ast.Module | None:
    """The syntax tree of Python 3 source, or None when it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes such as "\d" are common and harmless
            return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _does_something(statement: ast.stmt) -> bool:
    """False for a bare value: a printed result or a word of prose also parses as one."""
    if not isinstance(statement, ast.Expr):
        return not isinstance(statement, ast.AnnAssign) or statement.value is not None
    return any(isinstance(node, ast.Call | ast.Await | ast.Yield) for node in ast.walk(statement))


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
    repaired = body.inner_html.replace("\0", "")  # every tag closed and in its place
    if "<!--" in repaired:
        repaired = COMMENT.sub("", repaired)
    writer = _Writer(kinds)
    pieces = TAG.split(repaired)
    for text, tag in zip(pieces[::2], [*pieces[1::2], "end"], strict=True):
        if text:
            writer.text(html.unescape(text) if "&" in text else text)
        act = ACTIONS.get(tag)
        if act is not None and not (writer.in_pre and tag != "/pre"):
            act(writer, tag)
    writer.close_paragraph()
    return "".join(writer.blocks)


class _Writer:
    """Collects Markdown blocks while texts and tags go by, in one pass and without recursion."""

    def __init__(self, kinds: list[str] | None):
        self.kinds, self.blocks, self.inline = kinds, [], []
        self.code: list[str] | None = None  # the texts of an open <code> or <pre>
        self.in_pre = self.skipping = self.after_item = False
        self.marks: list[int] = []  # where in `inline` each open <b> or <i> begins
        self.lists: list[int] = []  # open lists: the number of the last item, BULLETS for <ul>
        self.marker, self.heading, self.quotes = "", "", 0

    def text(self, text: str) -> None:
        if self.code is not None:
            self.code.append(text)
        elif (self.inline or not text.isspace()) and not self.skipping:
            plain = "  " not in text and "\n" not in text and "\t" not in text
            self.inline.append(text if plain else SPACES.sub(" ", text))

    def close_paragraph(self, tag: str = "") -> None:
        """End the running text, as any tag of a block does."""
        if not self.inline and self.code is None:
            return
        self.close_code()
        self.marks.clear()
        text = "".join(self.inline).strip()
        self.inline.clear()
        if BREAK in text:
            lines = (line.strip() for line in text.split(BREAK))
            text = "  \n".join(line for line in lines if line)
        if text:
            self.add(self.heading + text)

    def add(self, text: str) -> None:
        """Append a block, with what its list item and its quotation put in front of it."""
        separator = "\n" if self.marker and self.after_item else "\n\n"
        if self.lists:
            levels = self.lists[-DEEPEST:]
            indent = "".join("  " if number == BULLETS else "   " for number in levels)
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
        code, self.code = SPACES.sub(" ", "".join(self.code)).strip(), None
        if code:
            self.inline.append(f"`` {code} ``" if "`" in code else f"`{code}`")

    def open_mark(self, tag: str) -> None:
        self.marks.append(len(self.inline))

    def close_mark(self, tag: str) -> None:
        """Put ** or * around what the tag held; spaces at its ends move out of the marks."""
        if not self.marks:
            return
        start = self.marks.pop()
        text = "".join(self.inline[start:])
        core, mark = text.strip(), MARKS[tag[1:]]
        if core and BREAK not in core:
            before, after = text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :]
            self.inline[start:] = [f"{before}{mark}{core}{mark}{after}"]

    def line_break(self, tag: str) -> None:
        self.text(BREAK)

    def rule(self, tag: str) -> None:
        self.close_paragraph()
        self.add("---")

    def open_list(self, tag: str) -> None:
        self.close_paragraph()
        self.lists.append(0 if tag == "ol" else BULLETS)

    def close_list(self, tag: str) -> None:
        self.close_paragraph()
        self.marker = ""
        if self.lists:
            self.lists.pop()

    def open_item(self, tag: str) -> None:
        self.close_paragraph()
        if self.lists and self.lists[-1] != BULLETS:
            self.lists[-1] += 1
            self.marker = f"{self.lists[-1]}. "[-3:]
        elif self.lists:
            self.marker = "- "

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

    def skip(self, tag: str) -> None:
        self.skipping = not tag.startswith("/")


BLOCKS = ("p", "div", "table", "tr", "dl", "dt", "dd", "section")
ACTIONS = {
    **{slash + tag: _Writer.close_paragraph for tag in BLOCKS for slash in ("", "/")},
    **{slash + tag: _Writer.skip for tag in ("script", "style") for slash in ("", "/")},
    **dict.fromkeys(MARKS, _Writer.open_mark),
    **{"/" + tag: _Writer.close_mark for tag in MARKS},
    **dict.fromkeys(("code", "kbd", "tt"), _Writer.open_code),
    **dict.fromkeys(("/code", "/kbd", "/tt"), _Writer.close_code),
    **{f"h{level}": _Writer.open_heading for level in range(1, 7)},
    **{f"/h{level}": _Writer.close_heading for level in range(1, 7)},
    "pre": _Writer.open_pre,
    "/pre": _Writer.close_pre,
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
}
