import pytest
from notebook import kernel


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
