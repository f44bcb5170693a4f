"""The notebook as a whole, headless, again, with other parameters; and section 10."""

import ast
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
from harness import (
    ROOT,
    cell_with,
    code_cells,
    columns,
    committed,
    definitions,
    fields,
    kernel,
    markdown,
    printed,
    section,
    table,
)

DATA = ROOT / "data"
RESULTS = "### The shared results table"
PREFIXES = {
    "Keras Sequential": "sequential",
    "Keras Functional": "functional",
    "PyTorch": "pytorch",
}


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


def numbers(text):
    return [float(n.replace(",", "")) for n in re.findall(r"[\d.,]*\d", text)]


def code_lines(source, function):
    """Lines of a function that are neither blank nor a comment nor its docstring."""
    start = min(node.lineno for node in [function, *function.decorator_list])
    lines = dict(enumerate(source.splitlines(), 1))
    if ast.get_docstring(function):
        doc = function.body[0]
        lines |= dict.fromkeys(range(doc.lineno, doc.end_lineno + 1), "")
    body = [lines[i].strip() for i in range(start, function.end_lineno + 1)]
    return sum(bool(line) and not line.startswith("#") for line in body)


def lines_of(api):
    """Lines of the functions that build, compile, feed, train and evaluate."""
    steps = ("build", "compile", "batches", "train", "evaluate")
    names = {f"{step}_{PREFIXES[api]}" for step in steps}
    if api == "PyTorch":
        names |= {"train_step", "train_one_epoch", "__init__", "forward"}
    found = {
        node.name: code_lines(cell.source, node)
        for number in (3, 4, 5)
        for cell in code_cells(section(committed(), number))
        for node in ast.walk(ast.parse(cell.source))
        if isinstance(node, ast.FunctionDef) and node.name in names
    }
    assert set(found) == names
    return sum(found.values())


@pytest.mark.parametrize("run", ["short_run", "full_run"])
def test_the_results_table_says_what_was_computed(request, run):
    run = request.getfixturevalue(run)
    rows = columns(run.notebook, RESULTS)
    assert list(rows) == list(PREFIXES)
    for api, row in rows.items():
        tests = run.value(f"list(tests['{api}'].values())")
        accuracies, losses = ([t[m] for t in tests] for m in ("accuracy", "loss"))
        found = numbers(row["test accuracy"])
        mean, sd = statistics.mean(accuracies), statistics.stdev(accuracies)
        assert found == pytest.approx([100 * mean, 100 * sd, len(tests)], abs=0.0051)
        expected = [statistics.mean(losses), statistics.stdev(losses)]
        assert numbers(row["test loss"]) == pytest.approx(expected, abs=5.1e-5)
        seconds = run.value(f"[r.seconds for r in runs['{api}'].values()]")
        middle = statistics.median(seconds)
        assert numbers(row["training seconds"]) == pytest.approx([middle], abs=0.051)
        [speed] = numbers(row["images per second"])
        assert speed == pytest.approx(run.value("epochs") * 50_000 / middle, abs=0.51)
        assert row["parameters"] == "101,770"
        assert row["lines of code"] == str(lines_of(api))
        assert row["differing predictions (aligned, float64)"] == "0"


def results_row(*seeds):
    """A row for three given runs, or some of them, of 15 epochs out of 24."""
    values = [
        {"accuracy": 0.97, "loss": 0.10, "seconds": 40.0},
        {"accuracy": 0.98, "loss": 0.11, "seconds": 10.0},
        {"accuracy": 0.9765, "loss": 0.13, "seconds": 25.0},
    ]
    first, second = (
        SimpleNamespace(weights=np.zeros((25, 2)), predictions=np.zeros((25, 99)))
        for _ in range(2)
    )
    second.predictions[15, :7] = second.predictions[24, :77] = 1
    names = "mean_and_sd", "results_row", "apart"
    given = {
        "tests": {"A": {seed: values[seed] for seed in seeds}},
        "runs": {"A": {seed: SimpleNamespace(**values[seed]) for seed in seeds}},
        "x_train": range(50_000),
        "lines": {"A": 35},
        "sequential_training": first,
    }
    notebook = definitions(*names, epochs=15, seeds=seeds, **given)
    return notebook.results_row("A", 101_770, second)


def test_a_row_of_the_results_table_is_that_of_its_runs():
    accuracy, loss = "97.55 ± 0.51 % (n = 3)", "0.1133 ± 0.0153"
    rest = ["101,770", "25.0", "30,000", 35, 7]
    assert results_row(0, 1, 2) == ["A", accuracy, loss, *rest]
    assert results_row(2) == ["A", "97.65 % (n = 1)", "0.1300", *rest]


def test_the_last_caption_says_what_was_run_and_for_how_long(short_run):
    text = markdown(short_run.notebook.cells[-1]).splitlines()[0]
    kind, parameters, minutes, cores = re.fullmatch(
        r"\*\*(.*)\*\*: (.*)\. The whole notebook took (.*) minutes on (\d+) CPU cores\.",
        text,
    ).groups()
    assert kind == "Results of a shortened or changed run"
    assert parameters == "epochs 1, batch size 32, learning rate 0.001, seeds 0, 3"
    # The kernel's start and the first imports come before the notebook's clock.
    assert short_run.minutes - 0.7 < float(minutes) < short_run.minutes + 0.06
    assert int(cores) == os.cpu_count()


def test_a_full_run_is_labelled_as_one(full_run):
    assert markdown(full_run.notebook.cells[-1]).startswith("**Results**: epochs 15")


def test_lines_of_code_are_counted_as_they_stand(short_run):
    short_run.execute(
        'def probe():\n    """Doc."""\n\n    # why\n    return (\n        1\n    )'
    )
    assert short_run.value("lines_of_code(probe)") == 4
    shown = printed(cell_with(short_run.notebook, "def lines_of_code("))
    assert shown == f"lines of code: { ({api: lines_of(api) for api in PREFIXES}) }\n"


@pytest.mark.parametrize("run", ["short_run", "full_run"])
def test_the_table_of_speed_is_that_of_the_fastest_turns(request, run):
    run = request.getfixturevalue(run)
    times, epochs = run.value("[times, epochs]")
    rows = columns(run.notebook, "### What makes it fast")
    assert list(rows) == list(times) and len(rows) == 7
    plain = {}
    for name, turns in times.items():
        child = name.startswith("Keras on PyTorch")
        assert len(turns) == (1 if child else min(3, epochs + 1))
        best = min(turns)
        plain.setdefault(name.split(":")[0], best)
        found = [numbers(field)[-1] for field in list(rows[name].values())[1:]]
        ratio = plain[name.split(":")[0]] / best
        assert found[0] == pytest.approx(best, abs=0.0051)
        assert found[1] == pytest.approx(50_000 / best, abs=0.51)
        assert found[2] == pytest.approx(ratio, abs=0.051)
    text = printed(cell_with(run.notebook, "subprocess.run("))
    assert text == f"Keras on PyTorch: {best:.1f} seconds\n"


def test_speed_settings_pay(full_run):
    for plain, fast in [
        ("Keras: `fit` on arrays", "Keras: + `steps_per_execution`"),
        ("PyTorch: `DataLoader`", "PyTorch: + `fused=True`"),
    ]:
        assert full_run.value(f"min(times[{plain!r}]) / min(times[{fast!r}])") > 1.2


ASKS = 'assert keras.backend.backend() == "torch"'


@pytest.mark.parametrize(
    ("right", "wrong", "expected"),
    [
        ("model.fit(x, y", 'model.fit(y, "planted"', "Error: "),
        ('"KERAS_BACKEND": "torch"', '"KERAS_BACKEND": "tensorflow"', "AssertionError"),
        (ASKS, "raise SystemExit(keras.backend.backend())", "torch"),
        (ASKS, "raise SystemExit(keras.Variable(1.0).value.device.type)", "cpu"),
    ],
)
def test_the_child_runs_on_pytorch_and_says_why_it_fails(
    short_run, right, wrong, expected
):
    source = cell_with(short_run.notebook, "subprocess.run(").source
    assert source.count(right) == 1
    short_run.execute(
        f"try:\n    exec({source.replace(right, wrong)!r}, dict(globals()))\n"
        "except RuntimeError as error:\n    why = str(error).splitlines()"
    )
    why = short_run.value("why")
    assert len(why) <= 5 and expected in why[-1]


def run_with_few_images(session):
    """Run all cells, and train on 1,024 images; returns the results."""
    session.run_sections(1, 2)
    session.execute(
        "x_train, y_train = x_train[:1024], y_train[:1024]\n"
        "steps_per_epoch = math.ceil(len(x_train) / batch_size)"
    )
    session.run_sections(*range(3, 11))
    return rows_of_results(session.notebook)


def test_run_all_again_in_the_same_kernel_gives_the_same_results_table():
    with kernel(MNIST_EPOCHS="1", MNIST_SEEDS="0 3") as session:
        first, again = (run_with_few_images(session) for _ in range(2))
    assert first == again
    assert first[-1][-1] == "0"


@pytest.mark.parametrize(
    ("epochs", "horizon"),
    [(15, 24), (24, 24), pytest.param(30, 30, marks=pytest.mark.full)],
)
def test_other_numbers_of_epochs_run_to_the_end(epochs, horizon):
    """And the pairs train to the horizon, the results table reads the last epoch."""
    with kernel(MNIST_EPOCHS=str(epochs), MNIST_SEEDS="0") as session:
        results = run_with_few_images(session)
        gaps = session.value(
            f"[apart(float64_pair, n)[1] for n in {[epochs, horizon]}]"
        )
        rows = session.value("[len(pair[0].losses) for pair in pairs.values()]")
    assert set(rows) == {horizon + 1}
    assert results[-1][-1] == str(gaps[0])
    marks = dict.fromkeys((epochs, horizon))
    for heading in ("### The proof", "### The two amplifiers"):
        for row in columns(session.notebook, heading).values():
            shown = [name for name in row if name.startswith("predictions, epoch")]
            assert shown == [f"predictions, epoch {mark}" for mark in marks]
    caption = markdown(session.notebook.cells[-1])
    assert caption.startswith("**Results of a shortened or changed run**: epochs")


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
    assert page.count('src="data:image/png') == 6
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
