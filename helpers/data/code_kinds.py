"""What kind of code a block is: Python, a session, Python 2, broken, or something else."""

import ast
import re
import textwrap
import warnings

# Statements that only Python 2 accepts (asked when Python 3's parser refuses) ...
PYTHON2_SYNTAX = re.compile(
    r"^[ \t]*(?:print[ \t]+[^\s(=]|print$|exec\s+['\"\w]|raise\s+\w+\s*,)|except\s+[\w., "
    r"()]+,\s*\w+\s*:"
    r"|<>|\b(?:\d+L\b|(?<!\.)0[0-7]+(?![\w.])|ur['\"])",
    re.MULTILINE,
)
# ... and names that Python 3 moved or dropped (asked when it parses).
PYTHON2_NAMES = re.compile(
    r"\b(?:xrange|raw_input|unicode|basestring|unichr)\s*\("
    r"|\.(?:iteritems|itervalues|iterkeys|has_key)\("
    r"|^[ \t]*(?:import|from)\s+"
    r"(?:urllib2|StringIO|cStringIO|ConfigParser|Tkinter|cPickle|httplib|Queue)\b",
    re.MULTILINE,
)
LOOKS_LIKE_PYTHON = re.compile(
    r"^[ \t]*(?:def \w+\(|class \w+[(:]|import \w+$|from \w[\w.]* import |@\w+|return\b(?!.*;$)"
    r"|(?:if|elif|while|with|for \w.* in) .*:$|try:$|for \w[\w, ]* in .*\n[ \t])",
    re.MULTILINE,
)
SESSION_LINE = re.compile(r"^(?:>>>|\.\.\.)(?: |$)(.*)$", re.MULTILINE)


def code_kind(code: str) -> str:
    """What a code block is: "python", "session", "python2", "broken" or "other".

    A session has `>>>`, broken is Python that does not parse, other is output, a shell, another
    language. A block that parses and only names values, such as `3` or `done`, is output too.
    """
    if code.lstrip().startswith(">>>"):
        code, kind = "\n".join(SESSION_LINE.findall(code)), "session"
    else:
        code, kind = textwrap.dedent(code) if code[:1].isspace() else code, "python"
    tree = parse_python(code)
    if (PYTHON2_NAMES if tree else PYTHON2_SYNTAX).search(code):
        return "python2"
    if tree is None:
        return "broken" if LOOKS_LIKE_PYTHON.search(code) or kind == "session" else "other"
    return kind if any(map(_does_something, tree.body)) else "other"


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
