"""The notebook and the README as they are in the repository, nothing executed."""

import ast
import builtins
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
    code_cells,
    committed,
    image_under,
    markdown,
    printed,
    section,
    table,
)
from refresh import shown_tables

NB = committed()
CODE = code_cells(NB.cells)
PROSE = "\n".join(cell.source for cell in NB.cells if cell.cell_type == "markdown")
TEXT = README.read_text(encoding="utf-8")
PREFIXES = {3: "sequential", 4: "functional", 5: "pytorch"}


def test_it_is_valid_and_small():
    nbformat.validate(NB)
    assert NOTEBOOK.stat().st_size < 1.5e6
    assert len(CODE) <= 60


def test_at_most_60_lines_lead_from_one_output_to_the_next():
    """The check is one cell, to be copied whole, and does not count."""
    waiting = 0
    for cell in CODE:
        if "def check_port(" not in cell.source:
            waiting += sum(bool(line.strip()) for line in cell.source.splitlines())
        assert waiting <= 60, cell.source[:80]
        waiting = 0 if cell.outputs else waiting
    assert waiting == 0, "the last cell shows something"


def test_every_cell_was_executed_once_in_order():
    assert [cell.execution_count for cell in CODE] == list(range(1, len(CODE) + 1))


def test_outputs_have_no_error_stderr_or_warning():
    for output in (output for cell in CODE for output in cell.outputs):
        assert output.output_type != "error"
        assert output.get("name") != "stderr"
        assert "warning" not in output.get("text", "").lower()


def test_outputs_are_those_of_the_full_protocol():
    label = "**Results**: epochs 15, batch size 32, learning rate 0.001, seeds 0, 1, 2, 3, 4."
    assert markdown(NB.cells[-1]).startswith(label)


def test_it_names_no_path_of_the_machine_it_ran_on():
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert not re.search(r"/(home|root|tmp|work|Users)/|[A-Z]:\\\\", text)


def test_code_fits_in_88_columns():
    lines = [line for cell in CODE for line in cell.source.splitlines()]
    assert [line for line in lines if len(line) > 88] == []


def test_nothing_is_used_above_its_definition():
    known = set(dir(builtins)) | {"__name__"}
    for cell in CODE:
        nodes = list(ast.walk(ast.parse(cell.source)))
        names = [node for node in nodes if isinstance(node, ast.Name)]
        known |= {node.id for node in names if not isinstance(node.ctx, ast.Load)}
        known |= {node.name for node in nodes if hasattr(node, "name") and node.name}
        known |= {node.arg for node in nodes if isinstance(node, ast.arg)}
        imported = [node for node in nodes if isinstance(node, ast.alias)]
        known |= {(alias.asname or alias.name).split(".")[0] for alias in imported}
        assert {node.id for node in names} <= known, cell.source[:80]


def test_every_function_and_class_has_a_docstring():
    for cell in CODE:
        for node in ast.parse(cell.source).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                assert ast.get_docstring(node), node.name


def test_no_more_than_three_code_cells_follow_each_other():
    kinds = "".join(cell.cell_type[0] for cell in NB.cells)
    assert "cccc" not in kinds


def test_the_first_network_comes_within_a_hundred_lines_of_code():
    sources = [cell.source for cell in CODE]
    first = next(i for i, source in enumerate(sources) if "keras.Sequential(" in source)
    lines = [line for source in sources[:first] for line in source.splitlines()]
    assert len([line for line in lines if re.match(r"\s*[^#\s]", line)]) <= 100


def test_links_inside_the_notebook_lead_to_headings():
    headings = re.findall(r"^#+ (.*)$", PROSE, flags=re.MULTILINE)
    anchors = {heading.replace(" ", "-") for heading in headings}
    links = re.findall(r"\]\(#([^\s]*?)\)", PROSE)
    targets = [urllib.parse.unquote(link) for link in links]
    assert len(targets) > 10
    assert [target for target in targets if target not in anchors] == []
    numbered = {anchor for anchor in anchors if re.match(r"\d\.", anchor)}
    assert numbered <= set(targets), "the contents link every section"


def test_each_figure_has_a_visible_caption():
    data = [[output.get("data", {}) for output in cell.outputs] for cell in CODE]
    captions = [
        caption.get("text/markdown", "")
        for outputs in data
        for image, caption in itertools.pairwise([*outputs, {}])
        if "image/png" in image
    ]
    assert len(captions) == 6
    assert all(re.fullmatch(r"\*[^*]{30,}\.\*", caption) for caption in captions)


def test_parameters_cell_is_tagged_for_papermill():
    [cell] = [c for c in CODE if "parameters" in c.metadata.get("tags", [])]
    assignments = ast.parse(cell.source).body
    names = {target.id for node in assignments for target in node.targets}
    assert names == {"epochs", "batch_size", "learning_rate", "seeds", "data_dir"}


def test_the_three_sections_have_the_same_headings_and_cells():
    def shape(number):
        return [
            cell.cell_type
            if cell.cell_type == "code"
            else re.findall(r"^### .*", cell.source, flags=re.MULTILINE)
            for cell in section(NB, number)
        ]

    assert shape(3) == shape(4) == shape(5)
    headings = [heading for item in shape(3) if item != "code" for heading in item]
    steps = ("Build", "Compile", "Train", "Evaluate", "Look inside")
    assert headings == [f"### {step}" for step in steps]


@pytest.mark.parametrize(("number", "prefix"), PREFIXES.items())
def test_the_three_sections_use_the_same_names(number, prefix):
    names = set()
    for cell in code_cells(section(NB, number)):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.FunctionDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
    for function in ("build", "compile", "batches", "evaluate", "train"):
        assert f"{function}_{prefix}" in names
    for variable in ("model", "parameters", "optimizer", "run", "test", "predictions"):
        assert f"{prefix}_{variable}" in names


def test_the_three_sections_print_the_same_lines():
    def lines(number):
        text = "\n".join(map(printed, code_cells(section(NB, number))))
        masked = [re.sub(r"[\d.,]+", "#", line) for line in text.splitlines()]
        starts = ("epoch", "test", "untrained", "Adam", "# parameters")
        return [line for line in masked if line.startswith(starts)]

    assert lines(3) == lines(4) == lines(5)
    # Epochs 1, 2, 5, 10 and 15, and the four other lines.
    assert len(lines(3)) == 9


def test_the_shared_results_table_comes_last_after_a_caption():
    last = markdown(NB.cells[-1]).splitlines()
    assert NB.cells[-2].source == "### The shared results table"
    assert len(table("\n".join(last))) == 5
    assert [line for line in last if line and not line.startswith("|")] == last[:1]


@pytest.mark.parametrize(("name", "lines"), shown_tables(NB).items())
def test_readme_shows_tables_of_the_notebook(name, lines):
    shown = TEXT.split(f"<!-- {name} -->\n\n")[1].split("\n\n<!-- end -->")[0]
    assert shown.splitlines() == lines and len(lines) > 4


def test_readme_shows_the_picture():
    assert f"(.github/{PICTURE.name})" in TEXT
    assert PICTURE.read_bytes() == image_under(NB, "### The picture")


def test_readme_says_how_long_a_run_takes():
    minutes = float(re.search(r"took ([\d.]+) minutes", markdown(NB.cells[-1]))[1])
    assert f"The committed run took {minutes} minutes" in " ".join(TEXT.split())


def test_readme_code_is_the_notebooks_and_runs():
    blocks = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    assert len(blocks) == 4
    source = "\n".join(cell.source for cell in CODE)
    imports, *styles = blocks
    lines = [line.split("  #")[0] for line in imports.splitlines()]
    assert all(line in source.splitlines() for line in lines)
    for style in styles:
        assert style.strip() in source, style
    namespace = {}
    exec("\n\n".join(blocks), namespace)
    assert namespace["build_sequential"](0).count_params() == 101_770
    assert namespace["build_functional"](0).count_params() == 101_770
    assert sum(p.numel() for p in namespace["build_pytorch"](0).parameters()) == 101_770


def test_the_readme_s_first_block_survives_an_optimizer():
    """In a process of its own: Triton loaded after TensorFlow would end it."""
    first = re.search(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)[1]
    step = "w = torch.ones(1, requires_grad=True)\nadam = torch.optim.Adam([w])\n"
    step += "w.sum().backward()\nadam.step()\nprint(w.item() < 1)"
    command = [sys.executable, "-c", f"{first}\n{step}"]
    process = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (process.returncode, process.stdout) == (0, "True\n"), process.stderr


def test_prose_says_nothing_louder_than_a_full_stop():
    assert not re.search(r"\w!(\s|$)", PROSE + TEXT)
