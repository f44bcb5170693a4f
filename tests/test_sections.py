"""Sections 1 to 6: the network, the protocol, the training loop, the seeds."""

import re

import pytest
from harness import (
    code_cells,
    definitions,
    fields,
    printed,
    section,
    table_under,
    under,
)

APIS = {
    "sequential": "Keras Sequential",
    "functional": "Keras Functional",
    "pytorch": "PyTorch",
}
QUIET = "lambda epoch, logs: None"
METRICS = ("loss", "accuracy", "val_loss", "val_accuracy")


@pytest.fixture(scope="module", params=["short_run", "full_run"])
def run(request):
    return request.getfixturevalue(request.param)


def test_no_cell_warns_or_writes_to_stderr(run):
    for cell in run.notebook.cells:
        for output in cell.get("outputs", []):
            assert output.get("name") != "stderr", output.text
            assert "warning" not in output.get("text", "").lower()


@pytest.mark.parametrize("api", APIS)
def test_each_network_is_784_128_10(short_run, api):
    shapes = {"pytorch": "[list(p.shape[::-1]) for p in pytorch_model.parameters()]"}
    expression = shapes.get(api, f"[list(w.shape) for w in {api}_model.weights]")
    assert short_run.value(expression) == [[784, 128], [128], [128, 10], [10]]
    assert short_run.value(f"{api}_parameters") == 101_770


@pytest.mark.parametrize("api", ["sequential", "functional"])
def test_keras_networks_are_relu_and_softmax(short_run, api):
    names = f"[layer.activation.__name__ for layer in {api}_model.layers[-2:]]"
    assert short_run.value(names) == ["relu", "softmax"]


def test_pytorch_returns_the_logits_of_the_same_network(short_run):
    short_run.execute(
        "few, m = torch.from_numpy(x_test[:8]), pytorch_model\n"
        "inner = torch.relu(few @ m.hidden.weight.T + m.hidden.bias)\n"
        "expected = inner @ m.output.weight.T + m.output.bias\n"
        "assert torch.allclose(m(few), expected, atol=1e-4)"
    )


@pytest.mark.parametrize("api", ["sequential", "functional"])
def test_keras_has_the_protocols_adam_and_loss(short_run, api):
    config = short_run.value(f"{api}_model.optimizer.get_config()")
    assert config["learning_rate"] == pytest.approx(0.001)
    assert (config["beta_1"], config["beta_2"], config["epsilon"]) == (0.9, 0.999, 1e-7)
    assert short_run.value(f"type({api}_model.optimizer).__name__") == "Adam"
    loss = short_run.value(f"type({api}_model.loss).__name__")
    assert loss == "SparseCategoricalCrossentropy"


def test_pytorch_has_the_protocols_adam_and_loss(short_run):
    names = "('lr', 'betas', 'eps', 'weight_decay', 'amsgrad')"
    defaults = short_run.value(f"[pytorch_optimizer.defaults[n] for n in {names}]")
    assert defaults == [0.001, [0.9, 0.999], 1e-8, 0, False]
    assert short_run.value("type(pytorch_optimizer).__name__") == "Adam"
    assert short_run.value("type(pytorch_loss_function).__name__") == "CrossEntropyLoss"


def test_the_full_run_is_the_protocol(full_run):
    names = "[epochs, batch_size, learning_rate, seeds]"
    assert full_run.value(names) == [15, 32, 0.001, [0, 1, 2, 3, 4]]
    lengths = (
        "[[len(v) for v in run.history.values()]"
        " for api in runs for run in runs[api].values()]"
    )
    assert full_run.value(lengths) == [[15] * 4] * 15


def test_splits_are_the_first_50000_the_last_10000_and_the_test_set(short_run):
    sizes = short_run.value("[len(x_train), len(x_val), len(x_test)]")
    assert sizes == [50_000, 10_000, 10_000]
    short_run.execute(
        "import gzip\n"
        "def raw(name, header):\n"
        "    packed = Path(data_dir, 'MNIST', 'raw', f'{name}-ubyte.gz').read_bytes()\n"
        "    return np.frombuffer(gzip.decompress(packed), 'uint8')[header:]\n"
        "for part, x, y in [\n"
        "    ('train', np.concatenate([x_train, x_val]), np.concatenate([y_train, y_val])),\n"
        "    ('t10k', x_test, y_test),\n"
        "]:\n"
        "    pixels = raw(f'{part}-images-idx3', 16).reshape(-1, 784)\n"
        "    assert np.array_equal(np.rint(255 * x), pixels)\n"
        "    assert np.array_equal(y, raw(f'{part}-labels-idx1', 8))"
    )


@pytest.mark.parametrize(
    ("seeding", "batches"),
    [
        ("pipeline = batches_sequential(0)", "pipeline"),
        ("pipeline = batches_functional(0)", "pipeline"),
        ("torch.manual_seed(0)", "batches_pytorch()"),
    ],
)
def test_an_epoch_delivers_every_image_once_and_in_a_new_order(
    short_run, seeding, batches
):
    short_run.execute(
        f"{seeding}\npasses = [list({batches}) for _ in range(2)]\n"
        "images, labels = ([np.concatenate([b[i] for b in p]) for p in passes] for i in (0, 1))\n"
        "assert sorted(map(bytes, images[0])) == sorted(map(bytes, x_train))\n"
        "assert sorted(map(bytes, images[1])) == sorted(map(bytes, x_train))\n"
        "assert not np.array_equal(*labels)\ndel passes, images"
    )


def test_training_loss_and_accuracy_of_the_pytorch_loop_are_those_of_its_logits():
    """A loop with learning rate 0 must report what one evaluation of all images gives."""
    n = definitions("train_one_epoch")
    n.torch.manual_seed(0)
    model = n.nn.Linear(6, 4)
    x, y = n.torch.randn(100, 6), n.torch.randint(0, 4, (100,))
    batches = [(x[:48], y[:48]), (x[48:96], y[48:96]), (x[96:], y[96:])]
    optimizer = n.torch.optim.SGD(model.parameters(), lr=0.0)
    logs = n.train_one_epoch(model, n.nn.CrossEntropyLoss(), optimizer, batches)
    logits = model(x)
    loss = n.nn.functional.cross_entropy(logits, y).item()
    assert logs["loss"] == pytest.approx(loss, abs=1e-6)
    assert logs["accuracy"] == (logits.argmax(dim=1) == y).double().mean().item()


@pytest.mark.parametrize("api", APIS)
def test_reported_accuracy_is_that_of_the_predictions(run, api):
    share = f"float(({api}_predictions == y_test).mean())"
    reported = run.value(f"{api}_test['accuracy']")
    assert reported == pytest.approx(run.value(share), abs=1e-6)


def test_training_accuracy_after_the_last_epoch_is_plausible(full_run):
    histories = "[run.history for api in runs for run in runs[api].values()]"
    for history in full_run.value(histories):
        assert history["val_accuracy"][-1] < history["accuracy"][-1] <= 1
        assert history["loss"][-1] < 0.1 * history["loss"][0]


def test_accuracies_are_in_the_range_of_this_network(full_run):
    found = full_run.value("[test for api in tests for test in tests[api].values()]")
    assert len(found) == 15
    assert all(0.965 < test["accuracy"] < 0.985 for test in found)
    assert all(0.06 < test["loss"] < 0.16 for test in found)


def test_sequential_and_functional_are_bitwise_equal(run):
    run.execute(
        "models = sequential_run.model, functional_run.model\n"
        "for a, b in zip(*(model.get_weights() for model in models), strict=True):\n"
        "    assert np.array_equal(a, b)"
    )
    for metric in METRICS:
        first = "runs['{}'][0].history['{}']".format
        equal = f"{first(APIS['sequential'], metric)} == {first(APIS['functional'], metric)}"
        assert run.value(equal)


@pytest.mark.parametrize("api", APIS)
def test_the_same_seed_twice_gives_the_same_numbers_and_another_seed_others(
    short_run, api
):
    short_run.execute(f"again, other = (train_{api}(s, {QUIET})[1] for s in (0, 1))")
    for metric in METRICS:
        first = f"runs['{APIS[api]}'][0].history['{metric}']"
        assert short_run.value(f"again['{metric}'] == {first}")
        assert short_run.value(f"other['{metric}'] != {first}")


def test_another_kernel_gives_the_same_numbers(short_run, full_run):
    first = "[runs[api][0].history['val_loss'][0] for api in runs]"
    assert short_run.value(first) == full_run.value(first)


def test_every_seed_has_its_row_of_accuracies(full_run):
    lines = table_under(full_run.notebook, "### Several seeds instead of one")[2:]
    rows = [fields(line) for line in lines]
    accuracies = full_run.value(
        "[[test['accuracy'] for test in tests[api].values()] for api in tests]"
    )
    for row, seed, *values in zip(rows, range(5), *accuracies, strict=True):
        assert row == [str(seed), *(f"{value:.2%}" for value in values)]


def test_the_p_value_is_that_of_whole_numbers(full_run):
    counts = full_run.value(
        "[[round(test['accuracy'] * 10_000) for test in tests[api].values()] "
        "for api in ('PyTorch', 'Keras Sequential')]"
    )
    n = definitions("splits", "p_value")
    p = n.p_value(*map(n.np.array, counts), n.splits(5))
    text = "".join(printed(cell) for cell in under(full_run.notebook, "### The test"))
    assert f"p = {p:.2g} from 252 ways" in text


@pytest.mark.parametrize("api", APIS)
def test_epochs_are_reported_as_1_2_5_10_and_15(full_run, api):
    number = list(APIS).index(api) + 3
    cells = code_cells(section(full_run.notebook, number))
    text = "".join(map(printed, cells))
    shown = re.findall(r"^epoch +(\d+) +training loss", text, flags=re.MULTILINE)
    assert shown == ["1", "2", "5", "10", "15"]
