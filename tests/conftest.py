import json
import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from harness import cell_with, kernel, run_all, under

# What tests compute in the kernel in their own way; figures are kept, and not drawn.
HELPERS = '''
import numpy as np
from matplotlib.figure import Figure

shown_figures = []
Figure.savefig = lambda figure, *args, **options: shown_figures.append(figure)

def weights_of(model):
    """The weights of a model of either framework, in Keras's layout, in float64."""
    if hasattr(model, "get_weights"):
        return [w.astype("float64") for w in model.get_weights()]
    return [p.detach().double().numpy().T for p in model.parameters()]

def logits_by_hand(model, x):
    w, b, v, c = weights_of(model)
    return np.maximum(x @ w + b, 0) @ v + c

def by_hand(model, x, y):
    """Loss and accuracy."""
    z = logits_by_hand(model, x)
    losses = np.log(np.exp(z).sum(axis=1)) - z[range(len(y)), y]
    return [float(losses.mean()), float((z.argmax(axis=1) == y).mean())]
'''


def pytest_configure(config):
    config.addinivalue_line("markers", "full: trains for all 15 epochs of the protocol")
    for name in ("MNIST_EPOCHS", "MNIST_SEEDS"):
        os.environ.pop(name, None)


def pytest_collection_modifyitems(items):
    """What waits for the full run comes last."""
    items.sort(key=lambda item: "full_run" in item.fixturenames)


@pytest.fixture(scope="session", autouse=True)
def begun(request):
    """The full run, beside the other tests from the first on, if any test needs it."""
    with ThreadPoolExecutor(1) as thread:
        needed = any("full_run" in item.fixturenames for item in request.session.items)
        yield thread.submit(run_all) if needed else None


@pytest.fixture(scope="session")
def full_run(begun):
    """The whole notebook with its own parameters; its kernel has ended."""
    return begun.result()


@pytest.fixture(scope="session")
def short_run(tmp_path_factory):
    """The notebook for one epoch, two seeds, in an environment that changes nothing."""
    home = tmp_path_factory.mktemp("home")
    config = {"backend": "jax", "floatx": "float16", "epsilon": 1e-3}
    (home / "keras.json").write_text(json.dumps(config))
    hostile = {"KERAS_HOME": str(home), "KERAS_BACKEND": "torch", "LC_ALL": "C"}
    hostile |= {"OMP_NUM_THREADS": "1", "MNIST_EPOCHS": "1", "MNIST_SEEDS": "0 3"}
    with kernel(**hostile) as session:
        start = time.perf_counter()
        session.run(session.notebook.cells)
        session.minutes = (time.perf_counter() - start) / 60
        yield session


@pytest.fixture(scope="session")
def small_run():
    """Sections 1 to 5, 7, and 9 up to its ladder, on 1,000 training images."""
    with kernel(MNIST_EPOCHS="15", MNIST_SEEDS="0 3") as session:
        session.execute(HELPERS)
        session.run_sections(1, 2)
        # With only zeros to validate, no network scores alike on them and on tests.
        session.execute(
            "x_train, y_train = x_train[:1000], y_train[:1000]\n"
            "x_val, y_val = x_val[y_val == 0], y_val[y_val == 0]\n"
            "steps_per_epoch = math.ceil(len(x_train) / batch_size)"
        )
        session.run_sections(3, 4, 5, 7)
        for text in ("def float64_on_cpu(", "class KerasAdam("):
            session.run([cell_with(session.notebook, text)])
        later = under(session.notebook, "### The ladder")
        cells = under(session.notebook, "### The defaults that differ")
        session.run(cells[: -len(later)])
        yield session
