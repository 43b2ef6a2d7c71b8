"""Raw posts to a dataset: pairs that are cleaned, filtered, deduplicated, split, and attributed.

The work goes partition by partition (`data.sources`), cheap rules first, and each post is parsed
once. Three passes: (1) clean and judge every pair, (2) compare all survivors with each other,
(3) render, count tokens, verify and split. Nothing depends on the number of processes or on the
order of a file.
"""

import functools
import gc
import html
import os
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from helpers import prompts
from helpers.config import SYSTEM_MESSAGE, Config
from helpers.data.contamination import problem_index
from helpers.data.curation_note import tokenizer_note, write_curation
from helpers.data.dataset_folder import check_dataset
from helpers.data.markdown import code_kind, fenced_blocks, html_to_markdown
from helpers.data.similarity import (
    PERMUTATIONS,
    RarestIndex,
    find,
    jaccard,
    similar_pairs,
    sketch,
    union,
    word_pairs,
    words_of,
)
from helpers.data.sources import (
    PARTITION_BYTES,
    QUARANTINE,
    DataError,
    Partitions,
    open_source,
    question_hash,
    read_partition,
    read_rows,
)
from helpers.data.workers import Workers, bar
from helpers.runs import folders
from helpers.runs.inventory import seal

# Why a question or pair is removed, in the order in which the rules are asked: cheap ones first.
RULES = {
    "no_answer": "the question has no answer",
    "low_score": "question or best answer is scored below the minimum",
    "other_language": "tagged or written in another language",
    "picture": "the question shows a picture instead of text",
    "length": "a post is too long or the answer too short",
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
    "length": "lower MIN_ANSWER_CHARACTERS or raise MAX_POST_CHARACTERS",
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

SMALL_SET_ROWS = 20_000  # the size of the article's smaller dataset
# Pairs at least this much like each other stay on one side of the split.
GROUP_SIMILARITY = 0.5

SCHEMA = pa.schema(
    {
        "prompt": pa.large_string(),
        "completion": pa.large_string(),
        "question_id": pa.int64(),
        "answer_id": pa.int64(),
        "question_author": pa.int64(),
        "answer_author": pa.int64(),
        "question_score": pa.int64(),
        "answer_score": pa.int64(),
        "url": pa.string(),
        "licence": pa.string(),
        "tags": pa.list_(pa.string()),
        "group": pa.int64(),
    }
)
PAIR_SCHEMA = pa.schema(
    [SCHEMA.field(name) for name in SCHEMA.names[2:8]]
    + [
        SCHEMA.field("tags"),
        pa.field("user", pa.large_string()),
        pa.field("answer", pa.large_string()),
    ]
)


@dataclass
class Report:
    """What a curation did. `removed` maps each rule to the question ids it removed."""

    raw_questions: int = 0
    raw_answers: int = 0
    quarantined: int = 0  # lines of the source that are no rows; dataset/quarantine.jsonl has them
    orphan_answers: int = 0
    removed: dict[str, list[int]] = field(default_factory=lambda: {rule: [] for rule in RULES})
    examples: dict[str, list[tuple[int, str, str]]] = field(
        default_factory=lambda: {rule: [] for rule in RULES}
    )
    benchmark_hits: list[tuple[int, str]] = field(default_factory=list)
    near_pairs: list[tuple[int, int, float]] = field(default_factory=list)
    token_lengths: list[int] = field(default_factory=list)
    kept_pairs: int = 0
    train_rows: int = 0
    validation_rows: int = 0
    validation_leaks: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def metrics(self) -> dict[str, int | float]:
        """The numbers that notebook 02 records, but for what it verifies on the saved rows."""
        names = "raw_questions raw_answers kept_pairs train_rows validation_rows validation_leaks"
        return {
            **{name: getattr(self, name) for name in names.split()},
            "benchmark_hits_removed": len(self.removed["contaminated"]),
            "quarantined_lines": self.quarantined,
            "rows_per_second": (self.raw_questions + self.raw_answers) / sum(self.seconds.values()),
        }

    def funnel(self) -> list[tuple[str, int, int]]:
        """(rule, pairs removed, pairs left) of every rule in order, from all questions on."""
        left, steps = self.raw_questions, []
        for rule in RULES:
            left -= len(self.removed[rule])
            steps.append((rule, len(self.removed[rule]), left))
        return steps

    def remove(self, rule: str, question_id: int, title: str = "", text: str = "") -> None:
        self.removed[rule].append(question_id)
        self.add_example(rule, question_id, title, text)

    def add_example(self, rule: str, question_id: int, title: str, text: str) -> None:
        if len(self.examples[rule]) < 3:
            self.examples[rule].append((question_id, title, text[:300]))

    def absorb(self, other: "Report") -> None:
        """Add the counts of one partition."""
        self.orphan_answers += other.orphan_answers
        self.benchmark_hits += other.benchmark_hits
        self.token_lengths += other.token_lengths
        for rule in RULES:
            self.removed[rule] += other.removed[rule]
            self.examples[rule] = (self.examples[rule] + other.examples[rule])[:3]


def curate(config: Config, workers: int | None = None, progress: bool = False) -> Report:
    """Write the `datasets.DatasetDict` of a Config and its card to `config.dataset_dir`.

    `workers` is the number of processes (default: all cores, one for a small source); the result
    does not depend on it. Raises DataError for a source that cannot be read and when no row
    survives, and what `artefacts.whole_folder` raises.
    """
    if config.system_message is None:
        config = replace(config, system_message=SYSTEM_MESSAGE)
    with folders.whole_folder(config.dataset_dir) as draft:
        work = draft / ".work"  # inside the draft: a killed run leaves one thing to remove, not two
        work.mkdir()
        count = workers or default_workers(config.data_source)
        with Workers(count, progress, partial(prepare_worker, config.benchmarks)) as pool:
            encoder = pool.begin(Encoder.of, config.model_name, work)  # takes as long as reading
            report, partitions = select_pairs(config, work, pool)
            encoder = encoder()
            render_rows(config, report, partitions, encoder, pool)
            write_curation(_note(config, encoder), draft)
            _write_dataset(config, report, partitions, pool, draft)
        shutil.rmtree(work)
    return report


def _note(config: Config, encoder: "Encoder") -> dict:
    """What notebooks 04 to 06 must know of the rows to train on them and to ask as they do."""
    model = {"name": folders.public_name(config.model_name)}
    return {
        "source": folders.public_name(config.data_source),
        "system_message": config.system_message,
        "template": prompts.TEMPLATE,
        "max_length": config.max_length,
        "tokenizer": {**model, **encoder.note},
    }


def select_pairs(config: Config, work: Path, workers: Workers) -> tuple[Report, Partitions]:
    """Passes 1 and 2.

    They leave in `work` the cleaned pairs of each partition, pairs-<number>.arrow, and kept.npy,
    the question ids that stay with their duplicate groups, [pairs, 2].
    """
    started = time.perf_counter()
    with bar(workers.progress, "reading", "B") as shown:
        partitions = open_source(config.data_source, work, config.seed, shown.advance)
    read = time.perf_counter()
    report = Report(partitions.questions, partitions.answers, partitions.quarantined)
    if report.quarantined:
        listed = config.dataset_dir / QUARANTINE
        warnings.warn(f"{report.quarantined} lines are no rows: see {listed}", stacklevel=3)
    problem_index(config.benchmarks)  # one that cannot be read should fail here, not in a worker
    clean = partial(clean_partition, config, partitions)
    kept = []
    for part, survivors in workers.run(clean, partitions, "cleaning"):
        report.absorb(part)
        kept.append(survivors)
    cleaned = time.perf_counter()
    groups = deduplicate(Survivors.join(kept), config.near_duplicate_similarity, report)
    _fail_if_empty(report, len(groups))
    np.save(work / "kept.npy", np.array(sorted(groups.items()), np.int64))
    report.seconds = {
        "read": read - started,
        "clean": cleaned - read,
        "compare": time.perf_counter() - cleaned,
    }
    return report, partitions


# -- Pass 1: clean and judge.


def prepare_worker(benchmarks: tuple[str, ...]) -> None:
    """Read the benchmarks; look for no garbage, a syntax tree is many objects and no cycle."""
    gc.disable()
    problem_index(benchmarks)


@dataclass
class Survivors:
    """What the comparison needs of the pairs that pass the rules: parallel arrays, no text."""

    ids: np.ndarray  # question ids
    scores: np.ndarray  # answer scores
    digests: np.ndarray  # 64-bit hash of the words
    signatures: np.ndarray  # [pairs, PERMUTATIONS] MinHash

    @classmethod
    def of(cls, rows: list[dict]) -> "Survivors":
        return cls(
            np.array([row["question_id"] for row in rows], np.int64),
            np.array([row["answer_score"] or 0 for row in rows], np.int64),
            np.frombuffer(b"".join(row["digest"] for row in rows), np.uint64),
            np.array([row["signature"] for row in rows], np.uint32).reshape(-1, PERMUTATIONS),
        )

    @classmethod
    def join(cls, parts: list["Survivors"]) -> "Survivors":
        """All partitions in one, by question id: in an order that depends on no partition."""
        arrays = [np.concatenate([getattr(p, name) for p in parts]) for name in cls.__annotations__]
        order = np.argsort(arrays[0])
        return cls(*(array[order] for array in arrays))


def clean_partition(
    config: Config, partitions: Partitions, number: int
) -> tuple[Report, Survivors]:
    """Join, judge and clean the pairs of one partition; survivors go to pairs-<number>.arrow."""
    report, rows = Report(), []
    for pair in join_pairs(config, partitions, number, report):
        rule, result = judge(pair, config, partitions.is_html)
        if rule:
            report.remove(rule, pair["question_id"], decode(pair["title"]), decode(pair["answer"]))
            if rule == "contaminated":
                report.benchmark_hits.append((pair["question_id"], result))
        else:
            rows.append(result)
    _write_rows(partitions.folder / f"pairs-{number}.arrow", rows)
    return report, Survivors.of(rows)


def join_pairs(
    config: Config, partitions: Partitions, number: int, report: Report
) -> Iterable[dict]:
    """Each question of a partition with its best answer: highest score, then lowest id.

    Whatever needs no parsing is judged here, on whole columns of bytes: such rows never become
    Python objects.
    """
    questions = read_partition(partitions, "Questions", number).sort_by("Id")
    answers = read_partition(partitions, "Answers", number)
    ids, parents = questions["Id"].to_numpy(), answers["ParentId"].to_numpy()
    known = np.isin(parents, ids)
    report.orphan_answers = int((~known).sum())
    ranks = answers["Score"].fill_null(0).to_numpy()
    order = np.lexsort((answers["Id"].to_numpy(), -ranks, parents))
    order = order[known[order]]
    best = order[np.diff(parents[order], prepend=-1) != 0]
    unanswered = ~np.isin(ids, parents)
    _remove(report, "no_answer", questions.filter(pa.array(unanswered)))
    questions = questions.take(pa.array(np.searchsorted(ids, parents[best])))
    answers = answers.take(pa.array(best))
    tags = _tags(read_partition(partitions, "Tags", number))
    for rule, test in COLUMN_RULES.items():
        bad = test(config, partitions.is_html, questions, answers, tags)
        _remove(report, rule, questions.filter(bad), answers.filter(bad))
        good = pc.invert(bad)
        questions, answers = questions.filter(good), answers.filter(good)
    yield from _pairs(questions, answers, tags)


def _remove(
    report: Report, rule: str, questions: pa.Table, answers: pa.Table | None = None
) -> None:
    report.removed[rule] += questions["Id"].to_pylist()
    for row in range(min(3, len(questions))):
        text = decode(answers["Body"][row].as_py()) if answers else ""
        report.add_example(
            rule, questions["Id"][row].as_py(), decode(questions["Title"][row].as_py()), text
        )


def _low_score(config, is_html, questions, answers, tags):
    low = [
        pc.less(pc.fill_null(posts["Score"], minimum), minimum)  # a source without scores passes
        for posts, minimum in (
            (questions, config.min_question_score),
            (answers, config.min_answer_score),
        )
    ]
    return pc.or_(*low)


def _other_language(config, is_html, questions, answers, tags):
    return pa.array(
        [is_other_language(tags.get(i, [])) for i in questions["Id"].to_pylist()], pa.bool_()
    )


def is_other_language(tags: list[str]) -> bool:
    """Whether tags name another language and no kind of Python. Untagged questions pass."""
    return bool(NOT_PYTHON_TAGS.intersection(tags)) and not any(
        t.startswith("python") for t in tags
    )


def _picture(config, is_html, questions, answers, tags):
    return pc.and_(pc.match_substring(questions["Body"], "<img"), is_html)


def _length(config, is_html, questions, answers, tags):
    question, answer = pc.binary_length(questions["Body"]), pc.binary_length(answers["Body"])
    too_long = pc.greater(pc.max_element_wise(question, answer), config.max_post_characters)
    return pc.or_(too_long, pc.less(answer, config.min_answer_characters))


def _no_code(config, is_html, questions, answers, tags):
    return pc.invert(pc.match_substring(answers["Body"], "<pre" if is_html else ""))


COLUMN_RULES = {
    "low_score": _low_score,
    "other_language": _other_language,
    "picture": _picture,
    "length": _length,
    "no_code": _no_code,
}


def _tags(table: pa.Table) -> dict[int, list[str]]:
    tags: dict[int, list[str]] = {}
    for question_id, tag in zip(table["Id"].to_pylist(), table["Tag"].to_pylist(), strict=True):
        tags.setdefault(question_id, []).append(tag)
    return tags


def _pairs(questions: pa.Table, answers: pa.Table, tags: dict, rows: int = 256) -> Iterable[dict]:
    """Row by row, some hundred at a time as Python objects."""
    for start in range(0, len(questions), rows):
        slices = (table.slice(start, rows).to_pylist() for table in (questions, answers))
        for question, answer in zip(*slices, strict=True):
            yield {
                "question_id": question["Id"],
                "answer_id": answer["Id"],
                "question_author": question["OwnerUserId"],
                "answer_author": answer["OwnerUserId"],
                "question_score": question["Score"],
                "answer_score": answer["Score"],
                "title": question["Title"],
                "question": question["Body"],
                "answer": answer["Body"],
                "tags": tags.get(question["Id"], []),
            }


def judge(pair: dict, config: Config, is_html: bool) -> tuple[str, dict | str | None]:
    """(rule that removes the pair, a note) or ("", the cleaned row).

    The first rule that applies counts.
    """
    title, question, answer = (
        decode(pair["title"]),
        decode(pair["question"]),
        decode(pair["answer"]),
    )
    if any(not text.isascii() and MOJIBAKE.search(text) for text in (title, question, answer)):
        return "bad_encoding", None
    kinds: list[str] = []
    answer = clean_answer(answer, is_html, kinds)
    if rule := judge_code(kinds, is_html):
        return rule, None
    title = html.unescape(title).strip()
    question = html_to_markdown(question) if is_html else question
    user = prompts.without_blank_lines(f"{title}\n\n{question}")
    if any(marker in user or marker in answer for marker in prompts.MARKERS):
        return "template_marker", None
    if not user.strip() or not answer.strip():
        return "length", None
    words = words_of(f"{user} {answer}")
    features = word_pairs(words)
    if problem := problem_index(config.benchmarks).match(title, words, features):
        return "contaminated", problem
    row = {name: pair[name] for name in PAIR_SCHEMA.names if name in pair}
    return "", {**row, "user": user, "answer": answer, **sketch(words, features, config.seed)}


def decode(data: bytes) -> str:
    """Text of a post.

    The set is ISO-8859-1; a post whose bytes are valid UTF-8 was converted wrongly on its way and
    is repaired. Lines end in a line feed alone, whatever they ended in.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def clean_answer(answer: str, is_html: bool, kinds: list[str]) -> str:
    """The answer as Markdown; `kinds` receives the kind of each code block."""
    if is_html:
        return html_to_markdown(answer, kinds)
    blocks = fenced_blocks(answer)
    kinds += [code_kind(code) for language, code in blocks if language in PYTHON_FENCES]
    return prompts.without_blank_lines(answer)


def judge_code(kinds: list[str], is_html: bool) -> str:
    """The rule that an answer's code blocks break, or "".

    A source without markup may have no code at all.
    """
    if "python2" in kinds:
        return "python2"
    if "broken" in kinds:
        return "does_not_parse"
    if not is_html or "python" in kinds or "session" in kinds:
        return ""
    return "other_language" if kinds else "no_code"


# -- Pass 2: compare.


def deduplicate(pairs: Survivors, threshold: float, report: Report) -> dict[int, int]:
    """Remove exact and near duplicates, the best-scored of each kind stays (then the oldest).

    Returns the kept question ids with their group: the smallest id among all pairs that are linked
    by a similarity of GROUP_SIMILARITY or more.
    """
    order = np.lexsort((pairs.ids, -pairs.scores))  # best first
    _, first = np.unique(pairs.digests[order], return_index=True)
    best = order[np.sort(first)]
    for index in np.setdiff1d(order, best):
        report.remove("exact_duplicate", int(pairs.ids[index]))
    left, right, similarity = similar_pairs(
        pairs.signatures[best], min(GROUP_SIMILARITY, threshold)
    )
    kept = np.ones(len(best), bool)
    parent = list(range(len(best)))
    # `left` is the better one of a pair; going through the worse ones in order makes the choice
    # greedy.
    for a, b, value in zip(left.tolist(), right.tolist(), similarity.tolist(), strict=True):
        union(parent, a, b)
        if value >= threshold and kept[a]:
            if kept[b]:
                report.remove("near_duplicate", int(pairs.ids[best[b]]))
                report.near_pairs.append((int(pairs.ids[best[a]]), int(pairs.ids[best[b]]), value))
            kept[b] = False
    roots = np.array([find(parent, index) for index in range(len(best))], int)
    smallest = np.full(len(best), np.iinfo(np.int64).max)
    np.minimum.at(smallest, roots, pairs.ids[best])
    return dict(zip(pairs.ids[best][kept].tolist(), smallest[roots][kept].tolist(), strict=True))


# -- Pass 3: render, count, verify, split, write.


@dataclass(frozen=True)
class Encoder:
    """The part of a tokenizer that workers need; it reaches them without transformers.

    The vocabulary travels as a file, which each worker reads once and not with every partition.
    """

    file: Path
    bos_token_id: int
    eos_token_id: int
    eos_token: str
    added_tokens_decoder: dict  # id -> tokenizers.AddedToken
    note: dict  # by which the tokenizer is known again

    @classmethod
    def of(cls, model_name: str, folder: Path) -> "Encoder":
        """Of a model's tokenizer; a worker's own, so transformers is imported in one of them."""
        from helpers.model.loading import load_tokenizer

        tokenizer, file = load_tokenizer(model_name), folder / "tokenizer.json"
        tokenizer.backend_tokenizer.save(str(file))
        return cls(
            file,
            tokenizer.bos_token_id,
            tokenizer.eos_token_id,
            tokenizer.eos_token,
            tokenizer.added_tokens_decoder,
            tokenizer_note(tokenizer),
        )

    def __call__(self, texts: list[str]) -> SimpleNamespace:
        """`encodings`, as transformers calls them: a `tokenizers.Encoding` for each text."""
        return SimpleNamespace(encodings=_vocabulary(self.file).encode_batch(texts))


@functools.lru_cache(maxsize=1)
def _vocabulary(file: Path):
    import tokenizers  # here: the passes before need no memory for it

    return tokenizers.Tokenizer.from_file(str(file))


def render_rows(
    config: Config, report: Report, partitions: Partitions, encoder: "Encoder", workers: Workers
) -> None:
    """Pass 3: the kept pairs as training rows in rows-<number>.arrow.

    Rows that fail verification or are too long are removed and counted.
    """
    started = time.perf_counter()
    render = partial(render_partition, partitions, encoder, config)
    for part in workers.run(render, partitions, "rendering"):
        report.absorb(part)
    report.kept_pairs = report.funnel()[-1][2]
    _fail_if_empty(report, report.kept_pairs)
    report.seconds["render"] = time.perf_counter() - started


def render_partition(
    partitions: Partitions, encoder: Encoder, config: Config, number: int
) -> Report:
    """One partition of `render_rows`.

    Rows are written in the order of their hash: shuffled, and reproducibly.
    """
    report = Report()
    kept = np.load(partitions.folder / "kept.npy", mmap_mode="r").reshape(-1, 2)
    pairs = read_rows(partitions.folder / f"pairs-{number}.arrow")
    ids = pairs["question_id"].to_numpy()
    place = np.minimum(np.searchsorted(kept[:, 0], ids), len(kept) - 1)
    chosen = np.flatnonzero(kept[place, 0] == ids)
    chosen = chosen[np.argsort(question_hash(ids[chosen], config.seed), kind="stable")]
    pairs = pairs.take(pa.array(chosen))
    rows = []
    for pair, group in zip(pairs.to_pylist(), kept[place[chosen], 1].tolist(), strict=True):
        rows.append(_training_row(pair, group, partitions, config.system_message))
    checks = prompts.verify_rows(encoder, ((row["prompt"], row["completion"]) for row in rows))
    good = []
    for row, (length, problems) in zip(rows, checks, strict=True):
        report.token_lengths.append(length)
        rule = "not_verified" if problems else "too_many_tokens"
        if problems or length > config.max_length:
            report.remove(
                rule, row["question_id"], row["prompt"], "; ".join(problems) or f"{length} tokens"
            )
        else:
            good.append(row)
    _write_rows(partitions.folder / f"rows-{number}.arrow", good, SCHEMA)
    return report


def _training_row(pair: dict, group: int, partitions: Partitions, system: str) -> dict:
    user, answer = pair.pop("user"), pair.pop("answer")
    return {
        **pair,
        "prompt": prompts.render_prompt(user, system),
        "completion": prompts.render_completion(answer),
        "url": partitions.url.format(**pair),
        "licence": partitions.licence,
        "group": group,
    }


def _write_rows(path: Path, rows: list[dict], schema: pa.Schema = PAIR_SCHEMA) -> None:
    with pa.ipc.new_stream(str(path), schema) as writer:
        for start in range(0, len(rows), 1000):
            writer.write_batch(pa.RecordBatch.from_pylist(rows[start : start + 1000], schema))


def choose_validation(groups: np.ndarray, wanted: int, seed: int) -> np.ndarray:
    """True for the validation rows: whole groups in a seeded order, up to `wanted` rows.

    Where each group is larger than that, the smallest.
    """
    names, which, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    chosen, left = np.zeros(len(names), bool), wanted
    for index in np.argsort(question_hash(names, seed + 1), kind="stable"):
        if sizes[index] <= left:
            chosen[index], left = True, left - sizes[index]
        if left == 0:
            break
    if wanted and not chosen.any():
        chosen[sizes.argmin()] = True
    return chosen[which]


def validation_size(config: Config, rows: int) -> int:
    """Rows to hold out: a share, at most `validation_rows`, at most half of `max_train_rows`."""
    cap = config.max_train_rows // 2 if config.max_train_rows else rows
    return max(1, min(config.validation_rows, round(config.validation_share * rows), cap))


class LeakFinder:
    """Held-out rows, ready to be looked up for each training row.

    A row leaks into a training row of the same question or group, or one as similar in words.
    Independent of the MinHash that removed duplicates: this measures the exact Jaccard similarity.
    """

    def __init__(self, validation: Iterable[dict], similarity: float):
        held = list(validation)
        self.similarity = similarity
        self.features = [row_pairs(row) for row in held]
        self.index = RarestIndex(self.features, similarity)
        self.places: dict[tuple[str, int], list[int]] = {}
        for number, row in enumerate(held):
            for name in ("question_id", "group"):
                self.places.setdefault((name, row[name]), []).append(number)

    def find(self, train: Iterable[dict]) -> set[int]:
        """Numbers of the held-out rows that leak into `train`."""
        leaked: set[int] = set()
        for row in train:
            for name in ("question_id", "group"):
                leaked.update(self.places.get((name, row[name]), ()))
            own = row_pairs(row)
            for number in self.index.candidates(own):
                if jaccard(self.features[number], own) >= self.similarity:
                    leaked.add(number)
        return leaked


@functools.lru_cache(maxsize=1)
def _leak_finder(path: Path, similarity: float) -> LeakFinder:
    return LeakFinder(read_rows(path).to_pylist(), similarity)


def _leaks_of_partition(folder: Path, similarity: float, number: int) -> set[int]:
    """What leaks from the training rows of one partition; the held-out ids lie in `folder`."""
    rows = read_rows(folder / f"rows-{number}.arrow")
    held = np.isin(rows["question_id"].to_numpy(), np.load(folder / "held.npy"))
    train = rows.filter(pa.array(~held)).to_pylist()
    return _leak_finder(folder / "held.arrow", similarity).find(train)


def row_pairs(row: dict) -> set[str]:
    """The word pairs of a training row, without the system message that all rows share."""
    user = row["prompt"].split(prompts.CLOSE_SYSTEM, 1)[-1].removesuffix(prompts.CLOSE_USER)
    return word_pairs(words_of(f"{user} {row['completion']}"))


def _write_dataset(
    config: Config, report: Report, partitions: Partitions, workers: Workers, draft: Path
) -> None:
    """Split, check, and save to the folder `draft`."""
    import datasets
    from datasets.fingerprint import generate_random_fingerprint

    started, folder = time.perf_counter(), partitions.folder
    files = [folder / f"rows-{number}.arrow" for number in range(partitions.count)]
    rows = pa.concat_tables(map(read_rows, files))
    size = validation_size(config, len(rows))
    held = choose_validation(rows["group"].to_numpy(), size, config.seed)
    # With a fingerprint of its own: for one, datasets would read all rows.
    dataset = datasets.Dataset(rows, fingerprint=generate_random_fingerprint())
    splits = datasets.DatasetDict(
        train=dataset.select(np.flatnonzero(~held)[: config.max_train_rows]),
        validation=dataset.select(np.flatnonzero(held)),
    )
    if min(map(len, splits.values())) == 0:
        raise _too_few(
            report,
            f"too few rows survive: {len(rows)} of {report.raw_questions} questions, in one group "
            "of rows that resemble each other, and training and validation need one each",
            "give more rows that differ",
        )
    report.train_rows, report.validation_rows = len(splits["train"]), len(splits["validation"])
    validation = rows.filter(pa.array(held))
    np.save(folder / "held.npy", validation["question_id"].to_numpy())
    _write_rows(folder / "held.arrow", validation.to_pylist(), SCHEMA)
    find = partial(_leaks_of_partition, folder, config.near_duplicate_similarity)
    leaks = workers.run(find, partitions, "checking")
    size = sum(os.path.getsize(file) for file in files)
    folders.need_space(config.run_dir, size, "saving the dataset")
    splits.save_to_disk(str(draft))
    report.validation_leaks = len(set().union(*leaks))
    if report.quarantined:
        shutil.copy(folder / QUARANTINE, draft)
    seal(draft)
    report.seconds["write"] = time.perf_counter() - started
    (draft / "README.md").write_text(dataset_card(config, report, partitions), encoding="utf-8")


def verify_dataset(dataset, tokenizer) -> list[tuple[int, list[str]]]:
    """(question id, problems) of each row of a saved DatasetDict that fails verification."""
    failing = []
    for split in dataset.values():
        rows = zip(split["prompt"], split["completion"], strict=True)
        checks = prompts.verify_rows(tokenizer, rows)
        for question_id, (_, problems) in zip(split["question_id"], checks, strict=True):
            if problems:
                failing.append((question_id, problems))
    return failing


def dataset_card(config: Config, report: Report, partitions: Partitions) -> str:
    """The README.md of the dataset, filled in from the numbers of the run."""
    funnel = "\n".join(
        f"| {rule} | {RULES[rule]} | {removed:,} | {left:,} |"
        for rule, removed, left in report.funnel()
    )
    known = ("CC BY-SA 3.0", "CC BY-SA 4.0")
    licence = (
        partitions.licence.lower().replace(" ", "-") if partitions.licence in known else "other"
    )
    source = folders.public_name(config.data_source)
    benchmarks = ", ".join(map(folders.public_name, config.benchmarks))
    model = folders.public_name(config.model_name)
    return f"""---
license: {licence}
language: [en]
task_categories: [text-generation]
tags: [code, python, question-answering]
size_categories: [{_size_category(report.train_rows + report.validation_rows)}]
---
# Python questions and answers in Llama 2's prompt template

{report.train_rows:,} rows to train and {report.validation_rows:,} to validate, made from
{report.raw_questions:,} questions and {report.raw_answers:,} answers
(source: `{source}`, licence: {partitions.licence}).

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


def _size_category(rows: int) -> str:
    limits = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"))
    return next((name for limit, name in limits if rows < limit), "100K<n<1M")


def push_dataset(config: Config) -> list[str]:
    """Upload the dataset of a run and its card under the user's own name; the repository ids.

    More than 20,000 training rows go up twice: the first 20,000 as `new_dataset_name`, all of them
    as `new_dataset_name_complete`. Raises NotLoggedIn without a token, before anything is sent.
    """
    import datasets

    from helpers.merging import publishing

    path = check_dataset(config)
    dataset = datasets.load_from_disk(str(path))
    train, validation = dataset["train"], dataset["validation"]
    card = (path / "README.md").read_text("utf-8")
    sizes = {config.new_dataset_name: min(len(train), SMALL_SET_ROWS)}
    if len(train) > SMALL_SET_ROWS:
        sizes[config.new_dataset_name_complete] = len(train)
    repositories = {publishing.own_repository(name): rows for name, rows in sizes.items()}
    folders.need_space(config.run_dir, dataset["train"].data.nbytes, "uploading the dataset")
    for repository, rows in repositories.items():
        splits = {"train": train.select(range(rows)), "validation": validation}
        with tempfile.TemporaryDirectory(prefix=".upload-", dir=config.run_dir) as folder:
            for name, split in splits.items():
                split.to_parquet(Path(folder) / "data" / f"{name}-00000-of-00001.parquet")
            own_card = _card_of_part(card, rows, len(train), len(validation))
            (Path(folder) / "README.md").write_text(own_card, encoding="utf-8")
            publishing.upload(repository, folder, "dataset")
    return list(repositories)


def _card_of_part(card: str, rows: int, every: int, held: int) -> str:
    """The card with the numbers of one repository; what its owner wrote into it stays."""
    size = f"size_categories: [{_size_category(rows + held)}]"
    part = f" (the first of {every:,})" if rows < every else ""
    counts = f"{rows:,} rows to train{part} and {held:,} to validate"
    card = re.sub(r"(?m)^size_categories: .*$", size, card, count=1)
    return re.sub(r"(?m)^[\d,]+ rows to train and [\d,]+ to validate", counts, card, count=1)


# -- Plumbing.


def _fail_if_empty(report: Report, left: int) -> None:
    if left == 0:
        raise _too_few(report, f"no row survives of {report.raw_questions} questions")


def _too_few(report: Report, what: str, *advice: str) -> DataError:
    """`what` with the three rules that removed most, and what to do about them."""
    removed = sorted(report.funnel(), key=lambda step: -step[1])
    removed = [(rule, count) for rule, count, _ in removed[:3] if count]
    counts = ", ".join(f"{rule} {count}" for rule, count in removed)
    told = "; ".join([*advice, *(ADVICE[rule] for rule, _ in removed)])
    for *_, problems in report.examples["not_verified"][:1]:
        told += f"; the first problem of a prompt: {problems.partition(';')[0]}"
    return DataError(f"{what}{counts and f' (removed: {counts})'}: {told}")


def default_workers(source: str) -> int:
    """All cores, or one where starting processes would take longer than the work."""
    path = Path(source).expanduser()
    if source == "sample" or (path.is_file() and path.stat().st_size < 8 * PARTITION_BYTES):
        return 1
    if path.is_dir() and sum(f.stat().st_size for f in path.glob("*.csv")) < 8 * PARTITION_BYTES:
        return 1
    return os.cpu_count() or 1
