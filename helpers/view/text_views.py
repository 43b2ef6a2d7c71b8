"""Texts to look at as HTML: answers side by side, the tokens of a row, a row as a page.

Whatever comes from data or a model is escaped. Each view can be read without colour.
"""

import html
from collections.abc import Sequence

from IPython.display import display

from helpers import prompts
from helpers.view.safe_text import visible

# JupyterLab breaks such text within words, and nbconvert's pages set no fixed-width font for it.
WRAPPED = "white-space:pre-wrap;overflow-wrap:anywhere;word-break:normal;font-family:monospace"
LEARNED = "background:#CFE8FA;border-bottom:2px solid #0072B2"
READ_ONLY = "background:#E4E4E4;border-bottom:2px solid #E4E4E4"
# Fields of evaluation.Score, and what is said of an answer that has it or lacks it.
VERDICTS = {
    "stops": ("\u2713 stops by itself", "\u2717 hit the limit"),
    "parses": ("\u2713 code that parses", "\u2717 no code that parses"),
    "steps": ("\u2713 explains in steps", "\u2717 no steps"),
    "passes": ("\u2713 passes its tests", "\u2717 fails its tests"),
}


def escaped(text: str) -> str:
    return f'<pre style="{WRAPPED}">{html.escape(visible(text))}</pre>'


def table(cells: dict[str, str]) -> str:
    """One row of cells under their heads, of equal width, as HTML; the cells are HTML already."""
    # JupyterLab reads the style, GitHub the attributes: it strips styles.
    place = "style='text-align:left;vertical-align:top;padding:0 8px' align='left' valign='top'"
    place += f" width='{100 // len(cells)}%'"
    heads = "".join(f"<th scope='col' {place}>{name}</th>" for name in cells)
    row = "".join(f"<td {place}>{cell}</td>" for cell in cells.values())
    # JupyterLab's grey of every second row would frame the text.
    rows = f"<tr>{heads}</tr><tr style='background:none'>{row}</tr>"
    return f"<table style='table-layout:fixed;width:100%'>{rows}</table>"


def verdicts(score) -> str:
    """What an `evaluation.Score` says of an answer, in marks and words."""
    found = {name: getattr(score, name) for name in VERDICTS}
    words = [VERDICTS[name][not value] for name, value in found.items() if value is not None]
    return ", ".join(words if found["passes"] is not None else [*words, "- not tested"])


def show_side_by_side(question: str, base: str, tuned: str, scores: Sequence = ()) -> None:
    """Display two answers in two columns, as text: generated HTML or script is shown, never run.

    `scores`, the `evaluation.Score` of each, stand under them in words.
    """
    if scores:
        base, tuned = f"{base}\n\n{verdicts(scores[0])}", f"{tuned}\n\n{verdicts(scores[1])}"
    # The question in <pre>, or its dollars would be read as formulas.
    page = escaped(question) + table({"base": escaped(base), "tuned": escaped(tuned)})
    plain = visible(f"{question}\n\n-- base\n{base}\n\n-- tuned\n{tuned}")
    display({"text/html": page, "text/plain": plain}, raw=True)


def tokens_html(pieces: Sequence[str], learned: Sequence[bool]) -> str:
    """The tokens of a row as HTML: grey ones are read only, blue ones carry the loss.

    Without colour the latter are told by their underline, and on GitHub, which strips styles, by
    bold type. A line break also shows as an arrow.
    """
    spans = []
    for piece, counts in zip(pieces, learned, strict=True):
        tag, look = ("b", LEARNED) if counts else ("span", READ_ONLY)
        # The padding, since underscores are black on a dark page without.
        style = f"{look};color:#000;font-weight:normal;margin-right:1px;padding-bottom:3px"
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
    return table(columns)
