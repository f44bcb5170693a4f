"""Section 8's KerasAdam, its demonstrations of the check, and its table of mistakes."""

import copy
import importlib.util
import subprocess
import sys

import numpy as np
import pytest
from harness import cell_with, columns, committed, executed, markdown, printed
from nbclient.exceptions import CellExecutionError

n = executed("def check_port(", "class KerasAdam(")
keras, tf, torch, KerasAdam = n.keras, n.tf, n.torch, n.KerasAdam

random = np.random.default_rng(0)
START = random.normal(size=(2, 6))
# Small ones too, where ε and its place matter: updates, parameters, numbers.
SIGNS, POWERS = random.choice([-1, 1], (10, 2, 6)), random.uniform(-9, 0, (10, 2, 6))
GRADIENTS = SIGNS * 10.0**POWERS
# Keras rounds β to float32, which holds these exactly.
BETAS, RATE = (0.875, 0.9990234375), 2**-7
# In these updates the second parameter has no gradient.
ABSENT = 2, 3


def keras_run(rate=RATE, **options):
    """The numbers that Keras's Adam moves, after each update, in float64."""
    with n.float64_on_cpu():
        variables = [keras.Variable(start) for start in START]
        optimizer = keras.optimizers.Adam(rate, *BETAS, **options)
        moved = []
        for t, gradients in enumerate(GRADIENTS):
            second = None if t in ABSENT else tf.constant(gradients[1])
            optimizer.apply([tf.constant(gradients[0]), second], variables)
            moved.append([variable.numpy() for variable in variables])
    return np.array(moved)


def torch_run(second=None, **options):
    """The same of KerasAdam; `second` are options of the second parameter alone."""
    parameters = [torch.nn.Parameter(torch.tensor(start)) for start in START]
    groups = [{"params": parameters[:1]}, {"params": parameters[1:]} | (second or {})]
    optimizer, moved = KerasAdam(groups, RATE, BETAS, **options), []
    for t, gradients in enumerate(GRADIENTS):
        if t == 4:
            # Another one that is given this one's state goes on in its place.
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = KerasAdam(groups)
            optimizer.load_state_dict(state)
        parameters[0].grad = torch.tensor(gradients[0])
        parameters[1].grad = None if t in ABSENT else torch.tensor(gradients[1])
        optimizer.step()
        moved.append([parameter.detach().numpy().copy() for parameter in parameters])
    return np.array(moved)


def apart(ours, theirs):
    """The largest difference, relative to the largest move at that update."""
    moves = np.abs(ours - START).max(axis=(1, 2))
    return (np.abs(ours - theirs).max(axis=(1, 2)) / moves).max()


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize(
    ("ours", "theirs", "tolerance"),
    [
        ({}, {"fused": True}, 1e-12),
        ({"epsilon": 1e-3}, {"eps": 1e-3}, 1e-12),
        ({"amsgrad": True}, {"amsgrad": True}, 1e-12),
        # Keras rounds the decay to float32.
        ({"weight_decay": 0.1}, {"weight_decay": 0.1}, 1e-7),
    ],
)
def test_keras_adam_moves_as_keras_does(ours, theirs, tolerance):
    assert apart(keras_run(**ours), torch_run(**theirs)) < tolerance


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_each_group_has_its_own_options():
    ours = keras_run()
    ours[:, 1] = keras_run(2**-9, epsilon=1e-4)[:, 1]
    assert apart(ours, torch_run({"lr": 2**-9, "eps": 1e-4})) < 1e-12


def test_a_closure_that_fails_leaves_the_options():
    optimizer = KerasAdam([torch.nn.Parameter(torch.ones(2))], 0.5)
    assert optimizer.step(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert optimizer.param_groups[0]["eps"] == 1e-7


@pytest.mark.parametrize("first", ["", "import tensorflow", "import keras"])
def test_the_check_runs_alone_and_below_another_import_says_what_to_do(first):
    cells = [cell_with(committed(), n) for n in ("def check_port(", "class KerasAdam(")]
    source = "\n".join([first, *[cell.source for cell in cells]])
    command = [sys.executable, "-c", source]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    expected = "KerasAdam: first step"
    if first and importlib.util.find_spec("triton"):
        expected = "above every other import"
    assert expected in (ended.stdout or ended.stderr).splitlines()[-1]


def test_the_first_steps_of_the_two_adams_are_those_of_their_formulas(short_run):
    text = printed(cell_with(short_run.notebook, "class KerasAdam("))
    # ε is a tenth of the gradient. Keras's counts 1 / √(1 - 0.999) times as much.
    own, keras = 0.1 / (1 + 0.1), 0.1 / (1 + 0.1 / 0.001**0.5)
    assert text == f"Adam: first step {own:.3f}\nKerasAdam: first step {keras:.3f}\n"


def test_the_check_shows_a_row_for_each_step_and_the_first_one_off():
    found = n.Steps(data=n.Gap(0, "x"), loss=n.Gap(2e-6, "y"), mse=n.Gap(0.34, "z"))
    rows = found._repr_markdown_().splitlines()[2:]
    assert rows[:2] == ["| data | 0e+00 | x |", "| loss | 2e-06 | y |"]
    assert rows[2:] == ["| mse | 3e-01 | z |", "| **first step off** | | **loss** |"]


def test_the_checks_in_the_notebook_find_what_the_text_says(short_run):
    for text, words in {
        "def build_own_adam(": "**first update**",
        "with Keras's Adam.": "**none**",
        "def check_cnn(": "| digits, after pool; its kernel's numbers are in digits.",
    }.items():
        assert words in markdown(cell_with(short_run.notebook, text))
    for text in ("class KerasFlatten(", "def right_port("):
        assert printed(cell_with(short_run.notebook, text)).endswith("none\n")


def test_a_mistake_that_is_caught_elsewhere_stops_the_notebook(short_run):
    line = "a name | nn.ReLU() | nn.Identity() | loss"
    with pytest.raises(CellExecutionError, match="a name: caught at forward pass"):
        short_run.execute(f"mistake_row({line!r})")


def test_a_row_says_what_was_planted_and_is_what_fit_gives(short_run):
    """Up to rounding, which an epoch of training amplifies."""
    short_run.execute(
        "model = right_port()[0]()\n"
        "summed = keras.losses.SparseCategoricalCrossentropy(reduction='sum')\n"
        "model.compile(model.optimizer, summed, metrics=['accuracy'])\n"
        "x, y = x_train[image_order], y_train[image_order]\n"
        "logs = model.fit(x, y, batch_size=32, shuffle=False, verbose=0).history\n"
        "test = evaluate_sequential(model, x_test, y_test)"
    )
    shown = columns(short_run.notebook, "### The mistakes")["sum for mean"]
    assert shown["right code"] == "`entropy(logits, y)`"
    assert shown["replaced by"] == '`entropy(logits, y, reduction="sum")`'
    assert shown["caught at"] == "loss"
    loss = short_run.value("logs['loss'][0]")
    assert float(shown["training loss"]) == pytest.approx(loss, rel=0.03)
    accuracies = short_run.value("[logs['accuracy'][0], test['accuracy']]")
    for name, share in zip(["training", "test"], accuracies, strict=True):
        percent = float(shown[f"{name} accuracy"].rstrip("%"))
        assert percent == pytest.approx(100 * share, abs=0.7)
