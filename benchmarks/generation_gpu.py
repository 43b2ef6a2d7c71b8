"""Measure how fast answers come on a GPU, way by way, beside the bound that its memory sets.

    python -m benchmarks.generation_gpu                        what fits into 290 seconds
    python -m benchmarks.generation_gpu --parts waiting batch  these, beside what the file has
    python -m benchmarks.generation_gpu --tiny                 a look at every part, on a CPU too

Random bfloat16 weights of Llama 2 7B's shape, made on the GPU. Prompts have 16 to 400 tokens and
answers 16 to 128, each a length of its own at which it ends (random weights end nothing by
themselves); only tokens of answers are counted. The bound: a step reads all weights once, so
so many answers at a time cannot come faster than that. `bound` has every place at work in every
step; `bound_of_work` knows that a short answer's place is empty at the end, if no prompt waits.

A part that fails or runs out of its time notes so, and the next one goes on. Results are written
after every part, to results/generation_gpu.json; parts not run keep what they have there. Needs a
GPU with 80 GB, most for the room of `generate_batch` and for 4 bits and 16 bits side by side.
"""

import argparse
import contextlib
import gc
import importlib.util
import json
import os
import random
import signal
import statistics
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# What was compiled before would hide what compiling takes.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.mkdtemp(prefix="inductor-"))
os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp(prefix="triton-"))

import helpers  # noqa: F401, I001  before torch, since it says how its memory may grow
import torch
from transformers import (
    CompileConfig,
    ContinuousBatchingConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
    StoppingCriteria,
)

from benchmarks import places
from benchmarks.llama2 import llama2_config
from helpers.runs.environment import environment

RESULTS = Path(__file__).resolve().parent / "results" / "generation_gpu.json"
BANDWIDTH = 4.8e12  # bytes a second, from the data sheet of an H200
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
TINY = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4)


class OutOfTime(BaseException):
    """Not an Exception, so that no library takes it for one of its own."""


@dataclass(frozen=True)
class Work:
    """Prompts, and how many tokens each one's answer has. `rows` of them are answered at a time."""

    prompts: list[list[int]]
    limits: list[int]
    rows: int

    @classmethod
    def of(cls, rows: int, prompts: int, tiny: bool, even: bool = False) -> "Work":
        """Seeded; `even`: all answers have the longest one's length."""
        chance = random.Random(rows)
        longest, most = (40, 12) if tiny else (400, 128)
        asked = [
            chance.choices(range(3, 32000), k=chance.randint(min(16, longest), longest))
            for _ in range(prompts)
        ]
        limits = [most if even else chance.randint(most // 8, most) for _ in asked]
        return cls(asked, limits, rows)

    @property
    def room(self) -> int:
        return max(map(len, self.prompts)) + max(self.limits) + places.LOOK

    def bounds(self, weights: int) -> dict:
        """Tokens a second if reading the weights were all that takes time."""
        step = weights / BANDWIDTH
        steps = max(max(self.limits), sum(self.limits) / self.rows)
        return {"bound": self.rows / step, "bound_of_work": sum(self.limits) / (steps * step)}


class Ends(StoppingCriteria):
    """Ends each row at a length of its own, the padding and the prompt counted."""

    def __init__(self, lengths: torch.Tensor):
        self.lengths = lengths

    def __call__(self, ids, scores, **others):
        return self.lengths <= ids.shape[1]


def by_generate(model, work: Work, **options) -> list[list[int]]:
    """All prompts through `generate`, `work.rows` at a time, padded on the left."""
    answers = []
    for first in range(0, len(work.prompts), work.rows):
        asked = work.prompts[first : first + work.rows]
        limits = work.limits[first : first + work.rows]
        ids, mask = padded(asked)
        width = ids.shape[1]
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            **{
                "max_new_tokens": max(limits),
                "stopping_criteria": [Ends(width + torch.tensor(limits, device=DEVICE))],
                "do_sample": False,
                "pad_token_id": 0,
                **options,
            },
        )[:, width:].tolist()
        answers += [row[:limit] for row, limit in zip(output, limits, strict=True)]
    return answers


@torch.no_grad()
def answer_together(model, ids, mask, new_tokens: int, end: int = -1) -> torch.Tensor:
    """Greedy answers to prompts padded on the left; (rows, tokens). A step is one CUDA graph.

    The first steps are run as they are, which also readies what the graph then records.
    """
    width, graph = ids.shape[1], None
    mask = torch.nn.functional.pad(mask, (0, new_tokens), value=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = StaticCache(config=model.config, max_cache_len=width + new_tokens)
    given = {"attention_mask": mask, "past_key_values": cache}
    read = model(ids, position_ids=positions[:, :width], logits_to_keep=1, **given)
    token, position = read.logits.argmax(-1), positions[:, width : width + 1].clone()

    def step():
        token.copy_(model(token, position_ids=position, **given).logits.argmax(-1))
        position.add_(1)

    written = [token.clone()]
    while len(written) < new_tokens:
        if ids.device.type != "cuda" or len(written) < 4:
            step()
        else:
            if graph is None:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    step()
            graph.replay()
        written.append(token.clone())
        if len(written) % 8 == 0 and (torch.cat(written, 1) == end).any(1).all():
            break
    return torch.cat(written, 1)


def by_loop(model, work: Work) -> list[list[int]]:
    """All prompts through `answer_together`."""
    ids, mask = padded(work.prompts)
    output = answer_together(model, ids, mask, max(work.limits)).tolist()
    return [row[:limit] for row, limit in zip(output, work.limits, strict=True)]


def padded(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of prompts, padded on the left."""
    width = max(map(len, prompts))
    ids = [[0] * (width - len(row)) + row for row in prompts]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in prompts]
    return torch.tensor(ids, device=DEVICE), torch.tensor(mask, device=DEVICE)


class Bench:
    """The model, the work, and what was found so far."""

    def __init__(self, options):
        self.tiny, self.turns, self.output = options.tiny, options.turns, options.output
        self.end = time.monotonic() + options.seconds
        self.known = self.output.exists() and json.loads(self.output.read_text(encoding="utf-8"))
        self.parts = dict((self.known or {}).get("parts", {}))
        self.work = {n: Work.of(n, n, self.tiny) for n in (12, 64)}
        shape = llama2_config("7B")
        shape.update({**TINY, "num_key_value_heads": 4, "head_dim": 64} if self.tiny else {})
        started = time.perf_counter()
        torch.set_default_dtype(torch.bfloat16)
        torch.manual_seed(0)
        with torch.device(DEVICE):
            self.model = LlamaForCausalLM(shape).eval().requires_grad_(False)
        torch.set_default_dtype(torch.float32)
        self.model.generation_config.eos_token_id = None
        self.weights = sum(p.nbytes for p in self.model.parameters())
        synchronize()
        say(f"{self.weights / 1e9:.2f} GB of weights in {time.perf_counter() - started:.1f} s")

    def run(self, name: str) -> None:
        """One part, in its time; what it found before it failed stays."""
        part, limit = PARTS[name]
        limit = min(limit, self.end - time.monotonic())
        found = self.parts[name] = {}
        started = time.perf_counter()
        try:
            if limit < 3:
                raise OutOfTime("no time was left for it")
            with time_limit(limit):
                part(self, found)
        except (Exception, OutOfTime) as error:
            found["stopped"] = f"{type(error).__name__}: {error}"[:600]
        found["seconds_of_part"] = round(time.perf_counter() - started, 1)
        say(f"{name}: {json.dumps(found)[:1500]}")
        with contextlib.suppress(Exception):  # after a failure in CUDA nothing works any more
            free()
        self.write()

    def write(self) -> None:
        facts = {
            "what": "Answers at Llama 2 7B's shape, random weights; greedy; prompts of 16 to 400 "
            "tokens, answers of 16 to 128",
            **environment(),
            "weights_bytes": self.weights,
            "bandwidth_bytes_per_second": BANDWIDTH,
            "answer_tokens": {str(n): sum(work.limits) for n, work in self.work.items()},
            "parts": {name: self.parts[name] for name in PARTS if name in self.parts},
        }
        self.output.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

    def time(self, found: dict, name: str, call, work: Work, turns=None, weights=None) -> None:
        """Time calls that answer the work: the first one apart, then turns, and their median."""
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(1 + (turns or self.turns)):
            started = time.perf_counter()
            answers = call()
            synchronize()
            seconds.append(round(time.perf_counter() - started, 3))
            if [len(answer) for answer in answers] != work.limits:
                raise ValueError(f"{name} gave answers of other lengths than asked for")
            found[name] = {"first_seconds": seconds[0], "seconds": seconds[1:]}
        tokens, usual = sum(work.limits), statistics.median(seconds[1:])
        rate, bounds = tokens / usual, work.bounds(weights or self.weights)
        found[name] |= {
            "tokens": tokens,
            "tokens_per_second": round(rate, 1),
            **{each: round(value, 1) for each, value in bounds.items()},
            **{f"share_of_{each}": round(rate / value, 3) for each, value in bounds.items()},
            "peak_gigabytes": round(torch.cuda.max_memory_allocated() / 1e9, 2) if CUDA else None,
        }
        say(f"  {name}: {rate:.0f} tokens/s, first {seconds[0]} s, then {seconds[1:]}")

    def fastest(self) -> dict:
        """How `Places` are made where the parts before found no better way: kind and fusing."""
        kinds = self.parts.get("attention", {})
        means = {
            kind: kinds[kind]["mean"] for kind in places.KINDS if "mean" in kinds.get(kind, {})
        }
        if not hasattr(self.model.model.layers[0].mlp, "gate_up"):
            places.fuse(self.model)
        kind = min(means, key=means.get, default="sdpa")
        return {"kind": kind if CUDA else "sdpa", "compiled": "parts", "fused": True}

    def time_places(self, found: dict, name: str, work: Work, *given, **made) -> None:
        """Answers by `Places`; what making them and recording a step takes is noted apart."""
        started = time.perf_counter()
        model, weights = given or (self.model, self.weights)
        room = places.Places(model, work.rows, work.room, **made)
        synchronize()
        ready = round(time.perf_counter() - started, 2)
        found[name] = {"ready_seconds": ready, **made}
        kept = dict(found[name])
        call = lambda: room.answer(work.prompts, work.limits)  # noqa: E731
        self.time(found, name, call, work, weights=weights)
        found[name] = kept | found[name] | {"step_milliseconds": step_time(room)}
        say(f"  {name}: ready in {ready} s, a step takes {found[name]['step_milliseconds']} ms")


@contextlib.contextmanager
def time_limit(seconds: float):
    def stop(*_):
        raise OutOfTime(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def say(text: str) -> None:
    print(text, flush=True)


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def free() -> None:
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def mean_time(call, many: int = 20) -> float:
    """Microseconds of a call, from first to last of many."""
    call(0)
    synchronize()
    started = time.perf_counter()
    for number in range(many):
        call(number)
    synchronize()
    return (time.perf_counter() - started) / many * 1e6


def step_time(room: places.Places) -> float:
    """Milliseconds of a step with every row going, at half of the room."""
    room.lengths.fill_(room.room // 2)
    return round(mean_time(lambda _: room.step()) / 1e3, 3)


# -- The parts


def attention(bench: Bench, found: dict) -> None:
    """Microseconds of one layer's attention for one token a row, at the middle of the answers.

    Two caches in turn, so that none is found in the chip's own memory.
    """
    for kind in places.KINDS:
        found[kind] = {}
        try:
            for rows, work in bench.work.items():
                found[kind][str(rows)] = round(attention_time(bench, kind, work), 1)
            found[kind]["mean"] = round(statistics.fmean(found[kind].values()), 1)
        except Exception as error:
            found[kind]["stopped"] = f"{type(error).__name__}: {error}"[:300]


def attention_time(bench: Bench, kind: str, work: Work) -> float:
    room = places.Places.__new__(places.Places)  # without a step, which this is to find a kind for
    shape = bench.model.config
    room.rows, size = work.rows, places.PAGE if kind == "paged" else 8
    room.room = -(-work.room // size) * size
    sizes = (room.rows, room.room, shape.num_key_value_heads, shape.head_dim)
    options = {"dtype": torch.bfloat16, "device": DEVICE}
    kept = [torch.randn(sizes, **options).transpose(1, 2) for _ in range(4)]
    query = torch.randn(room.rows, shape.num_attention_heads, 1, shape.head_dim, **options)
    middle = [len(p) + n // 2 for p, n in zip(work.prompts, work.limits, strict=True)]
    room.used = torch.tensor(middle, dtype=torch.int32, device=DEVICE)
    room.ends = torch.arange(room.rows + 1, dtype=torch.int32, device=DEVICE)
    room.starts = room.ends * room.room
    pages = torch.arange(room.rows * room.room // places.PAGE, dtype=torch.int32, device=DEVICE)
    room.pages = pages.view(room.rows, -1) if kind == "paged" else None
    mask = (torch.arange(room.room, device=DEVICE) < room.used[:, None])[:, None, None]
    module = bench.model.model.layers[0].self_attn
    call = places.sdpa_attention_forward if kind == "sdpa" else places.attend

    def once(number: int):
        pair = kept[number % 2 * 2 :][:2]
        given = mask if kind == "sdpa" else None
        call(module, query, *pair, given, scaling=module.scaling, places=room)

    return mean_time(once, 100 if CUDA else 2)


def products(bench: Bench, found: dict) -> None:
    """Microseconds of a layer's matrix products, apart and fused, and the share of the bandwidth.

    Each product goes through the layers, since one layer's matrix is kept in the chip's memory.
    """
    bench.fastest()
    layers = bench.model.model.layers
    matrices = {
        "q": [layer.self_attn.q_proj.weight for layer in layers],
        "qkv": [layer.self_attn.qkv for layer in layers],
        "o": [layer.self_attn.o_proj.weight for layer in layers],
        "gate": [layer.mlp.gate_proj.weight for layer in layers],
        "gate_up": [layer.mlp.gate_up for layer in layers],
        "down": [layer.mlp.down_proj.weight for layer in layers],
        "head": [bench.model.lm_head.weight],
    }
    for rows in (12, 64):
        for name, ws in matrices.items():
            x = torch.randn(rows, ws[0].shape[1], dtype=torch.bfloat16, device=DEVICE)

            def once(number: int, x=x, ws=ws):
                return torch.nn.functional.linear(x, ws[number % len(ws)])

            micros = mean_time(once, 96 if CUDA else 2)
            share = ws[0].nbytes / BANDWIDTH / (micros / 1e6)
            found[f"{name} {rows}"] = {"microseconds": round(micros, 1), "share": round(share, 3)}


def plain(bench: Bench, found: dict) -> None:
    for rows, work in bench.work.items():
        bench.time(found, str(rows), lambda work=work: by_generate(bench.model, work), work)


def best(bench: Bench, found: dict) -> None:
    for rows, work in bench.work.items():
        bench.time_places(found, str(rows), work, **bench.fastest())


def cell(bench: Bench, found: dict) -> None:
    """`answer_together`, which a notebook can show whole; recorded anew in each call."""
    for rows, work in bench.work.items():
        bench.time(found, str(rows), lambda work=work: by_loop(bench.model, work), work)


def static(bench: Bench, found: dict, rows: int = 12, mode: str = "reduce-overhead") -> None:
    """`generate` with a cache of fixed size, which transformers compiles at the first call."""
    compiled = CompileConfig(mode=mode, fullgraph=True)
    compiled._compile_all_devices = not CUDA
    options = {"cache_implementation": "static", "compile_config": compiled}
    work = bench.work[rows]
    try:
        call = lambda: by_generate(bench.model, work, **options)  # noqa: E731
        bench.time(found, f"{rows} {mode}", call, work)
        pays_after(bench, found, f"{rows} {mode}", str(rows))
    finally:
        bench.model.__dict__.pop("_compiled_call", None)
        torch._dynamo.reset()


def pays_after(bench: Bench, found: dict, name: str, rows: str) -> None:
    """After how many such calls the compiled way, its first call counted, has caught up."""
    usual = bench.parts.get("plain", {}).get(rows, {}).get("seconds")
    mine = statistics.median(found[name]["seconds"])
    if usual and statistics.median(usual) > mine:
        extra = found[name]["first_seconds"] - mine
        found[name]["pays_after_calls"] = round(extra / (statistics.median(usual) - mine), 1)


def static_64(bench: Bench, found: dict) -> None:
    static(bench, found, rows=64)


def autotuned(bench: Bench, found: dict) -> None:
    static(bench, found, mode="max-autotune-no-cudagraphs")


def simple(bench: Bench, found: dict) -> None:
    """What each thing brings: the graph alone, then flash attention, compiled parts, all fused."""
    kind = bench.fastest()["kind"]
    ways = {
        "graph": {},
        "graph, attention": {"kind": kind},
        "graph, attention, parts": {"kind": kind, "compiled": "parts"},
        "graph, attention, fused": {"kind": kind, "fused": True},
    }
    for name, made in ways.items():
        for rows, work in bench.work.items():
            bench.time_places(found, f"{name}: {rows}", work, **made)
            free()


def whole(bench: Bench, found: dict) -> None:
    """The whole forward pass compiled, in the graph."""
    torch._dynamo.reset()
    try:
        kind = bench.fastest()["kind"]
        bench.time_places(found, "12", bench.work[12], kind=kind, compiled="whole")
        pays_after(bench, found, "12", "12")
    finally:
        torch._dynamo.reset()


def even(bench: Bench, found: dict) -> None:
    """Answers that all have 128 tokens, as in the first look: no place is ever empty."""
    for rows in (12, 64):
        work = Work.of(rows, rows, bench.tiny, even=True)
        bench.time_places(found, f"places {rows}", work, **bench.fastest())
        call = lambda work=work: by_generate(bench.model, work)  # noqa: E731
        bench.time(found, f"generate {rows}", call, work, turns=1)


def waiting(bench: Bench, found: dict) -> None:
    """Four times as many prompts as places: one that waits takes the place of one that ended."""
    work = Work.of(12, 48, bench.tiny)
    bench.time_places(found, "places 12 of 48", work, **bench.fastest())
    call = lambda: by_generate(bench.model, work)  # noqa: E731
    bench.time(found, "generate 12 of 48", call, work, turns=1)


def batch(bench: Bench, found: dict) -> None:
    """transformers' own continuous batching, through the call that takes a limit per request."""
    graphs = {"use_cuda_graph": CUDA, "q_padding_interval_size": 16}
    graphs |= {"kv_padding_interval_size": 1024}
    ways = {"as it comes": {}, "graphs": graphs}
    ways["graphs, compiled"] = graphs | {"default_compile_level": 1}
    for name, options in ways.items() if CUDA else list(ways.items())[:1]:
        for rows, work in bench.work.items():
            try:
                time_batch(bench, found, f"{name}: {rows}", work, options)
            except Exception as error:
                found[f"{name}: {rows}"] = {"stopped": f"{type(error).__name__}: {error}"[:300]}
            free()
        torch._dynamo.reset()


def time_batch(bench: Bench, found: dict, name: str, work: Work, options: dict) -> None:
    has_flash = importlib.util.find_spec("flash_attn") is not None
    settings = ContinuousBatchingConfig(
        max_requests_per_batch=work.rows,
        max_batch_tokens=2048 if CUDA else 64,
        num_blocks=work.rows * (-(-work.room // 256)) + 8,
        auto_switch_to_flash=has_flash,
        allow_block_sharing=False,
        **options,
    )
    greedy = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=256)
    context = bench.model.continuous_batching_context_manager(
        generation_config=greedy, continuous_batching_config=settings, timeout=5
    )
    with context as manager:

        def call() -> list[list[int]]:
            names = [
                manager.add_request(prompt, max_new_tokens=limit)
                for prompt, limit in zip(work.prompts, work.limits, strict=True)
            ]
            answers, quiet = {}, 0
            while len(answers) < len(names):
                result = manager.get_result(timeout=1)
                quiet = quiet + 1 if result is None else 0
                if quiet and not manager.is_running():
                    raise RuntimeError(f"{manager.background_thread_status.fatal_error}")
                if result is not None and result.is_finished():
                    if result.error:
                        raise RuntimeError(result.error)
                    answers[result.request_id] = result.generated_tokens
            return [answers[name] for name in names]

        bench.time(found, name, call, work, turns=1)


def pipe(bench: Bench, found: dict) -> None:
    """`pipeline`, one prompt after the other, on the first three."""
    from transformers import pipeline

    from benchmarks.training import word_tokenizer

    tokenizer = word_tokenizer()
    ask = pipeline("text-generation", model=bench.model, tokenizer=tokenizer)
    few = Work(bench.work[12].prompts[:3], bench.work[12].limits[:3], 1)

    def call() -> list[list[int]]:
        answers = []
        for prompt, limit in zip(few.prompts, few.limits, strict=True):
            text = " ".join(f"w{token}" for token in prompt)
            options = {"max_new_tokens": limit, "do_sample": False, "return_tensors": True}
            (found,) = ask(text, **options)
            answers.append(found["generated_token_ids"][-limit:])
        return answers

    bench.time(found, "3 prompts", call, few, turns=1)


def four_bits(bench: Bench, found: dict) -> None:
    """4 bits with an adapter of rank 64 on all linear layers, and the same merged in memory."""
    from peft import get_peft_model_state_dict

    work = bench.work[12]
    started = time.perf_counter()
    base = in_four_bits(bench)
    tuned = with_adapter(base)
    synchronize()
    packed = sum(p.nbytes for p in tuned.parameters())
    found["made"] = {"seconds": round(time.perf_counter() - started, 1), "weights_bytes": packed}
    timed = {"work": work, "weights": packed}
    bench.time(found, "generate", lambda: by_generate(tuned, work), turns=1, **timed)
    try:
        bench.time_places(found, "graph", work, tuned.get_base_model(), packed)
    except Exception as error:
        found["graph"] = {"stopped": f"{type(error).__name__}: {error}"[:300]}
    free()
    ids = torch.tensor([work.prompts[0]], device=DEVICE)
    before, adapter = tuned(input_ids=ids).logits.float(), get_peft_model_state_dict(tuned)
    started = time.perf_counter()
    merged = merge(tuned, adapter)
    synchronize()
    seconds = round(time.perf_counter() - started, 2)
    change = (merged(input_ids=ids).logits.float() - before).norm() / before.norm()
    size = sum(p.nbytes for p in merged.parameters())
    found["merged in memory"] = {"seconds": seconds, "weights_bytes": size}
    found["merged in memory"]["relative_difference_of_logits"] = round(change.item(), 4)
    bench.time(found, "merged, generate", lambda: by_generate(merged, work), work, turns=1)
    places.fuse(merged)
    bench.time_places(found, "merged, graph", work, merged, size, **bench.fastest())


def four_bits_compiled(bench: Bench, found: dict) -> None:
    """The same 4 bits with the whole forward pass compiled. `generate` itself refuses to."""
    torch._dynamo.reset()
    try:
        tuned = with_adapter(in_four_bits(bench))
        packed = sum(p.nbytes for p in tuned.parameters())
        given = (bench.work[12], tuned.get_base_model(), packed)
        bench.time_places(found, "12", *given, compiled="whole")
    finally:
        torch._dynamo.reset()


def in_four_bits(bench: Bench):
    """The model's weights as NF4 with double quantization, through transformers' own loading."""
    from transformers import BitsAndBytesConfig

    packing = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head"],
    )
    shape = LlamaConfig(**bench.model.config.to_dict())
    options = {"quantization_config": packing, "device_map": {"": DEVICE}, "dtype": torch.bfloat16}
    state = {name: tensor.contiguous() for name, tensor in bench.model.state_dict().items()}
    base = LlamaForCausalLM.from_pretrained(None, config=shape, state_dict=state, **options).eval()
    base.generation_config.eos_token_id = None
    if not CUDA:  # else the first pass repacks the weights in place, and they cannot be unpacked
        for module in base.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    return base


def with_adapter(base):
    from peft import LoraConfig, get_peft_model

    from helpers.config import ALL_LINEAR_TARGETS

    torch.manual_seed(1)
    lora = LoraConfig(
        r=64,
        lora_alpha=16,
        target_modules=list(ALL_LINEAR_TARGETS),
        init_lora_weights=False,  # random, so that the adapter changes something
        task_type="CAUSAL_LM",
    )
    tuned = get_peft_model(base, lora, autocast_adapter_dtype=False).eval()
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(torch.bfloat16)
            if "lora_B" in name:
                parameter.data *= 0.1
    return tuned


def merge(tuned, adapter: dict):
    """The way out of 4 bits: unpack the base, put the adapter on it again, merge."""
    from peft import set_peft_model_state_dict

    base = tuned.unload().dequantize()
    base.is_loaded_in_4bit = False  # `dequantize` leaves it, and peft goes by it
    again = with_adapter(base)
    set_peft_model_state_dict(again, adapter)
    return again.merge_and_unload()


def profile(bench: Bench, found: dict) -> None:
    """Top ten kernels of a step, and how much of its time the GPU waits, of both ways at 12."""
    work = bench.work[12]
    room = places.Places(bench.model, work.rows, work.room, **bench.fastest())
    room.lengths.fill_(room.room // 2)
    with watched(found, "best", 3):
        for _ in range(3):
            room.step()
    watch = Watch(Ends(torch.full((12,), 10**9, device=DEVICE)), found)
    by_generate(bench.model, work, stopping_criteria=[watch], max_new_tokens=10)


class Watch(StoppingCriteria):
    """Profiles `generate` from the end of its fourth step to that of its seventh."""

    def __init__(self, ends: Ends, found: dict):
        self.ends, self.found, self.calls, self.open = ends, found, 0, contextlib.ExitStack()

    def __call__(self, ids, scores, **others):
        self.calls += 1
        if self.calls == 4:
            self.open.enter_context(watched(self.found, "generate", 3))
        if self.calls == 7:
            self.open.close()
        return self.ends(ids, scores)


@contextlib.contextmanager
def watched(found: dict, name: str, steps: int):
    """Profile some steps: microseconds a step, of them busy on the GPU, and the top ten kernels."""
    kinds = [torch.profiler.ProfilerActivity.CUDA if CUDA else torch.profiler.ProfilerActivity.CPU]
    synchronize()
    with torch.profiler.profile(activities=kinds) as seen:
        started = time.perf_counter()
        yield
        synchronize()
        micros = (time.perf_counter() - started) * 1e6
    side = "self_device_time_total" if CUDA else "self_cpu_time_total"
    rows = [row for row in seen.key_averages() if getattr(row, side) > 0]
    rows.sort(key=lambda row: -getattr(row, side))
    busy = sum(getattr(row, side) for row in rows)
    top = [
        {
            "kernel": row.key[:90],
            "calls": row.count / steps,
            "us": round(getattr(row, side) / steps),
        }
        for row in rows[:10]
    ]
    found[name] = {
        "step_us": round(micros / steps),
        "gpu_busy_us": round(busy / steps),
        "gpu_waits_share": round(1 - busy / micros, 3),
        "kernels_a_step": sum(row.count for row in rows) / steps,
        "top": top,
    }


def equal(bench: Bench, found: dict) -> None:
    """Greedy answers in float32 on a small random model, against `generate` one by one."""
    model = small_model()
    work = Work.of(4, 9, tiny=True)
    small = Work([[token % 250 + 3 for token in row] for row in work.prompts], work.limits, 4)
    alone = by_generate(model, Work(small.prompts, small.limits, 1))
    places.fuse(model)
    for compiled, fused in (("", False), ("parts", True)):
        made = places.Places(model, 4, small.room, "sdpa", compiled, fused)
        answers = made.answer(small.prompts, small.limits)
        answers = made.answer(small.prompts, small.limits)
        same = sum(a == b for a, b in zip(answers, alone, strict=True))
        found[f"places {compiled} {'fused' if fused else ''}".strip()] = f"{same} of {len(alone)}"


def small_model() -> LlamaForCausalLM:
    """A random Llama in float32 whose answers differ from token to token."""
    torch.manual_seed(0)
    shape = LlamaConfig(**TINY, num_key_value_heads=2, vocab_size=300, initializer_range=0.2)
    model = LlamaForCausalLM(shape).to(DEVICE).eval()
    model.generation_config.eos_token_id = None
    return model


# In this order, each with the seconds that it may take.
PARTS = {
    "attention": (attention, 20),
    "plain": (plain, 60),
    "best": (best, 60),
    "cell": (cell, 30),
    "equal": (equal, 40),
    "static": (static, 75),
    "four_bits": (four_bits, 75),
    "waiting": (waiting, 40),
    "simple": (simple, 60),
    "products": (products, 20),
    "profile": (profile, 40),
    "whole": (whole, 75),
    "even": (even, 40),
    "batch": (batch, 60),
    "pipeline": (pipe, 40),
    "autotuned": (autotuned, 75),
    "four_bits_compiled": (four_bits_compiled, 75),
    "static_64": (static_64, 75),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=290, help="for all parts together")
    parser.add_argument("--tiny", action="store_true", help="a small model, for a look on a CPU")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    bench = Bench(options)
    with torch.no_grad():
        for name in options.parts:
            bench.run(name)


if __name__ == "__main__":
    main()
