"""Values that make no sense are refused by name; values that do are taken."""

import contextlib
import math
import os

import pytest
from harness import code_cells, committed

CELLS = code_cells(committed().cells)
PARAMETERS, CHECK = next(
    (cell.source, CELLS[i + 1].source)
    for i, cell in enumerate(CELLS)
    if "parameters" in cell.metadata.get("tags", [])
)


def run_with(**values):
    """The namespace after the parameters cell, these values, and the check."""
    namespace = {"os": os, "contextlib": contextlib}
    exec(PARAMETERS, namespace)
    namespace |= values
    exec(CHECK, namespace)
    return namespace


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("epochs", value) for value in (0, -1, 1.5, "many", "", True, None, 1001)),
        *(("seeds", value) for value in ("", [], [1, 1], "one", [0.5], -1, 2**32)),
        *(("batch_size", value) for value in (0, 10_001, "32.0")),
        *(("learning_rate", value) for value in (0, -0.1, 1, math.nan, "fast")),
        ("learning_rate", math.inf),
    ],
)
def test_nonsense_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        run_with(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("epochs", "3", 3),
        ("seeds", "7", [7]),
        ("seeds", "1, 2 3", [1, 2, 3]),
        ("seeds", [4, 5], [4, 5]),
        ("seeds", (4, 5), [4, 5]),
        ("seeds", 6, [6]),
        ("seeds", list(range(30)), list(range(30))),
        ("batch_size", 10_000, 10_000),
        ("learning_rate", "1e-2", 0.01),
    ],
)
def test_sense_is_taken(name, value, expected):
    assert run_with(**{name: value})[name] == expected


def test_the_protocol_is_the_default(monkeypatch):
    monkeypatch.delenv("MNIST_EPOCHS", raising=False)
    monkeypatch.delenv("MNIST_SEEDS", raising=False)
    taken = run_with()
    names = ("epochs", "batch_size", "learning_rate", "seeds")
    assert [taken[name] for name in names] == [15, 32, 0.001, [0, 1, 2, 3, 4]]


def test_the_environment_sets_epochs_and_seeds(monkeypatch):
    monkeypatch.setenv("MNIST_EPOCHS", "2")
    monkeypatch.setenv("MNIST_SEEDS", "7 8")
    taken = run_with()
    assert (taken["epochs"], taken["seeds"]) == (2, [7, 8])
