"""Ask llama.cpp what it makes of an exported GGUF: the same tokens, template and greedy answers?

    llama-server -m runs/demo/gguf/model.f16.gguf --port 8080
    python -m benchmarks.llama_cpp f16 [--server http://127.0.0.1:8080] [--tokens 48]

transformers reads the file back in the tests; this is the other reader, the one that the file is
for. Needs a finished `demo` run, llama.cpp's server, and a few minutes on two cores. Adds to
results/llama_cpp.json.
"""

import argparse
import json
import urllib.request
from pathlib import Path

import torch

import helpers  # noqa: F401, I001  before torch, since it says how torch's threads wait
from helpers import prompts
from helpers.answers import inference, problem_sets
from helpers.config import Config
from helpers.model import embedded, loading
from helpers.runs.environment import environment
from helpers.training import training_rows

RESULTS = Path(__file__).resolve().parent / "results" / "llama_cpp.json"


def post(url: str, **body) -> dict:
    """The answer of a llama-server to a JSON request."""
    data = json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


@torch.no_grad()
def same_beginning(server: str, model, tokenizer, text: str, length: int) -> int:
    """How many greedy tokens after a prompt both agree on, before the first that differs."""
    options = {"temperature": 0, "return_tokens": True, "cache_prompt": False}
    theirs = post(f"{server}/completion", prompt=text, n_predict=length, **options)["tokens"]
    inputs = tokenizer(text, return_tensors="pt")
    ours = model.generate(
        **inputs,
        max_new_tokens=length,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )[0, inputs["input_ids"].shape[1] :].tolist()
    pairs = list(zip(ours, theirs, strict=False))
    return next((i for i, (one, two) in enumerate(pairs) if one != two), len(pairs))


def check(config: Config, name: str, server: str, length: int, count: int) -> dict:
    """Tokens of the validation rows, the chat template, and the beginnings of greedy answers."""
    tokenizer = loading.load_tokenizer(config.model_name)
    model = embedded.load_gguf(config.gguf_dir / f"model.{name}.gguf", torch.float32)
    texts = [
        r["prompt"] + r["completion"] for r in training_rows.load_dataset(config)["validation"]
    ]
    options = {"add_special": True, "parse_special": True}
    tokens = [post(f"{server}/tokenize", content=text, **options)["tokens"] for text in texts]
    messages = [{"role": "user", "content": "Hello?"}]
    rendered = post(f"{server}/apply-template", messages=messages)["prompt"]
    system = inference.system_message(config, "merged")
    asked = prompts.render_prompt("Hello?", system)
    problems = [problem.prompt for problem in problem_sets.load_problems(1, count)]
    requests = [prompts.render_prompt(text, system) for text in problems]
    return {
        "texts": len(texts),
        "texts_cut_into_the_same_tokens": sum(
            ids == tokenizer(text)["input_ids"] for ids, text in zip(tokens, texts, strict=True)
        ),
        "chat_template_is_that_of_training": rendered.removeprefix(tokenizer.bos_token) == asked,
        "greedy_tokens_asked_for": length,
        "greedy_tokens_in_common": [
            same_beginning(server, model, tokenizer, text, length) for text in requests
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("type", choices=["f16", "q8_0"])
    parser.add_argument("--server", default="http://127.0.0.1:8080")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--problems", type=int, default=8)
    parser.add_argument("--build", help="which llama.cpp it is, where the server does not say")
    options = parser.parse_args()
    config = Config.from_profile("demo")
    found = check(config, options.type, options.server, options.tokens, options.problems)
    with urllib.request.urlopen(f"{options.server}/props") as answer:
        build = options.build or json.load(answer)["build_info"]
    results = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    results[options.type] = {**environment(), "llama_cpp": build, **found}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results[options.type], indent=1))


if __name__ == "__main__":
    main()
