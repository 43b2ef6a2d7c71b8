"""Which pairs stay: the rules, in the order in which they are asked, and what to do about each."""

import html
import json
import math
import re
from typing import NamedTuple

from helpers import prompts
from helpers.config import Config
from helpers.data.code_kinds import code_kind
from helpers.data.contamination import problem_index
from helpers.data.markdown import fenced_blocks, html_to_markdown
from helpers.data.similarity import word_pairs, words_of

# Why a question or pair is removed, cheap rules first.
RULES = {
    "no_answer": "the question has no answer",
    "low_score": "question or best answer is scored below the minimum",
    "other_language": "tagged or written in another language",
    "picture": "the question shows a picture instead of text",
    "length": "a text is empty or too long, or the answer too short",
    "no_code": "the best answer holds no code block",
    "bad_encoding": "characters were lost in a wrong conversion",
    "python2": "the code is Python 2",
    "does_not_parse": "the code is Python and does not parse",
    "template_marker": "the text holds a marker of the prompt template",
    "contaminated": "the pair restates a benchmark problem",
    "exact_duplicate": "the same words as a better pair",
    "near_duplicate": "nearly the same words as a better pair",
    "not_verified": "the rendered prompt fails verification",
    "too_many_tokens": "longer than max_length tokens",
}

# What to do about each rule, when it leaves too few rows.
ADVICE = {
    "no_answer": "check that Answers.csv belongs to Questions.csv",
    "low_score": "lower MIN_QUESTION_SCORE or MIN_ANSWER_SCORE",
    "other_language": "give posts about Python",
    "picture": "give questions that are text and no <img>",
    "length": "fill empty texts; lower MIN_ANSWER_CHARACTERS or raise MAX_POST_CHARACTERS",
    "no_code": "give answers with code in <pre>",
    "bad_encoding": "get the source again, or save it as UTF-8 from where its text is whole",
    "python2": "translate the code to Python 3",
    "does_not_parse": "repair the code, or name its language after the ``` if it is not Python",
    "template_marker": f"remove {', '.join(prompts.MARKERS)} from the texts",
    "contaminated": "check BENCHMARKS",
    "exact_duplicate": "give rows that are not equal",
    "near_duplicate": "raise NEAR_DUPLICATE_SIMILARITY",
    "not_verified": "check the texts, or name a MODEL_NAME with another tokenizer",
    "too_many_tokens": "raise MAX_LENGTH",
}

# UTF-8 read as Latin-1 ("Ã©"), control characters of the C1 range, the replacement character.
MOJIBAKE = re.compile("[ÃÂâ][\x80-\xbf]|[\x80-\x9f\ufffd]")
NOT_PYTHON_TAGS = frozenset(
    "c c# c++ css go haskell html java javascript kotlin lua matlab objective-c perl php "
    "powershell r ruby rust scala sql swift typescript vb.net bash shell".split()
)
PYTHON_FENCES = ("", "python", "py", "python3", "pycon")


class Judged(NamedTuple):
    """A pair in Markdown, and its words; all empty where a rule removes it."""

    rule: str = ""
    problem: str = ""  # the benchmark problem that the pair restates
    turns: tuple[tuple[str, str], ...] = ()  # (user, answer)
    system: str | None = None  # that a row of one's own brings
    words: list[str] = []
    pairs: set[str] = set()  # of neighbouring words


def judge(pair: dict, config: Config, own: bool) -> Judged:
    """The first rule that removes a pair, or its texts; with `own`, of a row of one's own."""
    title, system, turns, rule = (_read_own if own else _read_post)(pair, config)
    texts = [text for turn in turns for text in turn]
    if rule or not all(map(str.strip, texts)):
        return Judged(rule or "length")
    words = words_of(" ".join(texts))
    pairs = word_pairs(words)
    problem = problem_index(config.benchmarks).match(title, words, pairs)
    return Judged("contaminated" if problem else "", problem, turns, system, words, pairs)


def _read_post(pair: dict, config: Config) -> tuple:
    """(title, None, turns, the rule that removes the pair or "") of a question and its answer."""
    rule, kinds = unread(pair, config), list[str]()
    answer = "" if rule else html_to_markdown(pair["answer"], kinds)
    if rule := rule or judge_code(kinds):
        return "", None, (), rule
    title = html.unescape(pair["title"]).strip()
    user = prompts.without_blank_lines(f"{title}\n\n{html_to_markdown(pair['question'])}")
    return title, None, ((user, answer),), ""


def _read_own(pair: dict, config: Config) -> tuple:
    """`_read_post` for a row of one's own: rules for posts of a forum hold if asked for."""
    row, rule = json.loads(pair["question"]), ""
    turns = tuple(tuple(map(prompts.without_blank_lines, turn)) for turn in row["turns"])
    texts = [text for turn in turns for text in turn]
    if min(len(answer) for _, answer in turns) < (config.min_answer_characters or 1):
        rule = "length"
    elif max(map(len, texts)) > (config.max_post_characters or math.inf):
        rule = "length"
    elif any(MOJIBAKE.search(text) for text in texts if not text.isascii()):
        rule = "bad_encoding"
    elif config.check_python:
        blocks = [block for _, answer in turns for block in fenced_blocks(answer)]
        kinds = [code_kind(code) for language, code in blocks if language in PYTHON_FENCES]
        rule = judge_code([*kinds, "python"])
    return "", row["system"], turns, rule


def unread(pair: dict, config: Config) -> str:
    """The rule that removes a pair before its posts are parsed, or ""."""
    title, question, answer = pair["title"], pair["question"], pair["answer"]
    if answer is None:
        return "no_answer"
    for post in ("question_score", "answer_score"):
        if pair[post] is not None and pair[post] < getattr(config, f"min_{post}"):
            return "low_score"
    named = NOT_PYTHON_TAGS.intersection(pair["tags"])
    if named and not any(tag.startswith("python") for tag in pair["tags"]):
        return "other_language"
    if "<img" in question:
        return "picture"
    if max(len(question), len(answer)) > (config.max_post_characters or 8000):
        return "length"
    if len(answer) < (config.min_answer_characters or 60):
        return "length"
    if "<pre" not in answer:
        return "no_code"
    posts = (text for text in (title, question, answer) if not text.isascii())
    return "bad_encoding" if any(map(MOJIBAKE.search, posts)) else ""


def judge_code(kinds: list[str]) -> str:
    """The rule that an answer's code blocks break, or ""."""
    if "python2" in kinds:
        return "python2"
    if "broken" in kinds:
        return "does_not_parse"
    if {"python", "session"}.intersection(kinds):
        return ""
    return "other_language" if kinds else "no_code"
