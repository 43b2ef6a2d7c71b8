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
    """A pair as two texts in Markdown and the words of both; all empty where a rule removes it."""

    rule: str = ""
    problem: str = ""  # the benchmark problem that the pair restates
    user: str = ""
    answer: str = ""
    turns: tuple[tuple[str, str], ...] = ()  # of rows of one's own, in place of the two
    system: str | None = None  # that they bring
    words: list[str] = []
    features: set[str] = set()


def judge(pair: dict, config: Config, is_html: bool) -> Judged:
    """The first rule that removes a pair, or its texts."""
    if not is_html:
        return judge_own(pair, config)
    if rule := unread(pair, config):
        return Judged(rule)
    kinds: list[str] = []
    answer = html_to_markdown(pair["answer"], kinds)
    if rule := judge_code(kinds):
        return Judged(rule)
    title = html.unescape(pair["title"]).strip()
    user = prompts.without_blank_lines(f"{title}\n\n{html_to_markdown(pair['question'])}")
    if any(marker in user or marker in answer for marker in prompts.MARKERS):
        return Judged("template_marker")
    if not user.strip() or not answer.strip():
        return Judged("length")
    words = words_of(f"{user} {answer}")
    features = word_pairs(words)
    if problem := problem_index(config.benchmarks).match(title, words, features):
        return Judged("contaminated", problem)
    return Judged("", "", user, answer, words=words, features=features)


def judge_own(pair: dict, config: Config) -> Judged:
    """`judge` for a conversation of one's own: rules for posts of a forum hold if asked for."""
    row = json.loads(pair["question"])
    turns = [[prompts.without_blank_lines(text) for text in turn] for turn in row["turns"]]
    texts = [text for turn in turns for text in turn]
    shortest, longest = config.min_answer_characters or 1, config.max_post_characters or math.inf
    if not all(map(str.strip, texts)) or max(map(len, texts)) > longest:
        return Judged("length")
    if min(len(answer) for _, answer in turns) < shortest:
        return Judged("length")
    if any(MOJIBAKE.search(text) for text in texts if not text.isascii()):
        return Judged("bad_encoding")
    if config.check_python:
        blocks = [block for _, answer in turns for block in fenced_blocks(answer)]
        kinds = [code_kind(code) for language, code in blocks if language in PYTHON_FENCES]
        if rule := judge_code([*kinds, "python"]):
            return Judged(rule)
    marked = [*texts, row["system"] or ""] if config.template != "model" else []
    if any(marker in text for text in marked for marker in prompts.MARKERS):
        return Judged("template_marker")
    words = words_of(" ".join(texts))
    features = word_pairs(words)
    if problem := problem_index(config.benchmarks).match("", words, features):
        return Judged("contaminated", problem)
    (user, answer), *_ = said = tuple((user, answer) for user, answer in turns)
    return Judged("", "", user, answer, said, row["system"], words, features)


def unread(pair: dict, config: Config) -> str:
    """The rule that removes a pair before its posts are parsed, or ""."""
    title, question, answer = pair["title"], pair["question"], pair["answer"]
    if answer is None:
        return "no_answer"
    for post, minimum in (
        ("question_score", config.min_question_score),
        ("answer_score", config.min_answer_score),
    ):
        if pair[post] is not None and pair[post] < minimum:
            return "low_score"
    if is_other_language(pair["tags"]):
        return "other_language"
    if "<img" in question:
        return "picture"
    longest = max(len(question), len(answer))
    if longest > (config.max_post_characters or 8000):
        return "length"
    if len(answer) < (config.min_answer_characters or 60):
        return "length"
    if "<pre" not in answer:
        return "no_code"
    posts = (text for text in (title, question, answer) if not text.isascii())
    return "bad_encoding" if any(map(MOJIBAKE.search, posts)) else ""


def is_other_language(tags: list[str]) -> bool:
    """Whether tags name another language and no kind of Python. Untagged questions pass."""
    return bool(NOT_PYTHON_TAGS.intersection(tags)) and not any(
        tag.startswith("python") for tag in tags
    )


def judge_code(kinds: list[str]) -> str:
    """The rule that an answer's code blocks break, or ""."""
    if "python2" in kinds:
        return "python2"
    if "broken" in kinds:
        return "does_not_parse"
    if "python" in kinds or "session" in kinds:
        return ""
    return "other_language" if kinds else "no_code"
