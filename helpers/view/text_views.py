"""Texts to look at as HTML: answers side by side, the tokens of a row, a row as a page.

Whatever comes from data or a model is escaped. Each view can be read without colour.
"""

import html
from collections.abc import Sequence

from IPython.display import display
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from helpers import prompts
from helpers.prompts import FENCE
from helpers.view.safe_text import visible

# JupyterLab breaks such text within words, and nbconvert's pages set no fixed-width font for it.
WRAPPED = "white-space:pre-wrap;overflow-wrap:anywhere;word-break:normal;font-family:monospace"
WHOLE_WIDTH = "table-layout:fixed;width:100%"
ROW = "<tr style='background:none'>"  # JupyterLab's grey of every second row would frame the text
# Code brings its own background, so that its colours can be read in a light and in a dark theme.
CODE = "display:block;background:#f6f6f6;color:#000;padding:2px 6px"
CODE_STYLE = "xcode"  # the one of pygments whose every colour has a contrast of 4.5 or more on it
BADGE = "display:inline-block;border:1px solid;border-radius:4px;padding:0 5px;margin:4px 4px 1px 0"
LEARNED = "background:#CFE8FA;border-bottom:2px solid #0072B2"
READ_ONLY = "background:#E4E4E4;border-bottom:2px solid #E4E4E4"
# Fields of evaluation.Score, and what an answer that has it or lacks it is said to do.
VERDICTS = {
    "stops": ("stops by itself", "hit the limit"),
    "parses": ("code that parses", "no code that parses"),
    "steps": ("explains in steps", "no steps"),
    "passes": ("passes its tests", "fails its tests"),
}


def answer_html(text: str) -> str:
    """An answer in fixed width, the code in its fences coloured. Every character is text."""
    text, parts, end = visible(text), [], 0
    lexer = PythonLexer(stripnl=False, ensurenl=False)
    formatter = HtmlFormatter(nowrap=True, noclasses=True, style=CODE_STYLE)
    for block in FENCE.finditer(text):
        parts.append(html.escape(text[end : block.start(3)]))
        parts.append(f'<span style="{CODE}">{highlight(block[3], lexer, formatter)}</span>')
        end = block.end(3)
    return f'<pre style="{WRAPPED}">{"".join(parts)}{html.escape(text[end:])}</pre>'


def badges(score) -> list[str]:
    """What an `evaluation.Score` says of an answer, each as a mark and words."""
    found = {name: getattr(score, name) for name in VERDICTS}
    words = [
        f"\u2713 {VERDICTS[name][0]}" if value else f"\u2717 {VERDICTS[name][1]}"
        for name, value in found.items()
        if value is not None
    ]
    return words if found["passes"] is not None else [*words, "- not tested"]


def badges_html(score) -> str:
    return " ".join(f'<span style="{BADGE}">{badge}</span>' for badge in badges(score))


def show_side_by_side(question: str, base: str, tuned: str, scores: Sequence = ()) -> None:
    """Display two answers in two columns, as text: generated HTML or script is shown, never run.

    `scores`, the `evaluation.Score` of each, stand under them in words.
    """
    answers = [base, tuned]
    under = [badges_html(score) for score in scores] or ["", ""]
    below = ["\n" + ", ".join(badges(score)) for score in scores] or ["", ""]
    # The style is for JupyterLab, the attributes for GitHub, which strips styles. Half the width
    # each: else a column of short lines is squeezed by one of long lines.
    left = "style='text-align:left;vertical-align:top' align='left' valign='top' width='50%'"
    heads = "".join(f"<th scope='col' {left}>{name}</th>" for name in ("base", "tuned"))
    cells = "".join(
        f"<td {left}>{answer_html(text)}{marks}</td>"
        for text, marks in zip(answers, under, strict=True)
    )
    # The question in <pre>, or its dollars would be read as formulas.
    table = f"<table style='{WHOLE_WIDTH}'><tr>{heads}</tr>{ROW}{cells}</tr></table>"
    plain = visible(f"{question}\n\n-- base\n{base}{below[0]}\n\n-- tuned\n{tuned}{below[1]}")
    display({"text/html": escaped(question) + table, "text/plain": plain}, raw=True)


def tokens_html(pieces: Sequence[str], learned: Sequence[bool]) -> str:
    """The tokens of a row as HTML: grey ones are read only, blue ones carry the loss.

    Without colour the latter are told by their underline, and where styles are stripped, as on
    GitHub, by bold type. Every piece is escaped, for it comes from data; a line break also shows as
    an arrow.
    """
    spans = []
    for piece, counts in zip(pieces, learned, strict=True):
        tag, look = ("b", LEARNED) if counts else ("span", READ_ONLY)
        style = f"{look};color:#000;font-weight:normal;margin-right:1px"
        style += ";padding-bottom:3px"  # else underscores are black on a dark page
        text = html.escape(visible(piece)).replace("\n", "&#8629;\n")
        spans.append(f'<{tag} style="{style}">{text}</{tag}>')
    return f'<pre style="{WRAPPED};line-height:1.8">{"".join(spans)}</pre>'


def dataset_page(row: dict, source: str, tokenizer) -> str:
    """One row as an HTML table: raw HTML of the answer, prompt and answer, tokens. All escaped."""
    encoded = prompts.encode(tokenizer, row["prompt"], row["completion"])
    pieces = [tokenizer.decode([token]) for token in encoded["input_ids"]]
    learned = [label != prompts.IGNORED_LABEL for label in encoded["labels"]]
    columns = {
        "raw HTML of the answer": escaped(source),
        "prompt and answer": escaped(row["prompt"] + row["completion"]),
        "tokens (blue, underlined: learned)": tokens_html(pieces, learned),
    }
    style = "vertical-align:top;text-align:left;width:33%;padding:0 8px"
    heads = "".join(f'<th style="{style}">{name}</th>' for name in columns)
    cells = "".join(f'<td style="{style}">{cell}</td>' for cell in columns.values())
    return f'<table style="{WHOLE_WIDTH}"><tr>{heads}</tr>{ROW}{cells}</tr></table>'


def escaped(text: str) -> str:
    return f'<pre style="{WRAPPED}">{html.escape(visible(text))}</pre>'
