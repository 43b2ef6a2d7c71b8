"""What a model and a process take, measured: footprint, peaks, and what the driver leaves free.

All sizes are in bytes. What a training step will take is predicted in `predict`.
"""

import copy
import gc
import sys
from pathlib import Path

import psutil
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

PROCESS_STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
CONTEXT_BYTES = 2**29  # what CUDA itself takes of a GPU, 0.3 to 0.5 GiB


def torch_bytes(device: str) -> int:
    """What torch may take of a GPU: all but CUDA's own, or the share of this process."""
    whole = torch.cuda.get_device_properties(device).total_memory
    share = round(whole * torch.cuda.get_per_process_memory_fraction(device))
    return min(share, whole - CONTEXT_BYTES)


def free_bytes(device: str | torch.device) -> int:
    """What torch can still take of a GPU: what nobody has, within the share of this process."""
    allocated = torch.cuda.memory_allocated(device)
    unused = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - allocated
    return min(unused, torch_bytes(device) - allocated)


def current_memory_bytes(device: str | torch.device) -> int:
    """What torch has allocated on a GPU; for "cpu" the process's resident memory."""
    if _is_gpu(device):
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def peak_memory_bytes(device: str | torch.device) -> int:
    """The most that `current_memory_bytes` has been since `reset_peak_memory`.

    Where the system cannot reset its mark (see there), since the process began.
    """
    if _is_gpu(device):
        return torch.cuda.max_memory_allocated(device)
    if PROCESS_STATUS.exists():
        # "VmHWM:   123456 kB": the high-water mark of resident memory, proc(5)
        (peak,) = [
            w[6:] for w in PROCESS_STATUS.read_text("utf-8").splitlines() if w[:6] == "VmHWM:"
        ]
        return int(peak.split()[0]) * 1024
    return _peak_of_process()


def reset_peak_memory(device: str | torch.device) -> bool:
    """Start a new peak from here. True when it could be done: on a GPU, and on Linux for a process.

    Writing 5 to /proc/self/clear_refs resets VmHWM (proc(5)); some containers forbid it.
    """
    if _is_gpu(device):
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        CLEAR_REFS.write_text("5", encoding="utf-8")
    except OSError:
        return False
    return True


def free_memory() -> None:
    """Give back what deleted models and tensors held, also on a GPU."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing without a GPU


def _is_gpu(device: str | torch.device) -> bool:
    return torch.device(device).type == "cuda"


def _peak_of_process() -> int:
    """Peak resident bytes where there is no /proc: Windows through psutil, else getrusage."""
    windows_peak = getattr(psutil.Process().memory_info(), "peak_wset", None)
    if windows_peak is not None:
        return windows_peak
    import resource  # a Unix module

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others KiB


def empty_4bit_model(model_config, quantization: BitsAndBytesConfig, dtype=torch.float16):
    """A causal language model on the meta device: shapes and types, no numbers, in 4 bits.

    Its packed weights still have their unpacked shape, because packing happens when numbers come.
    The head and what `llm_int8_skip_modules` names stay unpacked.
    """
    # Imported here, as peft is below: it takes over a second, and one notebook alone needs it.
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config, dtype=dtype)
    skipped = quantization.llm_int8_skip_modules or ["lm_head"]
    return replace_with_bnb_linear(model, skipped, quantization)


def count_trainable(model, rank: int, targets) -> tuple[int, int]:
    """(trainable, all) parameters once peft has put an adapter on a meta model; the model stays."""
    # Here, for peft is slow to import and a prediction does not need it.
    from peft import LoraConfig, inject_adapter_in_model

    adapter = LoraConfig(r=rank, target_modules=list(targets))
    with torch.device("meta"):
        adapted = inject_adapter_in_model(adapter, copy.deepcopy(model))
    sizes = [(p.numel(), p.requires_grad) for p in adapted.parameters()]
    return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)


def layer_table(model) -> list[dict]:
    """Every distinct kind of layer that holds weights, in the order of the model.

    For each: its name and shape, the type it is stored in, how often it occurs, how many weights it
    stands for (a packed byte stands for two), and its bytes without quantization constants.
    """
    tied = model.config.tie_word_embeddings
    table: dict[tuple, dict] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or (tied and name == "lm_head"):
            continue
        shape = getattr(weight, "quant_state", None) or weight
        row = table.setdefault(
            (name.split(".")[-1], tuple(shape.shape)),
            {"stored as": str(weight.dtype)[6:], "count": 0, "parameters": 0, "bytes": 0},
        )
        row["count"] += 1
        row["parameters"] += shape.shape.numel()
        row["bytes"] += weight.nbytes
    return [{"layer": f"{name} {shape}", **row} for (name, shape), row in table.items()]


def footprint_bytes(model_config, quantization: BitsAndBytesConfig, dtype=torch.float16) -> int:
    """What transformers' `get_memory_footprint()` says of a 4-bit model: parameters and buffers.

    Counted on the meta device, so biases and further norms are in it: half a byte for each weight
    that is packed, `dtype` for the others, and float32 tables of rotary frequencies. The
    quantization constants are attributes of the packed weights, not parameters: it leaves them out.
    """
    import bitsandbytes as bnb  # here for the reason given in empty_4bit_model

    shell = empty_4bit_model(model_config, quantization, dtype)
    packed = [m.weight.numel() for m in shell.modules() if isinstance(m, bnb.nn.Linear4bit)]
    others = [p.numel() for p in shell.parameters() if not isinstance(p, bnb.nn.Params4bit)]
    buffers = sum(buffer.nbytes for buffer in shell.buffers())
    return sum(packed) // 2 + sum(others) * dtype.itemsize + buffers
