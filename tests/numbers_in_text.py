"""Sentences with a number that is one field of an output, and where that field is."""

import re
from collections.abc import Callable
from typing import NamedTuple

from harness import README, code_cells, columns, committed, markdown, printed, section


class Field(NamedTuple):
    """A field of the first table below a heading."""

    heading: str
    row: str
    column: str
    take: Callable = str

    def read(self, notebook):
        return self.take(columns(notebook, self.heading)[self.row][self.column])


class Line(NamedTuple):
    """The group of a regular expression in what a section printed or displayed."""

    section: int
    pattern: str

    def read(self, notebook):
        cells = code_cells(section(notebook, self.section))
        text = "\n".join(printed(cell) + markdown(cell) for cell in cells)
        return re.search(self.pattern, text)[1]


def first(field):
    """The mean of "97.76 ± 0.16 % (n = 5)"."""
    return field.split()[0]


def last_if_never(field):
    return "24" if field == "never" else f"epoch {field}"


RESULTS, PAIRS = "### The shared results table", "### The two amplifiers"
EARLY, LATE, NEITHER = "relu, ε 1e-07: ", "softplus, ε 1e-07: ", "softplus, ε 0.001: "
BIT, OTHER = "PyTorch / PyTorch, one bit moved", "Keras / PyTorch"
AT_15, AT_24 = "predictions, epoch 15", "predictions, epoch 24"
PARTS, ACCURACY = "predictions differ from epoch", "test accuracy"
SHOWN, P = Line(7, r"a difference is (.*)"), Line(7, r"p = ([\d.e-]+) from")
AGREE = Line(9, r"no prediction differs after (\d+) of 15 epochs")
NEVER = Field(PAIRS, NEITHER + OTHER, PARTS, last_if_never)
# A sentence is a regular expression for a text with single spaces for all white space.
# Its one group is the number.
IN_NOTEBOOK = [
    (r"Keras got ([\d.]+) %", Field(RESULTS, "Keras Sequential", ACCURACY, first)),
    (r"images right, PyTorch ([\d.]+) %", Field(RESULTS, "PyTorch", ACCURACY, first)),
    (r"With five seeds a difference is ([\w ]+):", SHOWN),
    (r"a share of ([\d.]+) of all deals", P),
    (r"none of 10,000 predictions differs after any of the (\d+) epochs", AGREE),
    (r"last bit ends in (\d+) other predictions", Field(PAIRS, EARLY + BIT, AT_15)),
    (r"and the other framework in (\d+)\.", Field(PAIRS, EARLY + OTHER, AT_15)),
    (r"no prediction differs after any of its (\d+) epochs", AGREE),
    (r"differ from epoch (\d+) on for one", Field(PAIRS, EARLY + BIT, PARTS)),
    (r"from epoch (\d+) on for the other", Field(PAIRS, EARLY + OTHER, PARTS)),
    (r"after 15 epochs (\d+) and", Field(PAIRS, EARLY + BIT, AT_15)),
    (r"after 15 epochs \d+ and (\d+) do", Field(PAIRS, EARLY + OTHER, AT_15)),
    (r"no prediction before epoch (\d+)", Field(PAIRS, LATE + BIT, PARTS)),
    (r"and (\d+) by epoch 24", Field(PAIRS, LATE + BIT, AT_24)),
    (
        r"ReLU parts at epoch (\d+) between",
        Field("### The proof", EARLY + OTHER, PARTS),
    ),
    (
        r"no prediction differs after any of (\d+) epochs",
        Field(PAIRS, NEITHER + BIT, PARTS, last_if_never),
    ),
    (r"no prediction differs after any of (\d+) epochs", NEVER),
    (r"run ([\d,]+) × [\d.]+ × 1e-6", Line(9, r"([\d,]+) hidden inputs in an")),
    (r"× ([\d.]+) × 1e-6", Line(9, r"density at zero ([\d.]+)")),
]
IN_README = [
    (r"accuracies of Keras and PyTorch is ([\w ]+) \(p = ", SHOWN),
    (r"shown \(p = ([\d.]+)\)", P),
    (r"predictions differs after any of the (\d+) epochs", AGREE),
    (r"after every one of (\d+) epochs", NEVER),
]


def misfits(text, entries, notebook):
    """What no longer fits in a text: a line for each entry that does not."""
    found, text = [], " ".join(text.split())
    for sentence, source in entries:
        match = re.search(sentence, text)
        try:
            value = source.read(notebook)
        except (AttributeError, LookupError, StopIteration, TypeError, ValueError):
            value = "no output"
        if not match:
            found.append(f"no sentence fits {sentence!r}")
        elif match[1] != value:
            found.append(f"{match[0]!r}: now it is {value}")
    return found


def all_misfits():
    """The misfits of the notebook's and the README's sentences."""
    notebook = committed()
    prose = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    found = misfits("\n".join(prose), IN_NOTEBOOK, notebook)
    readme = misfits(README.read_text(encoding="utf-8"), IN_README, notebook)
    return [*found, *(f"README: {line}" for line in readme)]
