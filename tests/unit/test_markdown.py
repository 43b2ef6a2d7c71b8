"""HTML to Markdown, and what kind of code a block is."""

import csv

import pytest

from helpers.markdown import code_kind, fenced_blocks, html_to_markdown, parse_python
from helpers.sources import SAMPLE_DIR


@pytest.mark.parametrize(
    ("html", "markdown"),
    [
        ("<p>a <b>bold </b>word and <i>one</i></p>", "a **bold** word and *one*"),
        ("<p>a\n  b<br>c</p>", "a b  \nc"),
        ("<p>1 &lt; 2 &amp;&amp; <code>a &lt; b</code></p>", "1 < 2 && `a < b`"),
        ("<p>tick <code>a`b</code></p>", "tick `` a`b ``"),
        ("<ol><li>x</li>\n<li><p>y</p></li></ol>", "1. x\n2. y"),
        ("<ul><li>x<ul><li>y</li></ul></li></ul>", "- x\n  - y"),
        ("<blockquote><p>q</p></blockquote><h2>T</h2>", "> q\n\n## T"),
        ('<p><a href="http://e.com" title="a > b">text</a> <img src="x"></p>', "text"),
        ("<pre><code>if a:\n\n    b()\n</code></pre>", "```\nif a:\n\n    b()\n```"),
        ("<pre>```\nx\n```</pre>", "````\n```\nx\n```\n````"),
        ("<p>open <b>bold<p>next", "open **bold**\n\n**next**"),
        ("<script>alert(1)</script><!-- note --><p>seen</p>", "seen"),
        ("", ""),
    ],
)
def test_html_becomes_markdown(html, markdown):
    assert html_to_markdown(html) == markdown


def test_a_fence_inside_of_a_list_is_found_again():
    html = "<ol><li>first<pre><code>def f():\n    return 1\n</code></pre></li><li>second</li></ol>"
    kinds = []
    markdown = html_to_markdown(html, kinds)
    assert kinds == ["python"]
    assert fenced_blocks(markdown) == [("python", "def f():\n    return 1\n")]


def test_deep_nesting_does_not_exhaust_the_stack():
    assert "deep" in html_to_markdown("<blockquote><ul><li><b>" * 2000 + "deep")
    assert html_to_markdown("<div>" * 5000 + "deep") == "deep"


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("def f(x):\n    return x", "python"),
        ("    x = 1\n    y = x", "python"),
        (">>> f(2)\n4", "session"),
        (">>> print x\n4", "python2"),
        ('print "hello"', "python2"),
        ("print 'a' % b", "python2"),
        ("try:\n    f()\nexcept IOError, e:\n    pass", "python2"),
        ("for i in xrange(3):\n    pass", "python2"),
        ("d.iteritems()", "python2"),
        ("import urllib2", "python2"),
        ("def f(x:\n    return", "broken"),
        ("for x in y\n    pass", "broken"),
        ("[1, 2, 3]", "other"),
        ("done", "other"),
        ("let x = items.map(i => i);", "other"),
        ("$ pip install x", "other"),
        # What the detector must not take for Python 2:
        ("from io import StringIO\nbuffer = StringIO()", "python"),
        ('names = ["01", "02"]\nprint(names)', "python"),
        ("asyncio.gather(*(later(n) for n in numbers))", "python"),
        ("x = 0o17 + 10_000\nprint(x)", "python"),
        ("def f(x: int) -> str: ...", "python"),
        ('text = """\nprint "x" on paper\n"""\nshow(text)', "python"),
        ("print (1)\nx = print in [print]", "python"),
    ],
)
def test_kind_of_code(code, kind):
    assert code_kind(code) == kind


def test_hostile_code_is_judged_not_crashed_on():
    assert code_kind("(" * 100_000) in ("other", "broken")
    assert code_kind("x = 1\0") == "other"
    assert parse_python("-" * 200_000 + "1") is None


def test_nearly_all_code_survives_cleaning():
    """The bar is 0.98 of the answers whose fenced code parses before cleaning."""
    import html
    import re

    def parses(blocks):
        return bool(blocks) and all(parse_python(block) is not None for block in blocks)

    with (SAMPLE_DIR / "Answers.csv").open(encoding="latin-1", newline="") as file:
        bodies = [row["Body"] for row in csv.DictReader(file)]
    cut_out = (re.findall(r"<pre><code>(.*?)</code></pre>", body, re.S) for body in bodies)
    good = [
        body
        for body, blocks in zip(bodies, cut_out, strict=True)
        if parses([html.unescape(block) for block in blocks])
    ]
    kept = [parses([c for _, c in fenced_blocks(html_to_markdown(body))]) for body in good]
    assert len(good) > 500
    assert sum(kept) / len(kept) >= 0.98
