import time

import pytest
from harness import kernel


def pytest_configure(config):
    config.addinivalue_line("markers", "full: trains for all 15 epochs of the protocol")


def pytest_collection_modifyitems(items):
    """Mark what needs the full run, and put it last: the run goes on meanwhile."""
    waiting = [item for item in items if "full_run" in item.fixturenames]
    for item in waiting:
        item.add_marker("full")
    items.sort(key=waiting.__contains__)


@pytest.fixture(scope="session", autouse=True)
def running(request):
    """The full run of the notebook, begun with the first test if any test needs it."""
    if not any("full_run" in item.fixturenames for item in request.session.items):
        yield None
        return
    with kernel() as session:
        yield session, session.start()


@pytest.fixture(scope="session")
def full_run(running):
    """The whole notebook with its own parameters, in a kernel that can still be asked."""
    session, run = running
    run.result()
    return session


@pytest.fixture(scope="session")
def short_run():
    """The whole notebook for one epoch and two seeds, and the minutes that it took."""
    with kernel(MNIST_EPOCHS="1", MNIST_SEEDS="0 3") as session:
        start = time.perf_counter()
        session.run()
        session.minutes = (time.perf_counter() - start) / 60
        yield session
