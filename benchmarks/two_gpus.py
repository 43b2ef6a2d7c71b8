"""What does a second GPU bring? Llama 2's shapes under DDP and FSDP-QLoRA.

    python -m benchmarks.two_gpus FOLDER          every case of CASES, to results/two_gpus.json
    python -m benchmarks.two_gpus FOLDER NAME...  these, added to it

A case is the script of notebook 04's cells, started through accelerate with the committed files of
accelerate/. Every case of a model sees the same rows in each step: one GPU takes half of them at a
time. The 7B model has random weights, for losses are compared; the 70B model's are zeros from a
file that is one hole. A cap is `torch.cuda.set_per_process_memory_fraction`, in each process.

Needs two NVIDIA GPUs of one host with 24 GB, and one to two minutes a case.
"""

import argparse
import json
import os
import random
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
PROJECT = Path(__file__).resolve().parent.parent
RESULTS = PROJECT / "benchmarks" / "results" / "two_gpus.json"
ROWS_7B = {"max_length": 1024, "per_device_train_batch_size": 4, "max_steps": 30, "log_steps": 5}
ROWS_70B = {"max_length": 512, "per_device_train_batch_size": 2, "max_steps": 6, "log_steps": 2}
PLAIN = {"fast_path": False}
SHARED_70B = {**ROWS_70B, **PLAIN, "grad_acc_steps": 1}
# Name: model, accelerate's file (None: one process), GiB a GPU may give (0: all), settings.
CASES = {
    "7B one": ("7B", None, 0, {**ROWS_7B, "grad_acc_steps": 2}),
    "7B ddp": ("7B", "ddp", 0, {**ROWS_7B, "grad_acc_steps": 1}),
    "7B one plain": ("7B", None, 0, {**ROWS_7B, **PLAIN, "grad_acc_steps": 2}),
    "7B fsdp": ("7B", "fsdp_qlora", 0, {**ROWS_7B, **PLAIN, "grad_acc_steps": 1}),
    "70B fsdp": ("70B", "fsdp_qlora", 0, SHARED_70B),
    "70B fsdp 24 GiB": ("70B", "fsdp_qlora", 24, SHARED_70B),
    "70B fsdp 24 GiB forced": ("70B", "fsdp_qlora", 24, SHARED_70B),
    "70B fsdp 24 GiB rank 16": ("70B", "fsdp_qlora", 24, {**SHARED_70B, "lora_r": 16}),
}
MARK = "RESULT "


def write_model(folder: Path, size: str) -> Path:
    """The model's folder, made when it is not there."""
    from benchmarks import caps, training

    place = folder / size
    if not place.exists():
        caps.write_checkpoint(place, size) if size == "70B" else training.make(place, size)
    return place


def write_rows(run_dir: Path, longest: int) -> None:
    """Questions of any words, answers of few: what can be learnt is which those are."""
    from datasets import Dataset, DatasetDict

    from benchmarks.training import row_lengths
    from helpers.runs import inventory

    chance = random.Random(0)
    few = chance.sample(range(3, 32000), 200)

    def words(numbers) -> str:
        return " ".join(f"w{number}" for number in numbers)

    pairs = [
        {
            "prompt": words(chance.choices(range(3, 32000), k=length // 3)),
            "completion": " " + words(chance.choices(few, k=length - length // 3 - 1)),
        }
        for length in row_lengths(1200, longest)
    ]
    splits = {"train": Dataset.from_list(pairs[16:]), "validation": Dataset.from_list(pairs[:16])}
    DatasetDict(splits).save_to_disk(run_dir / "dataset")
    inventory.seal(run_dir / "dataset")


def parameters(model: Path, run_dir: Path, settings: dict) -> dict:
    """Of the notebook, for a case's settings."""
    steps, rows = settings["max_steps"], settings["per_device_train_batch_size"]
    settings = {"eval_steps": steps, "save_steps": steps, **settings}
    settings |= {"model_name": str(model), "run_dir": str(run_dir)}
    settings["per_device_eval_batch_size"] = rows
    return {"PROFILE": "llama2_7b", **{name.upper(): value for name, value in settings.items()}}


def make_config(model: Path, run_dir: Path, settings: dict):
    from helpers.config import Config

    return Config.from_parameters(parameters(model, run_dir, settings))


def work(run_dir: Path, cap: float, forced: bool) -> dict:
    """Train in this process, which may be one of two; its peak and what training measured.

    Forced, it trains what the planner refuses.
    """
    import torch

    from helpers.model import predict
    from helpers.runs import inventory
    from helpers.training import planning

    rank = int(os.environ.get("LOCAL_RANK", 0))
    torch.cuda.set_device(rank)
    if cap:
        whole = torch.cuda.get_device_properties(rank).total_memory
        torch.cuda.set_per_process_memory_fraction(cap * predict.GIB / whole)
    if forced:
        planning.refuse_without_room = lambda config: None
    found = {"rank": rank}
    try:
        metrics = runpy.run_path(str(run_dir / "train.py"), run_name="__main__")["metrics"]
    except Exception as error:  # what kept it from training is the result
        said = f"{type(error).__name__}: {error}".replace(f"{run_dir.parent}/", "")
        return {**found, "refused": said[:600]}
    log = json.loads((run_dir / "adapter" / inventory.TRAINING_LOG).read_text("utf-8"))
    losses = [round(float(e["loss"]), 4) for e in log["history"] if "loss" in e]
    return {
        **found,
        **{name: metrics[name] for name in ("eval_loss_before", "eval_loss_after")},
        "tokens_per_second": speed(log),
        "losses": losses,
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
    }


def speed(log: dict) -> float:
    """Tokens of all GPUs a second in the later half of the steps."""
    steps = log["steps"][len(log["steps"]) // 2 :]
    return round(sum(step["tokens"] for step in steps) / sum(step["seconds"] for step in steps))


def planned_bytes(model: Path, run_dir: Path, shards: int, settings: dict) -> int:
    """What the planner says of a process off the fast path, before anything is loaded."""
    import dataclasses

    from helpers.model import loading, predict
    from helpers.model.steps import Run

    run = Run.from_config(make_config(model, run_dir, settings))
    return predict.estimate(
        loading.load_shape(str(model)), dataclasses.replace(run, shards=shards)
    ).total


def losses_of_merge(model: Path, run_dir: Path, settings: dict) -> dict[str, float]:
    """Nats a token of one row: the base, with the gathered adapter, and merged as 05 does it."""
    import torch
    from datasets import load_from_disk

    from helpers.merging import merging
    from helpers.model import loading

    config = make_config(model, run_dir, settings)
    tokenizer = loading.load_tokenizer(config.model_name)
    row = load_from_disk(str(config.dataset_dir))["validation"][0]
    ids = torch.tensor([tokenizer(row["prompt"] + row["completion"])["input_ids"]], device="cuda")

    def loss(model) -> float:
        with torch.no_grad():
            return round(model(input_ids=ids, labels=ids).loss.item(), 4)

    tuned = merging.load_tuned(config)
    with tuned.disable_adapter():
        found = {"base": loss(tuned)}
    found["tuned"] = loss(tuned)
    del tuned
    base = loading.load_model(config).dequantize()
    merged = merging.as_saved(merging.load_tuned(config, base).merge_and_unload(), config)
    return {**found, "merged": loss(merged)}


def measure(folder: Path, name: str) -> dict:
    """One case in processes of its own."""
    from benchmarks.training import circumstances
    from helpers.training import export

    size, file, cap, settings = CASES[name]
    model, run_dir = write_model(folder, size), folder / "run"
    shutil.rmtree(run_dir, ignore_errors=True)
    write_rows(run_dir, settings["max_length"])
    export.export_training(parameters(model, run_dir, settings))
    command = [sys.executable]
    if file:
        launcher = ["accelerate.commands.launch", "--config_file", f"accelerate/{file}.yaml"]
        command += ["-m", *launcher]
    command += ["-m", "benchmarks.two_gpus", str(folder), name, "--work"]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, encoding="utf-8", timeout=400)
    found = {"case": name, **circumstances(), "settings": settings, "cap_gib": cap}
    found["seconds"] = round(time.perf_counter() - start)
    if not settings.get("fast_path", True):  # else what it said counts: it chose a plan
        shards = 2 if file == "fsdp_qlora" else 1
        found["planned_bytes"] = planned_bytes(model, run_dir, shards, settings)
    lines = done.stdout.splitlines()
    found["said"] = [line for line in lines if line.startswith("planned for")]
    found["processes"] = [json.loads(x[len(MARK) :]) for x in lines if x.startswith(MARK)]
    if not found["processes"]:
        found["failed"] = done.stderr[-3000:]
    elif name == "7B fsdp" and (run_dir / "adapter").exists():
        found["loss_of_one_row"] = losses_of_merge(model, run_dir, settings)
    return found


def table(rows: list[dict]) -> list[dict]:
    """What notebook 04 shows, a row a case; memory is that of the fuller GPU."""

    def in_gib(sizes: list[int]) -> float | None:
        return round(max(sizes) / 2**30, 1) if sizes else None

    lines = []
    for row in rows:
        trained = [process for process in row["processes"] if "losses" in process]
        first = trained[0] if trained else {}
        lines.append(
            {
                "run": row["case"],
                "GPUs": f"{len(row['processes'])} x {row['hardware']}",
                "planned GiB": in_gib([row["planned_bytes"]] if "planned_bytes" in row else []),
                "measured GiB": in_gib([process["peak_allocated_bytes"] for process in trained]),
                "tokens per second": first.get("tokens_per_second"),
                "validation loss after": first.get("eval_loss_after"),
            }
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="for models and runs, some 30 GB")
    parser.add_argument("cases", nargs="*", metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        cap, forced = CASES[options.cases[0]][2], options.cases[0].endswith("forced")
        found = work(options.folder / "run", cap, forced)
        # The script has silenced each process but the first.
        print(f"\n{MARK}{json.dumps(found)}", file=sys.__stdout__, flush=True)
        sys.exit("refused" in found)  # the other process must not wait for this one
    rows = (
        json.loads(RESULTS.read_text("utf-8"))["rows"] if RESULTS.exists() and options.cases else []
    )
    for name in options.cases or CASES:
        row = measure(options.folder, name)
        print(json.dumps(row), flush=True)
        rows = [other for other in rows if other["case"] != name] + [row]
        rows.sort(key=lambda row: list(CASES).index(row["case"]))
        what = "Llama 2's shapes on one GPU and on two of its kind"
        facts = {"what": what, "table": table(rows), "rows": rows}
        RESULTS.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
