"""Three ways to fold an adapter into its base, and saving and loading what comes of it.

    into "16bit":        the 16-bit base + the update
    into "dequantized":  the 4-bit base, unpacked to 16 bits, + the update
    into "4bit":         the same, packed to 4 bits again

The adapter was trained on the 4-bit base, so only the last two start from the weights it knows.
"""

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate.big_modeling import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from accelerate.utils import align_module_device
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import PeftModel
from peft.utils.integrations import dequantize_module_weight

from helpers import prompts
from helpers.config import Config
from helpers.data.curation_note import in_own_template, system_message
from helpers.merging.adapter_folder import ADAPTER_WEIGHTS, check_adapter
from helpers.merging.merged_folder import seal_merged
from helpers.model import loading, measure, precision, predict
from helpers.model.steps import Run
from helpers.runs import folders

MERGES = ("16bit", "dequantized", "4bit")
# What merging and some hundred tokens of answers take beside the weights.
WORK_BYTES = 500_000_000


def load_tuned(config: Config, base=None) -> PeftModel:
    """The 4-bit base (or the given one) with the trained adapter on top, in eval mode.

    The adapter keeps the dtype it was saved in: cast to float32, it would slow every layer down.
    Raises ValueError for a base that carries an adapter already.
    """
    adapter = check_adapter(config)
    base = loading.without_adapter(base if base is not None else loading.load_model(config))
    return PeftModel.from_pretrained(base, adapter, autocast_adapter_dtype=False).eval()


def load_base(config: Config, into: str):
    """The plain model that an adapter is merged into. `into` is one of MERGES, else ValueError.

    One that the GPU cannot hold in 16 bits lies on the CPU. For "dequantized" each matrix of the
    16-bit model goes through 4 bits: bit for bit what `dequantize()` makes of a 4-bit model, which
    holds both forms at once and so needs a third more room.
    """
    if into not in MERGES:
        raise ValueError(f"cannot merge into {into!r}: choose one of {', '.join(MERGES)}")
    base = loading.load_model(place_of(config, into), quantized=into == "4bit")
    if into == "dequantized":
        for matrix in packed_matrices(base):
            matrix.data = through_4_bits(matrix.data.to(config.device), config).to(matrix.device)
    return base


def packed_matrices(model) -> Iterator[torch.nn.Parameter]:
    """The weights of a 16-bit model that a 4-bit load packs: all linear layers but the head."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
            yield module.weight


def as_saved(model, config: Config):
    """A merged model with its weights rounded to what is saved, in eval mode and ready to answer.

    One that lies on the CPU for want of room computes on the GPU all the same, which gets each
    layer's weights when it is their turn.
    """
    precision.cast(model.parameters(), precision.storage_dtype(config))
    precision.cast(model.parameters(), precision.compute_dtype(config))
    if model.device.type != torch.device(config.device).type:
        cpu_offload(model, torch.device(config.device))
    return model.eval()


def place_of(config: Config, into: str) -> Config:
    """The Config of where a merge is made: on the CPU if 16 bits do not fit the GPU."""
    return config if into == "4bit" else with_room(config, bytes_needed(config) + WORK_BYTES)


def with_room(config: Config, needed: int) -> Config:
    """The Config, moved to the CPU when its GPU has less than `needed` bytes free for torch."""
    measure.free_memory()  # else what torch keeps for its next use counts as taken
    if config.device == "cpu" or measure.free_bytes(config.device) >= needed:
        return config
    return dataclasses.replace(config, device_map={"": "cpu"})


def bytes_needed(config: Config) -> int:
    """What a merge into 16 bits holds: all weights unpacked, and the adapter.

    On a CPU it may be less, for pages of a mapped file that nobody reads are not in memory.
    """
    shape = loading.load_shape(config.model_name)
    run = dataclasses.replace(Run.from_config(config), quantization="16bit")
    adapter = config.require(config.adapter_dir, "04") / ADAPTER_WEIGHTS
    return predict.estimate(shape, run).weights + adapter.stat().st_size


@contextlib.contextmanager
def saving(model, into: str, config: Config) -> Iterator[Path]:
    """A draft of run_dir/merged to save a merged model and its tokenizer to, in a with-statement.

    `into` is the one of MERGES that it is. At the end come the chat template of training and the
    seal, and the draft takes its name, whole or not at all; GGUF files of the model that it
    replaces go. Never over the adapter, as in the article: the adapter is what a later merge starts
    from. Raises DiskFull and InUse.
    """
    stored = precision.storage_dtype(config)
    remove_hook_from_submodules(model)  # of `as_saved`: the weights are back in the model
    precision.cast(model.parameters(), stored)
    size = sum(parameter.nbytes for parameter in model.parameters())
    with folders.whole_folder(config.merged_dir, size) as draft:
        yield draft
        if not in_own_template(config, config.adapter_dir):  # else the tokenizer brings it
            template = prompts.chat_template(system_message(config, config.adapter_dir))
            (draft / "chat_template.jinja").write_text(template, encoding="utf-8")
        seal_merged(draft, into, config)
        shutil.rmtree(config.gguf_dir, ignore_errors=True)
    as_saved(model, config)


def load_merged(config: Config):
    """The model in run_dir/merged, in the bits it has; on the CPU if it does not fit the GPU."""
    computed = precision.compute_dtype(config)
    size = sum(file.stat().st_size for file in config.merged_dir.glob("*.safetensors"))
    widened = size * computed.itemsize // precision.storage_dtype(config).itemsize
    place = with_room(config, widened + WORK_BYTES)
    # Not asked to pack, transformers goes by what the folder says: 4 bits stay 4 bits.
    model = loading.load_model(place, quantized=False, source=config.merged_dir)
    precision.cast(model.parameters(), computed)  # a packed model comes in the format it was saved
    return model


def weight_of(model, layer: str) -> torch.Tensor:
    """A layer's matrix in float32 on the CPU, unpacked if it is packed, from wherever it lies."""
    module = model.get_submodule(layer)
    with align_module_device(module):
        return dequantize_module_weight(module).detach().float().cpu()


def through_4_bits(W: torch.Tensor, config: Config) -> torch.Tensor:
    """A weight matrix as the 4-bit base holds it: packed, and unpacked again."""
    kind, double = config.bnb_4bit_compute_quant_type, config.use_nested_quant
    packed, state = quantize_4bit(W, quant_type=kind, compress_statistics=double)
    return dequantize_4bit(packed, state)
