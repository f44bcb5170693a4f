"""Execute the notebook in place, then copy its tables and its figure to where the README shows them.

Usage: python tests/refresh.py [--readme-only]
"""

import re
import sys

import nbformat
from notebook import (
    NOTEBOOK,
    PICTURE,
    README,
    committed,
    image_under,
    markdown,
    new_client,
    table,
    table_under,
)


def execute():
    """Run the notebook top to bottom in a fresh kernel and save it with the outputs."""
    notebook = committed()
    new_client(notebook).execute()
    nbformat.write(notebook, NOTEBOOK)


def between_markers(text, name, lines):
    """The text with the lines between its two markers <!-- name --> and <!-- end --> replaced."""
    pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
    body = "\n".join(["", *lines, ""])
    result, count = re.subn(pattern, lambda m: m[1] + body + "\n" + m[2], text, flags=re.DOTALL)
    assert count == 1, f"README.md has no place for {name}"
    return result


def refresh_readme():
    notebook = committed()
    text = README.read_text(encoding="utf-8")
    text = between_markers(text, "results", table(markdown(notebook.cells[-1])))
    text = between_markers(text, "ladder", table_under(notebook, "### The ladder"))
    README.write_text(text, encoding="utf-8")
    PICTURE.write_bytes(image_under(notebook, "### The picture"))


if __name__ == "__main__":
    if "--readme-only" not in sys.argv:
        execute()
    refresh_readme()
