"""Rows of one's own: each format is read whole, what is not used or cannot be is told."""

import csv
import gzip
import json

import datasets
import pandas
import pytest
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from helpers import prompts
from helpers.config import PROJECT_DIR, Config
from helpers.data import own_rows, sources
from helpers.data.conversations import read_row
from helpers.data.files import NoRow, split_of
from helpers.data.posts import DataError
from helpers.data.similarity import words_of
from helpers.training import training_rows
from tests.conftest import problems_of
from tests.notebook_code import curate

CASES = PROJECT_DIR / "tests" / "cases"
EXPECTED = json.loads((CASES / "expected.json").read_text(encoding="utf-8"))
EXPECTED.pop("what")
ROWS = [
    {"prompt": f"What is the colour of the {thing}?", "answer": f"The {thing} is {colour}."}
    for thing, colour in zip(
        "door sky grass snow coal rose sea sun brick mouse plum sand".split(),
        "brown blue green white black red grey yellow orange silver violet pale".split(),
        strict=True,
    )
]


def opened(source, folder, held=None):
    """(Posts, conversations in the order of their numbers) of a source."""
    folder.mkdir(exist_ok=True)
    config = Config.from_profile("demo", data_source=str(source), validation_source=held)
    posts = sources.open_source(config, folder)
    pairs = sorted(posts.pairs(range(posts.questions)), key=lambda pair: pair["question_id"])
    return posts, [{**json.loads(pair["question"]), "tags": pair["tags"]} for pair in pairs]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def config_of(path, tmp_path, **changes) -> Config:
    given = {"data_source": str(path), "run_dir": tmp_path / "run", "system_message": "Be brief."}
    return Config.from_profile("demo", **{**given, **changes})


def learned(tokenizer, row) -> str:
    encoded = prompts.encode(tokenizer, row["prompt"], row["completion"])
    return tokenizer.decode([t for t in encoded["labels"] if t != prompts.IGNORED_LABEL])


def saved(config):
    dataset = datasets.load_from_disk(str(config.dataset_dir))
    return {name: rows.to_list() for name, rows in dataset.items()}


# -- The cases of tests/cases, each with what must happen.

READ = [name for name, case in EXPECTED.items() if "rows" in case]
REFUSED = [name for name, case in EXPECTED.items() if "refused" in case]


@pytest.mark.parametrize("name", READ)
def test_a_case_is_read_whole(name, tmp_path):
    posts, rows = opened(CASES / name, tmp_path / "work")
    assert len(rows) == EXPECTED[name]["rows"] and not posts.seen.lost
    assert not posts.seen.unused and posts.seen.formats.total() == len(rows)
    stored = (CASES / name).read_text(encoding="utf-8-sig").replace("\\n", "\n").replace('\\"', '"')
    for row in rows:  # each text stands in the file as it is
        assert all(text in stored for text in row["turns"][0][0].split("\n\n"))
        assert all(answer in stored for _, answer in row["turns"])


def test_columns_of_the_cases_are_rendered(tmp_path):
    _, rows = opened(CASES / "alpaca.jsonl", tmp_path / "a")
    first = json.loads((CASES / "alpaca.jsonl").open(encoding="utf-8").readline())
    assert rows[0]["turns"] == [[f"{first['instruction']}\n\n{first['input']}", first["output"]]]
    _, rows = opened(CASES / "system.jsonl", tmp_path / "b")
    assert [row["system"] for row in rows] == [f"You are pirate {n}." for n in range(20)]
    posts, _ = opened(CASES / "messages.jsonl", tmp_path / "c")
    assert list(posts.seen.formats) == ["messages (OpenAI's form)"]


@pytest.mark.parametrize("name", REFUSED)
def test_a_case_is_refused_by_name(name, tmp_path):
    with pytest.raises(DataError, match=f"{name}, line 1, ") as refusal:
        opened(CASES / name, tmp_path / "work")
    assert all(word in str(refusal.value) for word in EXPECTED[name]["refused"])


def test_rows_with_more_fields_than_the_header_are_put_aside_with_their_lines(tmp_path):
    words = r"unquoted.csv, line 2, has 3 fields and .* 20 of 20 lines .* used \(2, 3, .*21\)"
    with pytest.raises(DataError, match=words):
        opened(CASES / "unquoted.csv", tmp_path / "work")


def test_own_rows_meet_no_rule_for_posts(tmp_path):
    for name in ("short3", "unlabelled_fence", "zh_21", "indent", "sql"):
        config = config_of(CASES / f"{name}.jsonl", tmp_path / name)
        report = curate(config)
        assert report.kept_pairs == 20, (name, report.funnel())
    assert report.validation_leaks == 0
    rows = saved(config_of("x", tmp_path / "indent"))["train"]
    assert all(row["completion"].startswith("     x = ") for row in rows)
    asked = config_of(CASES / "unlabelled_fence.jsonl", tmp_path, check_python=True)
    with pytest.raises(DataError, match="removed: python2 20"):
        curate(asked)
    with pytest.raises(DataError, match="removed: length 20"):
        curate(config_of(CASES / "short3.jsonl", tmp_path, min_answer_characters=60))


def test_near_duplicates_are_found_where_no_space_parts_words(tmp_path, tokenizer):
    with pytest.raises(DataError) as told:
        own_rows.describe(config_of(CASES / "zh_neardup_nopunct.jsonl", tmp_path), tokenizer)
    assert "near_duplicate 19" in str(told.value) and "row 2 is like row 1 (0." in str(told.value)


@pytest.mark.parametrize(
    "text, words",
    [
        ("火车站 到", ["火", "车", "站", "到"]),
        ("กขค", ["ก", "ข", "ค"]),
        ("Où est-il", ["où", "est", "il"]),
        ("Привет, мир", ["привет", "мир"]),
        ("iPhone手机", ["iphone", "手", "机"]),
        ("😀 !?", ["😀"]),
        ("¿ !?", ["¿", "!", "?"]),
        ("gut 👍🏽", ["gut", "👍", "🏽"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("كَتَبَ، كُتُب", ["كَتَبَ", "كُتُب"]),
        ("cafe\u0301 x \u2264 y", ["cafe\u0301", "x", "\u2264", "y"]),
    ],
)
def test_words_of_any_script(text, words):
    assert words_of(text) == words


# -- One row.


def said(*roles):
    return {"messages": [{"role": role, "content": role} for role in roles]}


SYSTEM, ASKED = said("system")["messages"], said("user", "assistant")["messages"]


@pytest.mark.parametrize(
    "record, turns, system, unused",
    [
        ({"Question": "q", "ANSWER ": "a", "id": 7}, [("q", "a")], None, ["id"]),
        ({"instruction": "i", "context": "c", "response": "r"}, [("i\n\nc", "r")], None, []),
        ({"instruction": "i", "input": " \n", "output": "r"}, [("i", "r")], None, []),
        ({"System Prompt": " s ", "USER": "q", "Assistant": "a"}, [("q", "a")], "s", []),
        ({"": "0", "prompt": "p", "answer": "a"}, [("p", "a")], None, [""]),
        ({"text": "[INST] <<SYS>> s <</SYS>> q [/INST] a"}, [("q", "a")], "s", []),
        ({"prompt": "<s>[INST] q [/INST] a </s>"}, [("q", "a")], None, []),
        ({"instruction": "i", "question": "q", "answer": "a"}, [("i\n\nq", "a")], None, []),
        ({"prompt": "p", "answer": "a", "output": "o"}, [("p", "a")], None, ["output"]),
        ({"prompt": "p", "answer": "a", "function": "f"}, [("p", "a")], None, ["function"]),
        ({"prompt": "p", "answer": "a", "rejected": False}, [("p", "a")], None, ["rejected"]),
        (
            {"input": "2", "output": "b", "history": [["1", "a"]], "system": "s"},
            [("1", "a"), ("2", "b")],
            "s",
            [],
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            [("q", "a")],
            None,
            [],
        ),
        (
            {"messages": [*SYSTEM, *ASKED], "system": "another"},
            [("user", "assistant")],
            "system",
            ["a system message beside that of messages"],
        ),
        (
            {"messages": [*SYSTEM, *SYSTEM, *ASKED]},
            [("user", "assistant")],
            "system\n\nsystem",
            [],
        ),
        (
            {"messages": [*SYSTEM, {"role": "assistant", "content": "Hi"}, *ASKED]},
            [("user", "assistant")],
            "system",
            ["an answer before the first request in messages"],
        ),
        (
            {"messages": [*ASKED, {"role": "user", "content": "Thanks"}]},
            [("user", "assistant")],
            None,
            ["a last request without an answer in messages"],
        ),
        (
            {"text": "<s>[INST] q [/INST] a </s><s>[INST] r [/INST]"},
            [("q", "a")],
            None,
            ["a last request without an answer in text"],
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": ["q", {"type": "input_text", "text": "r"}]},
                    {"role": "Assistant", "content": [{"type": "output_text", "text": "a"}]},
                ]
            },
            [("qr", "a")],
            None,
            [],
        ),
        (
            {
                "system": "s",
                "source": "x",
                "messages": '[{"role": "user", "content": "q"}, '
                '{"role": "assistant", "content": [{"type": "text", "text": "a"}], "weight": 1}]',
            },
            [("q", "a")],
            "s",
            ["messages.weight", "source"],
        ),
        (
            {
                "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}],
                "completion": [{"role": "assistant", "content": "a"}],
            },
            [("q", "a")],
            "s",
            [],
        ),
        (
            {"text": "<s>[INST] <<SYS>>\ns\n<</SYS>>\n\nq [/INST] a </s><s>[INST] r [/INST]  b"},
            [("q", "a"), ("r", " b")],
            "s",
            [],
        ),
        (
            {"prompt": "[INST] <<SYS>>\ns\n<</SYS>>\n\nq [/INST]", "completion": " a "},
            [("q", "a")],
            "s",
            [],
        ),
    ],
)
def test_a_row_is_read(record, turns, system, unused):
    row = read_row(record)
    assert (row.turns, row.system, row.unused) == (turns, system, unused)


@pytest.mark.parametrize(
    "record, error, words",
    [
        (said("user"), NoRow, "not user, assistant in turn: user"),
        (said("assistant", "user"), NoRow, "in turn: assistant, user"),
        (said("user", "user", "assistant"), NoRow, "in turn: user, user, assistant"),
        (said("user", "assistant", "user", "user"), NoRow, "in turn"),
        (said("user", "assistant", "system", "user", "assistant"), NoRow, "in turn: user, "),
        (said("system"), NoRow, "in turn"),
        ({"messages": []}, NoRow, "no messages with a role in messages"),
        ({"messages": "[{"}, NoRow, "no messages with a role in messages"),
        (said("user", "tool", "assistant"), DataError, "holds role tool, and the templates"),
        ({"tools": [{"name": "f"}], **said("user", "assistant")}, DataError, "holds tools"),
        ({"image": b"x", "prompt": "p", "answer": "a"}, DataError, "holds image, and this course"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            DataError,
            "holds image_url, and this course",
        ),
        ({"prompt": "p", "id": "1"}, NoRow, "none for the answer"),
        ({"chosen": "a", "rejected": "b"}, DataError, "holds chosen, rejected, and this course"),
        ({"image_path": "a.png", "prompt": "p", "answer": "a"}, DataError, "holds image_path"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, NoRow, "in turn: user"),
        ({"prompt": "p", "answer": 7}, NoRow, "where text must stand: write it as text"),
        ({"text": "### Instruction: q"}, NoRow, "no text of the form <s>"),
        ({"prompt": "p", "answer": "half \ud83d of it"}, NoRow, "half of a character"),
        ({"prompt": "p", "answer": "x" * 2_000_000}, NoRow, "more than 1,048,576 characters"),
        ({"prompt": "p", "answer": float("nan")}, NoRow, "'float'"),
        ({"prompt": "p", "answer": ["a"]}, NoRow, r"\['str', 'list'\]"),
        ({"text": "<s>[INST] q </s>[/INST] [INST] x"}, NoRow, "not of the form"),
        ({"title": "t", "body": "b"}, NoRow, "its columns are title, body: rename yours"),
    ],
)
def test_what_is_no_row_says_so(record, error, words):
    with pytest.raises(error, match=words):
        read_row(record)


# -- Files, folders, datasets.


def test_each_kind_of_file_gives_the_same_rows(tmp_path):
    frame, text = pandas.DataFrame(ROWS), json.dumps(ROWS)
    write(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    (tmp_path / "list.json").write_text(f"\ufeff{text}", encoding="utf-8")
    (tmp_path / "list.json.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "lines.json").write_bytes((tmp_path / "a.jsonl").read_bytes())
    (tmp_path / "data.json").write_text(json.dumps({"version": 1, "data": ROWS}), encoding="utf-8")
    named = json.dumps({f"r{n}": row for n, row in enumerate(ROWS)})
    (tmp_path / "named.json").write_text(named, encoding="utf-8")
    level = {"train": ROWS[:9], "training": ROWS[9:]}
    (tmp_path / "dev.json").write_text(json.dumps(level), encoding="utf-8")
    (tmp_path / "16.json").write_text(text, encoding="utf-16")
    (tmp_path / "16.jsonl").write_bytes((tmp_path / "a.jsonl").read_text("utf-8").encode("utf-16"))
    frame.to_csv(tmp_path / "16.csv", sep="\t", index=False, encoding="utf-16")
    (tmp_path / "UPPER.JSONL").write_bytes((tmp_path / "a.jsonl").read_bytes())
    (tmp_path / "packed.jsonl").write_bytes((tmp_path / "a.jsonl.gz").read_bytes())
    (tmp_path / "unpacked.json.gz").write_bytes(text.encode())
    frame.to_json(tmp_path / "index.json", orient="index")
    for number, separator in enumerate(",;\t|"):
        frame.to_csv(tmp_path / f"{number}.csv", sep=separator, index=False)
    frame.to_csv(tmp_path / "a.tsv", sep="\t", index=False, quoting=csv.QUOTE_ALL)
    frame.to_csv(tmp_path / "a.csv.gz")  # with a column that has no name
    frame.to_parquet(tmp_path / "a.parquet")
    paths = sorted(path for path in tmp_path.iterdir())
    for path in paths:
        _, rows = opened(path, tmp_path / "work")
        found = [turn for row in rows for turn in row["turns"]]
        assert found == [list(row.values()) for row in ROWS], path.name
    assert len(paths) == 22


def test_a_folder_with_its_own_validation_file(tmp_path, tokenizer):
    folder = tmp_path / "mine"
    (folder / "data").mkdir(parents=True)
    write(folder / "data" / "train-1.jsonl", ROWS[:5])
    write(folder / "data" / "train-2.jsonl", ROWS[5:9])
    write(folder / "valid.jsonl", ROWS[8:])  # one of them stands in training too
    write(folder / "test.jsonl", ROWS[:1])
    (folder / "README.md").write_text("mine", encoding="utf-8")
    config = config_of(folder, tmp_path)
    with pytest.warns(UserWarning, match=r"not used of .*mine: README.md, test.jsonl"):
        report = curate(config)
    assert (report.train_rows, report.validation_rows) == (8, 4) and report.validation_leaks == 0
    held = {row["completion"].strip() for row in saved(config)["validation"]}
    assert held == {row["answer"] for row in ROWS[8:]}
    told = own_rows.describe(config, tokenizer)
    assert "8 rows to train, 4 to validate (your own), 0 of which" in told


def test_a_validation_file_beside(tmp_path):
    train, held = write(tmp_path / "a.jsonl", ROWS[:9]), write(tmp_path / "b.jsonl", ROWS[9:])
    posts, rows = opened(train, tmp_path / "work", held=str(held))
    assert posts.seen.held == 3
    assert [row["tags"] for row in rows] == [[]] * 9 + [["validation"]] * 3


def test_saved_datasets_and_hub_datasets_with_their_splits(tmp_path, monkeypatch):
    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(str(tmp_path / "one"))
    posts, found = opened(tmp_path / "one", tmp_path / "work")
    assert len(found) == 12 and posts.seen.held == 0
    splits = datasets.DatasetDict(train_sft=rows, test_sft=rows.select([0]))
    splits.save_to_disk(str(tmp_path / "two"))
    posts, _ = opened(tmp_path / "two", tmp_path / "work")
    assert posts.questions == 13 and posts.seen.held == 1
    heard = datasets.Features({"answer": datasets.Value("string"), "voice": datasets.Audio()})
    silent = datasets.Dataset.from_dict({"answer": ["a"], "voice": [None]}, features=heard)
    silent.save_to_disk(str(tmp_path / "sound"))
    with pytest.raises(DataError, match="sound holds audios in voice, and this course trains on"):
        opened(tmp_path / "sound", tmp_path / "work")
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *given: asked.append(given) or splits)
    names = {"a/b": 13, "a/b:main": 13, "a/b:main:test_sft": 1, "a/b::train_sft": 12}
    for name, questions in names.items():
        posts, _ = opened(name, tmp_path / "work")
        assert posts.questions == questions and posts.seen.held == (questions == 13)
    assert asked == [("a/b",), ("a/b", "main"), ("a/b", "main"), ("a/b",)]
    with pytest.raises(DataError, match="has no split 'dev': it has train_sft, test_sft"):
        opened("a/b::dev", tmp_path / "work")


def test_what_there_is_to_validate_with(tmp_path):
    train, folder = write(tmp_path / "a.jsonl", ROWS[:9]), tmp_path / "both"
    folder.mkdir()
    write(folder / "train.jsonl", ROWS)
    write(folder / "dev.json", ROWS[9:])
    posts, _ = opened(train, tmp_path / "work", held=str(folder))
    assert posts.questions == 12 and posts.seen.held == 3
    assert posts.seen.not_read == ["train.jsonl"]
    (folder / "train.jsonl").rename(folder / "test.jsonl")
    with pytest.raises(DataError, match=r"\(dev.json, test.jsonl\) and none to train on"):
        opened(folder, tmp_path / "work")
    (folder / "dev.json").write_text(json.dumps({"data": ROWS[:2], "version": 1}), encoding="utf-8")
    posts, _ = opened(train, tmp_path / "work", held=str(folder))
    assert posts.seen.held == 2 and "dev.json[version]" in posts.seen.not_read
    for held, words in {
        "none.jsonl": "VALIDATION_SOURCE is 'none.jsonl', and there is no such",
        "sample": "VALIDATION_SOURCE is 'sample', and there is .*no row in that folder",
    }.items():
        with pytest.raises(DataError, match=words):
            opened(train, tmp_path / "work", held=held)
    with pytest.raises(DataError, match="posts of a forum take none"):
        opened("sample", tmp_path / "work", held=str(train))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="or rows of yours as .jsonl"):
        opened(tmp_path / "nothing", tmp_path / "work")


def test_rows_that_ask_the_same_stay_on_one_side_or_are_told(tmp_path, tokenizer):
    other = [{"prompt": row["prompt"], "answer": row["answer"][::-1]} for row in ROWS]
    config = config_of(write(tmp_path / "a.jsonl", [*ROWS, *other]), tmp_path)
    report = curate(config)
    assert report.kept_pairs == 24 and report.validation_leaks == 0
    sides = [{row["prompt"] for row in rows} for rows in saved(config).values()]
    assert not sides[0] & sides[1]
    held = write(tmp_path / "b.jsonl", other[:3])
    told = own_rows.describe(
        config_of(write(tmp_path / "a.jsonl", ROWS), tmp_path, validation_source=str(held)),
        tokenizer,
    )
    assert "3 to validate (your own), 3 of which have a near duplicate in training or ask" in told
    form = [{"prompt": "A colour?", "answer": row["answer"]} for row in ROWS]  # asks nothing
    config = config_of(write(tmp_path / "a.jsonl", form), tmp_path)
    report = curate(config)
    assert report.kept_pairs == 12 and (report.validation_rows, report.validation_leaks) == (1, 0)


def test_no_leak_is_denied_where_none_could_be_found(tmp_path, tokenizer):
    rows = [{"prompt": row["prompt"].split()[-1], "answer": row["answer"][-5:]} for row in ROWS]
    told = own_rows.describe(config_of(write(tmp_path / "a.jsonl", rows), tmp_path), tokenizer)
    assert "1 of them are too short for near duplicates: only equal ones are found" in told


def test_rows_that_differ_in_a_sign_that_is_no_letter_are_no_copies(tmp_path):
    pairs = [("Good food", "👍"), ("Good food", "👎"), ("कि", "a"), ("की", "a"), ("x ≤ y", "?")]
    rows = [{"prompt": prompt, "answer": answer} for prompt, answer in pairs]
    report = curate(config_of(write(tmp_path / "a.jsonl", rows), tmp_path))
    assert report.kept_pairs == len(rows)


def test_names_of_splits():
    names = "train validation data/val-00000-of-1 dev eval_set test_sft evaluation testing latest"
    found = [split_of(name) for name in names.split()]
    held = ["validation"] * 4
    assert found == ["train", *held, "test", "validation", "test", "train"]


NASTY = {
    "blank lines above": ("\n\nprompt,answer\nq,a\n\nr,b\nr,b,c\n", [7], 2),
    "quotes in quotes": ('prompt,answer\n"say ""hi""",a\n"say "hi" x",b\nq,"c, d"\n', [3], 2),
    "a quote that never closes": ('prompt,answer\nq,a\nr,b\ns,d\nt,"c\nu,d\n', [5, 6], 3),
    "columns without a name": ("prompt,answer,,\nq,a,,\n", [], 1),
    "nothing": ("prompt,answer\nr,\ns,a\nt,b\n", [], 3),
    "old line ends": ("prompt,answer\rq,a\rr,b\r", [], 2),
    "line ends of Windows": ('\ufeffPrompt;Answer\r\nq;"a\r\nb"\r\n', [], 1),
}


@pytest.mark.parametrize("name", NASTY)
def test_a_nasty_table_loses_no_row_in_silence(name, tmp_path):
    text, lost, good = NASTY[name]
    (tmp_path / "a.csv").write_bytes(text.encode())
    posts, rows = opened(tmp_path / "a.csv", tmp_path / "work")
    assert (len(rows), [entry["line"] for entry in posts.seen.lost]) == (good, lost)
    assert all("\r" not in text for row in rows for turn in row["turns"] for text in turn)


@pytest.mark.parametrize(
    "name, data, words",
    [
        (
            "a.csv",
            b"prompt,answer,answer\na,b,c\n",
            "a.csv has two columns called 'answer'",
        ),
        ("a.csv", b"What is 1?,One.\nWhat is 2?,Two.\n", "its columns are What is 1\\?, One"),
        ("a.json", b"3", "a.json, line 1, is int, not an object"),
        ("a.json", b"[", "a.json, line 1, is no JSON"),
        ("a.json", b"[]", "holds no row"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"prompt": "q", "answer": "a"}\n' * 9, mtime=0)[:-9],
            "damaged or cut off",
        ),
        ("a.jsonl", '{"prompt": "q"}'.encode("utf-16")[:-1], "a.jsonl, line 1, is no JSON"),
        ("a.jsonl", b'{"prompt": "caf\xe9", "answer": "x"}', "not UTF-8 .save the file as UTF-8"),
        ("a.json.gz", gzip.compress(b"[{}]", mtime=0)[:-9], "a.json.gz is damaged or cut off"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_sentence(name, data, words, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=words):
        opened(tmp_path / name, tmp_path / "work")


def test_one_file_of_many_forms_and_a_list_that_is_called_jsonl(tmp_path):
    many = [
        ROWS[0],
        said("user", "assistant"),
        {"text": "[INST] q [/INST] a"},
        {"input": "i", "output": "o"},
    ]
    posts, rows = opened(write(tmp_path / "a.jsonl", many), tmp_path / "work")
    assert len(rows) == len(posts.seen.formats) == 4
    (tmp_path / "b.jsonl").write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    assert len(opened(tmp_path / "b.jsonl", tmp_path / "work")[1]) == len(ROWS)


# -- Several turns, in either template.


@pytest.mark.parametrize("template", prompts.TEMPLATES)
def test_each_answer_and_its_end_are_learned_and_nothing_else(template, tmp_path, tokenizer):
    config = config_of(CASES / "multi_article.jsonl", tmp_path, template=template)
    report = curate(config)
    assert report.kept_pairs == 20 and not report.first_problem
    _, stored = opened(CASES / "multi_article.jsonl", tmp_path / "work")
    rows = [row for split in saved(config).values() for row in split]
    assert len(rows) == 20
    space = " " if template == "llama2" else ""
    for row in rows:
        answers = [answer for _, answer in stored[row["question_id"] - 1]["turns"]]
        ends = "".join(f"{space}{answer}{space}{tokenizer.eos_token}" for answer in answers)
        assert learned(tokenizer, row) == ends
        assert problems_of(tokenizer, row["prompt"], row["completion"]) == []
    # A dataset knows its template.
    note = json.loads((config.dataset_dir / "curation.json").read_text(encoding="utf-8"))
    assert note["template"] == prompts.template_text(tokenizer, template == "model")


# -- What is shown before training.


def test_what_check_data_tells(tmp_path, tokenizer):
    rows = [{**row, "id": n, "system": "Be kind."} for n, row in enumerate(ROWS)]
    rows += [{"prompt": "Empty?", "answer": " "}, rows[0], {"foo": 1}, said("user", "assistant")]
    told = own_rows.describe(config_of(write(tmp_path / "a.jsonl", rows), tmp_path), tokenizer)
    for words in (
        "a.jsonl: 15 rows",
        "format: system + prompt + answer (13 rows)",
        "format: messages (OpenAI's form) (1 rows)",
        "columns not used: id (13 rows)",
        "lines that are no rows: 1",
        "a.jsonl, line 15, has no column for the prompt",
        "13 rows bring their own",
        "system message of 2 rows: 'Be brief.'",
        "tokens of a row (least, median, 9 of 10, most): ",
        f"[/INST]« {ROWS[0]['answer']} {tokenizer.eos_token}»",
        "of 15 rows 13 stay",
        "length takes 1: a text is empty",
        "exact_duplicate takes 1: the same words as a better pair (rows 14): ",
        "(drawn), 0 of which have a near duplicate in training or ask what is asked there",
    ):
        assert words in told, (words, told)
    assert told.count("-- row ") == 3 and not (tmp_path / "run").exists()


def test_the_one_system_message_of_all_rows_is_the_runs(tmp_path):
    path = write(tmp_path / "a.jsonl", [{**row, "system": "Be kind."} for row in ROWS])
    config = config_of(path, tmp_path, system_message=None)
    curate(config)
    note = json.loads((config.dataset_dir / "curation.json").read_text(encoding="utf-8"))
    assert note["system_message"] == "Be kind."


def test_trl_takes_the_masks_of_several_turns(tmp_path, tokenizer, tiny_model_dir):
    config = config_of(CASES / "multi_article.jsonl", tmp_path)
    curate(config)
    dataset = training_rows.load_dataset(config, tokenizer)["train"]
    arguments = SFTConfig(
        output_dir=str(tmp_path / "trl"),
        completion_only_loss=True,
        max_length=400,
        per_device_train_batch_size=2,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    trainer = SFTTrainer(model, arguments, train_dataset=dataset, processing_class=tokenizer)
    wanted = {learned(tokenizer, row) for row in dataset}
    for batch in trainer.get_train_dataloader():
        for labels in batch["labels"].tolist():
            graded = [label for label in labels if label != prompts.IGNORED_LABEL]
            assert tokenizer.decode(graded) in wanted and len(graded) < len(labels) / 1.2


@pytest.mark.parametrize("tests", ["assert f() == 1", ["assert f() == 1", "assert f() != 2"]])
def test_tests_of_a_row_are_kept_for_notebook_06(tests, tmp_path):
    path = write(tmp_path / "rows.jsonl", [{**row, "tests": tests} for row in ROWS])
    config = config_of(path, tmp_path)
    curate(config)
    found = saved(config)["train"][0]
    assert found["tests"] == (tests if isinstance(tests, str) else "\n".join(tests))


def test_what_is_no_test_is_named_as_not_used_and_no_tests_need_no_column(tmp_path):
    assert read_row({**ROWS[0], "tests": 3}).unused == ["tests"]
    assert read_row({**ROWS[0], "tests": [1]}).unused == ["tests"]
    path = write(tmp_path / "rows.jsonl", ROWS)
    config = config_of(path, tmp_path)
    curate(config)
    assert "tests" not in saved(config)["train"][0]
