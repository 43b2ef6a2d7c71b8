"""The small package that the six notebooks share.

Read it in the order in which a run uses it:
config -> curation -> prompts -> models -> memory -> training -> merging -> inference -> evaluation.

Importing it imports nothing. It does say, before the libraries are loaded, that their progress bars
and notices stay out of a notebook's output; set one of the variables yourself to see them again.
"""

import os
import warnings

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # also read by transformers
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # no warning when a data loader forks
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")  # gives memory back sooner

# peft 0.21 and trl 1.16 still ask transformers for names that it is about to remove.
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
