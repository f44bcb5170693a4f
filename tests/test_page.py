"""The notebook and the README as they are in the repository, nothing executed."""

import ast
import itertools
import re
import subprocess
import sys
import urllib.parse

import nbformat
import pytest
from harness import (
    NOTEBOOK,
    PICTURE,
    README,
    ROOT,
    code_cells,
    committed,
    image_under,
    markdown,
    printed,
    section,
)
from numbers_in_text import IN_NOTEBOOK, IN_README, all_misfits
from refresh import minutes_taken, shown_tables

NB = committed()
CODE = code_cells(NB.cells)
PROSE = "\n".join(cell.source for cell in NB.cells if cell.cell_type == "markdown")
TEXT = README.read_text(encoding="utf-8")


def test_it_is_valid_and_small():
    nbformat.validate(NB)
    assert NOTEBOOK.stat().st_size < 1.5e6


def test_every_cell_was_executed_once_in_order_without_error_or_stderr():
    assert [cell.execution_count for cell in CODE] == list(range(1, len(CODE) + 1))
    for output in (output for cell in CODE for output in cell.outputs):
        assert output.output_type != "error" and output.get("name") != "stderr"


def test_outputs_are_those_of_the_full_protocol_and_end_in_the_results_table():
    last = [cell for cell in CODE if cell.outputs][-1]
    label = "**Results**: epochs 15, batch size 32, learning rate 0.001, seeds 0, 1, 2, 3, 4."
    assert last is CODE[-1] and markdown(last).startswith(label)
    assert markdown(last).rstrip().splitlines()[-1].startswith("| PyTorch |")


def test_it_names_no_path_of_the_machine_it_ran_on():
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert not re.search(r"/(home|root|tmp|work|Users)/|[A-Z]:\\\\", text)


def test_code_fits_in_88_columns_and_every_definition_has_a_docstring():
    lines = [line for cell in CODE for line in cell.source.splitlines()]
    assert [line for line in lines if len(line) > 88] == []
    for node in (node for cell in CODE for node in ast.parse(cell.source).body):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            assert ast.get_docstring(node), node.name


def test_links_inside_the_notebook_lead_to_headings_and_readmes_to_files():
    headings = re.findall(r"^#+ (.*)$", PROSE, flags=re.MULTILINE)
    anchors = {heading.replace(" ", "-") for heading in headings}
    links = {urllib.parse.unquote(n) for n in re.findall(r"\]\(#([^\s]*?)\)", PROSE)}
    assert links <= anchors, links - anchors
    numbered = {anchor for anchor in anchors if re.match(r"\d+\.", anchor)}
    assert numbered <= links, "the contents link every section"
    files = re.findall(r"\]\((?!https?:|#)([^)]+)\)", TEXT)
    assert [name for name in files if not (ROOT / name).exists()] == []


def test_each_figure_has_a_visible_caption():
    outputs = [output.get("data", {}) for cell in CODE for output in cell.outputs]
    captions = [
        caption.get("text/markdown", "")
        for image, caption in itertools.pairwise([*outputs, {}])
        if "image/png" in image
    ]
    assert len(captions) == 6
    assert all(re.fullmatch(r"\*[^*]{30,}\.\*", caption) for caption in captions)


def names_in(number):
    """The names that a section assigns or defines, in order."""
    for cell in code_cells(section(NB, number)):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.FunctionDef):
                yield node.name
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.id


def test_the_three_sections_have_the_same_headings_cells_lines_and_names():
    shapes, lines, names = [], [], []
    for number, prefix in {3: "sequential", 4: "functional", 5: "pytorch"}.items():
        cells = section(NB, number)
        titles = [re.findall(r"^### .*", c.source, flags=re.MULTILINE) for c in cells]
        shapes.append([(c.cell_type, *t) for c, t in zip(cells, titles, strict=True)])
        text = re.sub(r"[\d.,]+", "#", printed(*code_cells(cells)))
        starts = ("epoch", "test", "untrained", "Adam", "# parameters", "the first")
        lines.append([n for n in text.splitlines() if n.startswith(starts)])
        ours = [
            name.replace(prefix, "*") for name in names_in(number) if prefix in name
        ]
        names.append(sorted(set(ours)))
    assert shapes[0] == shapes[1] == shapes[2]
    steps = ("Build", "Compile", "Train", "Evaluate", "Look inside")
    assert [t for _, *t in shapes[0] if t] == [[f"### {step}"] for step in steps]
    assert lines[0] == lines[1] == lines[2] and len(lines[0]) == 10
    assert names[0] == names[1] == names[2] and len(names[0]) == 12


def test_readme_shows_tables_of_the_notebook():
    for name, lines in shown_tables(NB).items():
        shown = TEXT.split(f"<!-- {name} -->\n\n")[1].split("\n\n<!-- end -->")[0]
        assert shown.splitlines() == lines, name


def test_readme_shows_the_picture_and_says_how_long_a_run_takes():
    assert f"(.github/{PICTURE.name})" in TEXT
    assert PICTURE.read_bytes() == image_under(NB, "### The picture")
    sentence = f"The committed run took {minutes_taken(NB)} minutes"
    assert sentence in " ".join(TEXT.split())


def test_readme_code_is_the_notebooks_and_survives_an_optimizer():
    """In a process of its own: Triton loaded after TensorFlow would end it."""
    imports, *styles = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    source = "\n".join(cell.source for cell in CODE)
    assert all(line.split("  #")[0] in source for line in imports.splitlines())
    assert len(styles) == 3 and all(style.strip() in source for style in styles)
    probe = (
        "for model in build_sequential(0), build_functional(0):\n"
        "    assert model.count_params() == 101_770\n"
        "parameters = list(build_pytorch(0).parameters())\n"
        "assert sum(p.numel() for p in parameters) == 101_770\n"
        "parameters[0].sum().backward()\n"
        "torch.optim.Adam(parameters).step()\n"
    )
    command = [sys.executable, "-c", "\n\n".join([imports, *styles, probe])]
    process = subprocess.run(command, check=False, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def test_prose_says_nothing_louder_than_a_full_stop_and_leaves_nothing_to_fill_in():
    assert not re.search(r"\w!(\s|$)", PROSE + TEXT)
    assert re.findall(r"\bTODO\b|\bXX+\b", PROSE + TEXT) == []


def test_every_number_in_the_text_is_that_of_its_output():
    assert all_misfits() == []


# What the findings say of the protocol, of formats and of the frameworks.
CONSTANTS = r"""10,000 pred|15 epochs|epoch 24|24 epochs|float\d+|16 digits|7 digits|\(20\d\d\)
|ε (of )?(1e-07|0\.001|1e-3)|five seeds|\(#[^)]*\)|`[^`]*`|\(http[^)]*\)"""


@pytest.mark.parametrize(
    ("text", "start", "end", "entries"),
    [
        (PROSE, "**What came out**", "**Is your port off?**", IN_NOTEBOOK),
        (PROSE, "In the protocol's run:\n\n- **ReLU", "Three tests in", IN_NOTEBOOK),
        (TEXT, "Keras Sequential's.\n\n-", "## Is your port off?", IN_README),
    ],
)
def test_each_number_of_the_findings_is_a_constant_or_has_its_entry(
    text, start, end, entries
):
    text = " ".join(text.split(start)[1].split(f"\n{end}")[0].split())
    matches = [re.search(sentence, text) for sentence, _ in entries]
    for left, right in sorted({m.span(1) for m in matches if m}, reverse=True):
        text = text[:left] + text[right:]
    text = re.sub(CONSTANTS.replace("\n", ""), "", text)
    assert re.findall(r".{0,20}\d.{0,20}", text) == []


def test_the_tests_that_the_text_names_exist():
    paths = (ROOT / "tests").glob("test_*.py")
    source = "\n".join(path.read_text(encoding="utf-8") for path in paths)
    for name in set(re.findall(r"`(test_\w+)`", PROSE)):
        marked = rf"@pytest.mark.full\n(?:@.*\n)*def {name}\(|def {name}\(.*full_run"
        assert re.search(marked, source), name
