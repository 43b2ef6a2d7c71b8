"""Dirty data: what is no row is put aside and named, a row stays whole, no mask shifts."""

import itertools
import json

import datasets
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from helpers import prompts
from helpers.config import Config
from helpers.data.contamination import load_problems
from helpers.data.curation import QUARANTINE
from helpers.data.markdown import html_to_markdown
from helpers.data.posts import DataError
from helpers.data.rules import judge
from helpers.data.sources import open_source
from tests.conftest import problems_of
from tests.notebook_code import curate
from tests.unit.test_curation import OWN_ROWS


def curated(path, tmp_path, **changes):
    """(report, rows in the order of the file, Config) of a file of one's own."""
    config = Config.from_profile(
        "demo",
        data_source=str(path),
        run_dir=tmp_path / "run",
        near_duplicate_similarity=0.9,
        **changes,
    )
    report = curate(config)
    dataset = datasets.load_from_disk(str(config.dataset_dir))
    rows = [row for split in dataset.values() for row in split.to_list()]
    return report, sorted(rows, key=lambda row: row["question_id"]), config


def lines(rows, end="\n"):
    return "".join(json.dumps(row) + end for row in rows).encode()


def assert_nothing_good_is_lost(rows, good=OWN_ROWS):
    assert len(rows) == len(good)
    for row, own in zip(rows, good, strict=True):
        assert own["prompt"] in row["prompt"] and row["completion"] == f" {own['answer']} "


# -- Lines that are no rows.

BAD = {
    "is no JSON": b'{"prompt": "cut',
    "is no JSON (maximum recursion": b"[" * 100_000,
    "is list, not an object": b"[1]",
    "is dict, not an object with columns": b"{}",
    "holds NUL, half of a character, one that is not UTF-8": b'{"prompt": "caf\xe9", "answer": ""}',
    "holds NUL, half of": b'{"prompt": "' + b"x" * 3_000_000 + b'", "answer": "x"}',
    "has ['str', 'int'] in ('prompt', 'answer')": b'{"prompt": "x", "answer": 3}',
    "has ['str', 'NoneType'] in ('prompt', 'answer')": b'{"prompt": "x", "answer": null}',
    "has no column for the prompt (": b'{"prompt": "x"}',
    "is no JSON (one of prompt stands there twice)": b'{"prompt": "x", "prompt": "y"}',
    "has two columns of one name among prompt, Prompt": b'{"prompt": "x", "Prompt": "y"}',
    "holds NUL, half": b'{"prompt": "x", "answer": "half \\ud83d of it"}',
    "holds NUL": b'{"prompt": "zero \\u0000", "answer": "x"}',
}


def test_bad_lines_are_put_aside_with_number_and_reason_and_no_good_one_is_lost(tmp_path):
    rows = [lines([row]) for row in OWN_ROWS]
    places = {}
    for step, (reason, line) in enumerate(BAD.items()):
        rows.insert(3 * step + 1, line + b"\n")
        places[3 * step + 2] = reason
    path = tmp_path / "own.jsonl"
    path.write_bytes(b"".join(rows))
    with pytest.warns(UserWarning, match=r"13 lines are no rows: see .*quarantine\.jsonl"):
        report, kept, config = curated(path, tmp_path)
    assert_nothing_good_is_lost(kept)
    assert report.quarantined == report.metrics()["quarantined_lines"] == len(BAD)
    listed = (config.dataset_dir / QUARANTINE).read_text("utf-8").splitlines()
    found = {entry["line"]: entry for entry in map(json.loads, listed)}
    assert list(found) == list(places)
    for number, reason in places.items():
        assert found[number]["reason"].startswith(reason)
        assert 0 < len(found[number]["content"]) <= 200
    card = (config.dataset_dir / "README.md").read_text("utf-8")
    assert "no rows and are left out: 13." in card


def test_a_clean_file_leaves_no_quarantine_and_no_warning(tmp_path, recwarn):
    path = tmp_path / "own.jsonl"
    path.write_bytes(lines(OWN_ROWS))
    report, _, config = curated(path, tmp_path)
    assert report.quarantined == 0 and not (config.dataset_dir / QUARANTINE).exists()
    assert not [w for w in recwarn if "no rows" in str(w.message)]


def test_a_file_of_more_bad_lines_than_good_ones_is_refused_and_the_old_dataset_stays(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_bytes(lines(OWN_ROWS))
    _, before, config = curated(path, tmp_path)
    path.write_bytes(lines(OWN_ROWS[:2]) + b"{\n" * 3)
    with pytest.raises(DataError, match=r"own.jsonl, line 3, is no JSON .*; 3 of 5 lines cannot"):
        curate(config)
    assert [p.name for p in config.run_dir.iterdir() if p.name[0] != "."] == ["dataset"]
    assert len(datasets.load_from_disk(str(config.dataset_dir))["train"]) < len(before)


def test_a_benchmark_is_read_strictly_since_a_lost_line_would_hide_a_leak(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(lines([{"prompt": "a"}]) + BAD["has ['str', 'int'] in ('prompt', 'answer')"])
    assert len(load_problems(str(path))) == 2
    path.write_bytes(lines([{"prompt": "a"}]) + b'{"prompt": "caf\xe9"}\n')
    with pytest.raises(DataError, match="mine.jsonl, line 2, is no JSON object .*'utf-8' codec"):
        load_problems(str(path))


@pytest.mark.parametrize("cell", ["x" * 2_000_000, "half\nline"])
def test_a_csv_row_that_cannot_be_read_names_its_line(tmp_path, cell):
    path = tmp_path / "own.csv"
    good = "".join(f'"{row["prompt"]}","{row["answer"]}"\n' for row in OWN_ROWS)
    path.write_text(f"prompt,answer\n{good}{cell}\n", encoding="utf-8")
    if len(cell) > 1000:
        with pytest.warns(UserWarning, match="1 lines are no rows"):
            _, kept, config = curated(path, tmp_path)
        (line,) = map(json.loads, (config.dataset_dir / QUARANTINE).open(encoding="utf-8"))
        assert line["line"] == len(OWN_ROWS) + 2 and "field larger than" in line["reason"]
    else:
        with pytest.warns(UserWarning, match="2 lines are no rows"):
            _, kept, _ = curated(path, tmp_path)
    assert_nothing_good_is_lost(kept)


# -- Files that another system wrote.


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte-order mark"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_byte_order_marks_and_line_ends_change_no_row(tmp_path, start, end, kind):
    code = (
        "Write it like this, and look:\n\n```python\nfor x in y:\n    print(x)\n```\n\nThen done."
    )
    good = [*OWN_ROWS, {"prompt": "How do I loop?", "answer": code}]
    path = tmp_path / f"own.{kind}"
    if kind == "jsonl":
        stored = [{**row, "answer": row["answer"].replace("\n", end)} for row in good]
        path.write_bytes(start + lines(stored, end))
    else:
        text = "prompt,answer\n" + "".join(f'"{r["prompt"]}","{r["answer"]}"\n' for r in good)
        path.write_bytes(start + text.replace("\n", end).encode())
    report, kept, _ = curated(path, tmp_path)
    assert report.quarantined == 0
    assert_nothing_good_is_lost(kept, good)


def test_python_2_is_found_behind_line_ends_of_windows(tmp_path):
    answer = "Type this and press the enter key:\r\n\r\n```python\r\nprint 'x'\r\n```\r\n"
    path = tmp_path / "own.jsonl"
    path.write_bytes(lines([*OWN_ROWS, {"prompt": "How do I print?", "answer": answer}]))
    report, kept, _ = curated(path, tmp_path, check_python=True)
    assert report.removed["python2"] == [len(OWN_ROWS) + 1]
    assert_nothing_good_is_lost(kept)


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte-order mark"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
def test_kaggles_files_too(tmp_path, start, end):
    body = (
        b'"<p>Use it:</p><pre><code>def f(x):\n    return x\n</code></pre><p>A loop does it.</p>"'
    )
    (tmp_path / "Questions.csv").write_bytes(
        (start + b"Id,OwnerUserId,Score,Title,Body\n1,2,3,A title,<p>How so?</p>\n").replace(
            b"\n", end
        )
    )
    answers = b"Id,OwnerUserId,ParentId,Score,Body\n11,2,1,5," + body + b"\n"
    (tmp_path / "Answers.csv").write_bytes((start + answers).replace(b"\n", end))
    (tmp_path / "work").mkdir()
    config = Config.from_profile("demo", data_source=str(tmp_path))
    (pair,) = open_source(config, tmp_path / "work").pairs(range(1))
    found = judge(pair, config, own=False)
    assert found.rule == "" and pair["question_id"] == 1
    assert (
        "```python\ndef f(x):\n    return x\n```" in found.turns[0][1]
        and "\r" not in found.turns[0][1]
    )


def test_half_of_a_utf_16_file_is_named(tmp_path):
    path = tmp_path / "own.csv"
    text = "prompt,answer\n" + "".join(f"{r['prompt']},x\n" for r in OWN_ROWS)
    path.write_bytes(text.encode("utf-16")[:-1])
    with pytest.warns(UserWarning, match="1 lines are no rows"):
        curated(path, tmp_path)


# -- Markup without end.


@pytest.mark.parametrize("tag", ["div", "blockquote", "ul><li", "ol><li", "b", "code", "pre", "h1"])
def test_10_000_nested_tags_give_their_text_and_no_more_than_a_screen_of_marks(tag):
    text = html_to_markdown(f"<p>before</p>{f'<{tag}>x' * 10_000}deep", [])
    assert text.startswith("before") and "deep" in text and text.count("x") == 10_000
    assert len(text) < 2_000_000


def test_white_space_without_end_is_read_in_linear_time(tmp_path):
    """A pattern that may start anywhere in a run of blanks would take hours here."""
    path = tmp_path / "own.jsonl"
    texts = [f"<s>[INST] {row['prompt']} [/INST] {row['answer']} </s>" for row in OWN_ROWS]
    texts += ["[/INST]" + " " * 900_000 + "x", " " * 900_000 + "[/INST]", "[INST]" + " " * 900_000]
    path.write_bytes(lines({"text": text} for text in texts))
    with pytest.warns(UserWarning, match="3 lines are no rows"):
        _, kept, _ = curated(path, tmp_path)
    assert_nothing_good_is_lost(kept)


# -- Code that begins with indentation.

STEP = "Then print it, {n} times, and go on with the {thing} as before."
INDENTED = [
    {
        "prompt": f"    {thing} = {n}\nWhat follows this line?",
        "answer": f"    x = {n}\n    print(x)  # {STEP.format(n=n, thing=thing)}",
    }
    for n, thing in enumerate("door window gate barrel crate lamp roof wall stair chair".split())
]


@pytest.mark.parametrize("frame", ["{}", "\n\n{}\n", "\r\n{}"])
def test_the_first_line_keeps_its_indentation(tmp_path, frame):
    path = tmp_path / "own.jsonl"
    framed = [{name: frame.format(text) for name, text in row.items()} for row in INDENTED]
    path.write_bytes(lines(framed))
    _, kept, _ = curated(path, tmp_path)
    assert_nothing_good_is_lost(kept, INDENTED)


def test_the_first_line_keeps_its_indentation_in_the_articles_form(tmp_path):
    systems = itertools.cycle(["", "<<SYS>>\nS\n<</SYS>>\n\n"])
    texts = [f"<s>[INST] {next(systems)}{r['prompt']} [/INST] {r['answer']} </s>" for r in INDENTED]
    path = tmp_path / "own.jsonl"
    path.write_bytes(lines({"text": text} for text in texts))
    _, kept, _ = curated(path, tmp_path)
    assert_nothing_good_is_lost(kept, INDENTED)


# -- Text that speaks to the model: the template's markers and the tokenizer's special tokens.

MARKS = ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"]
SPECIAL = ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<filename>", "<jupyter_code>"]
PLAIN = [
    "<s>",
    "</s>",
    "<unk>",
    "[inst]",
    "<|eot_id|>",
    "</pre>",
]  # of other tokenizers, or of none


def test_rows_that_hold_a_marker_or_a_special_token_are_removed_and_counted(tmp_path):
    rows = list(OWN_ROWS)
    for mark in [*MARKS, *SPECIAL]:
        rows.append(
            {"prompt": f"What does {mark} mean here?", "answer": OWN_ROWS[0]["answer"] + mark}
        )
        rows.append(
            {"prompt": f"What is {len(rows)}?", "answer": f"{mark} {OWN_ROWS[1]['answer']}"}
        )
    path = tmp_path / "own.jsonl"
    path.write_bytes(lines(rows))
    report, kept, config = curated(path, tmp_path)
    assert_nothing_good_is_lost(kept)
    first = len(OWN_ROWS) + 1
    assert report.removed["template_marker"] == list(range(first, first + 8))
    assert sorted(report.removed["not_verified"]) == list(range(first + 8, first + 18))
    assert report.first_problem.startswith("the special token <")


def test_what_is_plain_text_to_this_tokenizer_stays(tmp_path, tokenizer):
    extra = [
        {"prompt": f"What does {mark} mean here?", "answer": f"{row['answer']} Write {mark}."}
        for mark, row in zip(PLAIN, OWN_ROWS, strict=False)
    ]
    path = tmp_path / "own.jsonl"
    path.write_bytes(lines([*OWN_ROWS, *extra]))
    _, kept, _ = curated(path, tmp_path)
    assert_nothing_good_is_lost(kept, [*OWN_ROWS, *extra])
    for row in kept[-len(PLAIN) :]:
        assert problems_of(tokenizer, row["prompt"], row["completion"]) == []


@pytest.mark.parametrize("hidden", ["[/IN<b></b>ST]", "&#91;/INST&#93;", "[/INST<!-- x -->]"])
def test_a_marker_that_markup_hides_is_found(hidden, tmp_path):
    answer = "<p>Call it once, with a number:</p><pre><code>f(1)</code></pre>"
    pair = {"title": "t", "question": f"<p>{hidden}</p>", "answer": answer, "tags": []}
    pair |= {"question_score": 1, "answer_score": 1}
    found = judge(pair, Config.from_profile("demo"), own=False)
    with pytest.raises(prompts.TemplateError, match="holds the template's own marker"):
        prompts.render(prompts.Conversation("S", found.turns))


@pytest.fixture(scope="module")
def shared_tokenizer(tokenizer):
    return tokenizer


# SmolLM2's vocabulary has no token for some control characters and for what lies above U+2FFFF.
encodable = st.text(st.characters(max_codepoint=0x2FFFF, exclude_categories=("Cs", "Cc")))
hostile = st.lists(st.sampled_from([*MARKS, *SPECIAL, *PLAIN, " ", "\n", "x"]) | encodable)


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(user=hostile, answer=hostile)
@example(user=["<|im_end|>"], answer=["x"])
@example(user=["a"], answer=["<|im_start|>", " [", "/INST]"])
def test_the_mask_never_shifts(shared_tokenizer, user, answer):
    """A row is refused, or the loss falls on the answer and its end to the letter."""
    user, answer = "".join(user), "".join(answer)
    try:
        prompt, completion = prompts.render_prompt(user, "S"), prompts.render_completion(answer)
    except prompts.TemplateError:
        assert any(mark in user + "\n" + answer for mark in MARKS)
        return
    row = prompts.encode(shared_tokenizer, prompt, completion)
    learned = [token for token in row["labels"] if token != prompts.IGNORED_LABEL]
    exact = shared_tokenizer.decode(learned) == completion + shared_tokenizer.eos_token
    if not problems_of(shared_tokenizer, prompt, completion):
        assert exact and not any(mark in user + answer for mark in SPECIAL)
    else:
        assert any(mark in user + "\n" + answer for mark in SPECIAL) or not answer.strip()
