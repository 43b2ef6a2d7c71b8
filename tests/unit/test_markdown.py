"""HTML to Markdown, and what kind of code a block is."""

import csv

import pytest

from helpers.data.code_kinds import code_kind, parse_python
from helpers.data.markdown import fenced_blocks, html_to_markdown
from helpers.data.sources import SAMPLE_DIR


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


ITEMS = "".join(f"<li>x{number}</li>" for number in range(1, 13))


@pytest.mark.parametrize(
    ("html", "markdown"),
    [
        (f"<ol>{ITEMS}</ol>", "\n".join(f"{number}. x{number}" for number in range(1, 13))),
        ('<ol class="a" start="5"><li>x</li><li>y</li></ol>', "5. x\n6. y"),
        ('<ol start="0"><li>x</li></ol>', "0. x"),
        ('<ol start="-1"><li>x</li><li>y</li></ol>', "-1. x\n0. y"),
        ('<ol start="first"><li>x</li></ol>', "1. x"),
        (
            '<ol start="9"><li>x</li><li><p>y</p><p>more</p><ol><li>z</li></ol></li></ol>',
            "9. x\n10. y\n\n    more\n    1. z",
        ),
        (
            '<ol start="10"><li>do<pre>f()</pre><p>then</p></li><li>y</li></ol>',
            "10. do\n\n```\nf()\n```\n\n    then\n11. y",
        ),
        ("<ol><li>x</li></ol><ol><li>y</li></ol>", "1. x\n\n1. y"),
    ],
)
def test_the_numbers_of_a_list_are_those_that_a_browser_shows(html, markdown):
    assert html_to_markdown(html) == markdown


@pytest.mark.parametrize(
    ("html", "markdown"),
    [
        (
            "<p>So:</p><table><thead><tr><th>Name</th> <th>Age</th></tr></thead>"
            "<tbody><tr><td>Ann</td>\n<td>31</td></tr></tbody></table><p>end</p>",
            "So:\n\nName | Age\n\nAnn | 31\n\nend",
        ),
        ("<table><tr><td><b>a</b><td><code>x</code><td>c</table>", "**a** | `x` | c"),
        ("<table><tr><td>a<p>b</p><td>c<pre>f()</pre></table>", "a\n\nb\n\nc\n\n```\nf()\n```"),
        ("<ul><li>x<table><tr><td>a<td>b</table></ul>", "- x\n\n  a | b"),
    ],
)
def test_cells_of_a_table_stay_apart(html, markdown):
    assert html_to_markdown(html) == markdown


@pytest.mark.parametrize(
    ("html", "markdown"),
    [
        ("10<sup>3</sup> and 2<sup>32</sup>, 10<sup>-9</sup>", "10^3 and 2^32, 10^-9"),
        ("H<sub>2</sub>O, x<sup>n+1</sup>, x<sub>max</sub>", "H_2O, x^n+1, x_max"),
        ("<code>x<sup>2</sup></code>, x<sup><code>k</code></sup>", "`x^2`, x^`k`"),
        ("<pre>x<sup>2</sup> + y<sub>i</sub></pre>", "```\nx^2 + y_i\n```"),
        ("<p><sup>1</sup> A note.</p><sub>Small print.</sub>", "1 A note.\n\nSmall print."),
        ("<p>y <sub>small</sub>, <sup></sup>x</p>", "y small, x"),
    ],
)
def test_a_raised_or_lowered_text_is_told_from_its_base(html, markdown):
    assert html_to_markdown(html) == markdown


@pytest.mark.parametrize(
    ("html", "markdown"),
    [
        ("<p>Use <del>a</del> b, <s>c</s> <strike>d </strike>e</p>", "Use ~~a~~ b, ~~c~~ ~~d~~ e"),
        ("<del><p>a</p><p>b<br>c</p></del><p>d</p>", "~~a~~\n\n~~b~~  \n~~c~~\n\nd"),
        ("<p><b>a<strong>b</strong></b> <b><i>c</i></b> <b> </b></p>", "**ab** ***c***"),
        ("<b>a<br></b>b", "**a**  \nb"),
        ("<pre>a<br>b</pre>", "```\na\nb\n```"),
        ("<p><code>a<br>b</code></p>", "`a`  \n`b`"),
        ("<h2>a<br>b</h2>", "## a b"),
        (
            "<article>a</article><article>b</article><details><summary>c</summary>d",
            "a\n\nb\n\nc\n\nd",
        ),
        ("<dl><dt>a</dt><dd>b</dd></dl>", "a\n\nb"),
        ("<p>a</p><script>x = '<pre><b>'</script><style>p > b {}</style><p>b</p>", "a\n\nb"),
        ("<p>a</p><iframe><pre></iframe><p>b</p>", "a\n\nb"),
    ],
)
def test_what_is_struck_out_broken_or_a_script_does_not_read_as_something_else(html, markdown):
    assert html_to_markdown(html) == markdown


def test_a_hostile_table_stays_small():
    wide = "<table>" + "<tr><td colspan=1000 rowspan=60000>x</td></tr>" * 500 + "</table>"
    assert len(html_to_markdown(wide)) < 2_000
    assert len(html_to_markdown("<table><tr>" + "<td>x" * 3000 + "<tr><td>y" * 3000)) < 100_000


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
