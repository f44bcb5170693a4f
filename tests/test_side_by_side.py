"""Section 6: every code field of the table runs, and both sides do the same."""

import contextlib
import io
import random
import re
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
    for line in field.split("<br>"):
        if line.startswith("*"):
            label = line.strip("*")
        else:
            line = re.fullmatch("`([^`]+)`", line)[1].replace("\xa0", " ")
            found[label] = f"{found.get(label, '')}{line}\n"
    return found


ROWS = {what: [codes(field) for field in pair] for what, *pair in LINES}


def each(row, sides):
    """The code of each side of a row, and the names in which it runs."""
    return zip([field[""] for field in ROWS[row]], sides, strict=True)


def execute(code, names):
    """Execute code without a word."""
    with contextlib.redirect_stdout(io.StringIO()):
        exec(code, names)


def both(row, sides):
    for code, names in each(row, sides):
        execute(code, names)


def bring(keras_model, model):
    """Give PyTorch's model the weights of Keras's."""
    for p, w in zip(model.parameters(), keras_model.get_weights(), strict=True):
        p.data = torch.tensor(w.T.copy())


def weights(names):
    """Copies of a side's weights, in Keras's layout."""
    if "keras" in names:
        return names["model"].get_weights()
    return [p.detach().numpy().T.copy() for p in names["model"].parameters()]


def close(a, b, atol=1e-5):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), 1e-5, atol)


def moved_alike(before, sides):
    """On average within a hundredth of the way they went, because the ε differ."""
    for start, a, b in zip(before, *map(weights, sides), strict=True):
        assert abs(a - b).mean() < 0.01 * abs(a - start).mean()


@pytest.fixture(params=["sequential", "functional"])
def sides(request):
    """Names for both sides: equal weights, one batch of images, nothing trained."""
    draw = np.random.default_rng(0)
    left, right = {"keras": keras, "tf": tf}, {"torch": torch, "nn": nn}
    for part in ("train", "val", "test"):
        x, y = draw.random((32, 784), dtype="float32"), draw.integers(0, 10, 32)
        left |= {f"x_{part}": x, f"y_{part}": y}
        right |= {f"x_{part}": torch.tensor(x), f"y_{part}": torch.tensor(y)}
    left["model"] = getattr(n, f"build_{request.param}")(0)
    right["model"] = n.build_pytorch(0)
    bring(left["model"], right["model"])
    for names in (left, right):
        names.update(np=np, learning_rate=0.001, epochs=0)
    both("train", (left, right))
    execute(ROWS["evaluate"][1][""], right)
    right["model"].train()
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
def test_networks(row, label, name, size):
    left, right = {"keras": keras}, {"nn": nn}
    execute(ROWS[row][0][label], left)
    execute(ROWS[row][1][""], right)
    x = np.random.default_rng(0).normal(size=(8, size)).astype("float32")
    outputs = left[name](x)
    bring(left[name], right[name])
    expected = right[name](torch.tensor(x)).detach()
    close(outputs, expected.softmax(1) if row == "plain stack" else expected)


def test_parameters(sides):
    counts = [eval(code, names) for code, names in each("count parameters", sides)]
    assert counts == [101_770, 101_770]


def test_train(sides):
    """On copies of one image: however they are shuffled, every batch is the same."""
    before = weights(sides[0])
    for names in sides:
        names["x_train"] = names["x_train"][[0] * 80]
        names["y_train"] = names["y_train"][[0] * 80]
    both("train", sides)
    moved_alike(before, sides)
    assert sides[0]["optimizer"].iterations == 4 * 3
    assert isinstance(sides[1]["loader"].sampler, torch.utils.data.RandomSampler)
    assert sides[1]["model"].training


RESULTS = [
    ("evaluate", ["loss", "accuracy"]),
    ("predict", ["probabilities", "digits"]),
    ("output of a middle layer", ["hidden"]),
]


@pytest.mark.parametrize(("row", "results"), RESULTS)
def test_results(sides, row, results):
    both(row, sides)
    for name in results:
        close(sides[0][name], sides[1][name])
    assert not sides[1]["model"].training
    assert not sides[1]["model"].activation._forward_hooks


def test_save_and_load(sides, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for code, names in each("save, load weights", sides):
        save, load = code.split("\n", 1)
        saved = weights(names)
        execute(save, names)
        names["model"] = n.build_sequential(1) if "keras" in names else n.Network()
        assert not np.array_equal(weights(names)[0], saved[0])
        execute(load, names)
        assert all(map(np.array_equal, weights(names), saved))


def test_freeze(sides):
    loops = "model.fit(x_train, y_train)", "train_epoch()"
    for (code, names), train in zip(each("freeze a layer", sides), loops, strict=True):
        execute(train, names)
        before = weights(names)
        execute(f"{code}\n{train}", names)
        same = list(map(np.array_equal, before, weights(names)))
        assert same == [True, True, False, False]
    left, right = (names["model"] for names in sides)
    assert sum(w.value.shape.num_elements() for w in left.trainable_weights) == 1290
    assert sum(p.numel() for p in right.parameters() if p.requires_grad) == 1290


def test_dropout_and_normalization(sides):
    both("dropout, normalization", sides)
    on = np.array([sides[0]["on"].numpy(), sides[1]["on"].detach().numpy()])
    assert (on != 0).mean(axis=(1, 2)) == pytest.approx(0.5, abs=0.02)
    close(*on[:, (on != 0).all(axis=0)])
    # PyTorch's running variance is the unbiased one.
    close(sides[0]["off"], sides[1]["off"].detach(), atol=5e-4)


def test_schedule(sides):
    rates, step = (
        [],
        lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]),
    )
    sides[1]["optimizer"].register_step_pre_hook(step)
    both("learning-rate schedule", sides)
    assert rates == pytest.approx([0.001 * 0.9**epoch for epoch in range(4)])
    history = sides[0]["history"].history
    assert history["learning_rate"] == pytest.approx(rates)


@pytest.mark.filterwarnings("ignore:Even though the `tf.config")
def test_clip(sides, monkeypatch):
    """The gradients that each optimizer gets for its step."""
    received, step = ([], []), keras.optimizers.Adam.update_step

    def keras_step(self, gradient, variable, rate):
        received[0].append(gradient.numpy())
        return step(self, gradient, variable, rate)

    def hook(optimizer, *_):
        parameters = optimizer.param_groups[0]["params"]
        received[1].extend(p.grad.numpy().T.copy() for p in parameters)

    monkeypatch.setattr(keras.optimizers.Adam, "update_step", keras_step)
    sides[1]["optimizer"].register_step_pre_hook(hook)
    for names in sides:
        names["x_train"] *= 100
    tf.config.run_functions_eagerly(True)
    try:
        both("clip gradients", sides)
    finally:
        tf.config.run_functions_eagerly(False)
    assert sum((g**2).sum() for g in received[0]) == pytest.approx(1, 1e-4)
    for a, b in zip(*received, strict=True):
        close(a, b)


def test_weight_decay(sides):
    """A pixel without ink has no gradient: only the decay moves its weights."""
    before = weights(sides[0])
    for names in sides:
        names["learning_rate"] = 0.1
        names["x_train"][:, 0] = 0
    both("weight decay", sides)
    moved_alike(before, sides)
    for names in sides:
        close(weights(names)[0][0], before[0][0] * (1 - 0.1 * 0.01), atol=1e-7)


def test_early_stopping(sides):
    """Both are given these validation losses: the fourth is the best."""
    losses, seen = [3, 2, 4, 1, 5, 6, 0, 0], ([], [])

    def evaluate(side):
        seen[side].append(weights(sides[side]))
        loss = losses[len(seen[side]) - 1]
        return (loss, 0) if side else {"loss": loss}

    sides[0]["model"].evaluate = lambda **arguments: evaluate(0)
    sides[1]["evaluate"] = lambda x, y: evaluate(1)
    sides[0]["epochs"] = sides[1]["epochs"] = len(losses)
    both("early stopping", sides)
    for names, kept in zip(sides, seen, strict=True):
        assert len(kept) == 6
        assert all(map(np.array_equal, weights(names), kept[3]))


def test_seeds(sides):
    """Seeds 0, 0 and 1, for Python's, NumPy's and the framework's random numbers."""
    draws = []
    for code, names in each("seeds", sides):
        for seed in (0, 0, 1):
            execute(code.replace("(0)", f"({seed})"), names)
            draws.append([random.random(), np.random.rand()])
            initial = keras.initializers.HeNormal()
            own = initial((1, 1)) if "keras" in names else torch.randn(1)
            draws[-1].append(float(own.numpy().sum()))
    for first, again, other in (draws[:3], draws[3:]):
        assert first == again
        assert not set(first) & set(other)
    assert draws[0][:2] == draws[3][:2]


def test_device(sides, monkeypatch):
    both("device", sides)
    probabilities, logits = sides[0]["probabilities"], sides[1]["logits"]
    close(probabilities, logits.softmax(1).detach().cpu())
    assert sides[0]["device"].upper() in probabilities.device
    assert logits.device.type == sides[1]["device"]
    for gpus, expected in ([], ["cpu:0", "cpu"]), ([1], ["gpu:0", "cuda"]):
        monkeypatch.setattr(tf.config, "list_logical_devices", lambda _, g=gpus: g)
        monkeypatch.setattr(torch.cuda, "is_available", lambda g=gpus: bool(g))
        for code, names in each("device", sides):
            execute("\n".join(code.split("\n")[:2]), names)
        assert [names["device"] for names in sides] == expected


def test_habits():
    """What the text below the table says of weight decay, clipping and momentum."""
    decayed = []
    for make in (keras.optimizers.Adam, keras.optimizers.AdamW):
        variable = keras.Variable([2.0])
        make(0.1, weight_decay=0.01).apply([tf.zeros(1)], [variable])
        decayed.append(variable.numpy().item())
    for make in (torch.optim.AdamW, torch.optim.Adam):
        parameter = nn.Parameter(torch.tensor([2.0]))
        parameter.grad = torch.zeros(1)
        make([parameter], 0.1, weight_decay=0.01).step()
        decayed.append(parameter.item())
    assert decayed == pytest.approx([1.998, 1.998, 1.998, 1.9])
    pair = keras.Variable([0.0]), keras.Variable([0.0])
    keras.optimizers.SGD(1.0, clipnorm=1.0).apply(
        [tf.fill(1, g) for g in (3.0, 4.0)], pair
    )
    assert [v.numpy().item() for v in pair] == [-1, -1]
    momentum = keras.layers.BatchNormalization().momentum, nn.BatchNorm1d(1).momentum
    assert momentum == (0.99, 0.1)
