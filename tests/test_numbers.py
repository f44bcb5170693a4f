"""Numbers in the notebook's prose and in the README are those of the outputs."""

import ast
import re
from pathlib import Path

import nbformat
import pytest
from harness import committed
from numbers_in_text import IN_NOTEBOOK, Field, Line, all_misfits, first, misfits

TESTS = Path(__file__).parent
PROSE = "\n".join(c.source for c in committed().cells if c.cell_type == "markdown")


def test_every_number_in_the_text_is_that_of_its_output():
    assert all_misfits() == []


# What the two parts with findings say of the protocol, of formats and of the frameworks.
CONSTANTS = r"""10,000 predictions|15 epochs|epoch 24|24 epochs|float\d+|16 digits|7 digits
|ε (of )?(1e-07|0\.001)|2e-4|five seeds|\(20\d\d\)|\(http[^)]*\)|\(#[^)]*\)|`[^`]*`"""


@pytest.mark.parametrize(
    ("start", "end"),
    [
        ("**What came out**", "**Is your port off?**"),
        ("In the protocol's run:\n\n-", "Three tests in"),
    ],
)
def test_each_number_of_the_findings_is_a_constant_or_has_its_entry(start, end):
    text = " ".join(PROSE.split(start)[1].split(f"\n{end}")[0].split())
    matches = [re.search(sentence, text) for sentence, _ in IN_NOTEBOOK]
    for left, right in sorted({m.span(1) for m in matches if m}, reverse=True):
        text = text[:left] + text[right:]
    text = re.sub(CONSTANTS.replace("\n", ""), "", text)
    assert re.findall(r".{0,20}\d.{0,20}", text) == []


def small_notebook():
    """A section 7 that prints a number and displays one in a table."""
    v4 = nbformat.v4
    data = {"text/markdown": "| pair | a |\n| --- | ---: |\n| x | 0.07 ± 1 |\n"}
    outputs = [v4.new_output("stream", name="stdout", text="p = 0.4\n")]
    outputs += [v4.new_output("display_data", data=data)]
    heading = v4.new_markdown_cell("## 7. Numbers\n\n### Table")
    return v4.new_notebook(cells=[heading, v4.new_code_cell(outputs=outputs)])


@pytest.mark.parametrize(
    ("text", "row", "found"),
    [
        ("it is 0.4 and\n0.07", "x", []),
        ("it is 0.3 and\n0.07", "x", ["'it is 0.3': now it is 0.4"]),
        ("it is 0.4 and\n0.06", "x", ["'and 0.06': now it is 0.07"]),
        ("it is 0.4 and\n0.07", "y", ["'and 0.07': now it is no output"]),
        ("it was 0.4 and\n0.07", "x", [r"no sentence fits 'it is ([\\d.]+)'"]),
    ],
)
def test_what_does_not_fit_is_said(text, row, found):
    entries = [(r"it is ([\d.]+)", Line(7, r"p = (.*)"))]
    entries += [(r"and (\S+)", Field("### Table", row, "a", first))]
    assert misfits(text, entries, small_notebook()) == found


def marked_full(function):
    """Whether a test asks the full run or has the mark."""
    marks = [ast.unparse(decorator) for decorator in function.decorator_list]
    arguments = {argument.arg for argument in function.args.args}
    return "full_run" in arguments or any("full" in mark for mark in marks)


def test_the_tests_that_the_text_names_exist_and_train_in_full():
    nodes = [
        node
        for path in TESTS.glob("test_*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
    ]
    full = {node.name for node in nodes if hasattr(node, "args") and marked_full(node)}
    assert set(re.findall(r"`(test_\w+)`", PROSE)) <= full


def test_no_number_is_still_to_be_filled_in():
    without_code = re.sub(r"`[^`]*`", "", PROSE)
    assert re.findall(r"\b[A-Z]+_[A-Z]+\b|\bTODO\b|\bXX+\b", without_code) == []
