"""Damaged data, another backend, parameters that make no sense."""

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torchvision
from harness import ROOT, executed, kernel
from nbclient.exceptions import CellExecutionError

modules = {"np": np, "math": math, "Path": Path, "torchvision": torchvision}
given = modules | {"batch_size": 32, "data_dir": ROOT / "data"}
load_mnist = executed("def load_mnist(", **given).load_mnist


def test_archives_load_or_are_refused_by_name(tmp_path, monkeypatch):
    """From a folder with an odd name, without a network; nothing is left there."""
    folder = tmp_path / "Schöne Zahlen 数字"
    shutil.copytree(ROOT / "data", folder)
    nowhere = ["http://127.0.0.1:9/"]
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", nowhere)
    images, labels = load_mnist(folder, train=True)
    assert (images.shape, labels.shape) == ((60_000, 784), (60_000,))
    assert len(list(folder.rglob("*"))) == len(list((ROOT / "data").rglob("*")))
    path = folder / "MNIST" / "raw" / "train-images-idx3-ubyte.gz"
    content = path.read_bytes()
    message = f"set data_dir, or connect to a network.*{path.name}"
    path.write_bytes(content[:-100] + b"?" + content[-99:])
    with pytest.raises(RuntimeError, match=message):
        load_mnist(folder, train=True)
    path.unlink()
    with pytest.raises(RuntimeError, match=message):
        load_mnist(folder, train=True)


# Several times, because Python may be where it drops an interrupt.
INTERRUPTS = """
import _thread, threading
timers = [threading.Timer(4 * n, _thread.interrupt_main) for n in range(1, 9)]
for timer in timers:
    timer.start()
"""


def test_an_interrupted_cell_of_section_9_goes_on_where_it_stopped(small_run):
    training = "train_keras({}, {}, ('precision', 'rounded β'), 'relu', 1e-7)"
    small_run.execute(f"before = {training.format(0, 24)}\n{INTERRUPTS}")
    with pytest.raises(CellExecutionError, match="KeyboardInterrupt"):
        small_run.execute(training.format(4, 10_000))
    small_run.execute("for timer in timers:\n    timer.cancel()")
    # What was done is kept, and nothing of what was begun is in the next training.
    assert small_run.value(f"{training.format(0, 24)} is before")
    small_run.execute(f"train_keras.cache_clear()\nagain = {training.format(0, 24)}")
    assert small_run.value("np.array_equal(again.weights, before.weights)")


def test_keras_imported_with_another_backend_says_what_to_do():
    with kernel(KERAS_BACKEND="torch") as session:
        session.execute("import keras")
        with pytest.raises(CellExecutionError) as stopped:
            session.run_sections(1)
    assert "restart the kernel" in stopped.value.evalue


def test_papermill_and_nbconvert_run_other_parameters_to_a_page(tmp_path):
    """At learning rate 0.1 two float64 trainings may part, which is no mistake."""
    parameters = {"learning_rate": 0.1, "batch_size": 512, "epochs": 2, "seeds": 7}
    options = json.dumps(parameters | {"data_dir": str(ROOT / "data")})
    prepared, name = str(tmp_path / "page.ipynb"), "mnist_framework_comparison.ipynb"
    for command in (
        ["papermill", "--prepare-only", name, prepared, "-y", options],
        ["nbconvert", "--execute", "--to", "html", prepared],
    ):
        subprocess.run([sys.executable, "-m", *command], check=True, cwd=ROOT)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "epochs 2, batch size 512, learning rate 0.1, seeds 7." in page
    assert "Results of a shortened or changed run</strong>" in page
    assert page.count("<table>") >= 10 and page.count('src="data:image/png') == 6
    assert 'data-mime-type="application/vnd.jupyter.stderr"' not in page


def run_with(**values):
    """The names after the cell of parameters, these values, and the check below it."""
    names = vars(executed("epochs = os.environ", os=os, contextlib=contextlib))
    return vars(executed("def checked(", **names | values))


NONSENSE = {
    "epochs": [0, -1, 1.5, "many", "", True, None, 201],
    "seeds": ["", [], [1, 1], "one", [0.5], -1, 2**32],
    "batch_size": [0, 10_001, "32.0"],
    "learning_rate": [0, -0.1, 1, math.nan, "fast", math.inf],
}


def test_nonsense_is_refused_by_name():
    for name, values in NONSENSE.items():
        for value in values:
            with pytest.raises(ValueError, match=name):
                run_with(**{name: value})


def test_sense_is_taken_and_no_longer_the_protocol():
    assert run_with()["is_protocol"]
    for name, value, expected in [
        ("epochs", "3", 3),
        ("seeds", "1, 2 3", [1, 2, 3]),
        ("seeds", (4, 5), [4, 5]),
        ("seeds", 6, [6]),
        ("batch_size", 10_000, 10_000),
        ("learning_rate", "1e-2", 0.01),
    ]:
        taken = run_with(**{name: value})
        assert taken[name] == expected and not taken["is_protocol"]
