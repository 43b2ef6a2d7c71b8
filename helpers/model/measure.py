"""What a model and a process take, measured: footprint, peaks, and what the driver leaves free.

All sizes are in bytes. What a training step will take is predicted in `predict`.
"""

import gc
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
    on_gpu = torch.device(device).type == "cuda"
    return torch.cuda.memory_allocated(device) if on_gpu else psutil.Process().memory_info().rss


def peak_memory_bytes(device: str | torch.device) -> int:
    """The most that `current_memory_bytes` has been since `reset_peak_memory`, or the beginning.

    On a CPU as Linux and Windows keep it; macOS keeps none that psutil reads: what is taken now.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if PROCESS_STATUS.exists():  # "VmHWM:   123456 kB", the high-water mark, proc(5)
        return int(PROCESS_STATUS.read_text("utf-8").partition("VmHWM:")[2].split()[0]) * 1024
    memory = psutil.Process().memory_info()
    return getattr(memory, "peak_wset", memory.rss)


def reset_peak_memory(device: str | torch.device) -> bool:
    """Start a new peak from here; False where the system, or a container, does not let it."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        CLEAR_REFS.write_text("5", encoding="utf-8")  # resets VmHWM, proc(5)
    except OSError:
        return False
    return True


def free_memory() -> None:
    """Give back what deleted models and tensors held, also on a GPU."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing without a GPU


def footprint_bytes(model_config, quantization: BitsAndBytesConfig, dtype: torch.dtype) -> int:
    """What transformers' `get_memory_footprint()` says of a 4-bit model: parameters and buffers.

    It leaves out the constants of the quantization, which are attributes of the weights.
    """
    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(model_config)
    skipped = tuple(quantization.llm_int8_skip_modules or ["lm_head"])
    packed = sum(
        module.weight.numel()
        for name, module in shell.named_modules()
        if isinstance(module, torch.nn.Linear) and not name.endswith(skipped)
    )
    others = shell.num_parameters() - packed
    return packed // 2 + others * dtype.itemsize + sum(b.nbytes for b in shell.buffers())
