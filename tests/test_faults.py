"""What happens to notebooks: cells run twice, interruptions, damaged data, odd environments."""

import functools
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from notebook import ROOT, code_cells, committed, kernel, markdown, printed, section, table

RAW = ROOT / "data" / "MNIST" / "raw"
ARCHIVES = sorted(path.name for path in RAW.glob("*.gz"))
NO_NETWORK = {
    "http_proxy": "http://127.0.0.1:9",
    "https_proxy": "http://127.0.0.1:9",
    "no_proxy": "127.0.0.1",
}
REPORT_NOTHING = "report=lambda epoch, logs: None"


def without_timings(notebook):
    """The results table without the columns that a clock decides."""
    rows = [line.split("|") for line in table(markdown(notebook.cells[-1]))]
    timed = [i for i, name in enumerate(rows[0]) if "second" in name]
    return [[field for i, field in enumerate(row) if i not in timed] for row in rows]


def test_every_cell_twice_gives_the_same_results_table(short_run):
    once = without_timings(short_run.notebook)
    with kernel(MNIST_EPOCHS="1", MNIST_SEEDS="0, 1") as session:
        for cell in code_cells(session.notebook.cells):
            session.run([cell])
            session.run([cell])
        assert without_timings(session.notebook) == once


@pytest.fixture(scope="module")
def setup_and_data():
    """A kernel that has run Setup and The data, and nothing else."""
    with kernel(MNIST_EPOCHS="1", MNIST_SEEDS="0, 1") as session:
        session.run_sections(1, 2)
        yield session


def test_results_without_the_sections_say_what_to_run(setup_and_data):
    with pytest.raises(CellExecutionError) as caught:
        setup_and_data.run_sections(7)
    assert caught.value.ename == "RuntimeError"
    assert "run sections 3 to 6 first" in caught.value.evalue


@pytest.mark.parametrize("number", [5, 4, 3])
def test_a_section_needs_only_setup_and_data(setup_and_data, short_run, number):
    setup_and_data.run_sections(number)
    name = {3: "sequential", 4: "functional", 5: "pytorch"}[number]
    assert setup_and_data.value(f"{name}_test") == short_run.value(f"{name}_test")


@pytest.fixture(scope="module")
def two_sections(setup_and_data):
    """The same kernel after the sections of one Keras API and of PyTorch."""
    setup_and_data.run_sections(3, 5)
    return setup_and_data


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for another process")
@pytest.mark.parametrize("name", ["sequential", "pytorch"])
def test_an_interrupted_training_starts_anew(two_sections, short_run, name):
    session = two_sections
    session.execute("epochs = 50")
    threading.Timer(8, os.kill, (session.value("os.getpid()"), signal.SIGINT)).start()
    with pytest.raises(CellExecutionError) as caught:
        session.execute(f"train_{name}(0, {REPORT_NOTHING})")
    assert caught.value.ename == "KeyboardInterrupt"
    session.execute("epochs = 1")
    session.execute(f"again = train_{name}(0, {REPORT_NOTHING})[1]")
    assert session.value("again['val_loss']") == short_run.value(f"{name}_history['val_loss']")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder with spaces and non-ASCII letters in its name, with the data in it."""
    folder = tmp_path_factory.mktemp("Schöne Zahlen 数字")
    shutil.copytree(ROOT / "data", folder / "data")
    return folder


@pytest.fixture(scope="module")
def offline(checkout):
    """A kernel without a network that has run Setup in that folder."""
    with kernel(checkout, **NO_NETWORK) as session:
        session.run_sections(1)
        session.run(code_cells(section(session.notebook, 2))[:2])
        yield session


def damage(path, how):
    content = path.read_bytes()
    match how:
        case "missing":
            path.unlink()
        case "empty":
            path.write_bytes(b"")
        case "truncated":
            path.write_bytes(content[: len(content) // 2])
        case "one byte changed":
            path.write_bytes(content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])
        case "an HTML page":
            path.write_bytes(b"<html><body>Please sign in to this network.</body></html>")


@pytest.mark.parametrize(
    "how", ["missing", "empty", "truncated", "one byte changed", "an HTML page"]
)
@pytest.mark.parametrize("archive", ARCHIVES)
def test_a_damaged_archive_is_refused_by_name(offline, checkout, archive, how):
    path = checkout / "data" / "MNIST" / "raw" / archive
    try:
        damage(path, how)
        with pytest.raises(CellExecutionError) as caught:
            offline.execute("load_mnist(data_dir)")
    finally:
        shutil.copy(RAW / archive, path)
    assert caught.value.ename == "RuntimeError"
    assert archive in caught.value.evalue
    assert "set data_dir" in caught.value.evalue
    assert len(caught.value.traceback.splitlines()) < 50
    offline.execute("load_mnist(data_dir)")  # nothing was left behind that breaks the next run
    assert sorted(p.name for p in path.parent.iterdir()) == ARCHIVES


def test_a_damaged_archive_is_replaced_when_there_is_a_mirror(offline, checkout):
    path = checkout / "data" / "MNIST" / "raw" / ARCHIVES[0]
    damage(path, "truncated")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=RAW)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as mirror:
        threading.Thread(target=mirror.serve_forever, daemon=True).start()
        try:
            offline.execute(
                "mirrors = torchvision.datasets.MNIST.mirrors\n"
                f"torchvision.datasets.MNIST.mirrors = ['http://127.0.0.1:{mirror.server_port}/']\n"
                "load_mnist(data_dir)\n"
                "torchvision.datasets.MNIST.mirrors = mirrors"
            )
        finally:
            mirror.shutdown()
    assert path.read_bytes() == (RAW / ARCHIVES[0]).read_bytes()
    assert sorted(p.name for p in path.parent.iterdir()) == ARCHIVES


def test_a_load_that_is_killed_leaves_nothing_that_breaks_the_next(offline, checkout):
    with kernel(checkout, **NO_NETWORK) as victim:
        victim.run_sections(1)
        victim.run(code_cells(section(victim.notebook, 2))[:2])
        pid = victim.value("os.getpid()")
        threading.Timer(
            0.3, os.kill, (pid, signal.SIGKILL if os.name != "nt" else signal.SIGTERM)
        ).start()
        with pytest.raises(Exception, match="(?i)died|dead"):
            victim.execute("while True:\n    load_mnist(data_dir)")
    offline.execute("load_mnist(data_dir)")
    assert sorted(p.name for p in (checkout / "data" / "MNIST" / "raw").iterdir()) == ARCHIVES


def test_two_loads_at_the_same_time(offline):
    offline.execute(
        "from concurrent.futures import ThreadPoolExecutor\n"
        "with ThreadPoolExecutor() as pool:\n"
        "    a, b = pool.map(load_mnist, [data_dir] * 2)\n"
        "assert torch.equal(a[0].data, b[0].data)"
    )


@pytest.mark.skipif(os.name == "nt", reason="Windows has no permission bits for folders")
def test_a_read_only_checkout_is_enough(offline, checkout):
    folders = [checkout / "data", checkout / "data" / "MNIST", checkout / "data" / "MNIST" / "raw"]
    for folder in folders:
        folder.chmod(0o555)
    try:
        offline.execute("load_mnist(data_dir)")
    finally:
        for folder in folders:
            folder.chmod(0o755)


def test_the_notebook_alone_says_what_it_needs(tmp_path):
    with kernel(tmp_path, **NO_NETWORK) as session:
        session.run_sections(1)
        with pytest.raises(CellExecutionError) as caught:
            session.run_sections(2)
    assert all(archive in caught.value.evalue for archive in ARCHIVES)


@pytest.mark.parametrize(
    "environment",
    [
        {"KERAS_BACKEND": "torch", "OMP_NUM_THREADS": "1"},
        {"KERAS_BACKEND": "jax", "LC_ALL": "C", "PYTHONUTF8": "0"},
        {"KERAS_HOME": "a folder with a keras.json of its own"},
        {"HOME": "a file", "USERPROFILE": "a file"},
    ],
    ids=lambda environment: " ".join(environment),
)
def test_the_environment_does_not_change_the_numbers(environment, tmp_path, short_run):
    (tmp_path / "file").touch()
    config = {"backend": "jax", "floatx": "float16", "epsilon": 1e-3}
    (tmp_path / "keras.json").write_text(json.dumps(config))
    places = {
        "a file": str(tmp_path / "file"),
        "a folder with a keras.json of its own": str(tmp_path),
    }
    environment = {name: places.get(value, value) for name, value in environment.items()}
    with kernel(MNIST_EPOCHS="1", MNIST_SEEDS="0, 1", **environment) as session:
        session.run_sections(1, 2, 3, 5)
        for name in ("sequential", "pytorch"):
            assert session.value(f"{name}_test") == short_run.value(f"{name}_test")


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="this system cannot pin a process to a core"
)
def test_one_core_is_enough_for_the_same_numbers(short_run):
    with kernel(MNIST_EPOCHS="1", MNIST_SEEDS="0, 1") as session:
        session.execute("import os\nos.sched_setaffinity(0, {0})")
        session.run_sections(1, 2, 3, 5)
        for name in ("sequential", "pytorch"):
            assert session.value(f"{name}_test") == short_run.value(f"{name}_test")


def test_papermill_from_another_folder(tmp_path):
    notebook = committed()
    notebook.cells = [*section(notebook, 1), *section(notebook, 2), *section(notebook, 5)]
    nbformat.write(notebook, tmp_path / "part.ipynb")
    process = subprocess.run(
        [
            sys.executable,
            "-m",
            "papermill",
            "part.ipynb",
            "out.ipynb",
            "-p",
            "epochs",
            "1",
            "-p",
            "seeds",
            "3",
        ]
        + ["-p", "data_dir", str(ROOT / "data")],
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    executed = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    assert sum(printed(cell).count("validation loss") for cell in code_cells(executed.cells)) == 1


@pytest.mark.parametrize("batch_size", [50_000, 999])
def test_other_batch_sizes_use_every_image(two_sections, batch_size):
    session = two_sections
    session.execute(
        f"batch_size = {batch_size}\nsteps_per_epoch = math.ceil(len(x_train) / batch_size)"
    )
    try:
        for name in ("sequential", "pytorch"):
            arguments = "0" if name == "sequential" else ""
            session.execute(f"sizes = [len(y) for x, y in batches_{name}({arguments})]")
            assert session.value("sum(sizes)") == 50_000
            assert session.value("len(sizes)") == session.value("steps_per_epoch")
            session.execute(f"model, history = train_{name}(0, {REPORT_NOTHING})")
            assert 0 < session.value("history['loss'][0]") < 3
    finally:
        session.execute("batch_size = 32\nsteps_per_epoch = math.ceil(len(x_train) / batch_size)")


IMPORTS = next(
    cell for cell in code_cells(committed().cells) if "import torch" in cell.source
).source


def test_the_import_cell_has_torchvision_before_keras_and_tensorflow():
    order = [
        IMPORTS.index(f"import {name}")
        for name in ("torch\n", "torchvision", "keras", "tensorflow")
    ]
    assert order == sorted(order)


def test_the_import_cell_does_not_crash():
    process = subprocess.run([sys.executable, "-c", IMPORTS], check=False, capture_output=True)
    assert process.returncode == 0, process.stderr
