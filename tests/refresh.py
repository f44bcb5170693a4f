"""Execute the notebook in place, then copy what the README shows of it.

Usage: python tests/refresh.py [--readme-only]
"""

import re
import sys

import nbformat
from harness import (
    NOTEBOOK,
    PICTURE,
    README,
    committed,
    fields,
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


def check_of_one_mistake(notebook):
    """The check's table with only the column of the forgotten zero_grad()."""
    lines = [fields(line) for line in table_under(notebook, "### The check")]
    column = lines[0].index("`zero_grad()` forgotten")
    return [f"| {line[0]} | {line[column]} |" for line in lines]


def refresh_readme():
    notebook = committed()
    results = markdown(notebook.cells[-1])
    text = README.read_text(encoding="utf-8")
    text = between_markers(text, "results", table(results))
    text = between_markers(text, "ladder", table_under(notebook, "### The ladder"))
    text = between_markers(text, "switch", table_under(notebook, "### The switch"))
    text = between_markers(text, "check", check_of_one_mistake(notebook))
    minutes = re.search(r"took ([\d.]+) minutes", results)[1]
    sentence = f"The committed run took {minutes} minutes"
    text = substitute(r"The committed run took [\d.]+ minutes", sentence, text)
    README.write_text(text, encoding="utf-8")
    PICTURE.write_bytes(image_under(notebook, "### The picture"))


if __name__ == "__main__":
    if "--readme-only" not in sys.argv:
        execute()
    refresh_readme()
