"""The small package that the six notebooks share.

A folder for each lesson: data (02), model (03), training (04), merging (05), answers (06). config
holds the settings and prompts the template; view draws, runs keeps the folders and runs notebooks.

Importing it imports nothing. It does say, before the libraries are loaded, that their progress
bars and notices stay out of a notebook's output, and how their threads wait. A variable that you
have set yourself stays as it is.
"""

import logging
import os
import sys
import warnings

__version__ = "0.2.0"

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # also read by transformers
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # else trl reports each training to the Hub
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # no warning when a data loader forks
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")  # gives memory back sooner

# GPU memory in pieces that can grow. Without, the fast path's recorded step leaves gaps: Llama 2 7B
# ran out of 8 GiB, and needs 7.4 with it (benchmarks/caps.py). Windows does not have it.
if sys.platform == "linux":
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

# On a CPU every length of a batch gets machine code of its own. Two caches keep 1,024 pieces each,
# so that a training grew by 70 MB a step. Those of one batch are enough (docs/hardware.md).
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
os.environ.setdefault("LRU_CACHE_CAPACITY", "64")

# Idle threads sleep. The default is to spin, and then a step takes five times as long or more as
# soon as another program wants one of the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# On a CPU bitsandbytes says "Failed to load CPU gemm_4bit_forward from kernels-community" when it
# is imported: an optional, faster kernel is missing. Nothing is wrong, so only errors are shown.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# gguf warns that BOS stands in front of both halves of a pair of texts, as it should.
logging.getLogger("gguf").setLevel(logging.ERROR)

# peft 0.21 and trl 1.16 still ask transformers for names that it is about to remove.
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")

# peft says so at every merge into 4-bit weights. Notebook 05 measures what it warns of.
warnings.filterwarnings("ignore", message="Merge lora module to 4-bit linear")
