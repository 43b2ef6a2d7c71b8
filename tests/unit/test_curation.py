"""The curation:

what it removes, keeps, splits and writes, where data comes from, and what it says about bad input.
"""

import csv
import io
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from helpers import prompts
from helpers.config import SYSTEM_MESSAGE, Config
from helpers.data import curation, kaggle, posts, rules, sources
from helpers.data.contamination import load_problems, problem_index
from helpers.data.curation_note import curation_of
from helpers.data.posts import DataError, question_hash
from helpers.data.report import Report
from helpers.data.similarity import (
    SKETCH,
    RarestIndex,
    contained,
    jaccard,
    similar_pairs,
    sketch,
    word_pairs,
    words_of,
)
from helpers.data.sources import SAMPLE_DIR
from helpers.data.split import choose_validation, find_leaks, row_pairs, validation_size
from helpers.merging import publishing
from helpers.merging.publishing import NotLoggedIn
from tests.conftest import write_bos_twice
from tests.faults.staging import left_over
from tests.notebook_code import curate

PLANTED = [
    json.loads(line) for line in (SAMPLE_DIR / "planted.jsonl").read_text("utf-8").splitlines()
]


def opened(source, folder):
    """The Posts of a source, in a database in `folder`."""
    return sources.open_source(Config.from_profile("demo", data_source=str(source)), folder)


def planted(*kinds):
    return {row["question_id"] for row in PLANTED if row["kind"] in kinds}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return Config.from_profile("demo", run_dir=tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def report(config):
    return curate(config)


@pytest.fixture(scope="module")
def dataset(config, report):
    return datasets.load_from_disk(str(config.dataset_dir))


@pytest.fixture(scope="module")
def kept(dataset):
    return {i for split in dataset.values() for i in split["question_id"]}


# -- The sample.


def test_enough_rows_survive_and_the_split_is_a_tenth(report, dataset):
    assert report.kept_pairs >= 600
    assert report.train_rows == len(dataset["train"])
    assert report.validation_rows == len(dataset["validation"]) == round(0.1 * report.kept_pairs)


def test_the_funnel_adds_up(report):
    assert report.raw_questions == 780 and report.raw_answers == 1341
    removed = sum(len(ids) for ids in report.removed.values())
    assert report.raw_questions - removed == report.kept_pairs == report.funnel()[-1][3]
    everything = [i for ids in report.removed.values() for i in ids]
    assert len(set(everything)) == len(everything)


def test_of_each_planted_copy_only_one_stays(report, kept):
    for row in PLANTED:
        if row["kind"] in ("exact_duplicate", "near_duplicate"):
            assert len({row["question_id"], row["of"]} & kept) == 1, row
    assert len(report.removed["exact_duplicate"]) == len(planted("exact_duplicate"))
    assert len(report.removed["near_duplicate"]) == len(planted("near_duplicate"))


def test_every_planted_restatement_of_a_problem_is_found(report):
    expected = {(r["question_id"], r["of"]) for r in PLANTED if r["kind"] == "contaminated"}
    assert set(report.benchmark_hits) == expected
    assert report.metrics()["benchmark_hits_removed"] == len(expected) == 8


@pytest.mark.parametrize(
    "kind, rules",
    [
        ("no_answer", ["no_answer"]),
        ("negative_score", ["low_score"]),
        ("other_language", ["other_language", "python2"]),
        ("screenshot", ["picture", "low_score"]),
        ("too_short", ["length"]),
        ("thanks_only", ["no_code", "length"]),
        ("no_code", ["no_code"]),
        ("traceback", ["no_code"]),
        ("python2", ["python2"]),
        ("syntax_error", ["does_not_parse"]),
    ],
)
def test_each_kind_of_noise_goes_for_the_right_reason(report, kind, rules):
    removed = {i for rule in rules for i in report.removed[rule]}
    assert planted(kind) and planted(kind) <= removed


def test_hand_written_rows_stay(kept):
    with (SAMPLE_DIR / "Questions.csv").open(encoding="latin-1", newline="") as file:
        ids = {int(row["Id"]) for row in csv.DictReader(file)}
    copies = {row["of"] for row in PLANTED if isinstance(row.get("of"), int)}
    good = ids - {row["question_id"] for row in PLANTED} - copies
    assert good <= kept


def test_attribution_stays_with_every_row(dataset):
    with (SAMPLE_DIR / "Answers.csv").open(encoding="latin-1", newline="") as file:
        answers = {int(row["Id"]): row for row in csv.DictReader(file)}
    for row in [*dataset["train"], *dataset["validation"]]:
        source = answers[row["answer_id"]]
        assert row["question_id"] == int(source["ParentId"])
        assert row["answer_score"] == int(source["Score"])
        assert str(row["answer_author"] or "NA") == source["OwnerUserId"]
        assert row["url"] == "" and row["licence"] == "CC BY-SA 4.0" and row["tags"]


def test_the_best_answer_is_taken(dataset):
    scores = {}
    with (SAMPLE_DIR / "Answers.csv").open(encoding="latin-1", newline="") as file:
        for row in csv.DictReader(file):
            scores.setdefault(int(row["ParentId"]), []).append(int(row["Score"]))
    for row in dataset["train"]:
        assert row["answer_score"] == max(scores[row["question_id"]])


def test_rows_are_prompts_without_special_tokens_that_verify(dataset, tokenizer, config):
    texts = [(row["prompt"], row["completion"]) for split in dataset.values() for row in split]
    assert not any(problems for _, problems in prompts.verify_rows(tokenizer, texts))
    row = dataset["train"][0]
    conversation = prompts.parse(row["prompt"] + row["completion"])
    assert conversation.system == SYSTEM_MESSAGE
    assert tokenizer.bos_token not in row["prompt"] + row["completion"]
    assert tokenizer.eos_token not in row["prompt"] + row["completion"]


def test_no_row_is_longer_than_max_length(dataset, tokenizer, config, report):
    checks = prompts.verify_rows(
        tokenizer, zip(dataset["train"]["prompt"], dataset["train"]["completion"], strict=True)
    )
    assert max(length for length, _ in checks) <= config.max_length
    assert sum(np.array(report.token_lengths) > config.max_length) == len(
        report.removed["too_many_tokens"]
    )


def test_the_card_holds_the_numbers_and_no_path(config, report):
    card = (config.dataset_dir / "README.md").read_text("utf-8")
    assert f"{report.train_rows} rows to train and {report.validation_rows} to validate" in card
    for rule, _, removed, left in report.funnel():
        assert f"| {rule} |" in card and f"| {removed} | {left} |" in card
    assert str(config.run_dir) not in card and card.startswith("---\nlicense: cc-by-sa-4.0\n")


def test_nothing_is_left_beside_the_dataset(config, report):
    assert {path.name for path in config.run_dir.glob("[!.]*")} == {"dataset"}
    assert left_over(config.run_dir) == []


# -- The split.


def test_no_group_is_on_both_sides(dataset, report):
    assert report.validation_leaks == 0
    assert not set(dataset["train"]["group"]) & set(dataset["validation"]["group"])


def test_whole_groups_are_held_out():
    generator = np.random.default_rng(0)
    groups = generator.integers(0, 120, 400)
    held = choose_validation(groups, 40, seed=1)
    assert 30 <= held.sum() <= 40
    assert not set(groups[held]) & set(groups[~held])
    assert (choose_validation(groups, 40, seed=2) != held).any()


@pytest.mark.parametrize(
    "rows, changes, expected",
    [
        (629, {}, 63),
        (300_000, {}, 1000),
        (629, {"max_train_rows": 16}, 8),
        (300_000, {"max_train_rows": 20_000}, 1000),
        (3, {}, 1),
    ],
)
def test_size_of_the_validation_split(rows, changes, expected):
    assert validation_size(Config.from_profile("demo", **changes), rows) == expected


def test_a_leak_is_counted(dataset):
    train, validation = dataset["train"].to_list(), dataset["validation"].to_list()
    assert len(find_leaks(validation, train, 0.7)) == 0
    copy = {**validation[0], "question_id": 1, "group": 1}
    copy["completion"] = copy["completion"].replace(" the ", " that ", 1)
    assert jaccard(row_pairs(copy), row_pairs(validation[0])) < 1
    assert len(find_leaks(validation, [*train, copy], 0.7)) == 1
    same_group = {**train[0], "group": validation[2]["group"]}
    assert len(find_leaks(validation, [same_group], 0.7)) == 1


def test_smoke_is_small(tmp_path):
    config = Config.from_profile("smoke", run_dir=tmp_path)
    report = curate(config)
    assert (report.train_rows, report.validation_rows) == (16, 8)


# -- The same result whatever the order and the number of processes.


def test_two_workers_and_a_shuffled_file_give_the_same_rows(config, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(posts, "PART", 50)
    folder = tmp_path / "shuffled"
    folder.mkdir()
    for name in ("Questions", "Answers", "Tags"):
        with (SAMPLE_DIR / f"{name}.csv").open(encoding="latin-1", newline="") as file:
            header, *rows = csv.reader(file)
        random.Random(3).shuffle(rows)
        with (folder / f"{name}.csv").open("w", encoding="latin-1", newline="") as file:
            csv.writer(file, quoting=csv.QUOTE_ALL).writerows([header, *rows])
    other = replace(config, data_source=str(folder), run_dir=tmp_path / "run")
    curate(other, workers=2)
    again = datasets.load_from_disk(str(other.dataset_dir))
    for split in ("train", "validation"):
        for column in ("prompt", "completion", "answer_id", "group"):
            assert again[split][column] == dataset[split][column]
        assert [sorted(tags) for tags in again[split]["tags"]] == [
            sorted(tags) for tags in dataset[split]["tags"]
        ]


def test_the_hash_shuffles_and_gives_each_id_another_place():
    ids = np.arange(10_000)
    hashes = question_hash(ids, 42)
    assert len(np.unique(hashes)) == len(ids)
    assert (hashes != question_hash(ids, 43)).all()
    assert abs(np.corrcoef(ids, hashes.argsort())[0, 1]) < 0.05


def test_the_parts_hold_every_question_once_with_its_best_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(posts, "PART", 100)
    found = opened("sample", tmp_path)
    assert [len(part) for part in found.parts()] == [100] * 7 + [80]
    ids = [pair["question_id"] for part in found.parts() for pair in found.pairs(part)]
    assert len(ids) == len(set(ids)) == found.questions == 780


@pytest.mark.parametrize("count", [1, 2])
def test_calls_are_spread_in_order_and_their_errors_are_raised(count):
    with curation.spread_over(count) as spread:
        assert list(spread(int, ["7", "8", "9"])) == [7, 8, 9]
        with pytest.raises(ValueError, match="invalid literal"):
            list(spread(int, ["seven"]))


# -- Similarity.


def test_minhash_finds_what_a_full_comparison_finds():
    generator = random.Random(5)
    texts = [
        [generator.choice("abcdefgh") * generator.randint(1, 6) for _ in range(80)]
        for _ in range(150)
    ]
    texts += [text[:-k] + ["new"] * k for k, text in enumerate(texts[:40], 1) if k < 15]
    sets = [word_pairs(text) for text in texts]
    rows = [sketch(0, 0, "", words, pairs, 1) for words, pairs in zip(texts, sets, strict=True)]
    left, right, similarity = similar_pairs(np.array(rows, SKETCH)["signature"], 0.6)
    found = dict(zip(zip(left.tolist(), right.tolist(), strict=True), similarity, strict=True))
    exact = {(i, j): jaccard(sets[i], sets[j]) for j in range(len(sets)) for i in range(j)}
    assert all(pair in found for pair, value in exact.items() if value >= 0.75)
    assert all(abs(value - exact[pair]) < 0.2 for pair, value in found.items())
    assert len([v for v in exact.values() if v >= 0.75]) >= 10


def test_similar_pairs_of_nothing():
    assert all(len(part) == 0 for part in similar_pairs(np.zeros((0, 128), np.uint32), 0.5))
    assert all(len(part) == 0 for part in similar_pairs(np.zeros((1, 128), np.uint32), 0.5))


def test_the_index_finds_what_a_full_comparison_finds():
    generator = random.Random(9)
    sets = [set(generator.sample(range(60), generator.randint(1, 20))) for _ in range(200)]
    sets = [{str(member) for member in members} for members in sets]
    index = RarestIndex(sets, 0.6)
    for other in sets[:50]:
        assert index.find(other) == [n for n, s in enumerate(sets) if contained(s, other) >= 0.6]


# -- Benchmarks.


def test_humaneval_is_read_and_found():
    problems = load_problems("humaneval")
    assert len(problems) == 164
    index = problem_index(("humaneval",))
    for problem in problems:
        words = words_of(f"please solve this: {problem['prompt']} thanks")
        assert index.match("Please solve this", words, word_pairs(words)) != ""
    words = words_of("How do I print a list of words on one line with join?")
    assert index.match("How do I print a list?", words, word_pairs(words)) == ""


def test_a_benchmark_file_of_ones_own(config, dataset, tmp_path):
    prompt = dataset["train"][5]["prompt"].split("<</SYS>>")[1]
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"prompt": prompt.replace("[/INST]", "")}) + "\n", encoding="utf-8")
    report = curate(replace(config, benchmarks=(str(path),), run_dir=tmp_path / "run"))
    assert (dataset["train"][5]["question_id"], f"{path} 1") in report.benchmark_hits


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "has no line with a `prompt`"),
        ('{"x": 1}\n', "line 1, is no JSON object with a `prompt` .'prompt'.: repair"),
        ('{"prompt": "x"}\n3', "line 2, is no JSON object"),
        ("{", "line 1, is no JSON"),
    ],
)
def test_a_bad_benchmark_file(tmp_path, text, words):
    path = tmp_path / "mine.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=words):
        load_problems(str(path))
    with pytest.raises(DataError, match="does not exist: check BENCHMARKS"):
        load_problems(str(tmp_path / "none.jsonl"))


# -- Other sources.

OWN_ROWS = [
    {
        "prompt": f"How do I {verb} a {thing}?",
        "answer": f"Take the {thing} and {verb} it carefully, {n} times in a row: `{verb}({n})`.",
    }
    for n, (verb, thing) in enumerate(
        (verb, thing)
        for verb in ("open", "close", "paint", "lift", "sell")
        for thing in ("door", "window", "gate", "barrel", "crate", "lamp")
    )
]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path, rows):
    pa.parquet.write_table(pa.Table.from_pylist(rows), path)


@pytest.mark.parametrize(
    "name, write", [("a.jsonl", write_jsonl), ("a.csv", write_csv), ("a.parquet", write_parquet)]
)
def test_a_file_of_ones_own(tmp_path, name, write):
    write(tmp_path / name, OWN_ROWS)
    config = Config.from_profile(
        "demo",
        data_source=str(tmp_path / name),
        run_dir=tmp_path / "run",
        near_duplicate_similarity=0.9,
    )
    report = curate(config)
    rows = datasets.load_from_disk(str(config.dataset_dir))["train"].to_list()
    assert report.kept_pairs == len(OWN_ROWS) == len(rows) + report.validation_rows
    row = rows[0]
    own = OWN_ROWS[row["question_id"] - 1]
    assert own["prompt"] in row["prompt"] and own["answer"] in row["completion"]
    assert row["question_score"] is None and row["url"] == "" and name in row["licence"]


def test_a_hub_dataset_in_the_articles_form(tmp_path, monkeypatch):
    """One column `text`, whose system message opens with a closing tag: it is the row's own."""
    texts = [
        f"<s>[INST] <</SYS>>\nOld message.\n<</SYS>>\n\n{row['prompt']} [/INST] {row['answer']} "
        f"</s>"
        for row in OWN_ROWS
    ]
    hub = datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": texts}))
    monkeypatch.setattr(datasets, "load_dataset", lambda name: hub)
    config = Config.from_profile(
        "demo",
        data_source="luisroque/instruct-python-llama2-20k",
        run_dir=tmp_path,
        near_duplicate_similarity=0.9,
    )
    report = curate(config)
    row = datasets.load_from_disk(str(config.dataset_dir))["train"][0]
    assert report.kept_pairs == len(OWN_ROWS)
    assert prompts.parse(row["prompt"]).system == "Old message."
    assert SYSTEM_MESSAGE not in row["prompt"]
    assert curation_of(config, config.dataset_dir)["system_message"] == "Old message."
    assert row["completion"].strip() == OWN_ROWS[row["question_id"] - 1]["answer"]


def test_a_hub_dataset_that_cannot_be_had(tmp_path, monkeypatch):
    def fail(name):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        DataError, match=r"a/b could not be loaded \(no route to host\): check the name, "
    ):
        opened("a/b", tmp_path)


def test_a_file_with_fenced_python2_loses_that_row(tmp_path):
    rows = [
        *OWN_ROWS,
        {
            "prompt": "How do I print?",
            "answer": "Type this, then look at it:\n\n```python\nprint 'x'\n```\n\nand so on.",
        },
    ]
    write_jsonl(tmp_path / "a.jsonl", rows)
    config = Config.from_profile(
        "demo",
        data_source=str(tmp_path / "a.jsonl"),
        run_dir=tmp_path / "run",
        near_duplicate_similarity=0.9,
    )
    assert not curate(config).removed["python2"]  # unless it is asked for
    assert curate(replace(config, check_python=True)).removed["python2"] == [len(rows)]


@pytest.mark.parametrize(
    "name, data, words",
    [
        ("a.jsonl", b"", r"a.jsonl is empty \(0 bytes\)"),
        (
            "a.jsonl",
            b'{"foo": "x"}\n',
            "a.jsonl, line 1, has no column for the prompt .* its columns are foo: rename yours",
        ),
        (
            "a.jsonl",
            b'{"prompt": "x", "answer": 3}\n',
            r"a.jsonl, line 1, has \['str', 'int'\] in .*1 of 1 lines",
        ),
        ("a.jsonl", b'{"prompt": "x"\n', "a.jsonl, line 1, is no JSON"),
        ("a.jsonl", b"[1]\n", "line 1, is int, not an object"),
        (
            "a.jsonl",
            b'{"prompt": "caf\xe9", "answer": "x"}\n',
            "a.jsonl, line 1, holds .* not UTF-8",
        ),
        ("a.csv", b'prompt,answer\n"caf\xe9",x\n', "a.csv, line 2, holds .* not UTF-8"),
        ("a.csv", b"prompt,answer\n", "holds no row"),
        ("a.parquet", b"no parquet at all", "a.parquet is damaged or cut off"),
        ("a.txt", b"text", "a.txt ends in '.txt': give a .jsonl"),
    ],
)
def test_a_bad_file_of_ones_own(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=words):
        opened(tmp_path / name, tmp_path)


def test_a_source_that_is_nowhere(tmp_path):
    with pytest.raises(DataError, match="no such file, .*: give a folder with Questions.csv"):
        opened(tmp_path / "none", tmp_path)


def test_kagglehub_missing_or_without_credentials(tmp_path, monkeypatch):
    import sys
    import types

    monkeypatch.setitem(sys.modules, "kagglehub", None)
    with pytest.raises(DataError, match="did not deliver .* run `pip install kagglehub`"):
        opened("kagglehub", tmp_path)

    def refuse(name):
        raise PermissionError("401")

    monkeypatch.setitem(sys.modules, "kagglehub", types.SimpleNamespace(dataset_download=refuse))
    with pytest.raises(DataError, match=r"not deliver .* \(401\): .* check ~/.kaggle/kaggle.json"):
        opened("kagglehub", tmp_path)
    fake = types.SimpleNamespace(dataset_download=lambda name: str(SAMPLE_DIR))
    monkeypatch.setitem(sys.modules, "kagglehub", fake)
    assert opened("kagglehub", tmp_path).questions == 780


# -- Bad CSV files: one clear sentence each, with the file, the value and what to do.

QUESTIONS = b"Id,OwnerUserId,CreationDate,Score,Title,Body\n"
ROW = b'7,1,2012-05-06T07:08:09Z,3,"A title","<p>A body</p>"\n'


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "csv"
    shutil.copytree(SAMPLE_DIR, path)
    return path


def fails(folder, words, tmp_path):
    with pytest.raises(DataError, match=words) as caught:
        opened(folder, tmp_path)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400 and str(tmp_path) not in message
    return message


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "Questions.csv has no column Id, .*; its header is ''"),
        (QUESTIONS, "Questions.csv has a header and no row"),
        (
            b"Id,Score,Title\n1,2,x\n",
            "Questions.csv has no column OwnerUserId, Body; its header is 'Id,Score,Title'",
        ),
        (QUESTIONS.replace(b",", b";") + ROW, "header is 'Id;OwnerUserId;.*: save it with commas"),
        (
            QUESTIONS.replace(b",", b"\t") + ROW,
            r"header is 'Id.tOwner.*: save it with commas",
        ),
        (
            QUESTIONS + ROW * 1 + b'8,1,2012,3,"A title","<p>cut',
            "Questions.csv, line 3, unexpected end of data: repair or remove that row, or get",
        ),
        (
            QUESTIONS + ROW + b"8,1,2012,3,t\0itle,body\n",
            "Questions.csv, line 3, holds a NUL byte and is damaged or not ISO-8859-1",
        ),
        (
            "\ufeff".encode("utf-16") + (QUESTIONS + ROW).decode().encode("utf-16-le"),
            "no column Id, .* in ISO-8859-1",
        ),
        ((QUESTIONS + ROW).decode().encode("utf-16-le"), "no column Id"),
        (QUESTIONS + ROW + ROW, "Questions.csv, line 3, UNIQUE constraint failed: questions.id"),
        (
            QUESTIONS + ROW + b"seven,1,2012,3,t,b\n",
            "Questions.csv, line 3, invalid literal for int.* 'seven'",
        ),
        (
            QUESTIONS + ROW + b"8,1,2012,high,t,b\n",
            "Questions.csv, line 3, .*'high': repair",
        ),
        (
            QUESTIONS + ROW + b",1,2012,3,t,b\n",
            "Questions.csv, line 3, .*'': repair",
        ),
        (QUESTIONS + ROW + b"8,1,2012,3\n", "Questions.csv, line 3, has 4 fields and not 6"),
        (
            QUESTIONS + ROW + b'8,1,2012,3,t,"' + b"x" * 50_000_000 + b'"\n' + ROW,
            "Questions.csv, line 3, field larger than field limit .* repair or remove that",
        ),
    ],
    ids=(
        "empty header missing_column semicolon tab truncated nul utf16 utf16_no_mark duplicate_id "
        "id_text score_text id_empty short_row huge_body"
    ).split(),
)
def test_bad_questions(folder, tmp_path, data, words):
    (folder / "Questions.csv").write_bytes(data)
    fails(folder, words, tmp_path)


def test_bad_answers(folder, tmp_path):
    path = folder / "Answers.csv"
    good = path.read_bytes()
    path.write_bytes(good.replace(b"ParentId", b"Parent", 1))
    fails(folder, "Answers.csv has no column ParentId", tmp_path)
    path.write_bytes(good[:-40])
    fails(folder, r"Answers.csv, line \d+, unexpected end of data", tmp_path)
    path.unlink()
    fails(folder, "Answers.csv is missing in csv/", tmp_path)


def test_without_tags_nothing_is_tagged(folder, tmp_path):
    (folder / "Tags.csv").unlink()
    found = opened(folder, tmp_path)
    assert all(pair["tags"] == [] for pair in found.pairs(range(780)))


def test_utf8_is_repaired(folder, tmp_path, config, dataset):
    """A set that was saved as UTF-8 gives the rows that the ISO-8859-1 one gives."""
    for name in ("Questions", "Answers"):
        path = folder / f"{name}.csv"
        path.write_text(path.read_bytes().decode("latin-1"), encoding="utf-8", newline="")
    other = replace(config, data_source=str(folder), run_dir=tmp_path / "run")
    curate(other)
    again = datasets.load_from_disk(str(other.dataset_dir))
    plain = [row for row in dataset["train"]["prompt"] if row.isascii()]
    assert set(plain) <= set(again["train"]["prompt"])
    twice = "café".encode().decode("latin-1")
    assert kaggle.repair(twice) == kaggle.repair("café") == "café" != twice


def test_no_row_survives(tmp_path):
    config = Config.from_profile("demo", min_answer_score=100_000, run_dir=tmp_path)
    words = (
        r"no row survives of 780 questions \(removed: low_score 773, no_answer 7\): lower "
        "MIN_QUESTION_SCORE or MIN_ANSWER_SCORE; check that Answers.csv"
    )
    with pytest.raises(DataError, match=words):
        curate(config)
    config = Config.from_profile("demo", max_length=16, run_dir=tmp_path)
    with pytest.raises(DataError, match=r"removed: too_many_tokens 631, .*\): raise MAX_LENGTH; "):
        curate(config)
    assert not list(tmp_path.glob("[!.]*")) and left_over(tmp_path) == []


def test_each_rule_has_its_advice():
    assert rules.ADVICE.keys() == rules.RULES.keys()
    for rule in rules.RULES:
        problem = "its first problem" if rule == "not_verified" else ""
        report = Report(raw_questions=2, first_problem=problem)
        report.removed[rule].append(1)
        message = str(report.too_few("no row survives"))
        assert message.startswith(f"no row survives (removed: {rule} 1): ")
        assert [r for r, advice in rules.ADVICE.items() if advice in message] == [rule]
        assert ("its first problem" in message) == (rule == "not_verified")
        assert "\n" not in message and len(message) < 300


def test_a_tokenizer_that_writes_bos_twice_is_named(tmp_path, tokenizer):
    folder = tmp_path / "two-bos"
    shutil.copytree(tokenizer.name_or_path, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    write_bos_twice(folder, tokenizer)
    config = Config.from_profile("demo", model_name=str(folder), run_dir=tmp_path)
    words = (
        r"removed: not_verified 631, .*\): .*MODEL_NAME .*: 2 BOS tokens, there must be exactly one"
    )
    with pytest.raises(DataError, match=words):
        curate(config)


WORDS = [chr(97 + a) + chr(97 + b) for a in range(5) for b in range(8)]


def curate_rows(tmp_path, rows, **changes):
    write_jsonl(tmp_path / "a.jsonl", rows)
    source = {"data_source": str(tmp_path / "a.jsonl"), "run_dir": tmp_path / "run"}
    return curate(Config.from_profile("demo", **source, **changes))


def test_too_few_rows_are_told_with_what_took_the_others(tmp_path):
    rows = [OWN_ROWS[0], {"prompt": "What is 1?", "answer": "One."}]
    words = r"too few rows survive: 1 of 2.* \(removed: length 1\): .*; lower MIN_ANSWER_CHARACTERS"
    with pytest.raises(DataError, match=words):
        curate_rows(tmp_path, rows, min_answer_characters=60)
    with pytest.raises(DataError, match="too few rows survive: 1 of 1.*each: give more rows that"):
        curate_rows(tmp_path, rows[:1])


def test_where_all_groups_are_large_the_smallest_is_held_out():
    held = choose_validation(np.array([1] * 6 + [7] * 5), 1, seed=0)
    assert held.tolist() == [False] * 6 + [True] * 5


def test_own_rows_that_are_cast_in_one_mould_are_split_row_by_row(tmp_path):
    rows = [
        {"prompt": f"How do I turn {n}?", "answer": " ".join(f"{word}{n // 6}" for word in WORDS)}
        for n in range(11)
    ]
    report = curate_rows(tmp_path, rows, near_duplicate_similarity=1.0)
    assert (report.train_rows, report.validation_rows) == (10, 1)


def test_an_unwritable_run_folder(tmp_path):
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    config = Config.from_profile("demo", run_dir=tmp_path / "file" / "run")
    with pytest.raises(
        OSError,
        match=r"run folder .*cannot be written \(Not a directory\): set RUN_DIR",
    ):
        curate(config)


def test_a_failed_run_keeps_the_old_dataset(tmp_path, monkeypatch):
    config = Config.from_profile("smoke", run_dir=tmp_path)
    curate(config)
    before = (config.dataset_dir / "README.md").read_text("utf-8")

    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(curation, "dataset_card", fail)
    with pytest.raises(OSError, match="disk full"):
        curate(config)
    assert (config.dataset_dir / "README.md").read_text("utf-8") == before
    assert len(datasets.load_from_disk(str(config.dataset_dir))["train"]) == 16


def test_text_that_would_break_the_template_is_removed(folder, tmp_path, tokenizer):
    """Markers of the template and special tokens within a post:

    one rule sees the text, the other the tokens.
    """
    with (folder / "Answers.csv").open(encoding="latin-1", newline="") as file:
        header, *rows = csv.reader(file)
    rows[0][5] = rows[0][5].replace("<p>", "<p>[INST] ", 1)
    rows[1][5] = rows[1][5].replace("<p>", f"<p>&lt;{tokenizer.eos_token[1:-1]}&gt; ", 1)
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    (folder / "Answers.csv").write_bytes(text.getvalue().encode("latin-1"))
    report = curate(Config.from_profile("smoke", data_source=str(folder), run_dir=tmp_path / "run"))
    assert report.removed["template_marker"] == [int(rows[0][3])]
    assert report.removed["not_verified"] == [int(rows[1][3])]


# -- Uploading.


class FakeHub:
    """Keeps what each call to the Hub would have sent; the user is logged in as `reader`."""

    def __init__(self):
        self.commits, self.repositories = {}, []

    def create_repo(self, name, repo_type, exist_ok):
        self.repositories.append((name, repo_type))

    def upload_folder(self, repo_id, repo_type, folder_path, delete_patterns, commit_message):
        splits = {"train": "data/train-*.parquet", "validation": "data/validation-*.parquet"}
        rows = {
            split: len(pa.parquet.read_table(next(Path(folder_path).glob(pattern))))
            for split, pattern in splits.items()
        }
        self.commits[repo_id] = rows, (Path(folder_path) / "README.md").read_text("utf-8")


@pytest.fixture
def fake_hub(monkeypatch):
    fake = FakeHub()
    monkeypatch.setattr(huggingface_hub, "whoami", lambda: {"name": "reader"})
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    return fake


def test_without_a_token_nothing_is_uploaded(config, report, fake_hub, monkeypatch):
    def no_token():
        raise huggingface_hub.errors.LocalTokenNotFoundError("none")

    monkeypatch.setattr(huggingface_hub, "whoami", no_token)
    with pytest.raises(NotLoggedIn, match="nothing was uploaded: .* `hf auth login`"):
        publishing.push_dataset(config)
    assert not fake_hub.repositories and not fake_hub.commits


def test_each_repository_has_its_own_rows_and_a_card_that_tells_them(
    config, report, fake_hub, monkeypatch
):
    monkeypatch.setattr(publishing, "SMALL_SET_ROWS", 100)
    before = {path.name for path in config.run_dir.iterdir()}
    small, full = "reader/instruct-python-llama2-20k", "reader/instruct-python-500k"
    assert publishing.push_dataset(config) == [small, full]
    assert fake_hub.repositories == [(small, "dataset"), (full, "dataset")]
    every, held = report.train_rows, report.validation_rows
    told = {small: f"100 rows to train (the first of {every})", full: f"{every} rows to train"}
    for name, train in ((small, 100), (full, every)):
        rows, card = fake_hub.commits[name]
        assert rows == {"train": train, "validation": held}
        assert f"\n{told[name]} and {held} to validate, made from\n780 questions" in card
        assert f'"{SYSTEM_MESSAGE}"' in card
    assert {path.name for path in config.run_dir.iterdir()} == before


def test_a_push_that_is_interrupted_leaves_no_rows_without_a_card(
    config, report, fake_hub, monkeypatch
):
    """Both go up in one commit, and whatever ends it leaves nothing behind here."""

    def fail(**options):
        raise ConnectionError("the network is gone")

    for name in ("upload_folder", "upload_file"):
        monkeypatch.setattr(fake_hub, name, fail, raising=False)
    monkeypatch.setattr(
        datasets.DatasetDict, "push_to_hub", lambda self, name: fake_hub.commits.update({name: ""})
    )
    before = {path.name for path in config.run_dir.iterdir()}
    with pytest.raises(ConnectionError):
        publishing.push_dataset(config)
    assert not fake_hub.commits and {path.name for path in config.run_dir.iterdir()} == before


def test_push_before_notebook_02(tmp_path):
    with pytest.raises(FileNotFoundError, match="run notebook 02"):
        publishing.push_dataset(Config.from_profile("demo", run_dir=tmp_path))
