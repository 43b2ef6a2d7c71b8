"""Which form of 4 bits keeps what was learned? Asked in llama.cpp, as notebook 06 asks.

    python3 -m venv llamacpp && llamacpp/bin/pip install llama_cpp_python==0.3.36
    python -m benchmarks.llama_cpp llamacpp/bin/python

Needs a finished `demo` run and llama.cpp's Python package, in an environment of its own: pip builds
it from source, some ten minutes on two cores. Then the measurement takes about fifteen. Each form
answers the problems of level 1 that notebook 06 asks. Tokens and greedy answers are compared with
those of transformers. Writes results/four_bits.json.
"""

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from unittest import mock

from scipy.stats import binomtest

from helpers import prompts
from helpers.answers import evaluation, inference, problem_sets
from helpers.answers.inference import Answer
from helpers.config import PROJECT_DIR, Config
from helpers.merging import export, gguf_writer
from helpers.model import loading
from helpers.runs.environment import environment
from helpers.training import training_rows

RESULTS = PROJECT_DIR / "benchmarks" / "results" / "four_bits.json"
WORKER = PROJECT_DIR / "benchmarks" / "llama_cpp_worker.py"
ALL_IN_4, SOME_IN_8 = {"token_embd", "output"}, gguf_writer.IN_8_BITS
# Form -> model, adapter beside it, type, and what has 8 bits in q4_0.
FORMS = {
    "merged, f16": ("merged", False, "f16", set()),
    "merged, q8_0": ("merged", False, "q8_0", set()),
    "merged, q4_0": ("merged", False, "q4_0", ALL_IN_4),
    "merged, q4_0, v_proj and down_proj in q8_0": ("merged", False, "q4_0", SOME_IN_8),
    "base and adapter, q8_0": ("base", True, "q8_0", set()),
    "base and adapter, q4_0": ("base", True, "q4_0", ALL_IN_4),
    "base and adapter, q4_0, v_proj and down_proj in q8_0": ("base", True, "q4_0", SOME_IN_8),
}
# llama.cpp's own types, made of the merged f16.
OWN_TYPES = ("Q4_K_M", "Q4_1", "Q5_K_M")


def worker(python: str, **request) -> dict:
    """What llama.cpp answers; -P, else its package is not found behind this module's name."""
    command = [python, "-P", str(WORKER)]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, encoding="utf-8")
    if done.returncode:
        raise RuntimeError(f"llama.cpp's process ended with: {done.stderr[-2000:]}")
    return json.loads(done.stdout)


def write(config: Config, folder: Path) -> dict[str, tuple[Path, Path | None]]:
    """Each form's model, and the adapter that goes with it."""
    sources = {"merged": config.merged_dir, "base": export.base_folder(config)}
    adapter, files = folder / "adapter.gguf", {}
    gguf_writer.write_adapter(config.adapter_dir, sources["base"], adapter)
    for form, (model, apart, type_name, in_8_bits) in FORMS.items():
        path = folder / f"{form.replace(' ', '_')}.gguf"
        tokenizer = config.adapter_dir if apart else sources[model]
        with mock.patch.object(gguf_writer, "IN_8_BITS", in_8_bits):
            gguf_writer.write_gguf(sources[model], path, type_name, tokenizer)
        files[form] = path, adapter if apart else None
    return files


def write_own_types(python: str, folder: Path, merged: Path) -> dict[str, tuple[Path, None]]:
    """The merged f16 in llama.cpp's own types."""
    files = {}
    for name in OWN_TYPES:
        path = folder / f"{name}.gguf"
        kind = {"quantize": f"LLAMA_FTYPE_MOSTLY_{name}", "into": str(path)}
        if code := worker(python, model=str(merged), **kind)["code"]:
            raise RuntimeError(f"llama.cpp could not write {name}: it ended with {code}")
        files[f"merged, {name} by llama.cpp"] = path, None
    return files


def rate(values: list[bool]) -> dict:
    low, high = binomtest(sum(values), len(values)).proportion_ci(0.95, method="wilson")
    return {"yes": sum(values), "of": len(values), "interval": [round(low, 3), round(high, 3)]}


def scored(answers: list, problems: list, config: Config) -> dict:
    scores = evaluation.score_all(answers, problems, config.sandbox)
    return {"passes": rate([s.passes for s in scores]), "stops": rate([s.stops for s in scores])}


def by_transformers(config: Config, which: str, asked: list[str]) -> list:
    """Greedy answers in float32, whose tokens llama.cpp's can be compared with."""
    tokenizer, model = loading.load_tokenizer(config.model_name), inference.load(config, which)
    return inference.answer_all(model.float(), tokenizer, asked, config)[0]


def measured(python: str, model: Path, adapter: Path | None, request: dict) -> dict:
    """Answers and scores of one form, next to what transformers says."""
    config, tokenizer, texts = request["config"], request["tokenizer"], request["texts"]
    found = worker(
        python,
        model=str(model),
        adapter=adapter and str(adapter),
        texts=texts,
        prompts=[prompts.encode_prompt(tokenizer, text) for text in request["asked"]],
        limit=config.max_new_tokens,
        end=tokenizer.eos_token_id,
        threads=min(2, os.cpu_count() or 1),
    )
    answers = [
        Answer(
            prompt=text,
            text=prompts.read_completion(tokenizer.decode(ids, skip_special_tokens=True)),
            tokens=len(ids),
            stopped=len(ids) < config.max_new_tokens,
        )
        for text, ids in zip(request["asked"], found["answers"], strict=True)
    ]
    same_tokens = map(list.__eq__, tokenizer(texts)["input_ids"], found["texts"])
    return {
        **scored(answers, request["problems"], config),
        "megabytes": round(sum(p.stat().st_size for p in (model, adapter) if p) / 1e6, 1),
        "texts_in_the_same_tokens": sum(same_tokens),
        **{
            f"answers_as_{which}": sum(a.text == b.text for a, b in zip(answers, ours, strict=True))
            for which, ours in request["by_transformers"].items()
        },
        "tokens_per_second": round(sum(map(len, found["answers"])) / found["seconds"], 1),
        "llama_cpp_python": found["llama_cpp"],
    }


def request_of(config: Config) -> dict:
    """What every form is asked, and what transformers answers."""
    tokenizer = loading.load_tokenizer(config.model_name)
    problems = [p for p in problem_sets.unseen_problems(config) if p.part == "level1"]
    asked = inference.asked_of(config, "tuned", tokenizer, [p.prompt for p in problems])
    rows = training_rows.load_dataset(config)["validation"]
    texts = [row["prompt"] + row["completion"] for row in rows] + asked
    given = {which: by_transformers(config, which, asked) for which in ("tuned", "merged")}
    return {
        **{"config": config, "tokenizer": tokenizer, "problems": problems, "asked": asked},
        **{"texts": texts, "by_transformers": given},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("python", help="the interpreter that has llama_cpp")
    parser.add_argument("--run-dir", type=Path, help="of the finished run")
    options = parser.parse_args()
    config = evaluation.usable_sandbox(Config.from_profile("demo", run_dir=options.run_dir))
    request = request_of(config)
    forms = {
        f"{which}, transformers in float32": scored(answers, request["problems"], config)
        for which, answers in request["by_transformers"].items()
    }
    results = {**environment(), "limit": config.max_new_tokens, "texts": len(request["texts"])}
    with tempfile.TemporaryDirectory() as folder:
        files = write(config, Path(folder))
        files |= write_own_types(options.python, Path(folder), files["merged, f16"][0])
        for form, (model, adapter) in files.items():
            forms[form] = measured(options.python, model, adapter, request)
            print(form, forms[form], flush=True)
            text = json.dumps(results | {"forms": forms}, indent=1)
            RESULTS.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
