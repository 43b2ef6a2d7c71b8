"""Properties that hold for every input, each tried on 500: the same ones in every run."""

import dataclasses
import html
from collections import Counter

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from helpers import prompts
from helpers.config import PROFILES, Config, ConfigError
from helpers.data.markdown import fenced_blocks, html_to_markdown
from helpers.data.similarity import words_of
from helpers.data.split import choose_validation, validation_size
from helpers.prompts import Conversation, TemplateError
from tests.notebook_code import definitions_from

tried = settings(max_examples=500, deadline=None, derandomize=True, database=None)

# -- Template: parse undoes render.

BOS, EOS = "<s>", "</s>"
pieces = st.sampled_from(
    [*prompts.MARKERS, BOS, EOS, " ", "\n", "[", "]", "<", ">", "INST", "S", "/"]
)
texts = st.lists(pieces | st.text(max_size=5), max_size=8).map("".join)
turns = st.lists(st.tuples(texts, texts), max_size=3)


@tried
@given(system=texts, answered=turns, last=st.none() | texts, ends=st.sampled_from(["", "both"]))
@example(system="", answered=[("", "")], last=None, ends="both")
@example(system="S", answered=[("a", "b\n")], last="", ends="")
def test_parse_undoes_render(system, answered, last, ends):
    bos, eos = (BOS, EOS) if ends else ("", "")
    conversation = Conversation(
        system, tuple(answered if last is None else [*answered, (last, None)])
    )
    assume(conversation.turns)
    said = [system, *(text for turn in conversation.turns for text in turn if text is not None)]
    forbidden = [*prompts.MARKERS, *filter(None, (bos, eos))]
    try:
        rendered = prompts.render(conversation, bos, eos)
    except TemplateError:
        assert any(mark in text for mark in forbidden for text in said)
        return
    assert not any(mark in text for mark in forbidden for text in said)
    stripped = tuple(
        (user.strip("\n"), answer and answer.strip("\n")) for user, answer in conversation.turns
    )
    assert prompts.parse(rendered, bos, eos) == Conversation(system.strip("\n"), stripped)
    assert rendered.count(bos or "[INST]") == len(conversation.turns)


@tried
@given(user=st.text(max_size=9), noise=texts.filter(bool), place=st.floats(0, 1))
@example(user="a", noise=" ", place=1.0)
@example(user="a", noise="[INST] b [/INST] c ", place=1.0)
def test_nothing_can_be_hidden_in_what_parse_accepts(user, noise, place):
    """Anything put anywhere into a rendered text is refused, or is part of what was parsed."""
    text = prompts.render(Conversation("S", ((user.replace("[", ""), "answer"),)))
    cut = round(place * len(text))
    changed = text[:cut] + noise + text[cut:]
    try:
        found = prompts.parse(changed)
    except TemplateError:
        return
    assert prompts.render(found) == changed


# -- HTML to Markdown: no word is lost, code comes back to the letter.

TAGS = (
    "p div b strong i em code kbd tt pre br hr ul ol li blockquote h1 h3 a img table tr td span dl "
    "del s sup sub th caption"
).split()
tags = st.sampled_from([f"<{slash}{tag}>" for tag in TAGS for slash in ("", "/")])
words = st.sampled_from("apple bridge candle desert engine forest".split())
soup = st.lists(
    tags
    | words.map(" {} ".format)
    | st.sampled_from(["\n", "&lt;", "&amp;", "<!-- x -->", "`", "```"]),
    max_size=40,
)


@tried
@given(soup=soup)
@example(soup=["<b>", " apple ", "<p>", " bridge ", "</b>", " candle "])
@example(soup=["<pre>", " apple ", "<pre>", " bridge "])
def test_no_word_is_lost_and_none_is_said_twice(soup):
    markdown = html_to_markdown("".join(soup), [])
    assert Counter(w for w in words_of(markdown) if w in WORDS) == Counter(
        part.strip() for part in soup if part.strip() in WORDS
    )
    assert "\0" not in markdown and markdown == html_to_markdown("".join(soup), [])


WORDS = {"apple", "bridge", "candle", "desert", "engine", "forest"}
code_lines = st.text(st.characters(exclude_categories=("Cs", "Cc"))) | st.sampled_from(
    ["```", "````", "  ```", "   ````python", "~~~", "    x = 1", "\treturn", "</pre>", "&lt;", ""]
)


@tried
@given(lines=st.lists(code_lines, max_size=8))
@example(lines=["x", " ```", "y"])
def test_code_comes_back_to_the_letter(lines):
    code = "\n".join(lines)
    markdown = html_to_markdown(
        f"<p>so:</p><pre><code>{html.escape(code)}</code></pre><p>end</p>", []
    )
    kept = code.strip("\n").rstrip()
    assert [found for _, found in fenced_blocks(markdown)] == (
        [kept + "\n"] if kept.strip() else []
    )
    assert markdown.startswith("so:") and markdown.endswith("end")


@tried
@given(source=st.text() | st.binary().map(lambda data: data.decode("latin-1")))
def test_no_text_at_all_breaks_the_cleaner(source):
    assert isinstance(html_to_markdown(source, []), str)


# -- Splitter: groups stay whole, whatever the order of the rows.


@tried
@given(
    groups=st.lists(st.integers(-(2**62), 2**62) | st.integers(0, 5), min_size=1, max_size=60),
    wanted=st.integers(0, 70),
    seed=st.integers(0, 2**32 - 1),
    shuffle=st.randoms(use_true_random=False),
)
def test_groups_are_held_out_whole_and_whatever_the_order(groups, wanted, seed, shuffle):
    groups = np.array(groups, np.int64)
    held = choose_validation(groups, wanted, seed)
    smallest = np.unique(groups, return_counts=True)[1].min()
    assert held.sum() <= wanted if smallest <= wanted else held.sum() == bool(wanted) * smallest
    assert not set(groups[held].tolist()) & set(groups[~held].tolist())
    left = wanted - held.sum()
    assert all((groups == name).sum() > left for name in groups[~held]), "one more group would fit"
    order = list(range(len(groups)))
    shuffle.shuffle(order)
    assert (choose_validation(groups[order], wanted, seed) == held[order]).all()


@tried
@given(
    rows=st.integers(1, 10**6),
    cap=st.none() | st.integers(1, 10**6),
    share=st.floats(0.01, 0.5),
    most=st.integers(1, 10**4),
)
def test_the_validation_split_is_never_empty_and_never_most_of_the_rows(rows, cap, share, most):
    config = Config.from_profile(
        "demo", max_train_rows=cap, validation_share=share, validation_rows=most
    )
    size = validation_size(config, rows)
    assert 1 <= size <= max(1, min(most, round(share * rows)))


# -- NF4, as lesson 03 defines it.


@pytest.fixture(scope="module")
def lesson():
    return definitions_from("03")


# Down to 1e-30: below, one divided by a block's largest weight is no float32 any more.
weights = st.floats(-(2.0**99), 2.0**99, width=32).filter(lambda x: x == 0 or abs(x) > 1e-30)
blocks = arrays.arrays(np.float32, st.integers(1, 4).map(lambda n: n * 64), elements=weights)


@pytest.mark.slow
@tried
@given(values=blocks)
def test_nf4_errs_by_half_a_gap_at_most_and_not_at_all_the_second_time(lesson, values):
    weight, levels = torch.from_numpy(values), lesson["nf4_levels"]()
    packed, absmax = lesson["quantize"](weight, levels)
    back = lesson["dequantize"](packed, absmax, levels, like=weight)
    gap = (levels[1:] - levels[:-1]).max() / 2
    allowed = (absmax.double() * gap.double() * (1 + 1e-5))[:, None]
    assert ((back - weight).double().abs().reshape(-1, 64) <= allowed).all()
    assert back.isfinite().all() and (back[weight == 0] == 0).all()
    again, absmax_again = lesson["quantize"](back, levels)
    assert torch.equal(again, packed) and torch.equal(absmax_again, absmax)


@tried
@given(values=blocks)
def test_nf4_by_hand_is_that_of_bitsandbytes(lesson, values):
    weight = torch.from_numpy(values)
    packed, absmax = lesson["quantize"](weight, lesson["nf4_levels"]())
    theirs, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert torch.equal(packed, theirs.flatten()) and torch.equal(absmax, state.absmax)


# -- Config: a Config or a ConfigError, and the error names what is wrong.

FIELDS = [name.upper() for name in Config.__dataclass_fields__]
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, 1, 8, 50, 10**400, "8", "cpu", "nf4", "q_proj", ["q_proj"], {"": "cpu"}])
    | st.floats()
    | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)
names = st.sampled_from(FIELDS) | st.from_regex(r"[A-Z][A-Z0-9_]{1,12}", fullmatch=True)


@tried
@given(parameters=st.dictionaries(names, values, max_size=6))
@example(parameters={"LEARNING_RATE": 10**400, "RUN_DIR": "\0", "DEVICE_MAP": {"": True}})
@example(parameters={"NAME": 1, "CLS": 2, "SELF": 3})
@example(parameters={"PROFILE": ["demo"], "SEED": float("inf"), "TARGET_MODULES": [["q_proj"]]})
def test_parameters_give_a_config_or_one_line_that_names_them(parameters):
    try:
        config = Config.from_notebook(parameters)
    except ConfigError as error:
        text = str(error)
        assert "\n" not in text
        for name in set(parameters) - set(FIELDS):
            assert f"unknown parameter {name}" in text
        assert any(name in text for name in parameters)
        return
    assert set(parameters) <= set(FIELDS)
    for name, value in parameters.items():
        if value is not None and name not in ("RUN_DIR", "PROFILE"):
            found = getattr(config, name.lower())
            assert found == (tuple(value) if isinstance(found, tuple) else value)


@tried
@given(
    profile=st.sampled_from(sorted(PROFILES)),
    rank=st.integers(1, 4096),
    rate=st.floats(1e-9, 1),
    steps=st.just(-1) | st.integers(1, 10**7),
    every=st.integers(1, 1000),
)
def test_what_is_within_the_limits_is_taken_as_it_is(profile, rank, rate, steps, every):
    wanted = {"LORA_R": rank, "LEARNING_RATE": rate, "MAX_STEPS": steps, "EVAL_STEPS": every}
    wanted["SAVE_STEPS"] = every
    config = Config.from_notebook({"PROFILE": profile, **wanted})
    assert {name: getattr(config, name.lower()) for name in wanted} == wanted
    known = dataclasses.asdict(config)
    assert Config(**known) == config
