"""Execute the notebook in place, copy what the README shows of it, and say which
sentences in either no longer fit its numbers.

Usage: python tests/refresh.py [--readme-only]
"""

import base64
import re
import sys

import harness
import nbformat
from harness import NOTEBOOK, README, columns, committed, table_under, under

PICTURE = harness.ROOT / ".github" / "amplifiers.png"
RESULTS, AMPLIFIERS = "### The shared results table", "### The two amplifiers"
BIT, OTHER = "PyTorch / PyTorch, one bit moved", "Keras / PyTorch"
PARTS = "first epoch with differing predictions"
THEN = "differing predictions then"


def substitute(pattern, replacement, text):
    """The text with the one match of the pattern replaced."""
    result, count = re.subn(pattern, lambda match: replacement, text, flags=re.DOTALL)
    assert count == 1, f"README.md has {count} places for {pattern}"
    return result


def refreshed(text, notebook):
    """The README's text with the notebook's tables and the minutes that it took."""
    check = harness.markdown(harness.cell_with(notebook, "def check_cnn("))
    # The tables that the README shows, by the names of their markers.
    for name, lines in {
        "results": table_under(notebook, RESULTS),
        "check": harness.table(check),
        "ladder": table_under(notebook, "### The ladder"),
        "amplifiers": table_under(notebook, AMPLIFIERS),
    }.items():
        start, end = f"<!-- {name} -->\n", "<!-- end -->"
        body = "\n".join([start, *lines, "", end])
        text = substitute(rf"{start}((?!<!--).)*?{end}", body, text)
    caption = harness.markdown(under(notebook, RESULTS)[0])
    minutes = re.search(r"took ([\d.]+) minutes", caption)[1]
    sentence = f"The committed run took {minutes} minutes"
    return substitute(r"The committed run took [\d.]+ minutes", sentence, text)


def picture(notebook):
    """The first PNG, as bytes, that a cell displays below the picture's heading."""
    cells = under(notebook, "### The picture")
    data = [output.get("data", {}) for cell in cells for output in cell.outputs]
    return base64.b64decode(next(d["image/png"] for d in data if "image/png" in d))


def missing_sentences():
    """What the notebook's text and the README's do not say of the outputs."""
    notebook = committed()
    output = harness.printed(*harness.code_cells(notebook.cells))
    [p] = re.findall(r"p = (\S+) from", output)
    [verdict] = re.findall(r"a difference is (.*)", output)
    [agreeing] = re.findall(r"a differing prediction: (\d+) of the first 15", output)
    [estimate] = re.findall(r"(\S+) inputs of ReLU .* at zero (\S+)", output)
    ladder = columns(notebook, "### The ladder")["+ precision"]
    results, pairs = columns(notebook, RESULTS), columns(notebook, AMPLIFIERS)
    accuracy = {api: row["test accuracy"].split()[0] for api, row in results.items()}
    proof = columns(notebook, "### The proof")[f"relu, ε 1e-07: {OTHER}"]
    bit, other = (pairs[f"relu, ε 1e-07: {name}"] for name in (BIT, OTHER))
    softplus = pairs[f"softplus, ε 1e-07: {BIT}"]
    together = pairs[f"softplus, ε 0.001: {OTHER}"]["last epoch"]
    in_notebook = f"""
Keras got {accuracy["Keras Sequential"]} % of the
images right, PyTorch {accuracy["PyTorch"]} %.
With five seeds a difference is {verdict}:
a share of {p} of all deals
none of 10,000 predictions differs after any of the {agreeing} epochs
change at all, ends in {bit[THEN]} other predictions after 15 epochs
changing the framework, all else equal, ends in {other[THEN]}.
no prediction differs after any of its {agreeing} epochs
smaller, none differs after any of {together} epochs
leaves {ladder["weight difference, 1 update"]} in some weight after one update
and {ladder["weight difference, 1 epoch"]} after an epoch
predictions first differ after epoch {bit[PARTS]} for one moved bit
and after epoch {other[PARTS]} for the other framework
after 15 epochs {bit[THEN]} and {other[THEN]} do.
no prediction before epoch {softplus[PARTS]}, and {softplus[THEN]} by epoch 22.
ReLU parts at epoch {proof[PARTS]} between
no prediction differs after any of {together} epochs
run {estimate[0]} × {estimate[1]} × 1e-6
"""
    in_readme = f"""
accuracies of Keras and PyTorch is {verdict} (p = {p})
predictions differs after any of the {agreeing} epochs
after every one of {together} epochs
"""
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    texts = "\n".join(cells), README.read_text(encoding="utf-8")
    missing = []
    for text, expected in zip(texts, (in_notebook, in_readme), strict=True):
        words = " ".join(text.split())
        missing += [line for line in expected.splitlines() if line not in words]
    return missing


if __name__ == "__main__":
    if "--readme-only" not in sys.argv:
        nbformat.write(harness.run_all().notebook, NOTEBOOK)
    text = refreshed(README.read_text(encoding="utf-8"), committed())
    README.write_text(text, encoding="utf-8")
    PICTURE.write_bytes(picture(committed()))
    if missing := missing_sentences():
        sys.exit("The texts must say this now:\n" + "\n".join(missing))
