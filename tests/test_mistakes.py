"""Section 8's outputs: each mistake is caught where its table says, and ends as it says."""

import re
from collections import namedtuple

import numpy as np
import pytest
from harness import cell_with, columns, committed, fields, markdown, printed, table
from nbclient.exceptions import CellExecutionError

HEADING = "### The mistakes"


def planted(session):
    """[name, right, wrong, step] of the notebook's mistakes."""
    return session.value("[m.split(' | ') for m in MISTAKES.strip().splitlines()]")


def test_the_table_says_what_was_planted_and_where_it_was_caught(short_run):
    rows, mistakes = columns(short_run.notebook, HEADING), planted(short_run)
    assert list(rows) == [name for name, *_ in mistakes] and len(rows) >= 15
    for name, right, wrong, step in mistakes:
        row = rows[name]
        texts = [row[column] for column in ("instead of", "stands", "caught at")]
        assert texts == [f"`{right}`", f"`{wrong}`", step]


@pytest.mark.parametrize("seed", [1, 7])
def test_every_mistake_is_caught_at_the_same_step_on_other_seeds(short_run, seed):
    """With the first seed its own cell would stop."""
    short_run.execute(f"kept, seeds, found = seeds, [{seed}], []")
    try:
        short_run.execute(
            "for name, right, wrong, step in [m.split(' | ') for m in "
            "MISTAKES.strip().splitlines()]:\n"
            "    names = dict(globals())\n"
            "    exec(inspect.getsource(right_port).replace(right, wrong), names)\n"
            "    parts = names['right_port']()[:5]\n"
            "    found.append([name, first_off(check_port(*parts, ported=True)), step])"
        )
    finally:
        short_run.execute("seeds = kept")
    assert [row for row in short_run.value("found") if row[1] != row[2]] == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a | model.zero_grad() | pass | none", "model.zero_grad"),
        ("b | optimizer.zero_grad() | model.zero_grad() | data", "b: caught at none"),
        ("c | nn.ReLU() | nn.Identity() | loss", "c: caught at forward pass"),
    ],
)
def test_a_mistake_that_is_caught_elsewhere_stops_the_notebook(
    short_run, line, message
):
    with pytest.raises(CellExecutionError, match=re.escape(message)) as caught:
        short_run.execute(f"mistake_row({line!r})")
    assert caught.value.ename == "AssertionError"


def test_accuracy_does_not_tell_right_from_wrong(short_run):
    rows = columns(short_run.notebook, HEADING).items()
    accuracy = {name: float(row["test accuracy"].rstrip("%")) for name, row in rows}
    close = [n for n, a in accuracy.items() if abs(a - accuracy["no mistake"]) < 1]
    assert "sum for mean" in close and "not copied" in close
    assert len(close) >= 6


KERAS_EPOCH = """
keras.utils.set_random_seed(0)
inner = [keras.layers.Dense(128), keras.layers.BatchNormalization(), keras.layers.ReLU()]
model = keras.Sequential([keras.Input((784,)), *inner, keras.layers.Dense(10)])
adam, sums = keras.optimizers.Adam(0.001, weight_decay=0.01), np.zeros(3)
@tf.function
def own_step(x, y):
    with tf.GradientTape() as tape:
        p = model(x, training=True)
        loss = keras.losses.sparse_categorical_crossentropy(y, p, from_logits=True)
        mean = tf.reduce_mean(loss)
    variables = model.trainable_variables
    gradients = tape.gradient(mean, [w.value for w in variables])
    adam.apply(gradients, variables)
    right = tf.argmax(p, axis=1) == tf.cast(y, "int64")
    return mean, tf.reduce_mean(tf.cast(right, "float32"))
for i in range(0, len(order), 32):
    x, y = x_train[order[i : i + 32]], y_train[order[i : i + 32]]
    sums += [len(y), *(len(y) * float(n) for n in own_step(x, y))]
right = (model(x_test).numpy().argmax(axis=1) == y_test).mean()
"""
PYTORCH_EPOCH = """
keras.utils.set_random_seed(0)
inner = [keras.layers.Dense(128), keras.layers.BatchNormalization(), keras.layers.ReLU()]
start = keras.Sequential([keras.Input((784,)), *inner, keras.layers.Dense(10)])
w, b, scale, shift, v, c = (
    torch.tensor(a.numpy(), requires_grad=True) for a in start.trainable_weights
)
parameters, sums = [w, b, scale, shift, v, c], np.zeros(3)
adam = KerasAdam(parameters, lr=0.001, weight_decay=0.01)
mean, variance = torch.zeros(128), torch.ones(128)
for i in range(0, len(order), 32):
    x, y = (torch.tensor(a[order[i : i + 32]]) for a in (x_train, y_train))
    h = x @ w + b
    mean, variance = (
        (0.99 * old + 0.01 * new).detach()
        for old, new in ((mean, h.mean(0)), (variance, h.var(0)))
    )
    h = (h - h.mean(0)) / (h.var(0, unbiased=False) + 1e-3).sqrt() * scale + shift
    z = h.relu() @ v + c
    p = z.softmax(1).softmax(1) if TWICE else z.softmax(1)
    loss = -p[range(len(y)), y].log()
    loss = loss.sum() if SUM else loss.mean()
    if not KEEP:
        for parameter in parameters:
            parameter.grad = None
    loss.backward()
    adam.step()
    right = (z.argmax(1) == y).double().mean()
    sums += [len(y), len(y) * loss.item(), len(y) * right.item()]
with torch.no_grad():
    h = (torch.tensor(x_test) @ w + b - mean) / (variance + 1e-3).sqrt() * scale + shift
    right = ((h.relu() @ v + c).argmax(1).numpy() == y_test).mean()
"""
SWITCHES = {"TWICE": False, "SUM": False, "KEEP": False}


@pytest.mark.parametrize(
    ("row", "source", "switches"),
    [
        ("no mistake", KERAS_EPOCH, {}),
        ("no mistake", PYTORCH_EPOCH, {}),
        ("softmax before the loss", PYTORCH_EPOCH, {"TWICE": True}),
        ("sum for mean", PYTORCH_EPOCH, {"SUM": True}),
        ("`zero_grad()` forgotten", PYTORCH_EPOCH, {"KEEP": True}),
    ],
)
def test_a_row_is_what_another_loop_gives(short_run, row, source, switches):
    """Up to rounding, which an epoch of training amplifies."""
    short_run.execute(f"globals().update({SWITCHES | switches})\n{source}")
    loss, *shares = short_run.value("[*(sums[1:] / sums[0]), float(right)]")
    shown = columns(short_run.notebook, HEADING)[row]
    assert float(shown["training loss"]) == pytest.approx(loss, rel=0.03)
    names = "training accuracy", "test accuracy"
    for name, share in zip(names, shares, strict=True):
        assert float(shown[name].rstrip("%")) == pytest.approx(100 * share, abs=0.7)


def test_the_first_steps_of_the_two_adams_are_those_of_their_formulas(short_run):
    text = printed(cell_with(short_run.notebook, "class KerasAdam("))
    steps = [float(line.split()[-1]) for line in text.splitlines()]
    gradient, epsilon = 1e-6, 1e-7
    own = 0.1 * gradient / (gradient + epsilon)
    keras = 0.1 * gradient / (gradient + epsilon / (1 - 0.999) ** 0.5)
    assert steps == pytest.approx([own, keras], abs=0.00051)


@pytest.mark.parametrize(
    ("text", "off"),
    [
        ('def build_port():\n    """A PyTorch', "none"),
        ("def forgetful_step(", "second update"),
        ("def build_own_adam(", "first update"),
    ],
)
def test_the_tables_of_the_check_show_its_numbers(short_run, text, off):
    cell = cell_with(short_run.notebook, text)
    [output] = cell.outputs
    gap = namedtuple("Gap", ["difference", "where"])
    found = eval(output.data["text/plain"], {"Gap": gap, "inf": np.inf})
    rows = [fields(line) for line in table(markdown(cell))[2:]]
    assert rows[-1] == ["**first step off**", "", f"**{off}**"]
    expected = [[step, f"{a:.0e}", where] for step, (a, where) in found.items()]
    assert rows[:-1] == expected


@pytest.fixture(scope="module")
def check():
    """The check's cell, executed here."""
    names = {}
    exec(cell_with(committed(), "def check_port(").source, names)
    return names


def linear_pair(check, rate=0.5, factor=1.0, shift=0.0):
    """The differences of y = w x, in PyTorch with another rate, loss and start."""
    keras, torch = check["keras"], check["torch"]

    def build_keras():
        layer = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")
        model = keras.Sequential([keras.Input((1,)), layer])
        model.compile(keras.optimizers.SGD(0.5), "mse")
        return model

    def build_pytorch():
        model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.constant_(model.weight, 1 + shift)
        return model, torch.optim.SGD(model.parameters(), lr=rate)

    def train_step(model, optimizer, x, y):
        optimizer.zero_grad()
        loss = factor * ((model(x) - y) ** 2).mean()
        loss.backward()
        optimizer.step()
        return {"loss": loss.item()}

    batch = np.array([[1.0]]), np.array([[3.0]])
    parts = build_keras, build_pytorch, train_step, batch, batch
    return {k: g[0] for k, g in check["check_port"](*parts, ported=True).items()}


def test_a_difference_is_that_of_the_step_over_its_largest_number(check):
    """With w = 1, x = 1, y = 3: output 1, loss 4, gradient -4, update 4 times the rate."""
    found = linear_pair(check, rate=0.4)
    assert list(found)[:4] == ["data", "weights", "forward pass", "loss"]
    assert list(found)[4:] == ["gradient", "first update", "second update"]
    assert max(list(found.values())[:5]) < 1e-12
    assert found["first update"] == pytest.approx((2.0 - 1.6) / 2.0)
    # Keras is at its minimum, w = 3; PyTorch is at 2.6, and goes on by 0.32.
    assert found["second update"] == pytest.approx(1)
    found = linear_pair(check, factor=1.25)
    assert found["loss"] == pytest.approx((5 - 4) / 5)
    assert found["gradient"] == pytest.approx((5 - 4) / 5)
    found = linear_pair(check, shift=0.25)
    assert found["weights"] == pytest.approx(0.25 / 1.25)
    assert found["forward pass"] == pytest.approx(0.25 / 1.25)
    assert found["loss"] == pytest.approx((4 - 1.75**2) / 4)
