"""Execute the notebook in place, copy what the README shows of it, and say which
sentences in either no longer fit its numbers.

Usage: python tests/refresh.py [--readme-only]
"""

import re
import sys

import harness
import nbformat
from harness import NOTEBOOK, PICTURE, README, committed
from numbers_in_text import all_misfits

RESULTS = "### The shared results table"
# The headings of the tables that the README shows, by the names of their markers.
SHOWN = {
    "results": RESULTS,
    "ladder": "### The ladder",
    "amplifiers": "### The two amplifiers",
}


def minutes_taken(notebook):
    """The minutes in the caption of the results table, as text."""
    return re.search(
        r"took ([\d.]+) minutes", harness.markdown(harness.under(notebook, RESULTS)[0])
    )[1]


def substitute(pattern, replacement, text):
    """The text with the one match of the pattern replaced."""
    result, count = re.subn(pattern, lambda match: replacement, text, flags=re.DOTALL)
    assert count == 1, f"README.md has {count} places for {pattern}"
    return result


def shown_tables(notebook):
    """The tables that the README shows, by the names of their markers."""
    tables = {
        name: harness.table_under(notebook, heading) for name, heading in SHOWN.items()
    }
    cell = harness.cell_with(notebook, "def check_cnn(")
    tables["check"] = harness.table(harness.markdown(cell))
    return tables


def refresh_readme():
    notebook = committed()
    text = README.read_text(encoding="utf-8")
    for name, lines in shown_tables(notebook).items():
        start, end = f"<!-- {name} -->\n", "<!-- end -->"
        body = "\n".join([start, *lines, "", end])
        text = substitute(rf"{start}((?!<!--).)*?{end}", body, text)
    sentence = f"The committed run took {minutes_taken(notebook)} minutes"
    text = substitute(r"The committed run took [\d.]+ minutes", sentence, text)
    README.write_text(text, encoding="utf-8")
    PICTURE.write_bytes(harness.image_under(notebook, "### The picture"))


if __name__ == "__main__":
    if "--readme-only" not in sys.argv:
        executed = committed()
        harness.new_client(executed).execute()
        nbformat.write(executed, NOTEBOOK)
    refresh_readme()
    if misfits := all_misfits():
        sys.exit("These sentences need another number:\n" + "\n".join(misfits))
