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
PARTS, ACCURACY = "predictions differ from epoch", "test accuracy"
AT_15, AT_24 = "predictions, epoch 15", "predictions, epoch 24"


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


def sentences(notebook):
    """Sentences of the notebook and of the README, each with the number due in it.

    A sentence is a regular expression for a text with single spaces for all white space.
    Its one group is the number.
    """
    text = harness.printed(*harness.code_cells(notebook.cells))
    p = re.search(r"p = ([\d.e-]+) from", text)[1]
    verdict = re.search(r"a difference is (.*)", text)[1]
    agreeing = re.search(r"no prediction differs after (\d+) of 15", text)[1]
    inputs = re.search(r"([\d,]+) hidden inputs in an", text)[1]
    density = re.search(r"density at zero ([\d.]+)", text)[1]
    results, pairs = columns(notebook, RESULTS), columns(notebook, AMPLIFIERS)
    proof = columns(notebook, "### The proof")[f"relu, ε 1e-07: {OTHER}"]
    relu_bit, relu_other = (pairs[f"relu, ε 1e-07: {name}"] for name in (BIT, OTHER))
    softplus = pairs[f"softplus, ε 1e-07: {BIT}"]
    smooth = [pairs[f"softplus, ε 0.001: {name}"][PARTS] for name in (BIT, OTHER)]
    together = "24" if smooth == ["never", "never"] else "fewer"
    in_notebook = {
        r"Keras got ([\d.]+) %": results["Keras Sequential"][ACCURACY].split()[0],
        r"images right, PyTorch ([\d.]+) %": results["PyTorch"][ACCURACY].split()[0],
        r"With five seeds a difference is ([\w ]+):": verdict,
        r"a share of ([\d.]+) of all deals": p,
        r"none of 10,000 predictions differs after any of the (\d+) epochs": agreeing,
        r"last bit ends in (\d+) other predictions": relu_bit[AT_15],
        r"and the other framework in (\d+)\.": relu_other[AT_15],
        r"steps smaller, none differs after any of (\d+) epochs": together,
        r"no prediction differs after any of its (\d+) epochs": agreeing,
        r"differ from epoch (\d+) on for one": relu_bit[PARTS],
        r"from epoch (\d+) on for the other": relu_other[PARTS],
        r"after 15 epochs (\d+) and": relu_bit[AT_15],
        r"after 15 epochs \d+ and (\d+) do": relu_other[AT_15],
        r"no prediction before epoch (\d+)": softplus[PARTS],
        r"and (\d+) by epoch 24": softplus[AT_24],
        r"ReLU parts at epoch (\d+) between": proof[PARTS],
        r"no prediction differs after any of (\d+) epochs": together,
        r"run ([\d,]+) × [\d.]+ × 1e-6": inputs,
        r"× ([\d.]+) × 1e-6": density,
    }
    in_readme = {
        r"accuracies of Keras and PyTorch is ([\w ]+) \(p = ": verdict,
        r"shown \(p = ([\d.]+)\)": p,
        r"predictions differs after any of the (\d+) epochs": agreeing,
        r"after every one of (\d+) epochs": together,
    }
    return in_notebook, in_readme


def all_misfits():
    """A line for each sentence of the notebook and the README that no longer fits."""
    notebook, found = committed(), []
    prose = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    texts = "\n".join(prose), README.read_text(encoding="utf-8")
    for text, expected in zip(texts, sentences(notebook), strict=True):
        for sentence, number in expected.items():
            match = re.search(sentence, " ".join(text.split()))
            if not match:
                found.append(f"no sentence fits {sentence!r}")
            elif match[1] != number:
                found.append(f"{match[0]!r}: now it is {number}")
    return found


if __name__ == "__main__":
    if "--readme-only" not in sys.argv:
        executed = committed()
        harness.new_client(executed).execute()
        nbformat.write(executed, NOTEBOOK)
    text = refreshed(README.read_text(encoding="utf-8"), committed())
    README.write_text(text, encoding="utf-8")
    PICTURE.write_bytes(picture(committed()))
    if misfits := all_misfits():
        sys.exit("These sentences need another number:\n" + "\n".join(misfits))
