"""Section 6: every code field of the table runs, and both sides do the same."""

import contextlib
import io
import random
from pathlib import Path

import pytest
from harness import committed, definitions, fields, section, table

BUILDERS = ["build_sequential", "build_functional", "build_pytorch", "Network"]
n = definitions(*BUILDERS, PIXELS=784, HIDDEN=128, CLASSES=10)
keras, nn, np, tf, torch = n.keras, n.nn, n.np, n.tf, n.torch
HEADER, _, *LINES = map(fields, table(section(committed(), 6)[0].source))


def codes(field):
    """{label: code} of a field; the label is "" where there is none."""
    found, label = {}, ""
    for line in field.replace("\xa0", " ").split("<br>"):
        if line.startswith("`"):
            found[label] = found.get(label, "") + line.strip("`") + "\n"
        else:
            label = line.strip("*")
    return found


ROWS = {what: [codes(field) for field in pair] for what, *pair in LINES}


def execute(code, names):
    """Execute code without a word."""
    with contextlib.redirect_stdout(io.StringIO()):
        exec(code, names)


def run(row, left, right):
    """Execute both fields of a row, each with the names of its side."""
    ours, theirs = ROWS[row]
    execute(ours[""], left)
    execute(theirs[""], right)


def bring(keras_model, model):
    """Give PyTorch's model the weights of Keras's."""
    for p, w in zip(model.parameters(), keras_model.get_weights(), strict=True):
        p.data = torch.tensor(w.T.copy())


def weights(names):
    """Copies of a side's weights, in Keras's layout."""
    if "keras" in names:
        return names["model"].get_weights()
    return [p.detach().numpy().T.copy() for p in names["model"].parameters()]


def moved_alike(before, sides):
    """On average within a hundredth of the way that they went, because the ε differ."""
    for start, a, b in zip(before, *map(weights, sides), strict=True):
        assert abs(a - b).mean() < 0.01 * abs(a - start).mean()


def close(a, b, atol=1e-5):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), 1e-5, atol)


@pytest.fixture(params=["sequential", "functional"])
def sides(request):
    """Names for both sides, with equal weights, after the row "train" for no epoch.

    The training images are copies of one, so that their order does not count. The first
    pixel is always empty.
    """
    draw, one = np.random.default_rng(0), [0] * 80
    x, y = draw.random((32, 784), "float32"), draw.integers(0, 10, 32)
    x[:, 0] = 0
    data = {"x_train": x[one], "x_val": x, "x_test": x}
    data |= {"y_train": y[one], "y_val": y, "y_test": y}
    left = {"keras": keras, "tf": tf} | data
    right = {name: torch.tensor(array) for name, array in data.items()}
    right |= {"torch": torch, "nn": nn}
    left["model"] = getattr(n, f"build_{request.param}")(0)
    right["model"] = n.build_pytorch(0)
    bring(left["model"], right["model"])
    for names in (left, right):
        names |= {"np": np, "learning_rate": 0.001, "epochs": 0}
    run("train", left, right)
    run("evaluate", left, right)
    left["epochs"] = right["epochs"] = 4
    return left, right


def test_every_row_is_tested_and_fits_the_page():
    tests = Path(__file__).read_text(encoding="utf-8")
    assert [row for row in ROWS if f'"{row}"' not in tests] == []
    assert HEADER == ["to do this", "Keras", "PyTorch"]
    texts = [code for row in ROWS.values() for side in row for code in side.values()]
    assert max(len(line) for text in texts for line in text.splitlines()) <= 54


NETWORKS = [
    ("layer with activation", "", "layer", 784),
    ("plain stack", "Sequential", "model", 784),
    ("plain stack", "Functional", "model", 784),
    ("branch, share a layer", "Functional (not Sequential)", "block", 128),
]


@pytest.mark.parametrize(("row", "label", "name", "size"), NETWORKS)
def test_the_same_network(row, label, name, size):
    left, right = {"keras": keras}, {"nn": nn}
    execute(ROWS[row][0][label], left)
    execute(ROWS[row][1][""], right)
    x = np.random.default_rng(0).normal(size=(8, size)).astype("float32")
    outputs = left[name](x)
    bring(left[name], right[name])
    expected = right[name](torch.tensor(x)).detach()
    close(outputs, expected.softmax(1) if row == "plain stack" else expected)


def test_the_number_of_parameters(sides):
    for field, names in zip(ROWS["count parameters"], sides, strict=True):
        assert eval(field[""], names) == 101_770


@pytest.mark.parametrize("row", ["train", "learning-rate schedule"])
def test_trainings_move_alike(sides, row):
    before, loader = weights(sides[0]), sides[1]["loader"]
    run(row, *sides)
    moved_alike(before, sides)
    assert isinstance(loader.sampler, torch.utils.data.RandomSampler)
    assert sides[1]["model"].training


def test_weight_decay_is_decoupled(sides):
    """A pixel without ink has no gradient: only the decay moves its weights."""
    before = weights(sides[0])
    for names in sides:
        names["learning_rate"] = 0.1
    run("weight decay", *sides)
    moved_alike(before, sides)
    for names in sides:
        close(weights(names)[0][0], before[0][0] * (1 - 0.1 * 0.01) ** 3, 1e-7)


def test_all_gradients_are_clipped_together(sides):
    """With SGD in Adam's place, whose steps do not depend on the gradient's size."""
    parameters = sides[1]["model"].parameters()
    sides[1]["optimizer"] = torch.optim.SGD(parameters, lr=0.001)
    for field, names in zip(ROWS["clip gradients"], sides, strict=True):
        names["x_train"] *= 100
        execute(field[""].replace("Adam", "SGD"), names)
    left, right = map(weights, sides)
    for a, b in zip(left, right, strict=True):
        close(a, b)


RESULTS = [
    ("evaluate", ["loss", "accuracy"]),
    ("predict", ["probabilities", "digits"]),
    ("output of a middle layer", ["hidden"]),
]


@pytest.mark.parametrize(("row", "results"), RESULTS)
def test_the_same_results(sides, row, results):
    sides[1]["model"].train()
    run(row, *sides)
    for name in results:
        close(sides[0][name], sides[1][name])
    assert not sides[1]["model"].training
    assert not sides[1]["model"].activation._forward_hooks


def test_saved_weights_are_loaded(sides, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    others = n.build_sequential(1), n.Network()
    row = ROWS["save, load weights"]
    for field, names, other in zip(row, sides, others, strict=True):
        save, load = field[""].split("\n", 1)
        saved = weights(names)
        execute(save, names)
        names["model"] = other
        assert not np.array_equal(weights(names)[0], saved[0])
        execute(load, names)
        assert all(map(np.array_equal, weights(names), saved))


def test_a_frozen_layer_stays(sides):
    run("train", *sides)
    before = [weights(names) for names in sides]
    run("freeze a layer", *sides)
    execute("model.fit(x_train, y_train)", sides[0])
    execute("train_epoch()", sides[1])
    for names, old in zip(sides, before, strict=True):
        same = list(map(np.array_equal, old, weights(names)))
        assert same == [True, True, False, False]


def test_dropout_and_normalization_are_on_and_off(sides):
    run("dropout, normalization", *sides)
    on = np.array([sides[0]["on"].numpy(), sides[1]["on"].detach().numpy()])
    assert (on != 0).mean(axis=(1, 2)) == pytest.approx(0.5, abs=0.02)
    close(*on[:, (on != 0).all(axis=0)])
    # PyTorch's running variance is the unbiased one.
    close(sides[0]["off"], sides[1]["off"].detach(), 5e-4)


def test_early_stopping_keeps_the_best_weights(sides):
    """Both are given these validation losses: the fourth is the best."""
    losses, kept = [3, 2, 4, 1, 5, 6, 0, 0], ([], [])

    def next_loss(side):
        kept[side].append(weights(sides[side]))
        return losses[len(kept[side]) - 1]

    sides[0]["model"].evaluate = lambda **arguments: {"loss": next_loss(0)}
    sides[1]["evaluate"] = lambda x, y: (next_loss(1), 0)
    sides[0]["epochs"] = sides[1]["epochs"] = len(losses)
    run("early stopping", *sides)
    for names, of_epochs in zip(sides, kept, strict=True):
        assert len(of_epochs) == 6
        assert all(map(np.array_equal, weights(names), of_epochs[3]))


def test_a_seed_fixes_all_random_numbers(sides):
    """Python's, NumPy's and the framework's."""
    of_keras = keras.initializers.HeNormal
    own = [lambda: float(of_keras()((1, 1))[0, 0]), lambda: torch.randn(1).item()]
    for field, names, draw in zip(ROWS["seeds"], sides, own, strict=True):
        draws = []
        for seed in (0, 0, 1):
            execute(field[""].replace("(0)", f"({seed})"), names)
            draws.append({random.random(), np.random.rand(), draw()})
        assert draws[0] == draws[1] and not draws[0] & draws[2]


def test_the_device_is_a_gpu_if_there_is_one(sides, monkeypatch):
    run("device", *sides)
    probabilities, logits = sides[0]["probabilities"], sides[1]["logits"]
    close(probabilities, logits.softmax(1).detach().cpu())
    assert sides[0]["device"].upper() in probabilities.device
    assert logits.device.type == sides[1]["device"]
    for gpus, expected in ([], ["cpu:0", "cpu"]), ([1], ["gpu:0", "cuda"]):
        monkeypatch.setattr(tf.config, "list_logical_devices", lambda _, g=gpus: g)
        monkeypatch.setattr(torch.cuda, "is_available", lambda g=gpus: bool(g))
        for field, names in zip(ROWS["device"], sides, strict=True):
            execute("".join(field[""].splitlines(True)[:2]), names)
        assert [names["device"] for names in sides] == expected
