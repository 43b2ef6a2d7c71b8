"""Walk the six notebooks on a GPU, and measure each: seconds, GPU memory, disk, warnings.

    python -m benchmarks.series FOLDER llama2_7b                    without a cap
    python -m benchmarks.series FOLDER llama2_7b --cap 16           as on a card of 16 GiB
    python -m benchmarks.series FOLDER article --only 04 05 -p MAX_STEPS 60
    python -m benchmarks.series FOLDER demo --model MODEL           a model folder of yours

Run it from the project's folder. FOLDER takes the model and the run: at Llama 2 7B's shape 13.5 GB
and as much as notebook 05 says. Without --model the model has the shape of --shape, random weights
and a byte-level BPE tokenizer trained on the sample's posts, so its answers mean nothing, and
neither do its losses. Every notebook has a kernel of its own, as in `python -m helpers run`, which
is what runs it. A cap is `torch.cuda.set_per_process_memory_fraction` in each kernel. At 7B's shape
and 60 steps the walk takes some 15 minutes on an H200.

Each notebook's row goes to results/series.json as soon as it has ended; a row of the same profile,
model, cap and notebook is replaced.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from helpers.runs.environment import environment

RESULTS = Path(__file__).resolve().parent / "results" / "series.json"
NUMBERS = ("01", "02", "03", "04", "05", "06")
# hidden, inner, layers, heads, heads of keys and values: the public shape of TinyLlama-1.1B
TINYLLAMA = (2048, 5632, 22, 32, 4)
SHOWN = ("_tokens_per_second", "_bytes_predicted", "peak_memory_bytes", "_seconds")
# IPython runs this in each kernel before the first cell. The helpers come before torch, for they
# say how its memory may grow.
CAP = """import helpers
import torch

whole = torch.cuda.get_device_properties(None).total_memory
torch.cuda.set_per_process_memory_fraction({cap} * 2**30 / whole)
"""


# -- The model


def write_model(folder: Path, size: str) -> Path:
    """A Llama of random bfloat16 weights with a tokenizer; made when it is not there."""
    if not folder.exists():
        import torch
        from transformers import LlamaForCausalLM

        torch.set_default_dtype(torch.bfloat16)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = LlamaForCausalLM(shape_of(size))
        model.save_pretrained(folder)
        sample_tokenizer().save_pretrained(folder)
    return folder


def shape_of(size: str):
    """The LlamaConfig of "7B", "13B" or "TinyLlama"."""
    from benchmarks.llama2 import llama2_config

    if size != "TinyLlama":
        return llama2_config(size)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = dict(zip((*names, "num_key_value_heads"), TINYLLAMA, strict=True))
    shape = llama2_config("7B")
    shape.update({**sizes, "head_dim": 64, "max_position_embeddings": 2048})
    return shape


def sample_tokenizer():
    """A byte-level BPE tokenizer with Llama 2's special tokens, trained on the sample's posts."""
    import pandas as pd
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    from benchmarks.training import with_special_tokens
    from helpers.data.sources import SAMPLE_DIR

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=32_000,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    files = [SAMPLE_DIR / f"{name}.csv" for name in ("Questions", "Answers")]
    posts = pd.concat([pd.read_csv(file, encoding="latin-1") for file in files])["Body"]
    tokenizer.train_from_iterator(posts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return with_special_tokens(tokenizer)


# -- The walk


class Watch:
    """While `with` lasts: the most that a GPU and a disk are asked for, beyond what was in use."""

    def __init__(self, folder: Path):
        self.folder, self.gpu_bytes, self.disk_bytes = folder, 0, 0

    def __enter__(self):
        self.started = time.perf_counter()
        self.disk_before, self.gpu_before = shutil.disk_usage(self.folder).used, used_on_gpu()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._look)
        self.thread.start()
        return self

    def _look(self):
        while not self.stop.wait(0.3):
            disk = shutil.disk_usage(self.folder).used - self.disk_before
            self.disk_bytes = max(self.disk_bytes, disk)
            self.gpu_bytes = max(self.gpu_bytes, used_on_gpu() - self.gpu_before)

    def __exit__(self, *error):
        self.stop.set()
        self.thread.join()
        self.seconds = time.perf_counter() - self.started


def used_on_gpu() -> int:
    """Bytes in use on the first GPU as its driver counts them: torch's, CUDA's, and all else's."""
    if shutil.which("nvidia-smi") is None:
        return 0
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", "0"]
    said = subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout
    return int(said) * 2**20


def kernel_environment(folder: Path, cap: float | None) -> dict[str, str]:
    """The variables for a run whose kernels keep to a cap in GiB, if there is one."""
    startup = folder / "ipython" / "profile_default" / "startup"
    shutil.rmtree(startup, ignore_errors=True)
    startup.mkdir(parents=True)
    if cap is not None:
        (startup / "cap.py").write_text(CAP.format(cap=cap), encoding="utf-8")
    return {**os.environ, "IPYTHONDIR": str(folder / "ipython")}


def walk(folder: Path, options, model: Path, cap: float | None):
    """Run the notebooks in order; yields a row for each, the last one says what stopped it."""
    run_dir = folder / f"run-{options.profile}-{model.name}-{cap or 'no-cap'}"
    environment = kernel_environment(folder, cap)
    given = {"MODEL_NAME": str(model), "DATA_SOURCE": "sample", "SANDBOX": "limits-only"}
    given |= {name: value for name, value in options.p}
    parameters = [part for pair in given.items() for part in ("-p", *pair)]
    for number in options.only:
        command = [sys.executable, "-m", "helpers", "run", "--profile", options.profile]
        command += ["--run-dir", str(run_dir), "--only", number, *parameters]
        with Watch(folder) as watch:
            done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8")
        row = {
            "profile": options.profile,
            "model": model.name,
            "cap_gib": cap,
            "notebook": number,
            "parameters": dict(options.p),
            "seconds": round(watch.seconds, 1),
            "gpu_peak_bytes": watch.gpu_bytes,
            "disk_peak_bytes": watch.disk_bytes,
            "run_folder_bytes": folder_bytes(run_dir),
            "warnings": warnings_of(run_dir, number),
            "metrics": shown_metrics(run_dir, number),
        }
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["it said nothing"]
            row["stopped"] = lines[-1].replace(str(folder), "FOLDER")
        yield row
        if done.returncode:
            return
    if not options.keep:
        shutil.rmtree(run_dir)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def warnings_of(run_dir: Path, number: str) -> list[str]:
    """What a notebook's cells wrote on stderr."""
    import nbformat

    for path in (run_dir / "executed").glob(f"{number}_*.ipynb"):
        cells = nbformat.read(path, as_version=4).cells
        outputs = [output for cell in cells for output in cell.get("outputs", [])]
        return [output.text[-500:] for output in outputs if output.get("name") == "stderr"]
    return []


def shown_metrics(run_dir: Path, number: str) -> dict[str, float]:
    """What a notebook measured of time and memory."""
    path = run_dir / "metrics" / f"{number}.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {name: round(value, 1) for name, value in found.items() if name.endswith(SHOWN)}


def add_to_results(row: dict) -> None:
    """Put a row into the file of results, in place of an older one of the same walk."""
    from helpers.runs import folders

    names = ("profile", "model", "cap_gib", "notebook")
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"] if RESULTS.exists() else []
    rows = [old for old in rows if any(old[name] != row[name] for name in names)]
    what = "All six notebooks on a GPU, a kernel each; random weights, so losses say nothing"
    found = {"what": what, "rows": [*rows, {**row, **environment()}]}
    folders.write_text(RESULTS, json.dumps(found, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("profile")
    parser.add_argument("--shape", default="7B", choices=["7B", "13B", "TinyLlama"])
    parser.add_argument("--model", type=Path, help="a model folder, instead of a shape")
    parser.add_argument("--cap", type=float, nargs="*", help="GiB a kernel's torch may reserve")
    parser.add_argument("--only", nargs="+", default=NUMBERS, metavar="NN", help="these notebooks")
    parser.add_argument("--keep", action="store_true", help="leave the run folder")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    model = options.model or write_model(folder / f"llama-{options.shape}", options.shape)
    for cap in options.cap or [None]:
        for row in walk(folder, options, model.resolve(), cap):
            print(json.dumps(row), flush=True)
            add_to_results(row)


if __name__ == "__main__":
    main()
