"""Values that make no sense are refused by name; values that do are taken."""

import pytest
from nbclient.exceptions import CellExecutionError
from notebook import kernel


@pytest.fixture(scope="module")
def setup_only():
    with kernel() as session:
        session.run_sections(1)
        yield session


def set_parameter(session, name, value):
    """Run the parameter cell and the check after it, with one value replaced in between, as papermill does."""
    cells = [cell for cell in session.notebook.cells if cell.cell_type == "code"]
    index = next(i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", []))
    session.run([cells[index]])
    session.execute(f"{name} = {value}")
    session.run(cells[index + 1 : index + 3])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", "0"),
        ("epochs", "-1"),
        ("epochs", "1.5"),
        ("epochs", "'many'"),
        ("epochs", "''"),
        ("epochs", "True"),
        ("seeds", "''"),
        ("seeds", "[]"),
        ("seeds", "[1, 1]"),
        ("seeds", "'one'"),
        ("seeds", "[0.5]"),
        ("seeds", "-1"),
        ("batch_size", "0"),
        ("batch_size", "60_000"),
        ("learning_rate", "0"),
        ("learning_rate", "-0.1"),
        ("learning_rate", "float('nan')"),
        ("learning_rate", "float('inf')"),
        ("learning_rate", "'fast'"),
    ],
)
def test_nonsense_is_refused_by_name(setup_only, name, value):
    with pytest.raises(CellExecutionError) as caught:
        set_parameter(setup_only, name, value)
    assert caught.value.ename == "ValueError"
    assert name in caught.value.evalue


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("epochs", "'3'", 3),
        ("seeds", "'7'", [7]),
        ("seeds", "'1, 2 3'", [1, 2, 3]),
        ("seeds", "[4, 5]", [4, 5]),
        ("seeds", "6", [6]),
        ("batch_size", "50_000", 50_000),
        ("learning_rate", "'1e-2'", 0.01),
    ],
)
def test_sense_is_taken(setup_only, name, value, expected):
    set_parameter(setup_only, name, value)
    assert setup_only.value(name) == expected
