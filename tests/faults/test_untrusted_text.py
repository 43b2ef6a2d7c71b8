"""Text of data and answers in views, report and terminal: it is seen and does nothing.

The HTML is read by a parser everywhere, and by Chromium where there is one.
"""

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output
from selectolax.lexbor import LexborHTMLParser

from helpers import __main__ as command_line
from helpers.answers import inference
from helpers.answers.evaluation import Score
from helpers.answers.inference import Answer
from helpers.config import Config
from helpers.runs import runner
from helpers.view import text_views, widgets
from helpers.view.safe_text import ACTING, visible

HOSTILE = {
    "script": "<script>window.attacked = 1</script>",
    "handler": "<img src=x onerror='window.attacked = 2'> <svg/onload=window.attacked=3>",
    "link": '<a href="javascript:window.attacked=4" autofocus onfocus=window.attacked=5>here</a>',
    "frame": "<iframe srcdoc='<script>parent.attacked = 6</script>'></iframe>",
    "closing tags": "</pre></td></tr></table></span></style></title></textarea></script>-->]]>",
    "style": "<style>body { display: none }</style><base href=https://attacker.invalid/>",
    "entities": "&lt;script&gt;window.attacked=7&lt;/script&gt; &amp; &#60;b&#62; \" ' `",
    "formula": r"$\href{javascript:window.attacked=8}{x}$ \(\unicode{x}\)",
    "terminal": "\x1b[31mred\x1b[0m \x1b]0;title\x07 \x1b]52;c;YQ==\x1b\\ \x9b2J \x08\x08 \r gone",
    "direction": "user \u202e} \u2066;nimda\u2069 \u2067x\u200f\u200e\u061c",
    "null": "before\x00after \u2028 \x7f",
    "half": "half \ud83d of it",
    "one line": "x" * 1_000_000,
}
SCORE = Score(stops=True, parses=True, steps=True, passes=None)
# What the views themselves are made of.
OWN_TAGS = {"html", "head", "body", "table", "tbody", "tr", "th", "td", "pre", "b", "span"}


@pytest.fixture
def side_by_side(monkeypatch):
    """The bundle that show_side_by_side displays for three texts."""

    def shown(*texts):
        bundles = []
        monkeypatch.setattr(text_views, "display", lambda data, raw: bundles.append(data))
        text_views.show_side_by_side(*texts)
        return bundles[0]

    return shown


@pytest.fixture
def views(side_by_side, tokenizer):
    """The HTML of every view that shows text, by name, for one text in all its places."""

    def made(text):
        row = {"prompt": text, "completion": text}
        html = {
            "side by side": side_by_side(text, text, text)["text/html"],
            "code and scores": side_by_side(text, f"```python\n{text}\n```", text, [SCORE] * 2)[
                "text/html"
            ],
            "tokens": text_views.tokens_html([text, text], [False, True]),
        }
        if len(text) < 10_000:  # no row of a dataset is longer
            html["row"] = text_views.dataset_page(row, text, tokenizer)
            html["browser"] = widgets.dataset_browser([row], [text], tokenizer).children[1].value
        return html

    return made


@pytest.mark.parametrize("name", [name for name in HOSTILE if name != "half"])
def test_views_hold_the_text_and_no_element_of_it(views, name):
    for view, html in views(HOSTILE[name]).items():
        tree = LexborHTMLParser(html)
        assert {node.tag for node in tree.root.traverse()} <= OWN_TAGS, view
        assert all(
            set(node.attributes) <= {"style", "scope", "valign", "align", "width"}
            for node in tree.css("*")
        )
        assert visible(HOSTILE[name]) in tree.body.text(), view
        assert not ACTING.search(html), view


@pytest.mark.parametrize("name", HOSTILE)
def test_the_text_twin_of_a_view_holds_it_too(side_by_side, name):
    plain = side_by_side(HOSTILE[name], HOSTILE[name], HOSTILE[name])["text/plain"]
    assert plain.count(visible(HOSTILE[name])) == 3 and not ACTING.search(plain)


def test_nothing_is_lost_by_making_it_visible():
    text = HOSTILE["terminal"] + HOSTILE["direction"] + HOSTILE["half"]
    assert visible(text).encode().decode("unicode_escape").encode("utf-16", "surrogatepass") == (
        text.encode("utf-16", "surrogatepass")
    )
    plain = "def f(x):\n\treturn 'é 中 😀 العربية'"
    assert visible(plain) == plain


@pytest.mark.parametrize("name", ["terminal", "direction", "null", "half"])
def test_an_answer_sends_nothing_to_the_terminal_but_text(monkeypatch, capsys, name):
    given = [Answer("q", HOSTILE[name], 9, True)], 1.0
    monkeypatch.setattr(inference, "answer_alone", lambda *arguments: given)
    assert command_line.main(["ask", "tuned", "q", "--profile", "smoke"]) == 0
    assert capsys.readouterr().out == visible(HOSTILE[name]) + "\n"


# -- Chromium.


@pytest.fixture
def page(browser):
    """A page that reaches no network and notes which addresses it asked for, and every dialog."""
    page = browser.new_page()
    page.asked, page.dialogs = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("dialog", lambda dialog: (page.dialogs.append(dialog.message), dialog.dismiss()))
    page.route("http*://**", lambda route: route.abort())
    yield page
    page.close()


def assert_not_attacked(page):
    page.wait_for_timeout(200)  # handlers of broken images and focus come after the page
    assert page.evaluate("window.attacked") is None
    assert page.dialogs == [] and not [url for url in page.asked if "attacker" in url]


@pytest.mark.parametrize("name", [name for name in HOSTILE if name != "half"])
def test_chromium_shows_every_view_as_text(page, views, name):
    shown = views(HOSTILE[name])
    parts = "".join(f"<div>{html}</div>" for html in shown.values())
    page.set_content(f"<title>views</title>{parts}", wait_until="domcontentloaded")
    assert_not_attacked(page)
    assert page.title() == "views"
    assert page.locator("body > div").count() == len(shown)
    for text in page.locator("body > div").all_text_contents():
        assert visible(HOSTILE[name]) in text
    assert page.locator("script, img, svg, iframe, a, style, base").count() == 0


def test_chromium_shows_the_report_as_text(page, side_by_side, tmp_path):
    config = Config.from_profile("smoke", run_dir=tmp_path / "run")
    config.executed_dir.mkdir(parents=True)
    text = "\n".join(HOSTILE[name] for name in HOSTILE if name not in ("half", "one line"))
    output = new_output("display_data", data=side_by_side(text, text, text))
    cell = new_code_cell("show_side_by_side(text)", outputs=[output], execution_count=1)
    nbformat.write(new_notebook(cells=[cell]), config.executed_dir / "06_hostile.ipynb")
    report = runner.write_report(config)

    page.goto(report.as_uri(), wait_until="domcontentloaded")
    assert_not_attacked(page)
    assert page.text_content("pre").count(visible(text)) == 3
    assert page.locator("script, img, svg, iframe, base").count() == 0


def test_chromium_does_run_what_is_not_escaped(page):
    """The checks above are able to fail."""
    page.set_content(HOSTILE["script"] + HOSTILE["handler"], wait_until="domcontentloaded")
    page.wait_for_timeout(200)
    assert page.evaluate("window.attacked") is not None
