"""Notebook 04 as a script, which `accelerate launch` starts once for each GPU.

The cells that a training needs carry the tag `train`. What only looks at it, such as a figure or a
first answer, stays in the notebook.
"""

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


def export_training(parameters: dict) -> Path:
    """Write RUN_DIR/train.py, with these parameters in the place of the notebook's; its path.

    Raises ConfigError for a parameter that is none, FileNotFoundError without a dataset, and
    ModelUnavailable: the tokenizer is fetched here, before several processes ask for it at once.
    """
    config = Config.from_parameters(parameters)
    config.require(config.dataset_dir, "02")
    loading.load_tokenizer(config.model_name)
    notebook = parameterize_notebook(load_notebook_node(str(NOTEBOOK)), parameters)
    cells = [cell for cell in notebook.cells if TAGS & {*cell.metadata.get("tags", [])}]
    parts = [HEAD.format(project=str(PROJECT_DIR)), *(cell.source for cell in cells)]
    path = folders.writable(config.run_dir) / "train.py"
    return folders.write_text(path, "\n\n# %%\n".join(parts) + "\n")
