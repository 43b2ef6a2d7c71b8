"""The dataset's card, the README.md beside it: card.md with the numbers of the run."""

import re
from pathlib import Path

from helpers.config import Config
from helpers.data.posts import Posts
from helpers.data.report import Report
from helpers.runs.folders import public_name

CARD = Path(__file__).with_name("card.md")
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"))
LICENCES = ("CC BY-SA 3.0", "CC BY-SA 4.0")  # those that the Hub knows by a tag


def dataset_card(config: Config, report: Report, posts: Posts) -> str:
    """The card of a whole dataset."""
    known = posts.licence in LICENCES
    funnel = (
        f"| {rule} | {why} | {removed:,} | {left:,} |"
        for rule, why, removed, left in report.funnel()
    )
    return CARD.read_text(encoding="utf-8").format(
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
