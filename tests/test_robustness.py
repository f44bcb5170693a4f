"""Damaged data, interruptions, another backend, parameters that make no sense."""

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from harness import ROOT, code_cells, committed, definitions, kernel
from nbclient.exceptions import CellExecutionError

CELLS = code_cells(committed().cells)
loader = definitions("load_mnist", PIXELS=784)


@pytest.fixture
def raw(tmp_path, monkeypatch):
    """A copy of the archives, in a folder with an odd name, and no network."""
    folder = tmp_path / "Schöne Zahlen 数字"
    shutil.copytree(ROOT / "data", folder)
    nowhere = ["http://127.0.0.1:9/"]
    monkeypatch.setattr(loader.torchvision.datasets.MNIST, "mirrors", nowhere)
    yield folder / "MNIST" / "raw"
    left = {path.name for path in (folder / "MNIST" / "raw").iterdir()}
    assert left <= {path.name for path in (ROOT / "data" / "MNIST" / "raw").iterdir()}


def test_data_load_from_a_folder_with_an_odd_name(raw):
    images, labels = loader.load_mnist(raw.parents[1], train=True)
    assert (images.shape, labels.shape) == ((60_000, 784), (60_000,))


@pytest.mark.parametrize("damage", ["missing", "empty", "half", "one byte"])
def test_a_damaged_archive_is_refused_by_name(raw, damage):
    path = raw / "train-images-idx3-ubyte.gz"
    content = path.read_bytes()
    path.unlink()
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "half":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "one byte":
        path.write_bytes(content[:-100] + b"?" + content[-99:])
    message = f"set data_dir, or connect to a network.*{path.name}"
    with pytest.raises(RuntimeError, match=message):
        loader.load_mnist(raw.parents[1], train=True)


def interrupt(session, source):
    """Begin to execute this, and interrupt the kernel after four seconds."""
    threading.Timer(4, os.kill, (session.value("os.getpid()"), signal.SIGINT)).start()
    with pytest.raises(CellExecutionError) as stopped:
        session.execute(source)
    assert stopped.value.ename == "KeyboardInterrupt"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for another process")
@pytest.mark.parametrize("api", ["sequential", "pytorch"])
def test_an_interrupted_training_starts_anew(small_run, api):
    small_run.execute("epochs = 10_000")
    interrupt(small_run, f"train_{api}(0, print)")
    small_run.execute(f"epochs = 15\nagain = train_{api}(0, print)")
    assert small_run.value(f"again.history == {api}_run.history")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for another process")
def test_an_interrupted_cell_of_section_9_goes_on_where_it_stopped(small_run):
    training = "train_keras({}, {}, ('precision', 'rounded β'), 'relu', 1e-7)"
    small_run.execute(f"before = {training.format(0, 24)}")
    interrupt(small_run, training.format(4, 10_000))
    # What was done is kept, and nothing of what was begun is in the next training.
    assert small_run.value(f"{training.format(0, 24)} is before")
    small_run.execute("train_keras.cache_clear()")
    assert small_run.value(
        f"({training.format(0, 24)}.weights == before.weights).all()"
    )


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
    for part in page.split('href="#')[1:]:
        target = part.split('"')[0]
        assert f'id="{target}"' in page


def run_with(**values):
    """The namespace after the parameters cell, these values, and the check below it."""
    place = [cell.metadata.get("tags") for cell in CELLS].index(["parameters"])
    namespace = {"os": os, "contextlib": contextlib, "Path": Path}
    exec(CELLS[place].source, namespace)
    namespace |= values
    exec(CELLS[place + 1].source, namespace)
    return namespace


NONSENSE = {
    "epochs": [0, -1, 1.5, "many", "", True, None, 201],
    "seeds": ["", [], [1, 1], "one", [0.5], -1, 2**32],
    "batch_size": [0, 10_001, "32.0"],
    "learning_rate": [0, -0.1, 1, math.nan, "fast", math.inf],
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_refused_by_name(name):
    for value in NONSENSE[name]:
        with pytest.raises(ValueError, match=name):
            run_with(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("epochs", "3", 3),
        ("seeds", "1, 2 3", [1, 2, 3]),
        ("seeds", (4, 5), [4, 5]),
        ("seeds", 6, [6]),
        ("batch_size", 10_000, 10_000),
        ("learning_rate", "1e-2", 0.01),
    ],
)
def test_sense_is_taken_and_no_longer_the_protocol(name, value, expected):
    taken = run_with(**{name: value})
    assert taken[name] == expected and not taken["is_protocol"]


def test_the_protocol_is_the_default_and_the_environment_changes_it(monkeypatch):
    assert run_with()["is_protocol"]
    monkeypatch.setenv("MNIST_EPOCHS", "2")
    monkeypatch.setenv("MNIST_SEEDS", "7 8")
    changed = run_with()
    assert (changed["epochs"], changed["seeds"]) == (2, [7, 8])
