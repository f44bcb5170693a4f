import pytest
from notebook import kernel


def pytest_configure(config):
    config.addinivalue_line("markers", "full: needs the full run of the notebook")


def pytest_collection_modifyitems(items):
    for item in items:
        values = getattr(getattr(item, "callspec", None), "params", {}).values()
        if "full_run" in item.fixturenames or "full_run" in values:
            item.add_marker("full")


@pytest.fixture(scope="session")
def full_run():
    """The whole notebook with its own parameters, in a kernel that is still there to be asked."""
    with kernel() as session:
        session.run()
        yield session


@pytest.fixture(scope="session")
def short_run():
    """The whole notebook for one epoch and two seeds."""
    with kernel(MNIST_EPOCHS="1", MNIST_SEEDS="0, 1") as session:
        session.run()
        yield session
