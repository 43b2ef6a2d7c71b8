"""Measure the curation at the size of the real set, and against the article's way.

    python -m benchmarks.curation generate FOLDER [--share 0.05]   write a synthetic Kaggle set
    python -m benchmarks.curation ours FOLDER [--workers 2]        rows per second, peak memory
    python -m benchmarks.curation article FOLDER                   the same for the article's way
    python -m benchmarks.curation all FOLDER                       everything, to
                                                                     results/curation.json

The posts are synthetic: their number, mean size (1.05 KB) and mix of code, duplicates and noise
follow the real set (607,282 questions, 987,122 answers, 1.7 GB), their wording does not.

Needs 5 GB of disk, 3 GB of memory and, for everything, some fifteen minutes on two cores.
"""

import argparse
import csv
import html
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

QUESTIONS, ANSWERS = 607_282, 987_122
SAMPLE = Path(__file__).resolve().parent.parent / "data" / "sample"
RESULTS = Path(__file__).resolve().parent / "results" / "curation.json"

PYTHON3 = """def {f}({a}, {b}=None):
    {c} = []
    for {d} in {a}:
        if {d} is None or len(str({d})) > {n}:
            continue
        {c}.append(({d}, {b}))
    return sorted({c}, key=lambda pair: pair[0])
|import {m}

class {F}:
    def __init__(self, {a}):
        self.{a} = {a}
        self.{c} = {{}}

    def {f}(self, {d}):
        return self.{c}.setdefault({d}, len(self.{a}) + {n})
|with open("{a}.txt") as {f}:
    {c} = [line.split("{s}")[{n}] for line in {f} if "{b}" in line]
print(len({c}), {c}[:{n}])
|from {m} import {b}
{a} = {{key: value for key, value in {b}({n}).items() if value > {n}}}
{c} = max({a}, key={a}.get)
print("%s: %d" % ({c}, {a}[{c}]))
|>>> {a} = [{n}, 2, 3]
>>> [{d} * {n} for {d} in {a} if {d} < {n}]
[{n}, 4, 9]
""".split("|")
PYTHON2 = """for {a} in xrange({n}):
    print "{b}", {a}
|try:
    {f}({a})
except {F}, {c}:
    print {c}.message
""".split("|")
BROKEN = """def {f}({a}):
    for {b} in {a}
        yield {b}[{n}
|if {a} == {n}:
print({b}
""".split("|")
OTHER = """$ pip install {a}
$ {b} --{c} {n}
|SELECT {a}, {b} FROM {c} WHERE {d} > {n};
|{{"{a}": {n}, "{b}": [true, null]}}
""".split("|")


class Writer:
    """Random posts from a fixed seed:

    sentences and code from pools, names and numbers drawn anew.
    """

    def __init__(self, seed: int = 7):
        self.random = random.Random(seed)
        text = b"".join((SAMPLE / f"{n}.csv").read_bytes() for n in ("Questions", "Answers"))
        self.words = sorted({word.decode() for word in re.findall(rb"\b[a-z]{3,12}\b", text)})
        common = (
            "the a to in of and is I it that you for with this not have be on list file".split()
        )
        self.sentences = [
            " ".join(
                self.random.choice(common if self.random.random() < 0.45 else self.words)
                for _ in range(self.random.randint(6, 18))
            ).capitalize()
            for _ in range(20_000)
        ]

    def sentence(self) -> str:
        text, draw = self.random.choice(self.sentences), self.random.random()
        if draw < 0.15:
            first, _, rest = text.partition(" ")
            text = f'{first} <a href="https://example.com/{len(rest)}" rel="nofollow">{rest}</a>'
        elif draw < 0.25:
            text = f"<strong>{text}</strong>" if draw < 0.2 else f"<em>{text}</em>"
        if self.random.random() < 0.3:
            text += f" <code>{self.random.choice(self.words)}({self.random.randint(0, 999)})</code>"
        if self.random.random() < 0.003:
            text += " naïve café"
        return text + self.random.choice((".", ".", "?", ", I&#39;d say."))

    def paragraphs(self, count: int) -> str:
        return "\n\n".join(self.paragraph() for _ in range(count))

    def paragraph(self) -> str:
        """A paragraph, now and then a list or a quotation, as in real posts."""
        sentences = [self.sentence() for _ in range(self.random.randint(2, 4))]
        draw = self.random.random()
        if draw < 0.12:
            items = "\n".join(f"<li>{sentence}</li>" for sentence in sentences)
            return f"<ul>\n{items}\n</ul>"
        text = f"<p>{' '.join(sentences)}</p>"
        return f"<blockquote>\n  {text}\n</blockquote>" if draw < 0.16 else text

    def code(self, templates: list[str], blocks: int = 1) -> str:
        names = {letter: self.random.choice(self.words) + "_" + letter for letter in "abcdfmF"}
        text = "\n".join(
            self.random.choice(templates).format(**names, n=self.random.randint(2, 99), s=",")
            for _ in range(blocks)
        )
        return f"\n\n<pre><code>{html.escape(text)}</code></pre>\n\n"

    def question(self) -> str:
        text = self.paragraphs(self.random.randint(1, 3))
        if self.random.random() < 0.65:
            text += self.code(PYTHON3 + BROKEN, self.random.randint(1, 5)) + self.paragraphs(1)
        if self.random.random() < 0.04:
            text += '<p><img src="https://example.com/a.png" alt="screen"></p>'
        return text

    def answer(self) -> str:
        text, kind = self.paragraphs(self.random.randint(1, 3)), self.random.random()
        if kind > 0.62:
            return text
        templates = (
            PYTHON3 if kind < 0.5 else PYTHON2 if kind < 0.57 else BROKEN if kind < 0.6 else OTHER
        )
        text += self.code(templates, self.random.randint(1, 5))
        return text + self.paragraphs(self.random.randint(0, 2))

    def near(self, text: str) -> str:
        return text.replace(" the ", " the very ", 2)


def generate(folder: Path, share: float) -> None:
    """Write Questions.csv, Answers.csv and Tags.csv with a share of the real set's rows."""
    folder.mkdir(parents=True, exist_ok=True)
    writer, chance = Writer(), random.Random(11)
    tables = {
        name: csv.writer((folder / f"{name}.csv").open("w", encoding="latin-1", newline=""))
        for name in ("Questions", "Answers", "Tags")
    }
    tables["Questions"].writerow("Id OwnerUserId CreationDate Score Title Body".split())
    tables["Answers"].writerow("Id OwnerUserId CreationDate ParentId Score Body".split())
    tables["Tags"].writerow(["Id", "Tag"])
    date, number, pool = "2012-05-06T07:08:09Z", 900_000_000, []
    for _ in range(int(QUESTIONS * share)):
        number += chance.randint(1, 60)
        parent, draw = number, chance.random()
        title, body, best = writer.sentence()[:120], writer.question(), writer.answer()
        if pool and draw < 0.025:
            title, body, best = chance.choice(pool)
            if draw < 0.02:
                title, body, best = title, writer.near(body), writer.near(best)
        elif draw > 0.9:
            pool = [*pool[-200:], (title, body, best)]
        score = int(chance.paretovariate(0.9)) - (2 if chance.random() < 0.08 else 0)
        tables["Questions"].writerow([parent, owner(chance), date, min(score, 5000), title, body])
        for tag in ["python", *chance.sample(writer.words[:300], chance.randint(0, 2))]:
            tables["Tags"].writerow([parent, tag])
        if chance.random() < 0.12:
            continue
        for position in range(1 + int(chance.expovariate(0.78))):
            number += 1
            score = int(chance.paretovariate(0.9)) - (2 if chance.random() < 0.05 else position > 0)
            orphan = 1 if chance.random() < 0.005 and position else 0
            text = writer.answer() if position else best
            tables["Answers"].writerow(
                [number, owner(chance), date, parent - orphan, min(score, 5000), text]
            )


def owner(chance: random.Random):
    return "NA" if chance.random() < 0.02 else chance.randint(1, 4_000_000)


def article_way(folder: Path, output: Path) -> int:
    """The article's pipeline as its text describes it; returns the raw rows."""
    import pandas as pd
    from bs4 import BeautifulSoup

    markers = "def class import print return for while if else elif try except lambda list dict"
    markers = [*markers.split(), "set", "str", "=", "{", "}", "(", ")"]

    def contains_code(text):
        return any(marker in text for marker in markers)

    def flatten(body):
        return BeautifulSoup(body, "lxml").get_text()

    read = {"encoding": "ISO-8859-1"}
    questions = pd.read_csv(
        folder / "Questions.csv", usecols=["Id", "Score", "Title", "Body"], **read
    )
    answers = pd.read_csv(
        folder / "Answers.csv", usecols=["Id", "ParentId", "Score", "Body"], **read
    )
    pairs = questions.merge(
        answers, left_on="Id", right_on="ParentId", suffixes=("_question", "_answer")
    )
    pairs = pairs.sort_values("Score_answer", ascending=False).drop_duplicates("Id_question")
    pairs["question"] = pairs["Title"] + ": " + pairs["Body_question"].map(flatten)
    pairs["answer"] = pairs["Body_answer"].map(flatten)
    pairs = pairs[(pairs["Score_question"] >= 0) & (pairs["Score_answer"] >= 0)]
    pairs = pairs[pairs["question"].map(contains_code) | pairs["answer"].map(contains_code)]
    pairs[["question", "answer"]].to_pickle(output)
    return len(questions) + len(answers)


def our_way(folder: Path, run_dir: Path, workers: int) -> dict:
    """Rows, seconds, and a hash of what was kept: cleaned, rendered, verified, saved."""
    import hashlib

    from datasets import load_from_disk

    from helpers.config import Config
    from helpers.data.curation import curate
    from helpers.model.loading import load_tokenizer

    config = Config.from_profile("demo", data_source=str(folder), run_dir=run_dir, max_length=1024)
    report = curate(config, load_tokenizer(config.model_name), workers)
    train = load_from_disk(str(config.dataset_dir))["train"]
    kept = hashlib.sha256()
    for batch in train.select_columns(["prompt", "completion"]).iter(1000):
        kept.update("".join(batch["prompt"] + batch["completion"]).encode())
    return {
        "rows": report.raw_questions + report.raw_answers,
        "seconds": report.seconds,
        "kept_sha256": kept.hexdigest(),
        "removed": {rule: removed for rule, _, removed, _ in report.funnel() if removed},
        "kept": report.funnel()[-1][3],
        "validation_leaks": report.validation_leaks,
    }


class Watch(threading.Thread):
    """Peak memory (bytes) and CPU seconds of a process and its children, sampled.

    `rss` counts pages that processes share once for each, `pss` once in all.
    """

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.pid, self.rss, self.pss, self.running = pid, 0, 0, True
        self.ticks: dict[int, int] = {}

    def run(self) -> None:
        while self.running:
            rss = pss = 0
            for pid in tree(self.pid):
                try:
                    text = Path(f"/proc/{pid}/smaps_rollup").read_text("utf-8")
                    times = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()
                except (OSError, ProcessLookupError):
                    continue
                self.ticks[pid] = int(times[11]) + int(times[12])
                rss += kilobytes(text, "Rss:") * 1024
                pss += kilobytes(text, "Pss:") * 1024
            self.rss, self.pss = max(self.rss, rss), max(self.pss, pss)
            time.sleep(0.5)  # looking costs time on a busy core

    def cpu_seconds(self) -> float:
        return sum(self.ticks.values()) / os.sysconf("SC_CLK_TCK")


def tree(pid: int) -> list[int]:
    pids = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*"):
        try:
            pids += [
                p
                for child in (task / "children").read_text("utf-8").split()
                for p in tree(int(child))
            ]
        except OSError:
            continue
    return pids


def kilobytes(text: str, label: str) -> int:
    line = next((line for line in text.splitlines() if line.startswith(label)), "0 0")
    return int(line.split()[1])


def measure(arguments: list[str]) -> dict:
    """Run this script in a process of its own; what it printed, its time and peak memory."""
    started, command = (
        time.perf_counter(),
        [sys.executable, "-m", "benchmarks.curation", *arguments],
    )
    process = subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8")
    watch = Watch(process.pid)
    watch.start()
    output = process.communicate()[0]
    watch.running = False
    if process.returncode:
        raise RuntimeError(f"{arguments} failed with {process.returncode}")
    wall, result = time.perf_counter() - started, json.loads(output.splitlines()[-1])
    return {
        "command": " ".join([arguments[0], *arguments[2:]]),
        **result,
        "wall_seconds": round(wall, 2),
        "cpu_seconds": round(watch.cpu_seconds(), 2),
        "rows_per_second": round(result["rows"] / wall),
        "peak_pss_bytes": watch.pss,
        "peak_rss_sum_bytes": watch.rss,
    }


ALTERNATIONS = 3  # how often the two ways take turns
COMPARED = 0.05  # the share at which the article's way and one worker are measured too


def measure_all(folder: Path, shares: list[float]) -> None:
    """Every share with two workers, and at COMPARED one worker and the article's way beside it."""
    # Here, for it imports torch, which a process that is measured must not pay for.
    from helpers.runs.environment import environment

    runs = []
    for share in shares:
        path = folder / f"{share:g}"
        if not (path / "Tags.csv").exists():
            generate(path, share)
        commands = [["ours", str(path), "--workers", "2"]]
        if share == COMPARED:
            commands += [["ours", str(path), "--workers", "1"]]
            commands += ALTERNATIONS * [
                ["ours", str(path), "--workers", "2"],
                ["article", str(path)],
            ]
        for command in commands:
            runs.append({"share": share, **measure(command)})
            print(json.dumps({k: v for k, v in runs[-1].items() if k != "removed"}), flush=True)
    facts = {
        **environment(),
        "processor": processor(),
        "load_average": os.getloadavg(),
        **summary(runs),
    }
    RESULTS.write_text(json.dumps({**facts, "runs": runs}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(facts, indent=1))


def summary(runs: list[dict]) -> dict:
    """The ratios that the bars are about."""
    compared = [run for run in runs if run["share"] == COMPARED]
    if not compared:
        return {}
    two, one, *turns = compared
    ours, article = turns[::2], turns[1::2]
    return {
        "same_result_with_1_and_2_workers": two["kept_sha256"] == one["kept_sha256"],
        "speed_against_article": ratio_of_medians(ours, article, "rows_per_second"),
        "memory_against_article": ratio_of_medians(ours, article, "peak_pss_bytes"),
        "rows_per_second_by_share": {
            f"{r['share']:g}": r["rows_per_second"] for r in runs if r["command"] == two["command"]
        },
    }


def ratio_of_medians(first: list[dict], second: list[dict], name: str) -> float:
    medians = [statistics.median(run[name] for run in runs) for runs in (first, second)]
    return round(medians[0] / medians[1], 2)


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["generate", "ours", "article", "all"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.05, 0.25, 1.0])
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    if options.command == "generate":
        generate(options.folder, options.share)
    elif options.command == "all":
        measure_all(options.folder, options.shares)
    else:
        with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
            print(json.dumps(run_one(options, Path(scratch))))


def run_one(options: argparse.Namespace, scratch: Path) -> dict:
    if options.command == "article":
        return {"rows": article_way(options.folder, scratch / "rows.pkl")}
    return our_way(options.folder, scratch, options.workers)


if __name__ == "__main__":
    main()
