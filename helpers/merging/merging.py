"""Where a merge has room, and how its result is made ready, saved and loaded.

The merges themselves are cells of notebook 05.
"""

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate.big_modeling import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from peft import PeftModel

from helpers import prompts
from helpers.config import Config
from helpers.data.curation_note import in_own_template, system_message
from helpers.merging.adapter_folder import ADAPTER_WEIGHTS, check_adapter
from helpers.merging.merged_folder import seal_merged
from helpers.model import loading, measure, precision, predict
from helpers.model.steps import Run
from helpers.runs import folders

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


def with_room_for_base(config: Config) -> Config:
    """`with_room` for the base in 16 bits, the run's adapter if there is one, and the work."""
    run = dataclasses.replace(Run.from_config(config), quantization="16bit")
    weights = predict.estimate(loading.load_shape(config.model_name), run).weights
    adapter = config.adapter_dir / ADAPTER_WEIGHTS
    size = adapter.stat().st_size if adapter.is_file() else 0
    return with_room(config, weights + size + WORK_BYTES)


def with_room(config: Config, needed: int) -> Config:
    """The Config, moved to the CPU when its GPU has less than `needed` bytes free for torch."""
    measure.free_memory()  # else what torch keeps for its next use counts as taken
    if config.device == "cpu" or measure.free_bytes(config.device) >= needed:
        return config
    return dataclasses.replace(config, device_map={"": "cpu"})


def as_saved(model, config: Config):
    """A merged model with its weights rounded to what is saved, in eval mode and ready to answer.

    On a CPU 4-bit weights are unpacked, once and not for every token: the same numbers. A model
    that lies on the CPU for want of room computes on the GPU all the same, which gets each layer's
    weights when it is their turn.
    """
    # `is_loaded_in_4bit` stays True after `dequantize`, and a cell may run twice.
    if getattr(model, "hf_quantizer", None) is not None and config.device == "cpu":
        model = model.dequantize()
    precision.cast(model.parameters(), precision.storage_dtype(config))
    precision.cast(model.parameters(), precision.compute_dtype(config))
    if model.device.type != torch.device(config.device).type:
        cpu_offload(model, torch.device(config.device))
    return model.eval()


@contextlib.contextmanager
def saving(model, into: str, config: Config) -> Iterator[Path]:
    """A draft of run_dir/merged to save a merged model and its tokenizer to, in a with-statement.

    `into` says which merge it is. At the end come the chat template of training and the seal, and
    the draft takes its name, whole or not at all; GGUF files of the model that it replaces go.
    Never over the adapter: the adapter is what a later merge starts from. Raises DiskFull, InUse.
    """
    remove_hook_from_submodules(model)  # of `as_saved`: the weights are back in the model
    precision.cast(model.parameters(), precision.storage_dtype(config))
    size = sum(parameter.nbytes for parameter in model.parameters())
    with folders.whole_folder(config.merged_dir, size) as draft:
        yield draft
        if not in_own_template(config, config.adapter_dir):  # else the tokenizer brings it
            template = prompts.chat_template(system_message(config, config.adapter_dir))
            (draft / "chat_template.jinja").write_text(template, encoding="utf-8")
        seal_merged(draft, into, config)
        shutil.rmtree(config.gguf_dir, ignore_errors=True)
    precision.cast(model.parameters(), precision.compute_dtype(config))


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
