"""What the tests and refresh.py know about the notebook, and ways to run it."""

import ast
import base64
import contextlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "mnist_framework_comparison.ipynb"
README = ROOT / "README.md"
PICTURE = ROOT / ".github" / "amplifiers.png"


def committed():
    """The notebook as it is on disk."""
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(cells):
    return [cell for cell in cells if cell.cell_type == "code"]


def section(notebook, number):
    """The cells from the heading '## number.' up to the next one of its level."""
    cells = notebook.cells
    starts = [i for i, cell in enumerate(cells) if cell.source.startswith("## ")]
    for start, end in zip(starts, [*starts[1:], len(cells)], strict=True):
        if cells[start].source.startswith(f"## {number}."):
            return cells[start:end]
    raise LookupError(f"the notebook has no section {number}")


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


def markdown(cell):
    """The Markdown that a cell displayed."""
    texts = [output.get("data", {}).get("text/markdown", "") for output in cell.outputs]
    return "\n\n".join(filter(None, texts))


def table(text):
    """The lines of the first Markdown table in a text."""
    found = re.search(r"(^\|.*\|$\n?)+", text, flags=re.MULTILINE)
    return found.group().splitlines()


def fields(line):
    """The cells of one line of a Markdown table."""
    return [field.strip() for field in line.strip().strip("|").split("|")]


def table_under(notebook, heading):
    """The first table that a cell displays below a heading."""
    texts = map(markdown, under(notebook, heading))
    return table(next(text for text in texts if "|" in text))


def columns(notebook, heading):
    """{first field of a row: {column: field}} of the first table below a heading."""
    header, _, *rows = map(fields, table_under(notebook, heading))
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def image_under(notebook, heading):
    """The first PNG, as bytes, that a cell displays below a heading."""
    outputs = [output for cell in under(notebook, heading) for output in cell.outputs]
    data = [output.get("data", {}) for output in outputs]
    return base64.b64decode(next(d["image/png"] for d in data if "image/png" in d))


def defined_names(node):
    """The names that a statement at the top level defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    return {target.id for target in targets if isinstance(target, ast.Name)}


def definitions(*names, **given):
    """Functions, classes and constants of the notebook, defined in this process.

    All of the notebook's imports come first, in its own order. `given` are values that
    the notebook would have computed before.
    """
    trees = [ast.parse(cell.source) for cell in code_cells(committed().cells)]
    nodes = [node for tree in trees[1:] for node in tree.body]
    imports = [n for n in nodes if isinstance(n, ast.Import | ast.ImportFrom)]
    wanted = [node for node in nodes if defined_names(node) & set(names)]
    namespace = dict(given)
    module = ast.Module([*trees[0].body, *imports, *wanted], [])
    exec(compile(module, "notebook", "exec"), namespace)
    return SimpleNamespace(**namespace)


class Session:
    """The notebook in a running kernel, which is talked to from one thread of its own."""

    def __init__(self, client, thread):
        self.client, self.notebook, self.thread = client, client.nb, thread

    def start(self, cells=None):
        """Begin to execute some cells of the notebook, or all; returns a future."""
        cells = code_cells(self.notebook.cells if cells is None else cells)

        def run():
            for cell in cells:
                self.client.execute_cell(cell, self.notebook.cells.index(cell))

        return self.thread.submit(run)

    def run(self, cells=None):
        self.start(cells).result()

    def run_sections(self, *numbers):
        for number in numbers:
            self.run(section(self.notebook, number))

    def execute(self, source):
        """Execute code of the test's own in the kernel; returns the cell."""
        cell = nbformat.v4.new_code_cell(source)
        self.notebook.cells.append(cell)
        try:
            index = len(self.notebook.cells) - 1
            return self.thread.submit(self.client.execute_cell, cell, index).result()
        finally:
            self.notebook.cells.remove(cell)

    def value(self, expression):
        """A JSON value from the kernel."""
        source = f"import json\nprint(json.dumps({expression}))"
        return json.loads(printed(self.execute(source)))


def new_client(notebook, folder=ROOT):
    """An nbclient for the notebook that works in the folder."""
    metadata = {"metadata": {"path": str(folder)}}
    options = {"timeout": 3600, "record_timing": False, "coalesce_streams": True}
    return NotebookClient(notebook, resources=metadata, **options)


@contextlib.contextmanager
def kernel(folder=ROOT, **environment):
    """A Session in a fresh kernel, with some environment variables set."""
    kept = [name for name in os.environ if not name.startswith("MNIST_")]
    env = {name: os.environ[name] for name in kept}
    client = new_client(committed(), folder)
    with ThreadPoolExecutor(1) as thread:
        setup = client.setup_kernel(env=env | environment)
        thread.submit(setup.__enter__).result()
        try:
            yield Session(client, thread)
        finally:
            thread.submit(setup.__exit__, None, None, None).result()
