"""Section 9: its numbers, the proof, and what makes small differences large."""

import contextlib
import re

import numpy as np
import pytest
from harness import columns, fields, markdown, printed, table_under, under
from nbclient.exceptions import CellExecutionError
from refresh import AMPLIFIERS, BIT, OTHER, PARTS

DEFAULTS, LADDER = "### The defaults that differ", "### The ladder"


def line_with(session, words):
    """The one line that section 9 printed with these words."""
    text = printed(*under(session.notebook, DEFAULTS))
    [line] = [line for line in text.splitlines() if words in line]
    return line


def test_the_table_of_defaults_shows_what_fresh_objects_have(small_run):
    bias = small_run.value("build_pytorch(0).hidden.bias.detach().numpy().max()")
    keras, torch = f"{(6 / (784 + 128)) ** 0.5:.4f}", f"{784**-0.5:.4f}"
    assert table_under(small_run.notebook, DEFAULTS)[2:] == [
        f"| Keras | {keras} | 0.0000 | (784, 128) | 1e-07 |",
        f"| PyTorch | {torch} | {bias:.4f} | (128, 784) | 1e-08 |",
    ]


def test_fit_repeats_the_order_of_arrays_and_not_of_tf_data(small_run):
    for name, different in {"on arrays:": 1, "on tf.data:": 3}.items():
        digits = re.findall(r"\d", line_with(small_run, name))
        orders = np.reshape(digits, (3, 8)).astype(int)
        assert (np.sort(orders) == np.arange(8)).all()
        assert len(np.unique(orders, axis=0)) == different
        assert (orders[0] != np.arange(8)).any()


@pytest.mark.parametrize("framework", ["Keras", "PyTorch"])
def test_every_epoch_draws_an_order_of_its_own(small_run, framework):
    small_run.execute(f"weights, orders = draw({framework!r}, 0, 24)")
    assert small_run.value("np.all(np.sort(orders) == np.arange(1000))")
    assert small_run.value("len(np.unique(orders, axis=0))") == 24
    weight, first = small_run.value("[weights[0][0, 0], str(orders[0][:5])]")
    line = line_with(small_run, f"{framework}: first hidden weight {weight:+.4f}")
    assert line.endswith(f", first images {first}")


@pytest.mark.parametrize("name, api", [("Keras", "sequential"), ("PyTorch", "pytorch")])
def test_the_first_epoch_is_that_of_the_section(small_run, name, api):
    train = {"Keras": "train_keras", "PyTorch": "train_torch"}[name]
    small_run.execute(
        "epochs = 1\n"
        f"run = train_{api}(3, print)\n"
        "epochs = 15\n"
        f"training = {train}(3, 1, (), 'relu', 1e-7)\n"
        "vector = np.concatenate([w.ravel() for w in weights_of(run.model)])\n"
        "assert np.array_equal(training.weights[1], vector)\n"
        f"read = predict_{api}(run.model, x_test)\n"
        "assert np.array_equal(training.predictions[0], read)\n"
        f"first_batch = draw({name!r}, 3, 1)[1][0][:32]"
    )
    # The section's loss is the mean of all images; here the first 32 are left out.
    first_images = "x_train[first_batch], y_train[first_batch]"
    [first, _] = small_run.value(f"by_hand(build_{api}(3), {first_images})")
    rest, loss = small_run.value("[training.losses[0], run.history['loss'][0]]")
    assert 0.032 * first + 0.968 * rest == pytest.approx(loss, rel=1e-5)
    shown = small_run.value(f"{train}(0, 1, (), 'relu', 1e-7).losses[0]")
    assert line_with(small_run, f"{name}: training loss").endswith(f" {shown:.4f}")


def test_pytorch_draws_the_orders_of_its_section_in_all_epochs(small_run):
    trained = "train_torch(0, 15, (), 'relu', 1e-7).predictions[14]"
    assert small_run.value(f"np.array_equal({trained}, pytorch_predictions)")


PLAIN_STEP = """
EVERYTHING = frozenset(DIFFERENCES)

def off(training, adam, **options):
    # How far the weights after the first update are from those of a plain step.
    weights, orders = draw("Keras", 0, 1)
    model = build_pytorch(0).double()
    model.activation = nn.ACTIVATION()
    for parameter, array in zip(model.parameters(), weights, strict=True):
        parameter.data = torch.from_numpy(array.T).double()
    x = torch.from_numpy(x_train[orders[0][:32]]).double()
    y = torch.from_numpy(y_train[orders[0][:32]])
    optimizer = adam(model.parameters(), 0.001, **options)
    train_step(model, optimizer, x, y)
    vector = np.concatenate([p.detach().numpy().T.ravel() for p in model.parameters()])
    return abs(training.weights[0] - vector).max()
"""


@pytest.mark.parametrize("activation, epsilon", [("ReLU", 1e-7), ("Softplus", 1e-3)])
def test_the_first_update_is_that_of_a_plain_step(small_run, activation, epsilon):
    betas = float(np.float32(0.9)), float(np.float32(0.999))
    assert line_with(small_run, "β that float32 holds").endswith(f": {betas}")
    small_run.execute(PLAIN_STEP.replace("ACTIVATION", activation))
    network = f"{activation.lower()!r}, {epsilon}"
    size, exact = f"eps={epsilon}", f"betas={betas}"
    for training, adam in {
        "keras(0, 1, ('precision', 'rounded β')": f"KerasAdam, {size}, {exact}",
        "torch(0, 1, EVERYTHING": f"KerasAdam, {size}, {exact}",
        "torch(0, 1, EVERYTHING - {'size of ε'}": f"KerasAdam, eps=1e-8, {exact}",
        "torch(0, 1, EVERYTHING - {'place of ε'}": f"torch.optim.Adam, {size}, {exact}",
        "torch(0, 1, EVERYTHING - {'rounded β'}": f"KerasAdam, {size}",
    }.items():
        assert small_run.value(f"off(train_{training}, {network}), {adam})") < 1e-12


def test_the_control_moves_the_largest_output_weight_by_its_last_bit(small_run):
    """At a learning rate of 0 the weights stay as they start."""
    setting = "3, 1, ('initial weights',), 'relu', 1e-7"
    small_run.execute(
        "learning_rate = 0.0\n"
        f"start = train_torch({setting}).weights[0]\n"
        f"moved = train_torch({setting}, one_bit=True).weights[0]\n"
        "learning_rate = 0.001\n"
        "[place] = np.flatnonzero(start != moved)\n"
        "assert start[place] == build_sequential(3).get_weights()[2].max()\n"
        "assert moved[place] == np.nextafter(start[place], np.float32(0))"
    )
    assert "moved: ['-0.25000000', '0.24999999']" in line_with(small_run, "one bit")


# What is shown of planted trainings. The difference of a pair's weights grows tenfold
# with each epoch, and from a certain epoch on, as many predictions differ as it says.
PLANT = """
first_update = 1e-29
STARTS = {"relu": 3, "relu large": 5, "softplus": 18, "softplus large": 99}
STARTS |= {"float64": 17, "keras": 99, "moved": 99}

def plant(epochs, gaps, start, loss):
    predictions = np.tile(y_test, (epochs, 1))
    for epoch in range(start, epochs + 1):
        predictions[epoch - 1, :epoch] += 1
    losses = loss + np.arange(1, epochs + 1) / 1000
    return Training(np.outer(gaps, [0, 1]), predictions, losses)

def plant_keras(seed, epochs, removed, activation, epsilon):
    return plant(epochs, np.zeros(epochs + 1), STARTS["keras"], 0.9)

def plant_torch(seed, epochs, removed, activation, epsilon, one_bit=False):
    if epochs == 1:
        size = 1 + sum(DIFFERENCES.index(name) + 1 for name in removed)
        training = plant(1, size * (1 + seed) * np.array([0.001, 0.01]), 99, 0)
        training.predictions[0, : size + seed] += 1
        return training
    name = activation + " large" * (epsilon == 1e-3)
    if "precision" in removed:
        name = "float64"
    number = 1 + list(STARTS).index(name)
    gaps = number * 10.0 ** (np.arange(epochs + 1) - 30)
    gaps[0] = first_update
    if one_bit:
        return plant(epochs, -gaps, STARTS["moved"], 0.8)
    return plant(epochs, gaps, STARTS[name], number / 10)

planted = globals() | {"train_keras": plant_keras, "train_torch": plant_torch}
"""
ROWS = """
| nothing | 0.001 to 0.004 | 0.01 to 0.04 | 1 to 4 |  |
| + initial weights | 0.002 to 0.008 | 0.02 to 0.08 | 2 to 5 | 21 to 24 |
| + order of images | 0.004 to 0.02 | 0.04 to 0.2 | 4 to 7 | 20 to 23 |
| + size of ε | 0.007 to 0.03 | 0.07 to 0.3 | 7 to 10 | 19 to 22 |
| + place of ε | 0.01 to 0.04 | 0.1 to 0.4 | 11 to 14 | 18 to 21 |
| + precision | 0.02 to 0.06 | 0.2 to 0.6 | 16 to 19 | 17 to 20 |
| + rounded β | 0.02 to 0.09 | 0.2 to 0.9 | 22 to 25 | 16 to 19 |
| relu, ε 1e-07: bit | 17 | 22 | 22 | 1e-07 | 0.5220 |
| relu, ε 1e-07: both | 17 | 22 | 22 | 5e-08 | 0.9220 |
| relu, ε 1e-07: bit | 3 | 15 | 15 | 2e-15 | 0.1150 |
| relu, ε 0.001: bit | 5 | 15 | 15 | 4e-15 | 0.2150 |
| softplus, ε 1e-07: bit | 18 | 22 | 22 | 6e-08 | 0.3220 |
| softplus, ε 0.001: bit | none | 22 | 0 | 8e-08 | 0.4220 |
| relu, ε 1e-07: both | 3 | 15 | 15 | 1e-15 | 0.9150 |
| softplus, ε 0.001: both | none | 22 | 0 | 4e-08 | 0.9220 |
"""


def shortened(text):
    return text.replace(BIT, "bit").replace(OTHER, "both")


def run_planted(session, change=""):
    """Execute what comes from the ladder to the picture after these trainings."""
    session.execute(f"{PLANT}{change}")
    return session.run_in("planted", under(session.notebook, LADDER)[:6])


def test_the_tables_and_the_picture_show_the_differences_of_their_trainings(small_run):
    text, rows = shortened(markdown(run_planted(small_run))), ROWS.strip().splitlines()
    assert "| two trainings in float64 |" in text
    for row in rows:
        assert row in text.splitlines()
    found = small_run.value(
        "[f'{a.get_title()}: {n.get_label()}, {n.get_lw():g}, {n.get_ydata()[-1]:.0e}'"
        " for a in planted['amplifier_figure'].axes for n in a.lines[1:]]"
    )
    lines = [f"{row[0]}, float64, 0.8, {row[4]}" for row in map(fields, rows[7:9])]
    lines += [f"{row[0]}, float32, 2, {row[4]}" for row in map(fields, rows[9:])]
    assert sorted(map(shortened, found)) == sorted(lines)


def test_the_notebook_stops_for_a_difference_only_where_it_is_a_mistake(small_run):
    for change, message in {
        "first_update = 1.1e-12": "two computations",
        "STARTS['float64'], planted['is_protocol'] = 15, True": "that differ: ",
        "STARTS['moved'], planted['is_protocol'] = 22, True": "one bit moved: ",
        "STARTS['keras'], planted['is_protocol'] = 22, True": "Keras / PyTorch: ",
        "first_update, planted['is_protocol'] = 0.9e-12, True": None,
        "STARTS['float64'] = 1": None,
        "STARTS['moved'] = STARTS['keras'] = 22": None,
    }.items():
        stops = pytest.raises(CellExecutionError, match=message)
        with stops if message else contextlib.nullcontext():
            run_planted(small_run, change)


def test_the_proof_counts_the_epochs_and_hands_on_the_protocols_last(small_run):
    for first, without in (17, 15), (14, 13):
        text = printed(run_planted(small_run, f"STARTS['float64'] = {first}"))
        assert f"a differing prediction: {without} of the first 15\n" in text
        assert "largest weight difference after epoch 15: 5e-15\n" in text
    assert small_run.value("planted['aligned_differing']") == {"PyTorch": 15}


def test_the_density_is_that_of_the_inputs_of_relu_near_zero(small_run):
    inputs = "pytorch_run.model.hidden(torch.from_numpy(x_train)).detach().numpy()"
    near = small_run.value(f"np.sum(abs({inputs}) < 0.01)")
    text = f"128,000 inputs of ReLU in an epoch, density at zero {near / 2560:.2f}\n"
    assert text in printed(run_planted(small_run))


@pytest.mark.full
def test_the_ladder_is_as_the_text_reads_it(full_run):
    rows = columns(full_run.notebook, LADDER)
    update, epoch = "weight difference, 1 update", "weight difference, 1 epoch"
    alone = "differing predictions, only this put back"

    def numbers(row, column):
        return [float(number) for number in rows[f"+ {row}"][column].split(" to ")]

    drawn = numbers("initial weights", alone) + numbers("order of images", alone)
    for name in ("size of ε", "place of ε", "precision", "rounded β"):
        assert max(numbers(name, alone)) < min(drawn)
    # In the row "precision" only a rounded β is left.
    after_update, after_epoch = (numbers("precision", n) for n in (update, epoch))
    assert min(after_epoch) > 100 * 1563 * max(after_update)
    assert numbers("rounded β", "differing predictions, 1 epoch") == [0]


@pytest.mark.full
def test_relu_amplifies_early_and_softplus_late(full_run):
    """That softplus with a large ε does not is an assertion of the notebook's."""
    rows = columns(full_run.notebook, AMPLIFIERS)
    late = int(rows[f"softplus, ε 1e-07: {BIT}"][PARTS])
    for pair in (BIT, OTHER):
        assert int(rows[f"relu, ε 1e-07: {pair}"][PARTS]) < late - 5


@pytest.mark.full
def test_relu_with_a_large_epsilon_parts_by_luck(short_run):
    pair = "one_bit_pair(seed, 5, IN_FLOAT32, 'relu', 1e-3)"
    parted = f"[prediction_gaps({pair}).any() for seed in range(5)]"
    assert 0 < sum(short_run.value(parted)) < 5


@pytest.mark.full
def test_float64_with_a_large_epsilon_stays_together(short_run):
    pair = "train_pair(0, 22, DIFFERENCES, 'relu', 1e-3)"
    assert not any(short_run.value(f"prediction_gaps({pair})"))


@pytest.mark.full
@pytest.mark.parametrize("rate, epsilon, epochs", [(2e-4, 1e-7, 60), (0.001, 1e-3, 30)])
def test_smaller_steps_stay_together_down_to_the_loss_of_parting(
    short_run, rate, epsilon, epochs
):
    short_run.execute(
        "parted = one_bit_pair(0, 22, IN_FLOAT32, 'softplus', 1e-7)\n"
        "loss = parted[0].losses[np.flatnonzero(prediction_gaps(parted))[0]]\n"
        f"learning_rate = {rate}\n"
        # The cache holds no other training of so many epochs.
        f"together = one_bit_pair(0, {epochs}, IN_FLOAT32, 'softplus', {epsilon})\n"
        "learning_rate = 0.001\n"
        "assert not prediction_gaps(together).any()\n"
        "assert together[0].losses[-1] < loss"
    )
