"""Notebook 04's own cells, run here: for the other benchmarks and the tests. No command."""

from collections.abc import Iterator

from helpers.config import Config
from helpers.training.export import NOTEBOOK, train_cells


def each_cell(config: Config, **given) -> Iterator[dict]:
    """The names after each of notebook 04's cells that train, run here with this Config.

    What is `given` takes the place of what a cell first gives that name, such as `dataset`.
    """
    names, given = {"__name__": "notebook_04"}, {**given, "config": config}
    for cell in train_cells({}):
        exec(compile(cell, str(NOTEBOOK), "exec"), names)
        names |= {name: given.pop(name) for name in [*given] if name in names}
        yield names


def run_cells(config: Config, until: str | None = None, **given) -> dict:
    """`each_cell`, up to the one that gives a name: "trainer" builds, "metrics" has trained too."""
    for names in each_cell(config, **given):
        if until in names:
            break
    return names


def train(trainer) -> tuple:
    """Train by the notebook's own cell; the trainer, or another one, and its metrics."""
    (cell,) = [cell for cell in train_cells({}) if "trainer.train(" in cell]
    names = {"trainer": trainer}
    exec(compile(cell, str(NOTEBOOK), "exec"), names)
    return names["trainer"], names["metrics"]
