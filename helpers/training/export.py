"""Notebook 04's own cells outside of it, as a script: those that carry the tag `train`.

The cell with the tag `loading` loads the whole model, and a process under FSDP its share.
"""

import textwrap
from pathlib import Path

from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from helpers.config import PROJECT_DIR, Config
from helpers.model import loading
from helpers.runs import folders

NOTEBOOK = PROJECT_DIR / "notebooks" / "04_qlora_training.ipynb"
TAGS = {"parameters", "injected-parameters", "train"}
HEAD = '''\
"""Cells of notebook 04 for one process or several: accelerate launch --config_file FILE THIS."""
import os
import sys

sys.path.insert(0, {project!r})
if os.environ.get("RANK", "0") != "0":
    sys.stdout = open(os.devnull, "w")  # the first process speaks for all
'''
SHARED = """\
if loading.is_sharded():
    model = loading.load_model(config)
else:
"""


def train_cells(parameters: dict) -> list[str]:
    """The cells that train, with these parameters behind those of the notebook."""
    notebook = parameterize_notebook(load_notebook_node(str(NOTEBOOK)), parameters)
    tagged = [(cell.source, {*cell.metadata.get("tags", [])}) for cell in notebook.cells]
    return [
        SHARED + textwrap.indent(source, "    ") if "loading" in tags else source
        for source, tags in tagged
        if TAGS & tags
    ]


def export_training(parameters: dict) -> Path:
    """Write RUN_DIR/train.py, with these parameters in the place of the notebook's; its path.

    Raises ConfigError for a parameter that is none, FileNotFoundError, and ModelUnavailable.
    """
    config = Config.from_parameters(parameters)
    config.require(config.dataset_dir, "02")
    loading.load_tokenizer(config.model_name)  # before several processes fetch it at once
    parts = [HEAD.format(project=str(PROJECT_DIR)), *train_cells(parameters)]
    path = folders.writable(config.run_dir) / "train.py"
    return folders.write_text(path, "\n\n# %%\n".join(parts) + "\n")
