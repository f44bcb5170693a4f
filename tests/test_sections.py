"""Sections 1 to 5 and 7: the network, the protocol, the loop, and what they print."""

import ast
import importlib.metadata
import re

import pytest
from harness import cell_with, code_cells, columns, definitions, printed, section

APIS = {
    "sequential": "Keras Sequential",
    "functional": "Keras Functional",
    "pytorch": "PyTorch",
}
QUIET = "lambda epoch, logs: None"
METRICS = ("loss", "accuracy", "val_loss", "val_accuracy")
BY_HAND = '''
def weights_of(model):
    """The weights of a model of either framework, in Keras's layout."""
    if hasattr(model, "get_weights"):
        return model.get_weights()
    return [p.detach().numpy().T for p in model.parameters()]


def read_by_hand(model, x):
    """The logits, in NumPy's float64."""
    w, b, v, c = (weight.astype("float64") for weight in weights_of(model))
    return np.maximum(x @ w + b, 0) @ v + c


def by_hand(model, x, y):
    """Loss and accuracy, in NumPy's float64."""
    z = read_by_hand(model, x)
    losses = np.log(np.exp(z).sum(axis=1)) - z[range(len(y)), y]
    return [float(losses.mean()), float((z.argmax(axis=1) == y).mean())]


def shown_by(source):
    """The titles and images of the figure that a source shows, without showing it."""
    figures, names = [], dict(globals())
    names["show_images"] = type(show_images)(
        show_images.__code__, names, "show_images", show_images.__defaults__
    )
    names["show"] = lambda figure, caption: figures.append(figure)
    exec(source, names)
    axes = [axis for axis in figures[0].axes if axis.images]
    images = [np.array(axis.images[0].get_array()).ravel() for axis in axes]
    return [axis.get_title() for axis in axes], images
'''


@pytest.fixture(scope="module", params=["short_run", "full_run"])
def run(request):
    session = request.getfixturevalue(request.param)
    session.execute(BY_HAND)
    return session


def text_of(session, number):
    """What a section printed."""
    cells = code_cells(section(session.notebook, number))
    return "".join(map(printed, cells))


def text_of_api(session, api):
    return text_of(session, list(APIS).index(api) + 3)


def test_setup_and_data_print_what_is_there(run):
    versions, parameters = text_of(run, 1).splitlines()
    for name, version in ast.literal_eval(versions).items():
        installed = importlib.metadata.version(name).split("+")[0]
        assert version.split("+")[0] == installed
    found = run.value("[epochs, batch_size, learning_rate, seeds]")
    names = "epochs={}, batch_size={}, learning_rate={}, seeds={}"
    assert parameters == names.format(*found)
    shapes = run.value("[x_train.shape, x_val.shape, x_test.shape]")
    parts = zip(("training", "validation", "test"), map(tuple, shapes), strict=True)
    assert text_of(run, 2) == ", ".join(f"{n} {s}" for n, s in parts) + "\n"


@pytest.mark.parametrize("api", APIS)
def test_parameters_and_epsilon_are_printed(run, api):
    text = text_of_api(run, api)
    assert "\n101,770 parameters\n" in f"\n{text}"
    epsilon = "1e-08" if api == "pytorch" else "1e-07"
    assert f"Adam with epsilon {epsilon}\n" in text
    if api != "pytorch":
        cell = cell_with(run.notebook, f"{api}_model.summary()")
        summary = "".join(o.get("data", {}).get("text/plain", "") for o in cell.outputs)
        for count in ("100,480", "1,290", "101,770"):
            assert count in summary


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
    n = definitions("train_step", "train_one_epoch")
    n.torch.manual_seed(0)
    model = n.nn.Linear(6, 4)
    x, y = n.torch.randn(100, 6), n.torch.randint(0, 4, (100,))
    batches = [(x[:48], y[:48]), (x[48:96], y[48:96]), (x[96:], y[96:])]
    optimizer = n.torch.optim.SGD(model.parameters(), lr=0.0)
    logs = n.train_one_epoch(model, optimizer, batches)
    logits = model(x)
    loss = n.nn.functional.cross_entropy(logits, y).item()
    assert logs["loss"] == pytest.approx(loss, abs=1e-6)
    assert logs["accuracy"] == (logits.argmax(dim=1) == y).double().mean().item()


OWN_EPOCH = {
    "sequential": """
model, adam, logs = build_sequential(0), keras.optimizers.Adam(learning_rate), []
@tf.function
def own_step(x, y):
    with tf.GradientTape() as tape:
        z = x @ model.weights[0].value + model.weights[1].value
        z = tf.nn.relu(z) @ model.weights[2].value + model.weights[3].value
        loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(y, z))
    variables = [w.value for w in model.weights]
    adam.apply(tape.gradient(loss, variables), model.weights)
    right = tf.cast(tf.argmax(z, 1), y.dtype) == y
    return loss, tf.reduce_mean(tf.cast(right, "float32"))
for x, y in batches_sequential(0):
    logs.append([len(y), *map(float, own_step(x, y))])
""",
    "pytorch": """
model, logs = build_pytorch(0), []
adam = torch.optim.Adam(model.parameters(), learning_rate)
for x, y in batches_pytorch():
    z = model(x)
    loss = -z.log_softmax(1)[range(len(y)), y].mean()
    model.zero_grad(), loss.backward(), adam.step()
    logs.append([len(y), float(loss), float((z.argmax(1) == y).float().mean())])
""",
}


@pytest.mark.parametrize("api", OWN_EPOCH)
def test_the_first_epoch_is_that_of_another_loop(short_run, api):
    """Up to rounding, which an epoch of training amplifies."""
    short_run.execute(OWN_EPOCH[api])
    own = "[np.average([log[i] for log in logs], weights=[log[0] for log in logs])"
    loss, accuracy = short_run.value(f"{own} for i in (1, 2)]")
    history = short_run.value(f"{api}_run.history")
    assert history["loss"][0] == pytest.approx(loss, abs=0.002)
    assert history["accuracy"][0] == pytest.approx(accuracy, abs=0.002)


LINE = (
    "   training loss {:.4f}, accuracy {:.4f}   validation loss {:.4f}, accuracy {:.4f}"
)


@pytest.mark.parametrize("api", APIS)
def test_epochs_1_2_every_fifth_and_the_last_are_printed_from_the_history(run, api):
    history = run.value(f"{api}_run.history")
    rows = enumerate(zip(*(history[name] for name in METRICS), strict=True), 1)
    last = len(history["loss"])
    expected = [
        f"epoch {epoch:2} {LINE.format(*row)}"
        for epoch, row in rows
        if epoch in (1, 2, last) or epoch % 5 == 0
    ]
    lines = text_of_api(run, api).splitlines()
    assert [line for line in lines if line.startswith("epoch")] == expected


@pytest.mark.parametrize("api", APIS)
def test_an_untrained_network_guesses(run, api):
    loss, accuracy = run.value(f"by_hand({api}_model, x_val, y_val)")
    text = text_of_api(run, api)
    shown = re.search("untrained: validation loss (.+), accuracy (.+)", text).groups()
    assert [float(n) for n in shown] == pytest.approx([loss, accuracy], abs=0.0051)
    assert 0.02 < accuracy < 0.25 and 2 < loss < 3


@pytest.mark.parametrize("api", APIS)
def test_losses_and_accuracies_are_those_of_the_weights(run, api):
    """Of every seed on the test images, and of its last epoch on validation images."""
    name = APIS[api]
    for seed in run.value("seeds"):
        model = f"runs['{name}'][{seed}].model"
        expected = run.value(f"by_hand({model}, x_test, y_test)")
        test = run.value(f"tests['{name}'][{seed}]")
        assert [test["loss"], test["accuracy"]] == pytest.approx(expected, abs=2e-5)
        expected = run.value(f"by_hand({model}, x_val, y_val)")
        history = run.value(f"runs['{name}'][{seed}].history")
        last = [history["val_loss"][-1], history["val_accuracy"][-1]]
        assert last == pytest.approx(expected, abs=2e-5)
    test = run.value(f"tests['{name}'][seeds[0]]")
    assert run.value(f"{api}_test") == test
    assert "test loss {loss:.4f}, accuracy {accuracy:.4f}".format(
        **test
    ) in text_of_api(run, api)


def test_the_mean_cosines_are_those_of_the_hidden_activations(run):
    run.execute(
        "w, b = (a.astype('float64') for a in weights_of(functional_run.model)[:2])\n"
        "ours = np.maximum(x_test @ w + b, 0)\n"
        "ours /= np.linalg.norm(ours, axis=1, keepdims=True)\n"
        "angles = (ours[:5000] * ours[5000:]).sum(axis=1)\n"
        "equal = y_test[:5000] == y_test[5000:]\n"
        "expected = [float(angles[part].mean()) for part in (equal, ~equal)]"
    )
    shown = re.search("cosine: (.+) for the same digit, (.+) for two", text_of(run, 4))
    expected = run.value("expected")
    assert [float(n) for n in shown.groups()] == pytest.approx(expected, abs=0.0051)
    assert expected[0] > expected[1] + 0.1


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        ("first_of_each = ", "[x_train[list(y_train).index(i)] for i in range(10)]"),
        (
            "show_images(\n    sequential_run",
            "list(weights_of(sequential_run.model)[0].T[:20])",
        ),
        ("pixels = torch.tensor(", "[*x_test[:10], *own_gradients]"),
    ],
)
def test_the_images_are_what_their_captions_say(short_run, start, expected):
    short_run.execute(BY_HAND)
    cells = code_cells(short_run.notebook.cells)
    [source] = [c.source[c.source.index(start) :] for c in cells if start in c.source]
    short_run.execute(
        "w, b, v, c = weights_of(pytorch_run.model)\n"
        "on = (x_test[:10] @ w + b) > 0\n"
        "own_gradients = (on * v.T[y_test[:10]]) @ w.T\n"
        f"images = shown_by({source!r})[1]"
    )
    shapes = short_run.value(f"[len(images), len({expected})]")
    assert shapes[0] == shapes[1]
    assert short_run.value(f"float(np.abs(np.array(images) - {expected}).max())") < 1e-5


def test_the_misread_digits_are_misread_by_each_of_the_three(run):
    cell = cell_with(run.notebook, "misread = ")
    run.execute(
        "models = sequential_run.model, functional_run.model, pytorch_run.model\n"
        "answer = [read_by_hand(model, x_test).argmax(axis=1) for model in models]\n"
        "wrong = [i for i in range(10_000) if y_test[i] not in [a[i] for a in answer]]\n"
        "read_as = [[int(y_test[i]), int(answer[0][i]), int(answer[2][i])] for i in wrong]\n"
        f"titles, images = shown_by({cell.source!r})\n"
        "equal = all(map(np.array_equal, images, x_test[wrong]))"
    )
    read_as, titles = run.value("[read_as, titles]")
    assert (
        printed(cell)
        == f"{len(read_as)} of 10,000 test images are misread by all three\n"
    )
    assert len(titles) == min(20, len(read_as)) and run.value("equal")
    for title, (label, ours, theirs) in zip(titles, read_as, strict=False):
        assert title == f"{label} → {ours}" + f", {theirs}" * (theirs != ours)


def test_training_accuracy_after_the_last_epoch_is_plausible(full_run):
    histories = "[run.history for api in runs for run in runs[api].values()]"
    for history in full_run.value(histories):
        assert history["val_accuracy"][-1] < history["accuracy"][-1] <= 1
        assert history["loss"][-1] < 0.1 * history["loss"][0]
        assert history["val_loss"][-1] > 1.05 * min(history["val_loss"])


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
    short_run.execute(
        f"start = time.perf_counter()\nagain = train_{api}(0, {QUIET})\n"
        f"taken = time.perf_counter() - start\nother = train_{api}(1, {QUIET})"
    )
    for metric in METRICS:
        first = f"runs['{APIS[api]}'][0].history['{metric}']"
        assert short_run.value(f"again.history['{metric}'] == {first}")
        assert short_run.value(f"other.history['{metric}'] != {first}")
    # The seconds are those of the training, without building the model.
    assert 0.5 < short_run.value("again.seconds / taken") < 1


def test_another_kernel_gives_the_same_numbers(short_run, full_run):
    first = "[runs[api][0].history['val_loss'][0] for api in runs]"
    assert short_run.value(first) == full_run.value(first)


def test_every_seed_has_its_row_of_accuracies(run):
    rows = columns(run.notebook, "### Several seeds instead of one")
    seeds = run.value("seeds")
    assert list(rows) == [str(seed) for seed in seeds]
    for seed, row in rows.items():
        for api in APIS.values():
            accuracy = run.value(f"tests['{api}'][{seed}]['accuracy']")
            assert row[api] == f"{accuracy:.2%}"
    ends = f"{run.value('epochs')} epochs, {len(seeds)} seeds\n"
    text = printed(cell_with(run.notebook, "functional_history ="))
    assert text.startswith("Sequential and Functional: equal metrics, ")
    assert text.endswith(ends)


def test_the_figure_of_all_runs_has_their_means_and_dots(run):
    lines = (
        "[np.ravel(line.get_{}data()).tolist() for line in runs_figure.axes[{}].lines]"
    )
    left, right = run.value(lines.format("y", 0)), run.value(lines.format("x", 1))
    for i, api in enumerate(APIS.values()):
        for j, metric in enumerate(("loss", "val_loss")):
            histories = run.value(
                f"[r.history['{metric}'] for r in runs['{api}'].values()]"
            )
            means = [sum(row) / len(row) for row in zip(*histories, strict=True)]
            assert left[2 * i + j] == pytest.approx(means)
        found = run.value(f"[100 * t['accuracy'] for t in tests['{api}'].values()]")
        assert right[2 * i] == pytest.approx(found)
        assert right[2 * i + 1] == pytest.approx([sum(found) / len(found)])
