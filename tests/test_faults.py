"""What happens to notebooks: interruptions, damaged data, odd environments."""

import functools
import http.server
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading

import pytest
from harness import ROOT, code_cells, committed, definitions, kernel
from nbclient.exceptions import CellExecutionError

RAW = ROOT / "data" / "MNIST" / "raw"
ARCHIVES = sorted(path.name for path in RAW.glob("*.gz"))
NOWHERE = ["http://127.0.0.1:9/"]
QUIET = "lambda epoch, logs: None"
IMPORTS = code_cells(committed().cells)[0].source

loader = definitions("load_mnist", PIXELS=784)


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A copy of the data in a folder with an odd name, and no network."""
    folder = tmp_path / "Schöne Zahlen 数字"
    shutil.copytree(ROOT / "data", folder)
    monkeypatch.setattr(loader.torchvision.datasets.MNIST, "mirrors", NOWHERE)
    return folder


def assert_mnist(data):
    """Both sets load from this folder, as rows of 784 numbers from 0 to 1."""
    for train, count in [(True, 60_000), (False, 10_000)]:
        images, labels = loader.load_mnist(data, train)
        assert (images.shape, labels.shape) == ((count, 784), (count,))
        assert (images.dtype, images.min(), images.max()) == ("float32", 0, 1)


def files(folder):
    return sorted(path.name for path in (folder / "MNIST" / "raw").iterdir())


def test_the_data_is_read_and_left_as_it_was(data):
    assert_mnist(data)
    assert files(data) == ARCHIVES


DAMAGES = {
    "missing": None,
    "empty": lambda content: b"",
    "truncated": lambda content: content[: len(content) // 2],
    "one byte changed": lambda c: c[:-100] + bytes([c[-100] ^ 1]) + c[-99:],
    "an HTML page": lambda content: (
        b"<html><body>Please sign in to this network.</body></html>"
    ),
}


@pytest.mark.parametrize(
    ("archive", "how"),
    [
        *((ARCHIVES[0], how) for how in DAMAGES),
        *((name, "missing") for name in ARCHIVES[1:]),
    ],
)
def test_a_damaged_archive_is_refused_by_name(data, archive, how):
    path = data / "MNIST" / "raw" / archive
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(DAMAGES[how](path.read_bytes()))
    with pytest.raises(RuntimeError, match="set data_dir") as caught:
        loader.load_mnist(data, train=True)
    assert archive in str(caught.value)
    # Nothing was left behind that could break the next run.
    assert set(files(data)) <= set(ARCHIVES)


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


def test_no_data_folder_says_what_to_do(tmp_path, data):
    with pytest.raises(RuntimeError, match="connect to a network"):
        loader.load_mnist(tmp_path / "nothing here", train=True)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_a_read_only_folder_is_enough(data):
    folders = [data, data / "MNIST", data / "MNIST" / "raw"]
    for folder in folders:
        folder.chmod(0o555)
    try:
        assert_mnist(data)
    finally:
        for folder in folders:
            folder.chmod(0o755)


@pytest.fixture(scope="module")
def started():
    """A kernel that has run Setup, The data, Keras Sequential and PyTorch, briefly."""
    with kernel(MNIST_EPOCHS="1", MNIST_SEEDS="0") as session:
        session.run_sections(1, 2, 3, 5)
        yield session


@pytest.mark.parametrize("api", ["sequential", "pytorch"])
def test_a_section_needs_only_setup_and_data(started, short_run, api):
    assert started.value(f"{api}_test") == short_run.value(f"{api}_test")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for another process")
@pytest.mark.parametrize("api", ["sequential", "pytorch"])
def test_an_interrupted_training_starts_anew(started, short_run, api):
    started.execute("epochs = 50")
    threading.Timer(6, os.kill, (started.value("os.getpid()"), signal.SIGINT)).start()
    with pytest.raises(CellExecutionError) as caught:
        started.execute(f"train_{api}(0, {QUIET})")
    assert caught.value.ename == "KeyboardInterrupt"
    started.execute(f"epochs = 1\nagain = train_{api}(0, {QUIET})")
    expected = short_run.value(f"{api}_run.history['val_loss']")
    assert started.value("again.history['val_loss']") == expected


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for another process")
@pytest.mark.parametrize(
    "training",
    [
        "train_keras(4, 15, ('precision', 'rounded β'), 'relu', 1e-7)",
        "train_torch(4, 15, DIFFERENCES, 'relu', 1e-7)",
    ],
)
def test_an_interrupted_ladder_goes_on_where_it_stopped(short_run, training):
    short_run.execute("before = both(3, 1, DIFFERENCES)")
    threading.Timer(3, os.kill, (short_run.value("os.getpid()"), signal.SIGINT)).start()
    with pytest.raises(CellExecutionError) as caught:
        short_run.execute(training)
    assert caught.value.ename == "KeyboardInterrupt"
    same = "all(map(lambda a, b: a is b, both(3, 1, DIFFERENCES), before))"
    assert short_run.value(same)
    assert short_run.value("apart(both(4, 1, DIFFERENCES), 1)[1]") == 0


@pytest.mark.parametrize("batch_size", [50_000, 999])
def test_other_batch_sizes_use_every_image(started, batch_size):
    started.execute(f"batch_size = {batch_size}")
    try:
        for batches in ("batches_sequential(0)", "batches_pytorch()"):
            started.execute(f"sizes = [len(y) for x, y in {batches}]")
            steps = math.ceil(50_000 / batch_size)
            assert started.value("[sum(sizes), len(sizes)]") == [50_000, steps]
    finally:
        started.execute("batch_size = 32")


def test_the_environment_does_not_change_the_numbers(tmp_path, short_run):
    config = {"backend": "jax", "floatx": "float16", "epsilon": 1e-3}
    (tmp_path / "keras.json").write_text(json.dumps(config))
    hostile = {"KERAS_HOME": str(tmp_path), "KERAS_BACKEND": "torch"}
    hostile |= {"OMP_NUM_THREADS": "1", "LC_ALL": "C"}
    with kernel(MNIST_EPOCHS="1", MNIST_SEEDS="0", **hostile) as session:
        if hasattr(os, "sched_setaffinity"):
            # One core must be enough for the same numbers, too.
            session.execute("import os\nos.sched_setaffinity(0, {0})")
        session.run_sections(1, 2, 3, 5)
        for api in ("sequential", "pytorch"):
            assert session.value(f"{api}_test") == short_run.value(f"{api}_test")


def test_keras_imported_with_another_backend_says_what_to_do():
    with kernel() as session:
        session.execute("import os\nos.environ['KERAS_BACKEND'] = 'torch'")
        session.execute("import keras")
        with pytest.raises(CellExecutionError) as caught:
            session.run_sections(1)
    assert "restart the kernel" in caught.value.evalue


def test_a_section_out_of_order_stops_at_a_name_that_is_missing(started):
    with pytest.raises(CellExecutionError) as caught:
        started.run_sections(9)
    assert caught.value.ename == "NameError"


def test_the_import_cell_has_torchvision_before_keras_and_tensorflow():
    names = ("torch\n", "torchvision", "keras", "tensorflow")
    order = [IMPORTS.index(f"import {name}") for name in names]
    assert order == sorted(order)


def test_the_import_cell_is_silent_and_does_not_crash():
    command = [sys.executable, "-c", IMPORTS]
    process = subprocess.run(command, check=False, capture_output=True)
    assert process.returncode == 0, process.stderr
    assert process.stderr == b""
