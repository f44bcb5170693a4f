"""The notebook and the README as they are in the repository, nothing executed."""

import ast
import re
import statistics

import nbformat
import pytest
from notebook import (
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
    table_under,
)

NB = committed()
SECTIONS = {3: "sequential", 4: "functional", 5: "pytorch"}


def test_it_is_valid_and_small():
    nbformat.validate(NB)
    assert NOTEBOOK.stat().st_size < 1.5e6


def test_every_cell_was_executed_once_in_order():
    counts = [cell.execution_count for cell in code_cells(NB.cells)]
    assert counts == list(range(1, len(counts) + 1))


def test_outputs_have_no_error_stderr_or_warning():
    for cell in code_cells(NB.cells):
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr"
        assert "warning" not in printed(cell).lower()


def test_outputs_are_those_of_the_full_protocol():
    assert markdown(NB.cells[-1]).startswith(
        "**Results**: epochs 15, batch size 32, learning rate 0.001, seeds 0, 1, 2, 3, 4."
    )


def test_it_names_no_path_of_the_machine_it_ran_on():
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert not re.search(r"/(home|root|tmp|work|Users)/|[A-Z]:\\\\", text)


def test_cells_are_short():
    lines = [
        sum(bool(line.strip()) for line in cell.source.splitlines())
        for cell in code_cells(NB.cells)
    ]
    assert statistics.median(lines) <= 8
    assert max(lines) <= 30


def test_figures_have_alternative_text():
    images = [
        o for c in code_cells(NB.cells) for o in c.outputs if "image/png" in o.get("data", {})
    ]
    assert len(images) >= 7
    for image in images:
        assert len(image.metadata["image/png"]["alt"]) > 30


def test_parameters_cell_is_tagged_for_papermill():
    [cell] = [cell for cell in NB.cells if "parameters" in cell.metadata.get("tags", [])]
    names = {target.id for node in ast.parse(cell.source).body for target in node.targets}
    assert names == {"epochs", "batch_size", "learning_rate", "seeds", "data_dir"}


def test_sections_have_the_same_headings_and_cells():
    def shape(cells):
        return [
            "code"
            if cell.cell_type == "code"
            else re.findall(r"^### .*", cell.source, flags=re.MULTILINE)
            for cell in cells
        ]

    shapes = [shape(section(NB, number)) for number in SECTIONS]
    assert shapes[0] == shapes[1] == shapes[2]
    headings = [heading for item in shapes[0] if item != "code" for heading in item]
    assert headings == ["### Build", "### Compile", "### Train", "### Evaluate", "### Look inside"]


@pytest.mark.parametrize("number", SECTIONS)
def test_sections_use_the_same_names(number):
    prefix = SECTIONS[number]
    names = set()
    for cell in code_cells(section(NB, number)):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.FunctionDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
    for function in ("build", "compile", "batches", "evaluate", "train"):
        assert f"{function}_{prefix}" in names
    for variable in ("model", "parameters", "optimizer", "history", "test", "predictions"):
        assert f"{prefix}_{variable}" in names


def test_sections_print_the_same_lines():
    def lines(number):
        cells = [
            cell
            for cell in code_cells(section(NB, number))
            if f"train_{SECTIONS[number]}(seeds" in cell.source
        ]
        return [
            re.sub(r"[\d.]+", "#", line) for cell in cells for line in printed(cell).splitlines()
        ]

    assert lines(3) == lines(4) == lines(5)
    assert len(lines(3)) == 15
    shape = "epoch # # s training loss #, accuracy # validation loss #, accuracy #"
    assert {" ".join(line.split()) for line in lines(3)} == {shape}


def test_readme_shows_the_results_table():
    assert "\n".join(table(markdown(NB.cells[-1]))) in README.read_text(encoding="utf-8")


def test_readme_shows_the_ladder_and_its_picture():
    text = README.read_text(encoding="utf-8")
    assert "\n".join(table_under(NB, "### The ladder")) in text
    assert "(.github/ladder.png)" in text
    assert PICTURE.read_bytes() == image_under(NB, "### The picture")


def test_readme_says_how_long_a_run_takes():
    minutes = re.search(r"took ([\d.]+) minutes", markdown(NB.cells[-1]))[1]
    assert float(minutes) < 10
    assert "less than ten minutes" in " ".join(README.read_text(encoding="utf-8").split())


def test_readme_code_is_the_notebooks():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    source = {line.strip() for cell in code_cells(NB.cells) for line in cell.source.splitlines()}
    assert len(blocks) == 3
    for line in "\n".join(blocks).splitlines():
        assert line.strip() in source
