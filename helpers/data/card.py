"""The dataset's card, the README.md beside it, filled in from the numbers of the run."""

import re

from helpers.config import Config
from helpers.data.posts import Posts
from helpers.data.report import Report
from helpers.data.rules import RULES
from helpers.runs.folders import public_name

CARD = """---
license: {tag}
language: [en]
task_categories: [text-generation]
tags: [code, python, question-answering]
size_categories: [{size}]
---
# Python questions and answers in Llama 2's prompt template

{report.train_rows:,} rows to train and {report.validation_rows:,} to validate, made from
{report.raw_questions:,} questions and {report.raw_answers:,} answers
(source: `{source}`, licence: {licence}).

Columns: `prompt` and `completion` (Llama 2's template without BOS and EOS as text: the tokenizer
adds the first, the trainer the second), and for attribution `question_id`, `answer_id`,
`question_author`, `answer_author`, `question_score`, `answer_score`, `url`, `licence`, `tags`;
`group` joins rows that resemble each other.

| rule | removed because | pairs removed | pairs left |
|---|---|---|---|
{funnel}

- Lines of the source that were no rows and are left out: {report.quarantined}.
- Near duplicates: MinHash of word pairs, similarity {config.near_duplicate_similarity} or more.
- Benchmarks kept out: {benchmarks}.
- Split by group: {report.validation_leaks} validation rows have a near duplicate in training.
- At most {config.max_length} tokens of `{model}`. Seed {config.seed}.
- System message of every row: "{config.system_message}"
- Answers were written by people. Code was parsed, not executed: check what you use.
"""
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"))
LICENCES = ("CC BY-SA 3.0", "CC BY-SA 4.0")  # those that the Hub knows by a tag


def dataset_card(config: Config, report: Report, posts: Posts) -> str:
    """The card of a whole dataset."""
    known = posts.licence in LICENCES
    funnel = (
        f"| {rule} | {RULES[rule]} | {removed:,} | {left:,} |"
        for rule, removed, left in report.funnel()
    )
    return CARD.format(
        config=config,
        report=report,
        funnel="\n".join(funnel),
        licence=posts.licence,
        tag=posts.licence.lower().replace(" ", "-") if known else "other",
        size=size_category(report.train_rows + report.validation_rows),
        source=public_name(config.data_source),
        benchmarks=", ".join(map(public_name, config.benchmarks)),
        model=public_name(config.model_name),
    )


def card_of_part(card: str, rows: int, every: int, held: int) -> str:
    """The card of a repository with the first `rows` of `every` training rows, and all held out.

    What its owner wrote into the card stays.
    """
    size = f"size_categories: [{size_category(rows + held)}]"
    part = f" (the first of {every:,})" if rows < every else ""
    counts = f"{rows:,} rows to train{part} and {held:,} to validate"
    card = re.sub(r"(?m)^size_categories: .*$", size, card, count=1)
    return re.sub(r"(?m)^[\d,]+ rows to train and [\d,]+ to validate", counts, card, count=1)


def size_category(rows: int) -> str:
    return next((name for limit, name in SIZES if rows < limit), "100K<n<1M")
