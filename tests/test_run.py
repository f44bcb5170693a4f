"""The notebook as a whole: headless, again, with other parameters."""

import json
import os
import shutil
import subprocess
import sys

import nbformat
from harness import ROOT, committed, fields, kernel, markdown, table

DATA = ROOT / "data"


def rows_of_results(notebook):
    """The shared results table without the columns that a clock decides."""
    rows = [fields(line) for line in table(markdown(notebook.cells[-1]))]
    kept = [i for i, name in enumerate(rows[0]) if "second" not in name]
    return [[row[i] for i in kept] for row in rows]


def jupyter(folder, *command):
    """Run a command short, as a user would; returns the finished process."""
    environment = os.environ | {"MNIST_EPOCHS": "1", "MNIST_SEEDS": "0"}
    options = {"cwd": folder, "env": environment, "capture_output": True, "text": True}
    return subprocess.run([sys.executable, "-m", *command], check=False, **options)


def test_the_results_table_says_what_was_computed(full_run):
    header, _, *rows = map(fields, table(markdown(full_run.notebook.cells[-1])))
    apis = ["Keras Sequential", "Keras Functional", "PyTorch"]
    assert [row[0] for row in rows] == apis
    for row in rows:
        values = dict(zip(header, row, strict=True))
        accuracies = f"[test['accuracy'] for test in tests['{row[0]}'].values()]"
        mean = 100 * sum(full_run.value(accuracies)) / 5
        assert values["test accuracy"].startswith(f"{mean:.2f} ± ")
        assert values["test accuracy"].endswith(" % (n = 5)")
        assert values["parameters"] == "101,770"
        assert values["differing predictions (aligned, float64)"] == "0"
    assert rows[0][1:4] == rows[1][1:4]


def test_a_full_run_and_a_short_one_are_labelled(full_run, short_run):
    assert markdown(full_run.notebook.cells[-1]).startswith("**Results**: epochs 15")
    label = "**Results of a shortened or changed run**: epochs 1, batch size 32"
    assert markdown(short_run.notebook.cells[-1]).startswith(label)


def test_lines_of_code_counts_neither_docstrings_nor_comments(short_run):
    short_run.execute(
        'def probe():\n    """Doc.\n    """\n\n    # why\n    return (\n        1\n    )'
    )
    assert short_run.value("lines_of_code(probe)") == 2


def test_speed_settings_pay(full_run):
    for plain, fast in [
        ("Keras: `fit` on arrays", "Keras: + `steps_per_execution`"),
        ("PyTorch: `DataLoader`", "PyTorch: + `fused=True`"),
    ]:
        assert full_run.value(f"min(times[{plain!r}]) / min(times[{fast!r}])") > 1.2


def run_with_few_images(session):
    """Run all cells, and train on 4,096 images; returns the results."""
    session.run_sections(1, 2)
    session.execute(
        "x_train, y_train = x_train[:4096], y_train[:4096]\n"
        "steps_per_epoch = math.ceil(len(x_train) / batch_size)"
    )
    session.run_sections(*range(3, 10))
    return rows_of_results(session.notebook)


def test_run_all_again_in_the_same_kernel_gives_the_same_results_table():
    with kernel(MNIST_EPOCHS="1", MNIST_SEEDS="0 3") as session:
        first, again = (run_with_few_images(session) for _ in range(2))
    assert first == again
    assert first[-1][-1] == "0"


def test_papermill_and_nbconvert_run_other_parameters_to_a_page(tmp_path):
    """At learning rate 0.1 two float64 trainings may part, which is no mistake."""
    parameters = {"learning_rate": 0.1, "batch_size": 128, "epochs": 2, "seeds": 7}
    options = ["-y", json.dumps(parameters | {"data_dir": str(DATA)})]
    prepared = str(tmp_path / "prepared.ipynb")
    name = "mnist_framework_comparison.ipynb"
    process = jupyter(ROOT, "papermill", "--prepare-only", name, prepared, *options)
    assert process.returncode == 0, process.stderr[-2000:]
    options = ["--execute", "--to", "html", prepared]
    process = jupyter(tmp_path, "nbconvert", *options)
    assert process.returncode == 0, process.stderr[-2000:]
    page = (tmp_path / "prepared.html").read_text(encoding="utf-8")
    assert "epochs 2, batch size 128, learning rate 0.1, seeds 7." in page
    assert "Results of a shortened or changed run</strong>" in page
    assert "no prediction differs after" in page
    assert page.count("<table>") >= 10
    assert page.count('src="data:image/png') == 8
    assert 'data-mime-type="application/vnd.jupyter.stderr"' not in page
    targets = [part.split('"')[0] for part in page.split('href="#')[1:]]
    assert [target for target in targets if f'id="{target}"' not in page] == []


def test_nbconvert_fails_when_an_assertion_does(tmp_path):
    shutil.copytree(ROOT / "data", tmp_path / "data")
    notebook = committed()
    cell = next(c for c in notebook.cells if "sequential_parameters" in c.source)
    cell.source += "\nassert sequential_parameters == 1"
    nbformat.write(notebook, tmp_path / "planted.ipynb")
    options = ["--execute", "--to", "notebook", "planted.ipynb"]
    process = jupyter(tmp_path, "nbconvert", *options)
    assert process.returncode != 0
    assert "AssertionError" in process.stderr
