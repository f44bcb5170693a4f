"""Execute the notebook in place, copy what the README shows of it, and say which
sentences in either no longer fit its numbers.

Usage: python tests/refresh.py [--readme-only]
"""

import re
import sys

import nbformat
from harness import (
    NOTEBOOK,
    PICTURE,
    README,
    cell_with,
    committed,
    image_under,
    markdown,
    new_client,
    table,
    table_under,
)
from numbers_in_text import all_misfits


def execute():
    """Run the notebook top to bottom in a fresh kernel and save it with the outputs."""
    notebook = committed()
    new_client(notebook).execute()
    nbformat.write(notebook, NOTEBOOK)


def substitute(pattern, replacement, text):
    """The text with the one match of the pattern replaced."""
    result, count = re.subn(pattern, lambda match: replacement, text, flags=re.DOTALL)
    assert count == 1, f"README.md has {count} places for {pattern}"
    return result


def between_markers(text, name, lines):
    """The text with the lines between <!-- name --> and <!-- end --> replaced."""
    start, end = f"<!-- {name} -->\n", "<!-- end -->"
    body = "\n".join([start, *lines, "", end])
    return substitute(rf"{start}((?!<!--).)*?{end}", body, text)


def shown_tables(notebook):
    """The tables that the README shows, by the names of their markers."""
    return {
        "results": table_under(notebook, "### The shared results table"),
        "ladder": table_under(notebook, "### The ladder"),
        "amplifiers": table_under(notebook, "### The two amplifiers"),
        "check": table(markdown(cell_with(notebook, "def forgetful_step("))),
    }


def refresh_readme():
    notebook = committed()
    text = README.read_text(encoding="utf-8")
    for name, lines in shown_tables(notebook).items():
        text = between_markers(text, name, lines)
    minutes = re.search(r"took ([\d.]+) minutes", markdown(notebook.cells[-1]))[1]
    sentence = f"The committed run took {minutes} minutes"
    text = substitute(r"The committed run took [\d.]+ minutes", sentence, text)
    README.write_text(text, encoding="utf-8")
    PICTURE.write_bytes(image_under(notebook, "### The picture"))


if __name__ == "__main__":
    if "--readme-only" not in sys.argv:
        execute()
    refresh_readme()
    if misfits := all_misfits():
        sys.exit("These sentences need another number:\n" + "\n".join(misfits))
