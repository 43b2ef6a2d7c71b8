"""Take lesson code out of a notebook, so that what is tested is what is taught."""

import ast
from pathlib import Path

import nbformat

from helpers.data import curation
from helpers.merging import merging
from helpers.model import loading

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


def merge(config, into: str):
    """Notebook 05's own merge, of the adapter in the run folder."""
    lesson = definitions_from("05")
    lesson |= {"config": config, "adapter": config.adapter_dir}  # which its functions look up there
    return lesson["merge"](into)


def save_merged(model, tokenizer, config, into: str = "16bit") -> Path:
    """A merged model saved as notebook 05 saves it; the folder."""
    with merging.saving(model, into, config) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return config.merged_dir


def curate(config, workers: int | None = None):
    """The dataset of a Config, made with the tokenizer of its model; its report."""
    return curation.curate(config, loading.load_tokenizer(config.model_name), workers)
