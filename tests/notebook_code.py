"""Take lesson code out of a notebook, so that what is tested is what is taught."""

import ast
import itertools
from pathlib import Path

import nbformat
import torch

from benchmarks.notebook_04 import train as fine_tune  # noqa: F401  by notebook 04's own cell
from helpers.data import curation
from helpers.merging import merging
from helpers.model import loading, precision

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
KEPT = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)


def notebook_path(number: str) -> Path:
    """The notebook whose name begins with a number, such as "01"."""
    (path,) = NOTEBOOKS.glob(f"{number}_*.ipynb")
    return path


def notebook_source(path: Path) -> str:
    """The code cells of a notebook as one program."""
    cells = nbformat.read(path, as_version=4).cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "code")


def cell_source(number: str, identifier: str) -> str:
    """The code of one cell."""
    cells = nbformat.read(notebook_path(number), as_version=4).cells
    return next(cell.source for cell in cells if cell.id == identifier)


def definitions_from(number: str) -> dict:
    """Every import, function and class of a notebook's code cells, by name; nothing else is run."""
    tree = ast.parse(notebook_source(notebook_path(number)))
    tree.body = [node for node in tree.body if isinstance(node, KEPT)]
    namespace = {}
    exec(compile(tree, f"notebook {number}", "exec"), namespace)
    return namespace


def save_adapter(trainer, config) -> None:
    """Save an adapter by notebook 04's own cell."""
    exec(cell_source("04", "013efc76"), {"trainer": trainer, "config": config})


def lesson_05(config) -> dict:
    """Notebook 05's functions, and what its cells have found when it comes to merging."""
    lesson = definitions_from("05")
    lesson |= {  # in place: here its functions look these names up
        "config": config,
        "adapter": config.adapter_dir,
        "source": loading.find_model(config),
        "dtype": precision.compute_dtype(config),
        "quantization": loading.quantization_config(config),
        "place": (place := merging.with_room_for_base(config).device_map),
        "at": {"dtype": precision.compute_dtype(config), "device_map": place},
        "measured": lambda into, merged: None,  # takes KL, loss and answers
    }
    return lesson


def merge(config, into: str):
    """Notebook 05's own merge, of the adapter in the run folder, ready to answer."""
    return merging.as_saved(lesson_05(config)["merge"](into), config)


def save_merged(model, tokenizer, config, into: str = "16bit") -> Path:
    """A merged model saved as notebook 05 saves it; the folder."""
    with merging.saving(model, into, config) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return config.merged_dir


def curate(config, workers: int | None = None):
    """The dataset of a Config, made with the tokenizer of its model; its report."""
    return curation.curate(config, loading.load_tokenizer(config.model_name), workers)


def examples_of(batch: dict) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The ids of each example in a batch that are shown to the model, and those that are graded.

    The examples are padded on the right, or with PACKING laid end to end.
    """
    ids, labels = batch["input_ids"], batch["labels"]
    if "position_ids" not in batch:
        places = [(row, slice(n)) for row, n in enumerate(batch["attention_mask"].sum(dim=1))]
    else:
        used = batch.get("used_tokens", ids.shape[1])  # on the fast path a filling follows
        starts = (batch["position_ids"][0, :used] == 0).nonzero().flatten().tolist()
        places = [(0, slice(*ends)) for ends in itertools.pairwise([*starts, used])]
    return [(ids[at], labels[at][labels[at] != -100]) for at in places]
