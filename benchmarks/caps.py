"""Does the planner keep its word? Llama 2's shapes under caps of GPU memory.

    python benchmarks/training.py make FOLDER                       random weights, 7B's shape
    python benchmarks/caps.py one FOLDER --cap 8 --length 1024      plan, train, one JSON line
    python benchmarks/caps.py one FOLDER --cap 4 --forced           train what the plan refuses
    python benchmarks/caps.py all FOLDER                            every cap, to results/caps.json

A cap is `torch.cuda.set_per_process_memory_fraction`: what torch may reserve, without the CUDA
context. Runs go side by side as far as the card holds them, for memory alone is measured.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

RESULTS = PROJECT / "benchmarks" / "results" / "caps.json"
# (GiB, tokens of the longest row, trained though refused): what one GPU holds side by side.
GROUPS = (
    ((6, 512, 0), (8, 512, 0), (12, 512, 0), (16, 512, 0), (24, 512, 0)),
    ((6, 1024, 0), (8, 1024, 0), (12, 1024, 0), (8, 2048, 0), (12, 2048, 0))
    + ((4, 512, 1), (5, 2048, 1), (6, 4096, 1)),
)
STEPS = 50


def one(folder: Path, cap: float, length: int, forced: bool) -> dict:
    """Plan 8 rows a step for a cap in GiB, train STEPS steps, compare bytes."""
    import torch
    from datasets import Dataset

    from benchmarks.training import random_rows
    from helpers import memory, models, training
    from helpers.config import Config, ConfigError

    whole = torch.cuda.get_device_properties(None).total_memory
    torch.cuda.set_per_process_memory_fraction(cap * memory.GIB / whole)
    with tempfile.TemporaryDirectory() as run_dir:
        config = Config.from_profile(
            "llama2_7b", model_name=str(folder), run_dir=run_dir, max_length=length,
            per_device_train_batch_size=8, grad_acc_steps=1, max_steps=STEPS, log_steps=10,
        )  # fmt: skip
        shape = models.load_shape(str(folder))
        room = memory.card_bytes()
        step = memory.Run.from_config(config)
        plan = memory.plan(shape, step, room, training.CONTEXT_BYTES)
        found = {"cap_gib": cap, "length": length, "fits": plan.fits, "plan": plan.advice}
        try:
            config = training.planned(config)
        except ConfigError as refusal:
            found["refusal"] = str(refusal)
            if not forced:
                return found
            config = dataclasses.replace(
                config, per_device_train_batch_size=1, kept_layers=0, optim=plan.run.optimizer
            )
        rows = random_rows(STEPS * 8 * length // 300, length)
        data = Dataset.from_dict({"input_ids": rows, "labels": [[-100, *r[1:]] for r in rows]})
        model = models.load_model(config)
        torch.cuda.empty_cache()
        found |= {"weights_bytes": torch.cuda.memory_allocated()}
        found |= {"weights_reserved_bytes": torch.cuda.memory_reserved()}
        found |= {"load_reserved_bytes": torch.cuda.max_memory_reserved()}
        torch.cuda.reset_peak_memory_stats()
        trainer = training.build_trainer(
            config, model, models.load_tokenizer(str(folder)),
            {"train": data, "validation": data.select(range(8))},
        )  # fmt: skip
        try:
            with training.kernels(trainer):
                trainer.train()
        except torch.OutOfMemoryError as error:
            return {**found, "out_of_memory": str(error)[:120]}
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        step = memory.Run.from_config(config)
        return {
            **found,
            "run": dataclasses.asdict(step),
            "steps": trainer.state.global_step,
            "losses": [round(float(loss), 3) for loss in losses],
            "predicted_bytes": memory.estimate(shape, step).total,
            "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        }


def side_by_side(folder: Path, cases: list[tuple]) -> list[dict]:
    """Each (cap, length, forced) in a process of its own, all at the same time."""
    processes = []
    for cap, length, forced in cases:
        command = [sys.executable, __file__, "one", str(folder), "--cap", str(cap)]
        command += ["--length", str(length)] + ["--forced"] * forced
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    found = []
    for case, process in zip(cases, processes, strict=True):
        lines = process.communicate()[0].splitlines()
        row = json.loads(lines[-1]) if process.returncode == 0 else {"failed": case}
        print(json.dumps(row), flush=True)
        found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["one", "all"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cap", type=float, default=24.0, help="GiB")
    parser.add_argument("--length", type=int, default=1024, help="tokens of the longest row")
    parser.add_argument("--forced", action="store_true", help="train even if refused")
    options = parser.parse_args()
    if options.command == "one":
        print(json.dumps(one(options.folder, options.cap, options.length, options.forced)))
        return
    rows = []
    for group in GROUPS:
        rows += side_by_side(options.folder, group)
    from benchmarks.training import circumstances

    what = f"Llama 2's shape with random weights, planned for a cap, {STEPS} steps of 8 rows"
    facts = {"what": what, **circumstances()}
    RESULTS.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
