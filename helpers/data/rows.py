"""Training rows: pairs that the rules let through, in the prompt template, counted and verified."""

import functools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa

from helpers import prompts
from helpers.config import Config
from helpers.data.posts import HELD, Posts
from helpers.data.rules import judge
from helpers.data.similarity import SKETCH, sketch

NUMBERS = "question_id answer_id question_author answer_author question_score answer_score".split()
SCHEMA = pa.schema(
    {
        **dict.fromkeys(("prompt", "completion"), pa.large_string()),
        **dict.fromkeys(NUMBERS, pa.int64()),
        **dict.fromkeys(("url", "licence"), pa.string()),
        "tags": pa.list_(pa.string()),
        "tests": pa.string(),  # of rows of one's own that bring some
        "group": pa.int64(),  # is known when all rows have been compared
    }
)
# What is written while the rows are made: with what decides whether they stay.
DRAFT = pa.schema([*list(SCHEMA)[:-1], ("tokens", pa.int64()), ("problem", pa.string())])
COPIED = "bos_token_id eos_token_id bos_token eos_token chat_template special_tokens_map "
COPIED += "added_tokens_decoder"


class Encoder(SimpleNamespace):
    """The part of a tokenizer that workers need, without transformers: they read `file` once."""

    def __call__(self, texts: list[str]) -> SimpleNamespace:
        """`encodings`, as transformers calls them: a `tokenizers.Encoding` for each text."""
        return SimpleNamespace(encodings=_vocabulary(self.file).encode_batch(texts))


def encoder_of(tokenizer, folder: Path) -> Encoder:
    """Of a fast tokenizer of transformers; its vocabulary is written into `folder`."""
    file = folder / "tokenizer.json"
    tokenizer.backend_tokenizer.save(str(file))
    return Encoder(file=file, **{name: getattr(tokenizer, name) for name in COPIED.split()})


@functools.lru_cache(maxsize=1)
def _vocabulary(file: Path):
    import tokenizers  # here: a process that only reads and compares needs no memory for it

    return tokenizers.Tokenizer.from_file(str(file))


def clean_part(
    config: Config, posts: Posts, encoder: Encoder, part: range
) -> tuple[list[tuple[int, str, str]], np.ndarray]:
    """Write the rows of a part; (question id, rule, benchmark problem) of the pairs it removes."""
    removed, rows, sketches = [], [], []
    for pair in posts.pairs(part):
        question_id, score = pair["question_id"], pair["answer_score"] or 0
        score += HELD in pair["tags"] and posts.own  # of two copies it is the one to stay
        text = judge(pair, config, posts.own)
        if text.rule:
            removed.append((question_id, text.rule, text.problem))
            continue
        # `curate` has given the Config a system message.
        said = prompts.Conversation(text.system or str(config.system_message), text.turns)
        try:
            rows.append(_training_row(pair, said, posts, encoder, config))
        except prompts.TemplateError:
            removed.append((question_id, "template_marker", ""))
            continue
        asked = " ".join(user for user, _ in text.turns)
        of_row = question_id, score, asked, text.words, text.pairs
        sketches.append(sketch(*of_row, config.seed))
    _write(rows_file(posts, part), rows, encoder)
    return removed, np.array(sketches, SKETCH)


def _training_row(
    pair: dict, said: prompts.Conversation, posts: Posts, encoder: Encoder, config: Config
) -> dict:
    """The columns of SCHEMA, but for the group. TemplateError where the template cannot hold it."""
    prompt, completion = prompts.render_row(said, encoder, config.template == "model")
    return {
        **{name: pair[name] for name in SCHEMA.names if name in pair},
        "prompt": prompt,
        "completion": completion,
        "url": posts.url.format(**pair),
        "licence": posts.licence,
        "tests": pair["title"] if posts.own else "",
    }


def _write(path: Path, rows: list[dict], encoder: Encoder) -> None:
    """Write rows with their length in tokens and what is wrong with them, "" where nothing is."""
    texts = ((row["prompt"], row["completion"]) for row in rows)
    for row, (length, problems) in zip(rows, prompts.verify_rows(encoder, texts), strict=True):
        row |= {"tokens": length, "problem": problems[0] if problems else ""}
    with pa.ipc.new_stream(str(path), DRAFT) as writer:
        writer.write_batch(pa.RecordBatch.from_pylist(rows, DRAFT))


def rows_file(posts: Posts, part: range) -> Path:
    """Where the rows of a part lie, beside the posts."""
    return posts.database.with_name(f"rows-{part.start}.arrow")


def read_rows(path: Path) -> pa.Table:
    """The rows of an Arrow stream file, mapped and not copied."""
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_stream(source).read_all()
