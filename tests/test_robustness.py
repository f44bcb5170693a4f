"""Damaged data, interruptions, odd environments, and parameters that make no sense."""

import contextlib
import functools
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from math import inf, nan
from pathlib import Path

import nbformat
import pytest
from harness import ROOT, cell_with, code_cells, committed, definitions, kernel
from nbclient.exceptions import CellExecutionError

RAW = ROOT / "data" / "MNIST" / "raw"
ARCHIVES = sorted(path.name for path in RAW.glob("*.gz"))
NOTEBOOK = committed()
loader = definitions("load_mnist", PIXELS=784)


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A copy of the data in a folder with an odd name, and no network."""
    folder = tmp_path / "Schöne Zahlen 数字"
    shutil.copytree(ROOT / "data", folder)
    nowhere = ["http://127.0.0.1:9/"]
    monkeypatch.setattr(loader.torchvision.datasets.MNIST, "mirrors", nowhere)
    return folder


def assert_mnist(data):
    """Both sets load from this folder, as rows of 784 numbers from 0 to 1."""
    for train, count in [(True, 60_000), (False, 10_000)]:
        images, labels = loader.load_mnist(data, train)
        assert (images.shape, labels.shape) == ((count, 784), (count,))
        assert (images.dtype, images.min(), images.max()) == ("float32", 0, 1)


DAMAGES = {
    "empty": lambda content: b"",
    "truncated": lambda content: content[: len(content) // 2],
    "one byte changed": lambda c: c[:-100] + bytes([c[-100] ^ 1]) + c[-99:],
    "a page": lambda content: (
        b"<html><body>Please sign in to this network.</body></html>"
    ),
}


@pytest.mark.parametrize(
    ("archive", "how"),
    [
        *((ARCHIVES[0], how) for how in DAMAGES),
        *((name, "missing") for name in ARCHIVES),
    ],
)
def test_a_damaged_archive_is_refused_by_name_and_nothing_is_left(data, archive, how):
    path = data / "MNIST" / "raw" / archive
    content = path.read_bytes()
    path.unlink()
    if how != "missing":
        path.write_bytes(DAMAGES[how](content))
    advice = "set data_dir, or connect to a network"
    with pytest.raises(RuntimeError, match=advice) as caught:
        loader.load_mnist(data, train=True)
    assert archive in str(caught.value)
    assert {file.name for file in path.parent.iterdir()} <= set(ARCHIVES)


def test_a_damaged_archive_is_downloaded_when_there_is_a_mirror(data, monkeypatch):
    (data / "MNIST" / "raw" / ARCHIVES[0]).write_bytes(b"")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=RAW)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as mirror:
        address = [f"http://127.0.0.1:{mirror.server_port}/"]
        monkeypatch.setattr(loader.torchvision.datasets.MNIST, "mirrors", address)
        threading.Thread(target=mirror.serve_forever, daemon=True).start()
        try:
            assert_mnist(data)
        finally:
            mirror.shutdown()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_a_read_only_folder_is_enough_and_left_as_it_was(data):
    folders = [data, data / "MNIST", data / "MNIST" / "raw"]
    for folder in folders:
        folder.chmod(0o555)
    try:
        assert_mnist(data)
        assert sorted(path.name for path in folders[-1].iterdir()) == ARCHIVES
    finally:
        for folder in folders:
            folder.chmod(0o755)


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Setup, The data, Keras Sequential and PyTorch, in a hostile environment."""
    home = tmp_path_factory.mktemp("home")
    config = {"backend": "jax", "floatx": "float16", "epsilon": 1e-3}
    (home / "keras.json").write_text(json.dumps(config))
    hostile = {"KERAS_HOME": str(home), "KERAS_BACKEND": "torch", "LC_ALL": "C"}
    hostile |= {"OMP_NUM_THREADS": "1", "MNIST_EPOCHS": "1", "MNIST_SEEDS": "0"}
    with kernel(**hostile) as session:
        if hasattr(os, "sched_setaffinity"):
            # One core must be enough for the same numbers, too.
            session.execute("import os\nos.sched_setaffinity(0, {0})")
        session.run_sections(1, 2, 3, 5)
        yield session


@pytest.mark.parametrize("api", ["sequential", "pytorch"])
def test_sections_need_only_setup_and_data_and_no_certain_environment(
    started, short_run, api
):
    assert started.value(f"{api}_test") == short_run.value(f"{api}_test")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for another process")
@pytest.mark.parametrize("api", ["sequential", "pytorch"])
def test_an_interrupted_training_starts_anew(started, short_run, api):
    started.execute("epochs = 50")
    pid = started.value("os.getpid()")
    threading.Timer(4, os.kill, (pid, signal.SIGINT)).start()
    with pytest.raises(CellExecutionError) as caught:
        started.execute(f"train_{api}(0, lambda *logs: None)")
    assert caught.value.ename == "KeyboardInterrupt"
    started.execute(f"epochs = 1\nagain = train_{api}(0, lambda *logs: None)")
    expected = short_run.value(f"{api}_run.history['val_loss']")
    assert started.value("again.history['val_loss']") == expected


def test_keras_imported_with_another_backend_says_what_to_do():
    with kernel() as session:
        session.execute(
            "import os\nos.environ['KERAS_BACKEND'] = 'torch'\nimport keras"
        )
        with pytest.raises(CellExecutionError) as caught:
            session.run_sections(1)
    assert "restart the kernel" in caught.value.evalue


def test_the_import_cell_is_silent_and_does_not_crash():
    imports = code_cells(NOTEBOOK.cells)[0].source
    command = [sys.executable, "-c", imports]
    process = subprocess.run(command, check=False, capture_output=True)
    assert (process.returncode, process.stderr) == (0, b"")


def jupyter(folder, *command):
    """Run a command short, as a user would; returns the finished process."""
    environment = os.environ | {"MNIST_EPOCHS": "1", "MNIST_SEEDS": "0"}
    options = {"cwd": folder, "env": environment, "capture_output": True, "text": True}
    return subprocess.run([sys.executable, "-m", *command], check=False, **options)


def test_papermill_and_nbconvert_run_other_parameters_to_a_page(tmp_path):
    """At learning rate 0.1 two float64 trainings may part, which is no mistake."""
    parameters = {"learning_rate": 0.1, "batch_size": 512, "epochs": 2, "seeds": 7}
    options = json.dumps(parameters | {"data_dir": str(ROOT / "data")})
    prepared, name = str(tmp_path / "page.ipynb"), "mnist_framework_comparison.ipynb"
    jupyter(ROOT, "papermill", "--prepare-only", name, prepared, "-y", options)
    process = jupyter(tmp_path, "nbconvert", "--execute", "--to", "html", prepared)
    assert process.returncode == 0, process.stderr[-2000:]
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "epochs 2, batch size 512, learning rate 0.1, seeds 7." in page
    assert "Results of a shortened or changed run</strong>" in page
    assert page.count("<table>") >= 10 and page.count('src="data:image/png') == 6
    assert 'data-mime-type="application/vnd.jupyter.stderr"' not in page
    targets = [part.split('"')[0] for part in page.split('href="#')[1:]]
    assert [target for target in targets if f'id="{target}"' not in page] == []


def test_nbconvert_fails_when_an_assertion_does(tmp_path):
    notebook = committed()
    cell_with(notebook, "is_protocol =").source += "\nassert epochs == 2"
    nbformat.write(notebook, tmp_path / "planted.ipynb")
    options = ["--execute", "--to", "notebook", "planted.ipynb"]
    process = jupyter(tmp_path, "nbconvert", *options)
    assert process.returncode != 0 and "AssertionError" in process.stderr


def run_with(**values):
    """The namespace after the parameters cell, these values, and the check below it."""
    namespace = {"os": os, "contextlib": contextlib, "Path": Path}
    cells = code_cells(NOTEBOOK.cells)
    [place] = [
        i
        for i, cell in enumerate(cells)
        if "parameters" in cell.metadata.get("tags", [])
    ]
    exec(cells[place].source, namespace)
    namespace |= values
    exec(cells[place + 1].source, namespace)
    return namespace


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("epochs", value) for value in (0, -1, 1.5, "many", "", True, None, 1001)),
        *(("seeds", value) for value in ("", [], [1, 1], "one", [0.5], -1, 2**32)),
        *(("batch_size", value) for value in (0, 10_001, "32.0")),
        *(("learning_rate", v) for v in (0, -0.1, 1, nan, "fast", inf)),
    ],
)
def test_nonsense_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        run_with(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("epochs", "3", 3),
        ("seeds", "1, 2 3", [1, 2, 3]),
        ("seeds", (4, 5), [4, 5]),
        ("seeds", 6, [6]),
        ("seeds", list(range(30)), list(range(30))),
        ("batch_size", 10_000, 10_000),
        ("learning_rate", "1e-2", 0.01),
    ],
)
def test_sense_is_taken_and_no_longer_the_protocol(name, value, expected):
    taken = run_with(**{name: value})
    assert taken[name] == expected and not taken["is_protocol"]


def test_the_protocol_is_the_default_and_the_environment_changes_it(monkeypatch):
    names = ("epochs", "batch_size", "learning_rate", "seeds", "is_protocol")
    monkeypatch.delenv("MNIST_EPOCHS", raising=False)
    monkeypatch.delenv("MNIST_SEEDS", raising=False)
    default = run_with()
    assert [default[n] for n in names] == [15, 32, 0.001, [0, 1, 2, 3, 4], True]
    monkeypatch.setenv("MNIST_EPOCHS", "2")
    monkeypatch.setenv("MNIST_SEEDS", "7 8")
    changed = run_with()
    assert [changed[n] for n in names] == [2, 32, 0.001, [7, 8], False]
