"""Section 8's KerasAdam, its demonstrations of the check, and its table of mistakes."""

import copy
import importlib.util
import re
import subprocess
import sys

import numpy as np
import pytest
from harness import cell_with, columns, committed, fields, markdown, printed, table
from nbclient.exceptions import CellExecutionError

HEADING = "### The mistakes"
names = {}
CHECK = cell_with(committed(), "def check_port(").source
ADAM = cell_with(committed(), "class KerasAdam(").source
exec(CHECK, names)
keras, torch, float64_on_cpu = names["keras"], names["torch"], names["float64_on_cpu"]
exec(ADAM, names)
KerasAdam = names["KerasAdam"]

random = np.random.default_rng(0)
START = [random.normal(size=size) for size in (7, 5)]
# Small ones too, where ε and its place matter.
ROWS = random.choice([-1, 1], (10, 12)) * 10.0 ** random.uniform(-9, 0, size=(10, 12))
GRADIENTS = [np.split(row, [7]) for row in ROWS]
# The second parameter has no gradient in two updates.
LATER_NONE = [[a, None if t in (2, 3) else b] for t, (a, b) in enumerate(GRADIENTS)]
# Keras rounds β, and a schedule's rates, to float32, which holds these exactly.
BETAS, RATE = (0.875, 0.9990234375), 2**-7
HALVED = keras.optimizers.schedules.ExponentialDecay(RATE, 1, 0.5)


def keras_run(gradients=GRADIENTS, betas=BETAS, lr=RATE, **options):
    """How far Keras's Adam has moved each number after each update, in float64."""
    with float64_on_cpu():
        variables = [keras.Variable(start) for start in START]
        optimizer = keras.optimizers.Adam(lr, *betas, **options)
        moved = []
        for now in gradients:
            held = [None if g is None else keras.ops.convert_to_tensor(g) for g in now]
            optimizer.apply(held, variables)
            moved.append(np.concatenate([v.numpy() for v in variables]))
    return np.array(moved) - np.concatenate(START)


def torch_run(gradients=GRADIENTS, adam=KerasAdam, halved=False, split=None, **options):
    """The same of PyTorch, perhaps with half the rate at each update.

    With `split`, the second parameter is a group with these options.
    """
    parameters = [torch.nn.Parameter(torch.tensor(start)) for start in START]
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], **(split or {})}]
    optimizer, moved = adam(groups, **options), []
    for t, now in enumerate(gradients):
        if t == 4:
            # A copy that is loaded anew goes on as the first would have.
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = adam(groups, **options)
            optimizer.load_state_dict(state)
        for group in optimizer.param_groups if halved else ():
            group["lr"] = RATE * 0.5**t
        for parameter, g in zip(parameters, now, strict=True):
            parameter.grad = None if g is None else torch.tensor(g)
        optimizer.step()
        moved.append(np.concatenate([p.detach().numpy() for p in parameters]))
    return np.array(moved) - np.concatenate(START)


def apart(ours, theirs):
    """The largest difference, relative to the largest number at that update."""
    return (np.abs(ours - theirs).max(axis=1) / np.abs(ours).max(axis=1)).max()


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {"fused": True}),
        ({"epsilon": 1e-3}, {"eps": 1e-3}),
        ({"amsgrad": True}, {"amsgrad": True}),
        ({"weight_decay": 0.125}, {"weight_decay": 0.125}),
        ({"gradients": LATER_NONE}, {"gradients": LATER_NONE}),
        ({"lr": HALVED}, {"halved": True}),
    ],
)
def test_keras_adam_moves_as_keras_does(ours, theirs):
    moved = torch_run(**{"betas": BETAS, "lr": RATE} | theirs)
    assert apart(keras_run(**ours), moved) < 1e-12


def test_each_group_has_its_own_options():
    other = keras_run(lr=2**-9, epsilon=1e-4)
    ours = np.hstack([keras_run()[:, :7], other[:, 7:]])
    split = {"lr": 2**-9, "eps": 1e-4}
    assert apart(ours, torch_run(betas=BETAS, lr=RATE, split=split)) < 1e-12


def test_the_default_options_are_those_of_keras():
    """Keras rounds its β; PyTorch's Adam, with the same ε, is further away."""
    ours = keras_run(betas=(0.9, 0.999), lr=0.001)
    assert apart(ours, torch_run()) < 1e-5
    assert apart(ours[:1], torch_run(adam=torch.optim.Adam, eps=1e-7)[:1]) > 1e-4


def test_a_closure_that_fails_leaves_the_options():
    optimizer = KerasAdam([torch.nn.Parameter(torch.ones(2))], 0.5)
    assert optimizer.step(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert optimizer.param_groups[0]["eps"] == 1e-7


def in_a_process(script):
    """Its exit status, and the last line that it wrote."""
    command, options = [sys.executable, "-c", script], {"capture_output": True}
    ended = subprocess.run(command, check=False, text=True, **options)
    return ended.returncode, (ended.stdout or ended.stderr).strip().splitlines()[-1]


def test_the_check_and_keras_adam_run_alone_and_first_in_a_process():
    code, last = in_a_process(f"{CHECK}\n{ADAM}")
    assert code == 0 and last.startswith("KerasAdam: first step")


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs Triton")
@pytest.mark.parametrize("library", ["tensorflow", "keras"])
def test_below_another_import_the_check_says_what_to_do(library):
    code, message = in_a_process(f"import {library}\n{CHECK}")
    assert code == 1 and message.startswith("ImportError")
    assert "above every other import" in message


def test_the_first_steps_of_the_two_adams_are_those_of_their_formulas(short_run):
    text = printed(cell_with(short_run.notebook, "class KerasAdam("))
    steps = [float(number) for number in re.findall(r"first step (\S+)", text)]
    gradient, epsilon = 1e-6, 1e-7
    own = 0.1 * gradient / (gradient + epsilon)
    keras = 0.1 * gradient / (gradient + epsilon / (1 - 0.999) ** 0.5)
    assert steps == pytest.approx([own, keras], abs=0.00051)


@pytest.mark.parametrize(
    ("text", "off", "layer"),
    [
        ("def build_own_adam(", "first update", ""),
        ("with Keras's Adam.", "none", ""),
        ("def check_cnn(", "forward pass", "digits, after pool"),
    ],
)
def test_the_tables_of_the_check_show_its_numbers(short_run, text, off, layer):
    cell = cell_with(short_run.notebook, text)
    call = cell.source.splitlines()[-1]
    found = short_run.value(f"{{step: list(gap) for step, gap in {call}.items()}}")
    *rows, last = [fields(line) for line in table(markdown(cell))[2:]]
    assert last == ["**first step off**", "", f"**{off}**"]
    assert [row[0] for row in rows] == list(found)
    assert not layer or found[off][1] == layer
    for step, shown, place in rows:
        difference, where = found[step]
        # Rounding is another in each run.
        assert difference < 1e-9 > float(shown) or shown == f"{difference:.0e}"
        assert difference < 1e-9 or place == where


def test_the_table_says_what_was_planted_and_where_the_check_caught_it(short_run):
    lines = short_run.value("MISTAKES.strip().splitlines()")
    mistakes = [line.split(" | ") for line in lines]
    rows = columns(short_run.notebook, HEADING)
    assert list(rows) == [name for name, *_ in mistakes] and len(rows) >= 15
    for name, right, wrong, step in mistakes:
        texts = [rows[name][key] for key in ("instead of", "stands", "caught at")]
        assert texts == [f"`{right}`", f"`{wrong}`", step]


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


EPOCH = """
model, sums = right_port()[0](), np.zeros(3)
@tf.function
def own_step(x, y):
    with tf.GradientTape() as tape:
        p = model(x, training=True)
        loss = LOSS
    weights = model.trainable_weights
    model.optimizer.apply(tape.gradient(loss, [w.value for w in weights]), weights)
    return loss, p
for images in np.split(epoch_order, range(32, len(epoch_order), 32)):
    loss, p = own_step(x_train[images], y_train[images])
    sums += [1, float(loss), (p.numpy().argmax(1) == y_train[images]).mean()]
right = (model(x_test).numpy().argmax(1) == y_test).mean()
"""
ENTROPY = "keras.losses.sparse_categorical_crossentropy"


@pytest.mark.parametrize(
    ("row", "loss"),
    [
        ("no mistake", f"tf.reduce_mean({ENTROPY}(y, p))"),
        ("softmax before the loss", f"tf.reduce_mean({ENTROPY}(y, tf.nn.softmax(p)))"),
        ("sum for mean", f"tf.reduce_sum({ENTROPY}(y, p))"),
    ],
)
def test_a_row_is_what_a_loop_of_keras_gives(short_run, row, loss):
    """Up to rounding, which an epoch of training amplifies."""
    short_run.execute(EPOCH.replace("LOSS", loss))
    mean_loss, *shares = short_run.value("[*(sums[1:] / sums[0]), float(right)]")
    shown = columns(short_run.notebook, HEADING)[row]
    assert float(shown["training loss"]) == pytest.approx(mean_loss, rel=0.03)
    for name, share in zip(("training accuracy", "test accuracy"), shares, strict=True):
        assert float(shown[name].rstrip("%")) == pytest.approx(100 * share, abs=0.7)
