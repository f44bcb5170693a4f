"""What the tests and refresh.py know about the notebook as a file, and a way to run it cell by cell."""

import base64
import contextlib
import json
import os
import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "mnist_framework_comparison.ipynb"
README = ROOT / "README.md"
PICTURE = ROOT / ".github" / "ladder.png"


def committed():
    """The notebook as it is on disk."""
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(cells):
    return [cell for cell in cells if cell.cell_type == "code"]


def section(notebook, number):
    """The cells from the heading '## number.' up to the next one of its level."""
    starts = [
        index
        for index, cell in enumerate(notebook.cells)
        if cell.cell_type == "markdown" and cell.source.startswith("## ")
    ]
    for start, end in zip(starts, [*starts[1:], len(notebook.cells)], strict=True):
        if notebook.cells[start].source.startswith(f"## {number}."):
            return notebook.cells[start:end]
    raise LookupError(f"the notebook has no section {number}")


def printed(cell):
    """What a cell wrote to stdout."""
    return "".join(output.text for output in cell.outputs if output.get("name") == "stdout")


def markdown(cell):
    """The Markdown that a cell displayed."""
    texts = [output.get("data", {}).get("text/markdown", "") for output in cell.outputs]
    return "\n".join(filter(None, texts))


def table(text):
    """The lines of the first Markdown table in a text."""
    return re.search(r"(?:^\|.*\|$\n?)+", text, flags=re.MULTILINE).group().strip().splitlines()


def table_under(notebook, heading):
    """The first table that a cell displays below a heading."""
    cells = iter(notebook.cells)
    next(c for c in cells if c.cell_type == "markdown" and heading in c.source.splitlines())
    return table(next(text for text in map(markdown, code_cells(cells)) if "|" in text))


def image_under(notebook, heading):
    """The first PNG, as bytes, that a cell displays below a heading."""
    cells = iter(notebook.cells)
    next(c for c in cells if c.cell_type == "markdown" and heading in c.source.splitlines())
    data = [output.get("data", {}) for cell in code_cells(cells) for output in cell.outputs]
    return base64.b64decode(next(item["image/png"] for item in data if "image/png" in item))


class Session:
    """The notebook in a running kernel."""

    def __init__(self, client):
        self.client, self.notebook = client, client.nb

    def run(self, cells=None):
        """Execute some cells of the notebook, or all."""
        for cell in code_cells(self.notebook.cells) if cells is None else code_cells(cells):
            self.client.execute_cell(cell, self.notebook.cells.index(cell))

    def run_sections(self, *numbers):
        for number in numbers:
            self.run(section(self.notebook, number))

    def execute(self, source):
        """Execute code of the test's own in the kernel; returns the cell."""
        cell = nbformat.v4.new_code_cell(source)
        self.notebook.cells.append(cell)
        try:
            return self.client.execute_cell(cell, len(self.notebook.cells) - 1)
        finally:
            self.notebook.cells.remove(cell)

    def value(self, expression):
        """A JSON value from the kernel."""
        return json.loads(printed(self.execute(f"import json\nprint(json.dumps({expression}))")))


def new_client(notebook, folder=ROOT):
    """An nbclient for the notebook that works in the folder."""
    return NotebookClient(
        notebook,
        timeout=1800,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )


@contextlib.contextmanager
def kernel(folder=ROOT, notebook=None, **environment):
    """A Session in a fresh kernel, with some environment variables set."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("MNIST_")}
    client = new_client(notebook or committed(), folder)
    with client.setup_kernel(env=env | environment):
        yield Session(client)
