"""Section 6: every code field of the table runs, and both sides do the same."""

import random
import re

import pytest
from harness import committed, executed, section, table

BUILDERS = "def build_sequential(", "def build_functional(", "def build_pytorch("
sizes = {"PIXELS": 784, "HIDDEN": 128, "CLASSES": 10}
n = executed("def check_port(", *BUILDERS, seeds=[0], **sizes)
keras, nn, np, tf, torch = n.keras, n.nn, n.np, n.tf, n.torch
TABLE = table(section(committed(), 6)[0].source)


def codes(row):
    """The code of each field of a row; a label divides a field into two."""
    [line] = [line for line in TABLE if line.startswith(f"| {row} |")]
    parts = re.split(r" \| |<br>\*Functional\*", line.replace("\xa0", " "))
    return ["\n".join(re.findall("`(.*?)`", part)) for part in parts[1:]]


def run(row, sides, old="", new=""):
    """Execute both fields of a row, perhaps with a text replaced."""
    for code, names in zip(codes(row), sides, strict=True):
        exec(code.replace(old, new), names)


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
    np.testing.assert_allclose(a, b, 1e-5, atol)


@pytest.fixture(params=["build_sequential", "build_functional"])
def sides(request):
    """Names for both sides, with equal weights, after the row "train" for no epoch."""
    # All training images are one, so order does not count; its first pixel is empty.
    draw, one = np.random.default_rng(0), [0] * 80
    x, y = draw.random((32, 784), "float32"), draw.integers(0, 10, 32)
    x[:, 0] = 0
    data = {"x_train": x[one], "x_val": x, "x_test": x}
    data |= {"y_train": y[one], "y_val": y, "y_test": y}
    left = {"keras": keras, "tf": tf, "model": getattr(n, request.param)(0)} | data
    right = {name: torch.tensor(array) for name, array in data.items()}
    right |= {"torch": torch, "nn": nn, "np": np, "model": n.build_pytorch(0)}
    bring(left["model"], right["model"])
    left["learning_rate"] = right["learning_rate"] = 0.001
    left["epochs"] = right["epochs"] = 0
    run("train", (left, right))
    run("evaluate", (left, right))
    left["epochs"] = right["epochs"] = 4
    return left, right


def test_the_same_networks():
    names = {"layer with activation": "layer", "plain stack": "model"}
    names |= {"branch, share a layer": "block"}
    for row, name in names.items():
        *ours, theirs = codes(row)
        right = {"nn": nn}
        exec(theirs, right)
        size = 128 if name == "block" else 784
        x = np.random.default_rng(0).normal(size=(8, size)).astype("float32")
        for code in ours:
            left = {"keras": keras}
            exec(code, left)
            outputs = left[name](x)
            bring(left[name], right[name])
            expected = right[name](torch.tensor(x)).detach()
            close(outputs, expected.softmax(1) if row == "plain stack" else expected)


@pytest.mark.parametrize("row", ["train", "learning-rate schedule", "weight decay"])
def test_trainings_move_alike(sides, row):
    before, loader = weights(sides[0]), sides[1]["loader"]
    run(row, sides)
    ours, theirs = map(weights, sides)
    for start, a, b in zip(before, ours, theirs, strict=True):
        # Within a hundredth of the way that they went, because the ε differ.
        assert abs(a - b).mean() < 0.01 * abs(a - start).mean()
    # A pixel without ink has no gradient: only the weight decay moves its weights.
    close(ours[0][0] - before[0][0], theirs[0][0] - before[0][0], 1e-7)
    assert sides[1]["model"].training
    data = torch.utils.data
    assert isinstance(loader.sampler, data.RandomSampler)
    assert isinstance(data.DataLoader(loader.dataset).sampler, data.SequentialSampler)


def test_all_gradients_are_clipped_together(sides):
    """With SGD in Adam's place, whose steps do not depend on the gradient's size."""
    sides[1]["optimizer"] = torch.optim.SGD(sides[1]["model"].parameters(), lr=0.001)
    for names in sides:
        names["x_train"] *= 100
    run("clip gradients", sides, "Adam", "SGD")
    for a, b in zip(*map(weights, sides), strict=True):
        close(a, b)


def test_the_same_results(sides):
    results = {"evaluate": ["loss", "accuracy"], "predict": ["probabilities", "digits"]}
    results |= {"output of a middle layer": ["hidden"]}
    for row, names in results.items():
        sides[1]["model"].train()
        run(row, sides)
        for name in names:
            close(sides[0][name], sides[1][name])
        assert not sides[1]["model"].training
    assert not sides[1]["model"].activation._forward_hooks
    for code, names in zip(codes("count parameters"), sides, strict=True):
        assert eval(code, names) == 101_770


def test_saved_weights_are_loaded(sides, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row, others = codes("save, load weights"), [n.build_sequential(1), n.Network()]
    for code, names, other in zip(row, sides, others, strict=True):
        save, load = code.split("\n", 1)
        exec(save, names)
        saved, names["model"] = weights(names), other
        exec(load, names)
        assert all(map(np.array_equal, weights(names), saved))


def test_a_frozen_layer_stays(sides):
    run("train", sides)
    before = [weights(names) for names in sides]
    run("freeze a layer", sides)
    exec("model.fit(x_train, y_train)", sides[0])
    exec("train_epoch()", sides[1])
    for names, old in zip(sides, before, strict=True):
        same = list(map(np.array_equal, old, weights(names)))
        assert same == [True, True, False, False]


def test_dropout_and_normalization_are_on_and_off(sides):
    run("dropout, normalization", sides)
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
    run("early stopping", sides)
    for names, of_epochs in zip(sides, kept, strict=True):
        assert len(of_epochs) == 6
        assert all(map(np.array_equal, weights(names), of_epochs[3]))


def test_a_seed_fixes_all_random_numbers(sides):
    """Python's, NumPy's and the framework's."""
    own = [lambda: float(keras.random.normal([])), lambda: torch.randn(1).item()]
    for code, names, draw in zip(codes("seeds"), sides, own, strict=True):
        draws = []
        for seed in (0, 0, 1):
            exec(code.replace("(0)", f"({seed})"), names)
            draws.append({random.random(), np.random.rand(), draw()})
        assert draws[0] == draws[1] and not draws[0] & draws[2]


def test_the_device_is_a_gpu_if_there_is_one(sides, monkeypatch):
    run("device", sides)
    probabilities, logits = sides[0]["probabilities"], sides[1]["logits"]
    close(probabilities, logits.softmax(1).detach().cpu())
    for gpus, expected in ([], ["cpu:0", "cpu"]), ([1], ["gpu:0", "cuda"]):
        monkeypatch.setattr(tf.config, "list_logical_devices", lambda _, g=gpus: g)
        monkeypatch.setattr(torch.cuda, "is_available", lambda g=gpus: bool(g))
        for code, names in zip(codes("device"), sides, strict=True):
            exec("\n".join(code.splitlines()[:2]), names)
        assert [names["device"] for names in sides] == expected
