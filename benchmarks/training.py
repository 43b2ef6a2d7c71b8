"""Measure a QLoRA training step at Llama-2-7B's shape on a GPU, against what else one could pick.

    python -m benchmarks.training make FOLDER               write a checkpoint of random weights
    python -m benchmarks.training run FOLDER NAME           measure one way, print one JSON line
    python -m benchmarks.training compare FOLDER NAME...    measure several in turn, and put them
                                                            into results/training.json

Names: ours, ours_plain (the same batches through trl's own step), article, unsloth (padded batches
grouped by length), unsloth_packed (its own packing). Speed and memory do not depend on what the
weights are. Every way gets rows of the same lengths (log-normal, median 300 tokens), rank 64, and a
process of its own. Unsloth must be installed to be measured; UNSLOTH_PATH may name a folder that
holds it with its own dependencies. Its xformers is built for CUDA 12: beside a PyTorch for CUDA 13
it loads where LD_LIBRARY_PATH leads to libcudart.so.12 (package nvidia-cuda-runtime-cu12), and the
results say whether it did.

Needs one NVIDIA GPU with 24 GB and 14 GB of disk; a way takes one to two minutes a turn.
"""

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
PROJECT = Path(__file__).resolve().parent.parent
RESULTS = PROJECT / "benchmarks" / "results" / "training.json"
WARM_UP, STEPS = 4, 24  # steps in all, and how many at the start are not counted


def make(folder: Path, shape: str) -> None:
    import torch
    from transformers import LlamaForCausalLM

    from benchmarks.llama2 import llama2_config

    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(llama2_config(shape))
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)


def word_tokenizer():
    """A tokenizer of 32,000 words w3, w4, ... with Llama 2's special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 32000)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return with_special_tokens(tokenizer)


def with_special_tokens(tokenizer):
    """The tokenizer in transformers' terms, with the special tokens of Llama 2."""
    from transformers import PreTrainedTokenizerFast

    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def row_lengths(count: int, longest: int) -> list[int]:
    chance = random.Random(0)
    return [
        max(32, min(longest, int(chance.lognormvariate(math.log(300), 0.7)))) for _ in range(count)
    ]


def random_rows(count: int, longest: int) -> list[list[int]]:
    chance = random.Random(1)
    return [chance.choices(range(3, 32000), k=n) for n in row_lengths(count, longest)]


def write_rows(folder: Path, rows: list[list[int]]) -> None:
    """Rows as notebook 02 leaves them; the first token of each is given, all others are graded.

    trl adds the end mark, so a row has a token more.
    """
    from datasets import Dataset, DatasetDict

    from helpers.runs import inventory

    texts = [[f"w{token}" for token in row] for row in rows]
    pairs = [{"prompt": text[0], "completion": " " + " ".join(text[1:])} for text in texts]
    data = Dataset.from_list(pairs)
    DatasetDict(train=data, validation=data.select(range(8))).save_to_disk(folder)
    inventory.seal(folder)


class Clock:
    """Counts tokens and seconds after the warm-up, and profiles the last step."""

    def __init__(self, steps: int, padded: bool = False):
        import torch

        self.torch, self.steps, self.padded = torch, steps, padded

    def begin(self, step: int) -> None:
        if step == self.steps:
            activities = [self.torch.profiler.ProfilerActivity.CUDA]
            self.profiler = self.torch.profiler.profile(activities=activities)
            self.profiler.__enter__()

    def end(self, step: int, tokens: int) -> None:
        if step == WARM_UP:
            self.torch.cuda.synchronize()
            self.start, self.first = time.perf_counter(), tokens
        if step == self.steps - 1:
            self.torch.cuda.synchronize()
            self.seconds, self.last = time.perf_counter() - self.start, tokens
        if step == self.steps:
            self.torch.cuda.synchronize()
            cuda = self.torch.cuda  # now: an evaluation may follow
            self.peaks = cuda.max_memory_allocated(), cuda.max_memory_reserved()
            self.profiler.__exit__(None, None, None)
            events = self.profiler.key_averages()
            self.kernels = sorted(events, key=lambda e: -e.self_device_time_total)
            # Copies between host and card run beside the rest.
            busy = [e for e in events if not e.key.startswith(HOST_COPIES)]
            self.busy = sum(e.self_device_time_total for e in busy) / 1e3
            self.profiled = tokens - self.last if self.padded else tokens / step

    def result(self) -> dict:
        for event in self.kernels[:20]:
            milliseconds = event.self_device_time_total / 1e3
            print(f"{milliseconds:8.1f} ms {event.count:6d} x {event.key[:90]}", file=sys.stderr)
        steps = self.steps - 1 - WARM_UP
        allocated, reserved = self.peaks
        return {
            "tokens_per_second": round((self.last - self.first) / self.seconds),
            "tokens_per_step": round((self.last - self.first) / steps),
            "milliseconds_per_step": round(1000 * self.seconds / steps, 1),
            "busy_milliseconds": round(self.busy, 1),
            # The shortest of padded batches says little of the others.
            "busy_by_part": None if self.padded else by_part(self.kernels),
            "busy_microseconds_per_token": round(1000 * self.busy / self.profiled, 2),
            "peak_allocated_bytes": allocated,
            "peak_reserved_bytes": reserved,
        }


HOST_COPIES = ("Memcpy DtoH", "Memcpy HtoD")
# What a kernel is for, by its name; the first that is found counts.
PARTS = {
    "copies to and from the host, beside the rest": HOST_COPIES,
    "attention": ("flash",),
    "unpacking 4 bits": ("Dequantize", "rshift"),
    "products": ("nvjet", "gemm", "cutlass", "splitK"),
    "sums of hidden states": ("CUDAFunctor_add<c10::BFloat16>",),
    "norms, rotation, gate": ("layer_norm", "triton"),
}
LONG = 100  # microseconds: at 4,096 tokens a product with a base weight takes twice that or more


def by_part(kernels: list) -> dict[str, float]:
    """Milliseconds of a profiled step by what they are for; products with base weights apart."""
    parts = {}
    for event in kernels:
        found = [part for part, names in PARTS.items() if any(n in event.key for n in names)]
        part = found[0] if found else "the rest: loss, optimizer, copies"
        if part == "products":
            long = event.self_device_time_total > LONG * event.count
            part += " with base weights" if long else " with adapters"
        parts[part] = parts.get(part, 0.0) + event.self_device_time_total / 1e3
    return {part: round(milliseconds, 1) for part, milliseconds in parts.items()}


def run_ours(folder: Path, options: argparse.Namespace, fast: bool) -> dict:
    """This project's own trainer, as notebook 04 builds it."""
    from benchmarks import notebook_04  # isort: skip
    from helpers.training import safety  # isort: skip  (say how memory grows, before it is asked)
    from transformers import TrainerCallback

    from helpers.config import Config

    with tempfile.TemporaryDirectory() as run_dir:
        config = Config.from_profile(
            "llama2_7b",
            model_name=str(folder),
            run_dir=run_dir,
            max_length=options.length,
            per_device_train_batch_size=options.rows,
            grad_acc_steps=1,
            activation_checkpointing=options.checkpointing,
            max_steps=options.steps,
            fast_path=fast,
            kept_layers=options.kept,
            activation_offloading=options.offload,
            log_steps=10,
        )
        count = 2 * options.steps * config.per_device_train_batch_size * options.length // 300
        write_rows(config.dataset_dir, random_rows(count, options.length - 1))
        trainer = notebook_04.run_cells(config, "trainer")["trainer"]
        clock = Clock(options.steps)

        class Timer(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                clock.begin(state.global_step + 1)

            def on_step_end(self, args, state, control, **kwargs):
                clock.end(state.global_step, state.num_input_tokens_seen)

        trainer.add_callback(Timer())
        with safety.kernels(trainer):
            trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        losses = [round(float(loss), 4) for loss in losses]
        ways = {"kept": options.kept, "offload": options.offload}
        return {**ways, **clock.result(), "losses": losses}


def padded_batches(options: argparse.Namespace):
    """Batches of rows grouped by length, as the trainers do it: their inputs and their tokens."""
    import torch

    rows = sorted(random_rows(options.steps * options.rows, options.length), key=len, reverse=True)
    for first in range(0, len(rows), options.rows):
        batch = rows[first : first + options.rows]
        width = max(map(len, batch))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in batch], device="cuda")
        lengths = torch.tensor([len(row) for row in batch], device="cuda")
        mask = (torch.arange(width, device="cuda") < lengths[:, None]).long()
        labels = ids.masked_fill(mask == 0, -100)
        yield {"input_ids": ids, "attention_mask": mask, "labels": labels}, sum(map(len, batch))


def packed_batches(options: argparse.Namespace):
    """Batches as Unsloth's trainer makes them with `packing=True`: trl packs rows into `length`
    tokens, and `rows` of these lie end to end in one, with the lengths of the rows beside them."""
    import torch
    from datasets import Dataset
    from trl.data_utils import pack_dataset

    rows = random_rows(2 * options.steps * options.rows * options.length // 300, options.length)
    packed = pack_dataset(Dataset.from_dict({"input_ids": rows}), options.length, "bfd")
    for batch in packed.shuffle(seed=0).iter(options.rows):
        ids = torch.tensor([sum(batch["input_ids"], [])], device="cuda")
        lengths = sum(batch["seq_lengths"], [])
        positions = torch.cat([torch.arange(n) for n in lengths])[None].cuda()
        inputs = {
            "input_ids": ids,
            "position_ids": positions,
            "labels": ids.masked_fill(positions == 0, -100),
            "packed_seq_lengths": torch.tensor(lengths, dtype=torch.int32),
        }
        yield inputs, ids.numel()


def run_loop(folder: Path, options: argparse.Namespace, load, packed: bool = False) -> dict:
    """A plain loop over batches, padded or packed."""
    import torch

    model, optimizer, autocast = load(folder, options)
    model.train()
    batches = (packed_batches if packed else padded_batches)(options)
    parameters = [p for p in model.parameters() if p.requires_grad]
    clock, tokens, losses = Clock(options.steps, padded=not packed), 0, []
    torch.cuda.reset_peak_memory_stats()
    for step, (inputs, count) in zip(range(1, options.steps + 1), batches, strict=False):
        clock.begin(step)
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.3)
        optimizer.step()
        optimizer.zero_grad()
        tokens += count
        clock.end(step, tokens)
        losses.append(round(loss.item(), 4))
    return {**clock.result(), "losses": losses}


def load_article(folder: Path, options: argparse.Namespace):
    """The article's configuration: float16, q and v alone, everything else upcast to float32."""
    import bitsandbytes as bnb
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four_bit = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float16
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        use_safetensors=True,
        quantization_config=four_bit,
        device_map={"": 0},
        dtype=torch.float16,
    )
    model.config.use_cache = False
    lora = LoraConfig(
        r=64, lora_alpha=16, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], bias="none"
    )
    model = get_peft_model(prepare_model_for_kbit_training(model), lora)
    trainable = [p for p in model.parameters() if p.requires_grad]
    return model, bnb.optim.PagedAdamW32bit(trainable, lr=2e-4), False


def load_unsloth(folder: Path, options: argparse.Namespace):
    """Unsloth with its own defaults, all linear layers."""
    import unsloth  # isort: skip  (before anything that it patches)
    import bitsandbytes as bnb
    import torch

    from helpers.config import ALL_LINEAR_TARGETS

    model, _ = unsloth.FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=options.length, load_in_4bit=True, dtype=torch.bfloat16
    )
    model = unsloth.FastLanguageModel.get_peft_model(
        model,
        r=64,
        lora_alpha=16,
        lora_dropout=0,
        target_modules=list(ALL_LINEAR_TARGETS),
        bias="none",
        use_gradient_checkpointing="unsloth" if options.checkpointing else False,
    )
    unsloth.FastLanguageModel.for_training(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    return model, bnb.optim.AdamW8bit(trainable, lr=2e-4), True


WAYS = {
    "ours": lambda folder, options: run_ours(folder, options, fast=True),
    "ours_plain": lambda folder, options: run_ours(folder, options, fast=False),
    "article": lambda folder, options: run_loop(folder, options, load_article),
    "unsloth": lambda folder, options: run_loop(folder, options, load_unsloth),
    "unsloth_packed": lambda folder, options: run_loop(folder, options, load_unsloth, packed=True),
}


def run(folder: Path, name: str, options: argparse.Namespace) -> None:
    import torch

    if options.cap_gib:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(options.cap_gib * 2**30 / total)
    settings = {key: getattr(options, key) for key in ("rows", "length", "checkpointing")}
    found = WAYS[name](folder, options)
    print(json.dumps({"name": name, **circumstances(), **settings, **found}), flush=True)


def compare(folder: Path, ways: list[str], options: argparse.Namespace) -> None:
    """Each way in turn, `turns` times. A way is NAME:ROWSxLENGTH, with + for no checkpointing."""
    facts = json.loads(options.output.read_text("utf-8")) if options.output.exists() else {}
    facts["what"] = "A QLoRA training step at Llama 2 7B's shape, random weights, rank 64"
    runs = [run for run in facts.get("runs", []) if run["way"] not in ways]
    for way in ways * options.turns:
        name, shape = way.rstrip("+").split(":")
        rows, length = shape.split("x")
        command = [sys.executable, "-m", "benchmarks.training", "run", str(folder), name]
        command += ["--rows", rows, "--length", length]
        command += ["--no-checkpointing"] if way.endswith("+") else []
        if name == "ours" and way[-1] != "+":
            command += ["--kept", str(options.kept)] + ["--offload"] * options.offload
        environment = dict(os.environ)
        if name.startswith("unsloth") and "UNSLOTH_PATH" in environment:
            environment["PYTHONPATH"] = environment["UNSLOTH_PATH"]
        done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8")
        if done.returncode:
            print(done.stderr[-2000:], flush=True)
            continue
        runs.append({"way": way, **json.loads(done.stdout.splitlines()[-1])})
        print({k: v for k, v in runs[-1].items() if k != "losses"}, flush=True)
        facts |= {"medians": medians(runs), "runs": runs}
        options.output.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def medians(runs: list[dict]) -> dict[str, dict]:
    """Of each way's speed and memory, over its runs."""
    return {
        way: {
            name: statistics.median(run[name] for run in runs if run["way"] == way)
            for name in ("tokens_per_second", "peak_reserved_bytes")
        }
        for way in dict.fromkeys(run["way"] for run in runs)
    }


def circumstances() -> dict:
    """Date, hardware and versions; where Unsloth was measured, also its own."""
    from helpers.runs.environment import environment  # sets how memory grows, and not for Unsloth

    if "unsloth" not in sys.modules:
        return environment()
    from unsloth.models._utils import xformers_version  # None where it does not load

    return {**environment(), "unsloth": version("unsloth"), "xformers": xformers_version}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["make", "run", "compare"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("ways", nargs="*")
    parser.add_argument("--shape", default="7B", choices=["7B", "13B"])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--kept", type=int, default=0, help="layers without a checkpoint")
    parser.add_argument("--offload", action="store_true", help="every second of the others")
    parser.add_argument("--cap-gib", type=float, default=0.0)
    parser.add_argument("--no-checkpointing", dest="checkpointing", action="store_false")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.command == "make":
        make(options.folder, options.shape)
    elif options.command == "run":
        run(options.folder, options.ways[0], options)
    else:
        compare(options.folder, options.ways, options)


if __name__ == "__main__":
    main()
