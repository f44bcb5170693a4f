"""The notebook and the README as they are in the repository, nothing executed."""

import re
import subprocess
import sys
import urllib.parse

import nbformat
from harness import NOTEBOOK, README, ROOT, code_cells, committed, printed, section
from refresh import PICTURE, missing_sentences, picture, refreshed

NB = committed()
CODE = code_cells(NB.cells)
PROSE = "\n".join(cell.source for cell in NB.cells if cell.cell_type == "markdown")
TEXT = README.read_text(encoding="utf-8")


def test_outputs_are_those_of_one_full_run_from_top_to_bottom():
    nbformat.validate(NB)
    assert NOTEBOOK.stat().st_size < 1.5e6
    assert [cell.execution_count for cell in CODE] == list(range(1, len(CODE) + 1))
    for output in (output for cell in CODE for output in cell.outputs):
        assert output.output_type != "error" and output.get("name") != "stderr"
    caption, table = (output.data["text/markdown"] for output in CODE[-1].outputs)
    protocol = "epochs 15, batch size 32, learning rate 0.001, seeds 0, 1, 2, 3, 4."
    assert f"**Results**: {protocol}" in caption and "\n| PyTorch |" in table
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert not re.search(r"/(home|root|tmp|work|Users)/|[A-Z]:\\\\", text)


def test_links_inside_the_notebook_lead_to_headings_and_readmes_to_files():
    headings = re.findall(r"^#+ (.*)$", PROSE, flags=re.MULTILINE)
    anchors = {heading.replace(" ", "-") for heading in headings}
    links = {urllib.parse.unquote(n) for n in re.findall(r"\]\(#([^\s]*?)\)", PROSE)}
    assert links <= anchors, links - anchors
    sections = {anchor for anchor in anchors if re.match(r"\d+\.", anchor)}
    assert sections <= links, "the contents link every section"
    for name in re.findall(r"\]\((?!https?:|#)([^)]+)\)", TEXT):
        assert (ROOT / name).exists(), name


def test_each_figure_has_a_visible_caption():
    data = [output.get("data", {}) for cell in CODE for output in cell.outputs]
    places = [place for place, one in enumerate(data) if "image/png" in one]
    assert len(places) == 6
    for place in places:
        assert re.fullmatch(r"\*[^*]{30,}\.\*", data[place + 1]["text/markdown"])


def test_the_three_sections_have_the_same_headings_cells_and_printed_lines():
    shapes, lines = [], []
    for number in (3, 4, 5):
        cells = section(NB, number)
        text = "\n".join(cell.source for cell in cells)
        headings = re.findall(r"^### .*", text, flags=re.MULTILINE)
        shapes.append([headings, [cell.cell_type for cell in cells]])
        text = re.sub(r"[\d.,]+", "#", printed(*code_cells(cells)))
        starts = ("epoch", "test", "untrained", "Adam", "# parameters", "the first")
        lines.append([line for line in text.splitlines() if line.startswith(starts)])
    assert shapes[0] == shapes[1] == shapes[2] and len(shapes[0][0]) == 5
    assert lines[0] == lines[1] == lines[2] and len(lines[0]) == 10


def test_readme_shows_the_notebooks_tables_minutes_and_picture():
    assert refreshed(TEXT, NB) == TEXT
    assert f"(.github/{PICTURE.name})" in TEXT
    assert PICTURE.read_bytes() == picture(NB)


def test_readme_code_is_the_notebooks_and_survives_an_optimizer():
    """In a process of its own: Triton loaded after TensorFlow would end it."""
    imports, *styles = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    source = "\n".join(cell.source for cell in CODE)
    assert all(line.split("  #")[0] in source for line in imports.splitlines())
    assert len(styles) == 3 and all(style.strip() in source for style in styles)
    probe = "build_sequential(0), build_functional(0)\n"
    probe += "torch.optim.Adam(build_pytorch(0).parameters()).step()\n"
    command = [sys.executable, "-c", "\n\n".join([imports, *styles, probe])]
    process = subprocess.run(command, check=False, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def test_every_number_in_the_text_is_that_of_its_output():
    assert missing_sentences() == []


def test_the_tests_that_the_text_names_exist():
    source = (ROOT / "tests" / "test_why.py").read_text(encoding="utf-8")
    for name in re.findall(r"`(test_\w+)`", PROSE):
        assert f"\ndef {name}(" in source
