"""What sections 1 to 5, 7 and 10 show is what was computed."""

import ast
import copy
import importlib.metadata
import os
import re
import statistics
from types import SimpleNamespace

import pytest
from harness import cell_with, code_cells, columns, kernel, markdown, printed, section

RESULTS, SEEDS = "### The shared results table", "### Several seeds instead of one"
APIS = {
    "sequential": "Keras Sequential",
    "functional": "Keras Functional",
    "pytorch": "PyTorch",
}
METRICS = ("loss", "accuracy", "val_loss", "val_accuracy")
BY_HAND = '''
from matplotlib.figure import Figure

shown_figures, save = [], Figure.savefig


def save_and_keep(figure, *args, **options):
    shown_figures.append(figure)
    return save(figure, *args, **options)


Figure.savefig = save_and_keep


def quiet(epoch, logs):
    pass


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


def images_in(figure):
    """The images of a figure, one row each; AssertionError unless more is darker."""
    images = [axis.images[0] for axis in figure.axes if axis.images]
    assert all(image.get_cmap()(1.0) < image.get_cmap()(0.0) for image in images)
    return np.array([np.ravel(image.get_array()) for image in images])
'''


def run_with_few_images(session, *numbers):
    """Run these sections after Setup and The data; training has 1,000 images."""
    session.run_sections(1, 2)
    session.execute(
        "x_train, y_train = x_train[:1000], y_train[:1000]\n"
        "steps_per_epoch = math.ceil(len(x_train) / batch_size)"
    )
    session.run_sections(*numbers)


@pytest.fixture(scope="module")
def few_run():
    """The whole notebook on few images; `notebook` is a copy, `session` can be asked."""
    with kernel(MNIST_EPOCHS="15", MNIST_SEEDS="7 0 3") as session:
        session.execute(BY_HAND)
        run_with_few_images(session, *range(3, 11))
        notebook = copy.deepcopy(session.notebook)
        yield SimpleNamespace(session=session, notebook=notebook, value=session.value)


def text_of(notebook, number):
    """What a section printed."""
    return printed(*code_cells(section(notebook, number)))


def text_of_api(run, api):
    return text_of(run.notebook, list(APIS).index(api) + 3)


def numbers(text):
    return [float(n.replace(",", "")) for n in re.findall(r"-?[\d.,]*\d", text)]


def test_setup_prints_the_installed_versions_and_the_parameters(short_run):
    versions, parameters = text_of(short_run.notebook, 1).splitlines()
    for name, version in ast.literal_eval(versions).items():
        installed = importlib.metadata.version(name).split("+")[0]
        assert version.split("+")[0] == installed
    given = "epochs=1, batch_size=32, learning_rate=0.001, seeds=[0, 3]"
    assert parameters.startswith(given)


def test_splits_are_the_first_50000_the_last_10000_and_the_test_set(short_run):
    assert text_of(short_run.notebook, 2) == (
        "training (50000, 784), validation (10000, 784), test (10000, 784)\n"
    )
    short_run.execute(
        "import gzip\n"
        "def raw(name, header):\n"
        "    packed = Path(data_dir, 'MNIST', 'raw', f'{name}-ubyte.gz').read_bytes()\n"
        "    return np.frombuffer(gzip.decompress(packed), 'uint8')[header:]\n"
        "x, y = np.concatenate([x_train, x_val]), np.concatenate([y_train, y_val])\n"
        "for part, x, y in [('train', x, y), ('t10k', x_test, y_test)]:\n"
        "    pixels = raw(f'{part}-images-idx3', 16).reshape(-1, 784)\n"
        "    assert np.array_equal(x, pixels / np.float32(255))\n"
        "    assert np.array_equal(y, raw(f'{part}-labels-idx1', 8))\n"
    )
    assert short_run.value("[len(x_train), len(x_val)]") == [50_000, 10_000]


@pytest.mark.parametrize(
    ("seeding", "batches"),
    [
        ("pipeline = batches_sequential(0)", "pipeline"),
        ("pipeline = batches_functional(0)", "pipeline"),
        ("torch.manual_seed(0)", "batches_pytorch()"),
    ],
)
def test_an_epoch_has_every_image_once_in_a_new_order_of_all(
    short_run, seeding, batches
):
    """The labels are the images' places here."""
    short_run.execute(f"kept, y_train = y_train, np.arange(len(y_train))\n{seeding}")
    short_run.execute(
        f"epoch_1, epoch_2 = (list({batches}) for _ in range(2))\n"
        "y_train = kept\n"
        "orders = [np.concatenate([y for x, y in e]) for e in (epoch_1, epoch_2)]\n"
        "assert all(np.array_equal(np.sort(o), np.arange(50_000)) for o in orders)\n"
        "assert not np.array_equal(*orders)\n"
        "assert orders[0][:32].max() > 20_000 and orders[0][-32:].min() < 20_000\n"
        "assert np.array_equal(epoch_1[-1][0], x_train[orders[0][-16:]])\n"
        "assert len(epoch_1[0][0]) == 32"
    )


@pytest.mark.parametrize("api", APIS)
def test_parameters_and_epsilon_are_printed(short_run, api):
    text = text_of_api(short_run, api)
    epsilon = "1e-08" if api == "pytorch" else "1e-07"
    assert f"Adam with epsilon {epsilon}\n" in text
    assert "\n101,770 parameters\n" in f"\n{text}"
    if api != "pytorch":
        cell = cell_with(short_run.notebook, f"{api}_model.summary()")
        summary = "".join(o.get("data", {}).get("text/plain", "") for o in cell.outputs)
        for count in ("100,480", "1,290", "101,770"):
            assert count in summary


@pytest.mark.parametrize("api", APIS)
def test_epochs_1_2_every_fifth_and_the_last_are_printed_from_the_history(few_run, api):
    history = few_run.value(f"{api}_run.history")
    expected = []
    for epoch in (1, 2, 5, 10, 15):
        loss, accuracy, val_loss, val_accuracy = (
            history[m][epoch - 1] for m in METRICS
        )
        expected.append(
            f"epoch {epoch:2}    training loss {loss:.4f}, accuracy {accuracy:.4f}"
            f"   validation loss {val_loss:.4f}, accuracy {val_accuracy:.4f}"
        )
    lines = text_of_api(few_run, api).splitlines()
    assert [line for line in lines if line.startswith("epoch")] == expected


@pytest.mark.parametrize("api", APIS)
def test_losses_accuracies_and_predictions_are_those_of_the_weights(few_run, api):
    text, model = text_of_api(few_run, api), f"{api}_run.model"
    scored = [f"build_{api}(7), x_val, y_val", f"{model}, x_val, y_val"]
    scored += [f"{model}, x_test, y_test"]
    fresh, last, test = (few_run.value(f"by_hand({models})") for models in scored)
    found = re.search("untrained: validation loss (.+), accuracy (.+)", text).groups()
    assert [float(n) for n in found] == pytest.approx(fresh, abs=0.0051)
    found = re.search(r"epoch 15.*validation loss (.+), accuracy (.+)", text).groups()
    assert [float(n) for n in found] == pytest.approx(last, abs=6e-5)
    found = re.search("test loss (.+), accuracy (.+)", text).groups()
    assert [float(n) for n in found] == pytest.approx(test, abs=6e-5)
    read = f"logits_by_hand({model}, x_test[:10]).argmax(axis=1)"
    digits = few_run.value(f"[str(y_test[:10]), str({read})]")
    assert "the first digits {} are read as {}\n".format(*digits) in text
    assert 0.02 < fresh[1] < 0.25


def test_every_seed_has_its_own_training_in_the_tables(few_run):
    """Trained again: the same seed gives the same numbers, another seed others."""
    rows, results = (columns(few_run.notebook, name) for name in (SEEDS, RESULTS))
    assert list(rows) == ["7", "0", "3"]
    for api in ("sequential", "pytorch"):
        again = [
            few_run.value(f"by_hand(train_{api}({seed}, quiet).model, x_test, y_test)")
            for seed in rows
        ]
        losses, accuracies = zip(*again, strict=True)
        assert len(set(losses)) == 3
        shown = [row[APIS[api]] for row in rows.values()]
        assert shown == [f"{accuracy:.2%}" for accuracy in accuracies]
        found = numbers(results[APIS[api]]["test loss"])
        expected = [statistics.mean(losses), statistics.stdev(losses)]
        assert found == pytest.approx(expected, abs=6e-5)
    for row in rows.values():
        assert row["Keras Functional"] == row["Keras Sequential"]
    text = text_of(few_run.notebook, 7)
    assert "Sequential and Functional: equal metrics, epochs 15, seeds 3\n" in text


OWN_EPOCH = {
    "keras": """
model, adam, logs = build_sequential(0), keras.optimizers.Adam(0.01), []
for x, y in batches_sequential(0):
    with tf.GradientTape() as tape:
        w, b, v, c = (weight.value for weight in model.weights)
        z = tf.nn.relu(x @ w + b) @ v + c
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(y, z)
        loss = tf.reduce_mean(losses)
    adam.apply(tape.gradient(loss, [w, b, v, c]), model.weights)
    logs += [[float(l), int(a) == int(b)] for l, a, b in zip(losses, tf.argmax(z, 1), y)]
""",
    "pytorch": """
model, logs = build_pytorch(0), []
adam = torch.optim.Adam(model.parameters(), 0.01)
for x, y in batches_pytorch():
    z = model(x)
    losses = -z.log_softmax(1)[range(len(y)), y]
    model.zero_grad(), losses.mean().backward(), adam.step()
    logs += [[float(l), int(a) == int(b)] for l, a, b in zip(losses, z.argmax(1), y)]
""",
}


@pytest.mark.parametrize("api", APIS)
def test_an_epoch_of_training_is_that_of_another_loop(few_run, api):
    """At another learning rate; the last of the 32 batches is a short one."""
    few_run.session.execute(
        "learning_rate, epochs = 0.01, 1\n"
        f"history = train_{api}(0, quiet).history\n"
        "learning_rate, epochs = 0.001, 15\n"
        + OWN_EPOCH["pytorch" if api == "pytorch" else "keras"]
    )
    loss, accuracy = few_run.value("np.mean(logs, axis=0).tolist()")
    history = few_run.value("history")
    assert history["loss"] == pytest.approx([loss], abs=1e-4)
    assert history["accuracy"] == pytest.approx([accuracy], abs=0.0011)


@pytest.mark.parametrize("api", APIS)
def test_seconds_are_those_of_the_training_without_building(few_run, api):
    few_run.session.execute(
        f"start = time.perf_counter()\nagain = train_{api}(0, quiet)\n"
        "taken = time.perf_counter() - start"
    )
    assert 0.5 < few_run.value("again.seconds / taken") < 1


def test_the_mean_cosines_are_those_of_the_hidden_activations(few_run):
    few_run.session.execute(
        "w, b = weights_of(functional_run.model)[:2]\n"
        "ours = np.maximum(x_test @ w + b, 0)\n"
        "ours /= np.linalg.norm(ours, axis=1, keepdims=True)\n"
        "angles = (ours[:5000] * ours[5000:]).sum(axis=1)\n"
        "equal = y_test[:5000] == y_test[5000:]"
    )
    expected = few_run.value("[angles[equal].mean(), angles[~equal].mean()]")
    text = text_of(few_run.notebook, 4)
    shown = re.search("cosine: (.+) for the same digit, (.+) for two", text).groups()
    assert [float(n) for n in shown] == pytest.approx(expected, abs=0.0051)


@pytest.mark.parametrize(
    ("figure", "expected"),
    [
        (0, "[x_train[list(y_train).index(i)] for i in range(10)]"),
        (1, "weights_of(sequential_run.model)[0].T[:20]"),
        (2, "[*x_test[:10], *gradients]"),
    ],
)
def test_the_images_are_what_their_captions_say(few_run, figure, expected):
    few_run.session.execute(
        "w, b, v, c = weights_of(pytorch_run.model)\n"
        "on = (x_test[:10] @ w + b) > 0\n"
        "gradients = (on * v.T[y_test[:10]]) @ w.T\n"
        f"found, expected = images_in(shown_figures[{figure}]), np.array({expected})\n"
        "assert found.shape == expected.shape\n"
        "assert np.abs(found - expected).max() < 1e-5"
    )
    scales = f"[axis.images[0].get_clim() for axis in shown_figures[{figure}].axes]"
    if figure > 0:
        # Grey is zero.
        assert all(low == -high for low, high in few_run.value(scales))


def test_the_misread_digits_are_misread_by_each_of_the_three(few_run):
    few_run.session.execute(
        "models = sequential_run.model, functional_run.model, pytorch_run.model\n"
        "read = [logits_by_hand(model, x_test).argmax(axis=1) for model in models]\n"
        "missed = np.flatnonzero(np.all([answers != y_test for answers in read], axis=0))\n"
        "assert np.array_equal(images_in(shown_figures[4]), x_test[missed[:20]])\n"
        "expected = [f'{y_test[i]} → {read[0][i]}, {read[2][i]}' for i in missed[:20]]\n"
        "assert [axis.get_title() for axis in shown_figures[4].axes] == expected"
    )
    line = (
        f"{few_run.value('len(missed)')} of 10,000 test images are misread by all three"
    )
    assert line in text_of(few_run.notebook, 7).splitlines()


def test_the_last_caption_says_what_was_run_and_for_how_long(short_run):
    cell = cell_with(short_run.notebook, "CPU cores")
    kind, parameters, minutes, cores = re.fullmatch(
        r"\*\*(.*)\*\*: (.*)\. The whole notebook took (.*) minutes on (\d+) CPU cores\.",
        markdown(cell).splitlines()[0],
    ).groups()
    assert kind == "Results of a shortened or changed run"
    assert parameters == "epochs 1, batch size 32, learning rate 0.001, seeds 0, 3"
    # The kernel's start and the first imports come before the notebook's clock.
    assert short_run.minutes - 0.7 < float(minutes) < short_run.minutes + 0.06
    allowed = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))(0)
    assert int(cores) == len(allowed)


def test_the_results_read_the_proof_after_the_last_epoch(few_run, short_run):
    """With 15 epochs the pairs go on to 24, with any other number they do not."""
    for run, last, marks in [(few_run, "15", ["15", "24"]), (short_run, "1", ["1"])]:
        row = columns(run.notebook, "### The proof")["relu, ε 1e-07: Keras / PyTorch"]
        assert re.findall(r"predictions, epoch (\d+)", " ".join(row)) == marks
        results = columns(run.notebook, RESULTS).values()
        expected = ["0", "0", row[f"predictions, epoch {last}"]]
        assert [list(row.values())[-1] for row in results] == expected
        caption = markdown(cell_with(run.notebook, "CPU cores"))
        kind = f"**Results of a shortened or changed run**: epochs {last}, "
        assert caption.startswith(kind)


def test_run_all_again_in_the_same_kernel_gives_the_same_results_table(few_run):
    run_with_few_images(few_run.session, *range(3, 11))
    tables = few_run.notebook, few_run.session.notebook
    first, again = (columns(notebook, RESULTS) for notebook in tables)
    for name, row in first.items():
        # A clock decides these.
        for column in ("training seconds", "images per second"):
            del row[column], again[name][column]
    assert first == again


def epoch_lines(notebook, number):
    lines = text_of(notebook, number).splitlines()
    return [line for line in lines if line.startswith("epoch")]


def test_the_full_run_is_the_protocol_and_its_first_epoch_that_of_another_kernel(
    short_run, full_run
):
    caption = markdown(cell_with(full_run.notebook, "CPU cores"))
    protocol = "epochs 15, batch size 32, learning rate 0.001, seeds 0, 1, 2, 3, 4."
    assert caption.startswith(f"**Results**: {protocol}")
    for number in (3, 4, 5):
        short, full = (epoch_lines(r.notebook, number) for r in (short_run, full_run))
        assert full[0] == short[0] and len(full) == 5


def test_a_full_training_learns_and_overfits_as_the_text_says(full_run):
    for number in (3, 4, 5):
        lines = [numbers(line)[1:] for line in epoch_lines(full_run.notebook, number)]
        (loss, _, _, _), *_, (last_loss, last, val_loss, val_last) = lines
        assert val_last < last <= 1 and last_loss < 0.1 * loss
        assert val_loss > 1.05 * min(line[2] for line in lines)
    for row in columns(full_run.notebook, SEEDS).values():
        assert all(96.5 < float(row[name].rstrip("%")) < 98.5 for name in APIS.values())
    for row in columns(full_run.notebook, RESULTS).values():
        assert 0.06 < numbers(row["test loss"])[0] < 0.16


def test_speed_settings_pay(full_run):
    rows = columns(full_run.notebook, "### What makes it fast").values()
    faster = [float(row["times as fast"]) for row in rows]
    assert faster[2] > 1 and faster[5] > 1
