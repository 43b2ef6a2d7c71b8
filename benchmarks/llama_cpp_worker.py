"""What llama.cpp's Python package says to one GGUF; `benchmarks.llama_cpp` starts it.

Runs in the interpreter that has `llama_cpp`, and so imports nothing of the course. Reads a request
in JSON from standard input: model, adapter or null, texts to cut into tokens, prompts (in tokens)
to answer greedily, limit, end (the token that ends an answer). Writes the tokens in JSON. With
`quantize` in place of these it writes another GGUF of the model, in llama.cpp's own types.
"""

import ctypes
import itertools
import json
import sys
import time

import llama_cpp


def quantized(asked: dict) -> dict:
    """A GGUF in 16 bits, written in one of llama.cpp's types, such as LLAMA_FTYPE_MOSTLY_Q4_K_M."""
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, asked["quantize"])
    paths = asked["model"].encode(), asked["into"].encode()
    return {"code": llama_cpp.llama_model_quantize(*paths, ctypes.byref(settings))}


def answered(asked: dict) -> dict:
    """Tokens of the texts and of the greedy answers, the end left out, and the seconds of these."""
    model = llama_cpp.Llama(
        asked["model"],
        lora_path=asked["adapter"],
        n_ctx=1024,
        n_threads=asked["threads"],
        n_threads_batch=asked["threads"],
        verbose=False,
    )
    cut = [model.tokenize(text.encode(), True, True) for text in asked["texts"]]
    start, answers = time.perf_counter(), []
    for prompt in asked["prompts"]:
        written = model.generate(prompt, temp=0.0, repeat_penalty=1.0)
        until = itertools.takewhile(lambda token: token != asked["end"], written)
        answers.append(list(itertools.islice(until, asked["limit"])))
    return {"texts": cut, "answers": answers, "seconds": time.perf_counter() - start}


if __name__ == "__main__":
    request = json.load(sys.stdin)
    found = quantized(request) if "quantize" in request else answered(request)
    found["llama_cpp"] = llama_cpp.__version__
    json.dump(found, sys.stdout)
