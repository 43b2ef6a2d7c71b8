"""Does the planner keep its word? Llama 2's shapes under caps of GPU memory.

    python -m benchmarks.caps one 7B --cap 8 --length 1024          plan, train, one JSON line
    python -m benchmarks.caps one 7B --cap 8 --way card             without the host's memory
    python -m benchmarks.caps one 7B --cap 4 --way forced           train what the plan refuses
    python -m benchmarks.caps group 1                               a group of GROUPS, added to
                                                                    results/caps.json

A cap is `torch.cuda.set_per_process_memory_fraction`: what torch may reserve, without the CUDA
context. Runs go side by side as far as a card of 80 GB holds them, for memory alone is measured.
The weights are zeros, read from a file that is one hole: they take no disk, and memory does not
depend on what they are.

Needs one NVIDIA GPU of 80 GB and some minutes a group.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
PROJECT = Path(__file__).resolve().parent.parent
RESULTS = PROJECT / "benchmarks" / "results" / "caps.json"
# (size, GiB, tokens of the longest row, way). Ways: "planned"; "card", planned without the host's
# memory; "forced" trains, though refused, as little at a time as it can.
GROUPS = (
    tuple(
        ("7B", cap, length, "planned") for cap in (24, 16, 12, 8, 6) for length in (512, 1024, 2048)
    ),
    (("70B", 48, 512, "planned"), ("13B", 16, 512, "planned"), ("13B", 12, 512, "planned")),
    (("7B", 4.5, 512, "forced"), ("7B", 5, 1024, "forced"), ("13B", 8, 512, "forced")),
    (("70B", 76, 512, "planned"),),
)
STEPS = 50
TOKENS_PER_STEP = {"7B": 4096, "13B": 4096, "70B": 2048}
CARD_GIB = 76  # what the runs of one moment may take together


def write_checkpoint(folder: Path, size: str) -> None:
    """A Llama 2 of zeros with a tokenizer: a safetensors file that is a header and a hole."""
    import math

    from benchmarks.llama2 import llama2_config
    from benchmarks.training import word_tokenizer

    shape = llama2_config(size)
    shape.architectures = ["LlamaForCausalLM"]
    shape.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    header, end = {}, 0
    for name, dimensions in parameter_shapes(shape).items():
        start, end = end, end + 2 * math.prod(dimensions)
        header[name] = {"dtype": "BF16", "shape": dimensions, "data_offsets": [start, end]}
    text = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def parameter_shapes(shape) -> dict[str, list[int]]:
    """The shape of every parameter of a Llama by name."""
    import torch
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(shape)
    return {name: list(parameter.shape) for name, parameter in model.named_parameters()}


def one(size: str, cap: float, length: int, way: str) -> dict:
    """Plan for a cap in GiB, train STEPS steps, compare bytes."""
    import torch

    from benchmarks.llama2 import llama2_config
    from helpers.config import Config, ConfigError
    from helpers.model import measure, plan, predict, steps
    from helpers.training import planning

    whole = torch.cuda.get_device_properties(None).total_memory
    torch.cuda.set_per_process_memory_fraction(cap * predict.GIB / whole)
    found = {"size": size, "cap_gib": cap, "length": length, "way": way}
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder) / "model", size)
        config = Config.from_profile(
            "llama2_7b", model_name=f"{folder}/model", run_dir=f"{folder}/run", max_length=length,
            per_device_train_batch_size=TOKENS_PER_STEP[size] // length, grad_acc_steps=1,
            max_steps=STEPS, log_steps=10,
        )  # fmt: skip
        shape, room = llama2_config(size), measure.torch_bytes(config.device)
        if way != "planned":
            planned = plan.for_card(shape, steps.Run.from_config(config), room, reserve_bytes=0)
            found |= {"plan": planned.advice, "fits": planned.fits}
            config = planning.follow(config, planned.run)
        try:
            config = planning.planned(config)
        except ConfigError as refusal:
            return {**found, "refusal": str(refusal)}
        step = steps.Run.from_config(config)
        found |= {"run": dataclasses.asdict(step)}
        found |= {"predicted_bytes": predict.estimate(shape, step).total}
        try:
            return {**found, **train(config, size)}
        except torch.OutOfMemoryError as error:
            return {**found, "out_of_memory": str(error).split(". ")[0]}


def train(config, size: str) -> dict:
    """Train on rows of random words as notebook 04 does; bytes, steps and losses."""
    import torch

    from benchmarks import notebook_04
    from benchmarks.training import random_rows, write_rows
    from helpers.training import safety

    count = 2 * STEPS * TOKENS_PER_STEP[size] // 300
    write_rows(config.dataset_dir, random_rows(count, config.max_length - 1))
    found = {}
    for names in notebook_04.each_cell(config):
        if "model" in names and not found:
            torch.cuda.empty_cache()
            found |= {"weights_bytes": torch.cuda.memory_allocated()}
            found |= {"load_reserved_bytes": torch.cuda.max_memory_reserved()}
            torch.cuda.reset_peak_memory_stats()
        if "trainer" in names:
            break
    trainer = names["trainer"]
    with safety.kernels(trainer):
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        **found,
        "steps": trainer.state.global_step,
        "losses": [round(float(loss), 3) for loss in losses],
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
    }


def side_by_side(cases: tuple) -> Iterator[dict]:
    """Each case in a process of its own, as many at a time as the card holds."""
    waiting, running = list(cases), {}
    while waiting or running:
        for case in list(waiting):
            if sum(cap for _, cap, *_ in running) + case[1] <= CARD_GIB:
                waiting.remove(case)
                size, cap, length, way = map(str, case)
                command = [sys.executable, "-m", "benchmarks.caps", "one", size, "--cap", cap]
                command += ["--length", length, "--way", way]
                running[case] = subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8")
        ended = [case for case, process in running.items() if process.poll() is not None]
        for case in ended:
            process = running.pop(case)
            lines = process.stdout.read().splitlines()
            yield json.loads(lines[-1]) if process.returncode == 0 else {"failed": case}
        time.sleep(1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["one", "group"])
    parser.add_argument("what", help="7B, 13B or 70B; or the number of a group, from 1")
    parser.add_argument("--cap", type=float, default=24.0, help="GiB")
    parser.add_argument("--length", type=int, default=512, help="tokens of the longest row")
    parser.add_argument("--way", choices=["planned", "card", "forced"], default="planned")
    options = parser.parse_args()
    if options.command == "one":
        print(json.dumps(one(options.what, options.cap, options.length, options.way)))
        return
    from helpers.runs.environment import (
        environment,  # with torch, which no other process here needs
    )

    facts = {"what": f"Llama 2's shapes, planned for a cap, {STEPS} steps", **environment()}
    rows = json.loads(RESULTS.read_text("utf-8"))["rows"] if RESULTS.exists() else []
    for row in side_by_side(GROUPS[int(options.what) - 1]):
        print(json.dumps(row), flush=True)
        rows.append(row)
        RESULTS.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
