"""What the notebook computes, asked of a kernel that has run it."""

import os
import re
import shutil
import subprocess
import sys

import nbformat
import pytest
from notebook import ROOT, code_cells, committed, markdown, printed, table

SECTIONS = ["sequential", "functional", "pytorch"]


@pytest.fixture(scope="module", params=["full_run", "short_run"])
def run(request):
    return request.getfixturevalue(request.param)


def test_no_cell_fails_warns_or_writes_to_stderr(run):
    for cell in code_cells(run.notebook.cells):
        assert not [output for output in cell.outputs if output.get("name") == "stderr"]
        assert "warning" not in printed(cell).lower()


@pytest.mark.parametrize("section", SECTIONS)
def test_each_network_is_784_128_10(run, section):
    shapes = {
        "pytorch": "[list(p.shape[::-1]) for p in pytorch_model.parameters()]",
    }.get(section, f"[list(w.shape) for w in {section}_model.weights]")
    assert run.value(shapes) == [[784, 128], [128], [128, 10], [10]]
    assert run.value(f"{section}_parameters") == 101_770


def test_activations_are_relu_and_softmax_in_keras(run):
    for section in SECTIONS[:2]:
        activations = run.value(
            f"[layer.activation.__name__ for layer in {section}_model.layers[-2:]]"
        )
        assert activations == ["relu", "softmax"]


def test_pytorch_returns_the_logits_of_the_same_network(run):
    hidden = "torch.relu(torch.from_numpy(x_test[:8]) @ m.hidden.weight.T + m.hidden.bias)"
    expected = f"({hidden} @ m.output.weight.T + m.output.bias)"
    run.execute(
        f"m = pytorch_model\nassert torch.allclose(m(torch.from_numpy(x_test[:8])), {expected}, atol=1e-4)"
    )


def test_adam_and_the_loss_have_the_protocols_settings(run):
    for section in SECTIONS[:2]:
        config = run.value(f"{section}_model.optimizer.get_config()")
        assert run.value(f"type({section}_model.optimizer).__name__") == "Adam"
        assert config["learning_rate"] == pytest.approx(0.001)
        assert (config["beta_1"], config["beta_2"], config["epsilon"]) == (0.9, 0.999, 1e-7)
        assert run.value(f"type({section}_model.loss).__name__") == "SparseCategoricalCrossentropy"
    assert run.value("type(pytorch_optimizer).__name__") == "Adam"
    defaults = run.value(
        "{k: pytorch_optimizer.defaults[k] for k in ('lr', 'betas', 'eps', 'weight_decay', 'amsgrad')}"
    )
    assert defaults == {
        "lr": 0.001,
        "betas": [0.9, 0.999],
        "eps": 1e-8,
        "weight_decay": 0,
        "amsgrad": False,
    }
    assert run.value("type(pytorch_loss_function).__name__") == "CrossEntropyLoss"


def test_protocol_of_the_full_run(full_run):
    assert full_run.value("[epochs, batch_size, learning_rate, seeds]") == [
        15,
        32,
        0.001,
        [0, 1, 2, 3, 4],
    ]
    for section in SECTIONS:
        assert full_run.value(f"[len(v) for v in {section}_history.values()]") == [15] * 5


def test_splits_are_the_first_50000_the_last_10000_and_the_test_set(run):
    assert run.value("[len(x_train), len(x_val), len(x_test)]") == [50_000, 10_000, 10_000]
    assert run.value("[len(y_train), len(y_val), len(y_test)]") == [50_000, 10_000, 10_000]
    run.execute(
        "train_rows, test_rows = (d.data.numpy().reshape(-1, 784) / np.float32(255) for d in (mnist_train, mnist_test))\n"
        "assert np.array_equal(np.concatenate([x_train, x_val]), train_rows)\n"
        "assert np.array_equal(np.concatenate([y_train, y_val]), mnist_train.targets)\n"
        "assert np.array_equal(x_test, test_rows) and np.array_equal(y_test, mnist_test.targets)\n"
        "assert not np.shares_memory(x_train, x_val)"
    )


@pytest.mark.parametrize("section", SECTIONS)
def test_an_epoch_delivers_every_training_image_once_and_in_a_new_order(short_run, section):
    run = short_run
    if section == "pytorch":
        run.execute("torch.manual_seed(0)\npasses = [list(batches_pytorch()) for _ in range(2)]")
    else:
        run.execute(f"pipeline = batches_{section}(0)\npasses = [list(pipeline) for _ in range(2)]")
    run.execute(
        "images = [np.concatenate([x for x, y in one]) for one in passes]\n"
        "labels = [np.concatenate([y for x, y in one]) for one in passes]\n"
        "del passes"
    )
    assert run.value("[len(one) for one in images]") == [50_000] * 2
    assert (
        run.value(
            "[sorted(map(hash, map(bytes, one))) == sorted(map(hash, map(bytes, x_train))) for one in images]"
        )
        == [True] * 2
    )
    assert not run.value("bool(np.array_equal(*labels))")


def test_accuracies_are_in_the_range_of_this_network(full_run):
    for runs in full_run.value("[list(runs.values()) for runs in tests.values()]"):
        assert len(runs) == 5
        for run in runs:
            assert 0.965 < run["accuracy"] < 0.985
            assert 0.06 < run["loss"] < 0.16


def test_training_improves(full_run):
    for section in SECTIONS:
        history = full_run.value(f"{section}_history")
        assert history["loss"][-1] < 0.1 * history["loss"][0]
        assert history["val_accuracy"][-1] > history["val_accuracy"][0]


def test_reported_accuracy_is_that_of_the_predictions(run):
    for section in SECTIONS:
        assert run.value(f"{section}_test['accuracy']") == pytest.approx(
            run.value(f"float((({section}_predictions) == y_test).mean())"), abs=1e-6
        )


def test_sequential_and_functional_are_bitwise_equal(run):
    run.execute(
        "for a, b in zip(sequential_model.get_weights(), functional_model.get_weights(), strict=True):\n"
        "    assert np.array_equal(a, b)"
    )
    for metric in ("loss", "accuracy", "val_loss", "val_accuracy"):
        assert run.value(f"sequential_history['{metric}'] == functional_history['{metric}']")


@pytest.mark.parametrize("section", SECTIONS)
def test_the_same_seed_twice_gives_the_same_numbers(short_run, section):
    short_run.execute(f"again = train_{section}(0, lambda epoch, logs: None)[1]")
    for metric in ("loss", "accuracy", "val_loss", "val_accuracy"):
        assert short_run.value(f"again['{metric}'] == {section}_history['{metric}']")
        assert short_run.value(f"again['{metric}'] != histories['PyTorch'][1]['{metric}']")


def test_another_kernel_gives_the_same_numbers(short_run, full_run):
    for section in SECTIONS:
        first_epoch = f"{section}_history['val_loss'][0]"
        assert short_run.value(first_epoch) == full_run.value(first_epoch)


def test_interval_of_the_permutation_test_agrees_with_the_test(short_run):
    short_run.execute("a, b = np.random.default_rng(0).normal(size=(2, 5))\nb -= 1")
    difference, (low, high), p = short_run.value("permutation_test(a, b)")
    assert low < difference < high
    assert 1 / 252 <= p <= 1
    for shift, inside in [
        (low - 1e-6, False),
        (low + 1e-6, True),
        (high - 1e-6, True),
        (high + 1e-6, False),
    ]:
        assert (short_run.value(f"permutation_test(a - {shift}, b)[2]") > 0.05) == inside


def test_results_table_is_the_last_output_and_says_what_was_computed(run):
    header, _, *rows = [
        [field.strip() for field in line.strip("|").split("|")]
        for line in table(markdown(run.notebook.cells[-1]))
    ]
    assert [row[0] for row in rows] == ["Keras Sequential", "Keras Functional", "PyTorch"]
    for row in rows:
        values = dict(zip(header, row, strict=True))
        accuracies = run.value(f"[100 * run['accuracy'] for run in tests['{row[0]}'].values()]")
        shown, n = re.match(r"([\d.]+)%.*\(n = (\d)\)", values["test accuracy"]).groups()
        assert float(shown) == pytest.approx(sum(accuracies) / len(accuracies), abs=0.006)
        assert int(n) == len(accuracies)
        assert values["parameters"] == "101,770"
    assert rows[0][1:4] == rows[1][1:4]


def test_lines_of_code_counts_neither_docstrings_nor_comments(short_run):
    short_run.execute(
        'def probe():\n    """Doc\n    string."""\n\n    # comment\n    return (\n        1\n    )'
    )
    assert short_run.value("lines_of_code(probe)") == 2


def test_speed_settings_pay(full_run):
    factors = {
        name: float(full_run.value(f"min(times[{plain!r}]) / min(times[{name!r}])"))
        for plain, name in [
            ("Keras: `fit` on arrays, no options", "Keras: the same and `jit_compile`"),
            ("PyTorch: `DataLoader`, default Adam", "PyTorch: the same and `fused=True`"),
        ]
    }
    assert min(factors.values()) > 1.2, factors


def test_a_short_run_is_labelled(short_run):
    label = "**Results of a shortened or changed run**: epochs 1"
    assert markdown(short_run.notebook.cells[-1]).startswith(label)


def test_a_full_run_is_labelled(full_run):
    assert markdown(full_run.notebook.cells[-1]).startswith("**Results**: epochs 15")


def nbconvert(folder, notebook, *options):
    """Run nbconvert as the README does, short; returns the finished process."""
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "nbconvert",
            "--execute",
            *options,
            "--output-dir",
            folder,
            notebook,
        ],
        cwd=ROOT,
        check=False,
        env=os.environ | {"MNIST_EPOCHS": "1", "MNIST_SEEDS": "0"},
        capture_output=True,
        text=True,
    )


def test_nbconvert_makes_a_page(tmp_path):
    process = nbconvert(tmp_path, "mnist_framework_comparison.ipynb", "--to", "html")
    assert process.returncode == 0, process.stderr
    page = (tmp_path / "mnist_framework_comparison.html").read_text(encoding="utf-8")
    assert page.count("<table>") >= 4
    assert page.count("data:image/png") >= 7
    assert 'data-mime-type="application/vnd.jupyter.stderr"' not in page


def test_nbconvert_fails_when_an_assertion_does(tmp_path):
    shutil.copytree(ROOT / "data", tmp_path / "data")
    notebook = committed()
    for cell in notebook.cells:
        cell.source = cell.source.replace(
            'print(f"{sequential_parameters',
            'assert sequential_parameters == 1\nprint(f"{sequential_parameters',
        )
    nbformat.write(notebook, tmp_path / "planted.ipynb")
    process = nbconvert(tmp_path, tmp_path / "planted.ipynb", "--to", "notebook")
    assert process.returncode != 0
    assert "AssertionError" in process.stderr
