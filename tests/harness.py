"""Ways to read the notebook and to run it, for the tests and refresh.py."""

import contextlib
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "mnist_framework_comparison.ipynb"
README = ROOT / "README.md"


def committed():
    """The notebook as it is on disk."""
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(cells):
    return [cell for cell in cells if cell.cell_type == "code"]


def section(notebook, number):
    """The cells from the heading '## number.' up to the next one of its level."""
    found, inside = [], False
    for cell in notebook.cells:
        if cell.source.startswith("## "):
            inside = cell.source.startswith(f"## {number}.")
        if inside:
            found.append(cell)
    assert found, f"the notebook has no section {number}"
    return found


def cell_with(notebook, text):
    """The one code cell with this text in its source."""
    [cell] = [cell for cell in code_cells(notebook.cells) if text in cell.source]
    return cell


def under(notebook, heading):
    """The code cells below a heading, up to the end of the notebook."""
    has_heading = [heading in cell.source.splitlines() for cell in notebook.cells]
    return code_cells(notebook.cells[has_heading.index(True) :])


def printed(*cells):
    """What these cells wrote to stdout."""
    outputs = [output for cell in cells for output in cell.outputs]
    return "".join(o.text for o in outputs if o.get("name") == "stdout")


def markdown(*cells):
    """The Markdown that these cells displayed."""
    data = [output.get("data", {}) for cell in cells for output in cell.outputs]
    return "\n\n".join(d["text/markdown"] for d in data if d.get("text/markdown"))


def table(text):
    """The lines of the first Markdown table in a text."""
    return re.search(r"(^\|.*\|$\n?)+", text, flags=re.MULTILINE).group().splitlines()


def fields(line):
    """The cells of one line of a Markdown table."""
    return [field.strip() for field in line.strip().strip("|").split("|")]


def table_under(notebook, heading):
    """The lines of the first table that a cell displays below a heading."""
    return table(markdown(*under(notebook, heading)))


def columns(notebook, heading):
    """{first field of a row: {column: field}} of the first table below a heading."""
    header, _, *rows = map(fields, table_under(notebook, heading))
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def executed(*texts, **given):
    """The names after the cells with these texts, executed in this process."""
    for text in texts:
        exec(cell_with(committed(), text).source, given)
    return SimpleNamespace(**given)


class Session:
    """The notebook in a running kernel."""

    def __init__(self, client):
        self.client, self.notebook = client, client.nb

    def run(self, cells):
        for cell in code_cells(cells):
            self.client.execute_cell(cell, self.notebook.cells.index(cell))

    def run_sections(self, *numbers):
        for number in numbers:
            self.run(section(self.notebook, number))

    def execute(self, source):
        """Execute code of the test's own in the kernel; returns the cell."""
        cell = nbformat.v4.new_code_cell(source)
        self.notebook.cells.append(cell)
        try:
            self.run([cell])
        finally:
            self.notebook.cells.remove(cell)
        return cell

    def run_in(self, names, cells):
        """Execute cells under the names in a dict of the kernel's, as one cell."""
        sources = [cell.source for cell in code_cells(cells)]
        return self.execute(f"for source in {sources}:\n    exec(source, {names})")

    def value(self, expression):
        """A value from the kernel; arrays become lists."""
        dumped = f"json.dumps({expression}, default=lambda array: array.tolist())"
        return json.loads(printed(self.execute(f"import json\nprint({dumped})")))


@contextlib.contextmanager
def kernel(**environment):
    """A Session in a fresh kernel, with some environment variables set."""
    options = {"timeout": 3600, "record_timing": False, "coalesce_streams": True}
    resources = {"metadata": {"path": str(ROOT)}}
    client = NotebookClient(committed(), resources=resources, **options)
    with client.setup_kernel(env=os.environ | environment):
        yield Session(client)


def run_all():
    """The Session after the whole notebook with its own parameters."""
    with kernel() as session:
        session.run(session.notebook.cells)
        return session
