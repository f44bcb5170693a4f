"""Section 9: its numbers, the proof, and what makes small differences large."""

import contextlib
import os
import re
import signal
import threading

import numpy as np
import pytest
from harness import cell_with, fields, kernel, markdown, printed, table_under, under
from nbclient.exceptions import CellExecutionError

NAMES = "initial weights, order of images, size of ε, place of ε, precision, rounded β"
ALL = tuple(NAMES.split(", "))
LADDER, PROOF, AMPLIFIERS = "### The ladder", "### The proof", "### The two amplifiers"
BIT, OTHER = "PyTorch / PyTorch, one bit moved", "Keras / PyTorch"
RELU, SOFTPLUS = ("relu", 1e-7), ("softplus", 1e-7)
RELU_LARGE, SOFTPLUS_LARGE = ("relu", 1e-3), ("softplus", 1e-3)
# The pairs in the tables of the proof (two, in float64) and of the amplifiers.
PAIRS = [(BIT, RELU), (OTHER, RELU), (BIT, RELU), (BIT, RELU_LARGE), (BIT, SOFTPLUS)]
PAIRS += [(BIT, SOFTPLUS_LARGE), (OTHER, RELU), (OTHER, SOFTPLUS_LARGE)]
# The training loss that the smaller learning rate must reach without parting.
LOSS = 0.0046
# What the tests compute in the kernel, in their own way.
HELPERS = """
def gaps(pair):
    one, two = pair
    weights = np.subtract(one.weights, two.weights, dtype="float64")
    predictions = np.sign(abs(one.predictions - two.predictions))
    return np.linalg.norm(weights, np.inf, axis=1), predictions.sum(axis=1)

def one_bit(seed, epochs, removed, *network):
    pair = [train_torch(seed, epochs, removed, *network)]
    return pair + [train_torch(seed, epochs, removed, *network, one_bit=True)]

def without(name):
    return tuple(other for other in DIFFERENCES if other != name)

def off(training, activation, epsilon, place=0):
    # How far the first update and the loss before it are from those by hand.
    weights, orders = draw("Keras", 0, 1)
    x, y = x_train[orders[0][:32]], np.eye(10)[y_train[orders[0][:32]]]
    w, b, v, c = (array.astype("float64") for array in weights)
    z = x.astype("float64") @ w + b
    h, slope = np.log1p(np.exp(z)), 1 / (1 + np.exp(-z))
    if activation == "relu":
        h, slope = np.maximum(z, 0), z > 0
    p = np.exp(h @ v + c) / np.exp(h @ v + c).sum(axis=1, keepdims=True)
    q = (p - y) / 32
    before = q @ v.T * slope
    gradient = [x.T @ before, before.sum(axis=0), h.T @ q, q.sum(axis=0)]
    gradient, start = (np.concatenate([*map(np.ravel, a)]) for a in (gradient, weights))
    root = np.sqrt(1 - float(np.float32(0.999)))
    step = gradient * root / (root * abs(gradient) + epsilon * root**place)
    loss = -np.log((p * y).sum(axis=1)).mean()
    weights = abs(training.weights[0] - start + 0.001 * step).max()
    return max(weights, abs(training.losses[0] - loss))
"""


def value(session, expression):
    """The value of an expression in the kernel, which knows the helpers."""
    session.execute(f"{HELPERS}answer = np.array({expression}).tolist()")
    return session.value("answer")


@pytest.fixture(scope="module")
def tiny():
    """Section 9 and what it needs in the protocol's epochs, on 100 images."""
    with kernel(MNIST_EPOCHS="15", MNIST_SEEDS="0 3") as session:
        session.run_sections(1, 2)
        for name, n in {"train": 100, "val": 50, "test": 200}.items():
            session.execute(f"x_{name}, y_{name} = x_{name}[:{n}], y_{name}[:{n}]")
        session.execute("steps_per_epoch = 4")
        session.run_sections(3, 4, 5, 7)
        for words in ("def float64_on_cpu(", "class KerasAdam("):
            session.run([cell_with(session.notebook, words)])
        session.run_sections(9)
        yield session


def ends(values, style):
    """The least and the largest, once if they read the same."""
    low, high = (f"{end:{style}}" for end in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def line_with(session, words):
    """The one line that section 9 printed with these words."""
    cells = under(session.notebook, "### The defaults that differ")
    text = "".join(map(printed, cells))
    [line] = [line for line in text.splitlines() if words in line]
    return line


def error_of(session, heading, place):
    """What stops a cell that is run again, or nothing."""
    try:
        session.execute(under(session.notebook, heading)[place].source)
    except CellExecutionError as error:
        return f"{error.ename}: {error.evalue}"
    return ""


@contextlib.contextmanager
def planted(session, array, change, **parameters):
    """For a time, an array in the kernel changed, and some parameters."""
    old = ", ".join(f"{name}={name}" for name in parameters)
    session.execute(f"old, target = dict({old}), {array}\nkept = target.copy()")
    session.execute(f"target{change}\nglobals().update({parameters})")
    try:
        yield
    finally:
        session.execute("globals().update(old)\ntarget[:] = kept")


def lines(notebook, heading):
    return [fields(line) for line in table_under(notebook, heading)[2:]]


# What the outputs show.


def test_the_table_of_defaults_shows_what_fresh_objects_have(tiny):
    keras_row, torch_row = lines(tiny.notebook, "### The defaults that differ")
    limits = f"{(6 / (784 + 128)) ** 0.5:.4f}", f"{784**-0.5:.4f}"
    assert keras_row == ["Keras", limits[0], "0.0000", "(784, 128)", "1e-07"]
    largest = value(tiny, "build_pytorch(0).hidden.bias.detach().numpy().max()")
    expected = [limits[1], f"{largest:.4f}", "(128, 784)", "1e-08"]
    assert torch_row == ["PyTorch", *expected]


def test_fit_repeats_the_order_of_arrays_and_not_of_tf_data(tiny):
    printed_orders = line_with(tiny, "on arrays:") + line_with(tiny, "on tf.data:")
    orders = np.reshape(re.findall(r"\d", printed_orders), (2, 3, 8)).astype(int)
    assert (np.sort(orders) == np.arange(8)).all()
    assert [len(np.unique(three, axis=0)) for three in orders] == [1, 3]
    assert (orders[0, 0] != np.arange(8)).any()


@pytest.mark.parametrize("name", ["Keras", "PyTorch"])
def test_with_nothing_removed_the_first_epoch_is_the_sections(tiny, name):
    side, run = {"Keras": (0, "sequential_run"), "PyTorch": (1, "pytorch_run")}[name]
    first, rest = value(tiny, f"train_pair(0, 1, ())[{side}].losses")
    # The section's loss is the mean of all batches; the first is in row 0.
    loss = value(tiny, f"{run}.history['loss'][0]")
    assert 0.32 * first + 0.68 * rest == pytest.approx(loss, rel=1e-5)
    assert line_with(tiny, f"{name}: training loss").endswith(f" {rest:.4f}")


def test_the_ladder_shows_the_ranges_of_its_trainings(tiny):
    pairs = "[gaps(train_pair(seed, 1, {})) for seed in seeds]".format
    for rung, row in enumerate(lines(tiny.notebook, LADDER)):
        weights, counts = zip(*value(tiny, pairs(ALL[:rung])), strict=True)
        expected = [f"+ {ALL[rung - 1]}" if rung else "nothing"]
        expected += [ends([w[i] for w in weights], ".1g") for i in (0, 1)]
        expected += [ends([int(count[1]) for count in counts], "d"), ""]
        if rung:
            alone = value(tiny, pairs(f"without({ALL[rung - 1]!r})"))
            expected[-1] = ends([int(counts[1]) for _, counts in alone], "d")
        assert row == expected
    assert rung == 6


def test_the_tables_and_the_picture_show_the_pairs(tiny):
    rows = lines(tiny.notebook, PROOF) + lines(tiny.notebook, AMPLIFIERS)
    curves = []
    for i, (row, (name, network)) in enumerate(zip(rows, PAIRS, strict=True)):
        removed = "without('precision')" if i > 1 else "DIFFERENCES"
        train = {BIT: "one_bit", OTHER: "train_pair"}[name]
        tiny.execute(f"{HELPERS}pair = {train}(0, 24, {removed}, *{network})")
        same = f"[a is b for a, b in zip(pair, list(pairs.values())[{i}])]"
        assert value(tiny, same) == [True, True]
        number_type = "float32" if i > 1 else "float64"
        assert value(tiny, "pair[1].weights.dtype.name") == number_type
        weights, counts = value(tiny, "gaps(pair)")
        right = value(tiny, "[np.mean(t.predictions[24] == y_test) for t in pair]")
        parted = [epoch for epoch, count in enumerate(counts) if count] + ["never"]
        title = f"{network[0]}, ε {network[1]:g}"
        expected = [f"{title}: {name}", f"{weights[15]:.0e}", f"{weights[24]:.0e}"]
        expected += [f"{parted[0]}", f"{counts[15]:.0f}", f"{counts[24]:.0f}"]
        expected += [f"{value(tiny, 'pair[0].losses[24]'):.4f}"]
        assert row == [*expected, "{:.2%} / {:.2%}".format(*right)]
        curve = [max(weight, 1e-17) for weight in weights]
        curves.append([title, f"{name}, {number_type}", curve])
    drawn = tiny.value(
        "[[axis.get_title(), line.get_label(), line.get_ydata().tolist()]"
        " for axis in amplifier_figure.axes for line in axis.lines[1:]]"
    )
    assert sorted(drawn) == sorted(curves)


def test_a_row_of_pairs_counts_the_predictions_that_differ(tiny):
    """Planted: from epoch 9 on, as many as the epoch says."""
    epoch = "np.arange(25)[:, None]"
    change = f" += (np.arange(200) < {epoch}) * ({epoch} > 8)"
    with planted(tiny, "list(pairs.values())[6][1].predictions", change):
        cell = tiny.execute(under(tiny.notebook, AMPLIFIERS)[0].source)
    assert fields(markdown(cell).splitlines()[6])[3:6] == ["9", "15", "24"]


def test_another_number_of_epochs_is_its_own_horizon(short_run):
    for heading in (PROOF, AMPLIFIERS):
        header = fields(table_under(short_run.notebook, heading)[0])
        found = [name for name in header if re.search(r"epoch \d", name)]
        assert found == ["weights, epoch 1", "predictions, epoch 1"]


def test_the_density_is_that_of_the_hidden_inputs_near_zero(tiny):
    inputs = "pytorch_run.model.hidden(torch.from_numpy(x_train)).detach().numpy()"
    near = value(tiny, f"np.sum((-0.01 < {inputs}) & ({inputs} < 0.01))")
    words = line_with(tiny, "density at zero").split()
    assert words[0] == "12,800"
    assert float(words[-1]) == pytest.approx(near / 12_800 / 0.02, abs=0.006)


# What a training is.


@pytest.mark.parametrize("activation", ["relu", "softplus"])
@pytest.mark.parametrize("epsilon", [1e-7, 1e-3])
def test_both_make_the_first_update_that_one_makes_by_hand(tiny, activation, epsilon):
    network = f"{activation!r}, {epsilon}"
    pair = f"train_pair(0, 1, DIFFERENCES, {network})"
    assert max(value(tiny, f"[off(t, {network}) for t in {pair}]")) < 1e-12
    for name, other in (("size of ε", "1e-8"), ("place of ε", f"{epsilon}, place=1")):
        own = f"train_torch(0, 1, without({name!r}), {network})"
        assert value(tiny, f"off({own}, {activation!r}, {other})") < 1e-12


@pytest.mark.parametrize("name", ["precision", ""])
def test_the_control_moves_the_largest_output_weight_by_its_last_bit(tiny, name):
    """At a learning rate of 0 the weights stay as they start."""
    call = "train_torch.__wrapped__(0, 1, {}, 'relu', 1e-7{}).weights[0]".format
    names = tuple(other for other in ALL if other != name)
    with planted(tiny, "np.zeros(1)", "[0] = 0", learning_rate=0.0):
        tiny.execute(f"start = {call(names, '')}")
        tiny.execute(f"moved = {call(names, ', one_bit=True')}")
        tiny.execute("alone = " + call("('initial weights',)", ""))
    tiny.execute("drawn = [a.ravel() for a in build_sequential(0).get_weights()]")
    same = "[np.all(a == np.concatenate(drawn)) for a in (start, alone)]"
    assert value(tiny, same) == [True, True]
    [place] = value(tiny, "np.flatnonzero(start != moved)")
    assert value(tiny, f"start[{place}] == drawn[2].max()")
    below = f"np.nextafter(start[{place}], start.dtype.type(0))"
    assert value(tiny, f"moved[{place}] == {below}")


@pytest.mark.parametrize("framework", ["Keras", "PyTorch"])
def test_the_draws_depend_on_the_seed_alone(tiny, framework):
    drawn = f"draw.__wrapped__({framework!r}, " + "{}, {})[1]"
    orders = value(tiny, drawn.format(3, 24))
    tiny.execute("keras.utils.set_random_seed(99)\ntorch.manual_seed(99)")
    assert value(tiny, drawn.format(3, 1)) == orders[:1]
    assert value(tiny, drawn.format(4, 1)) != orders[:1]
    assert (np.sort(orders) == np.arange(100)).all()
    assert len(np.unique(orders, axis=0)) == 24
    line = line_with(tiny, f"{framework}: first hidden weight")
    weight = value(tiny, f"draw({framework!r}, 0, 1)[0][0][0, 0]")
    assert f" {weight:+.4f}," in line
    first = value(tiny, f"draw({framework!r}, 0, 1)[1][0][:5]")
    assert line.split("[")[1].strip("]").split() == list(map(str, first))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for another process")
def test_an_interrupted_cell_goes_on_where_it_stopped(tiny):
    tiny.execute("before = train_pair(0, 24, DIFFERENCES)")
    misses = "[f.cache_info().misses for f in (train_keras, train_torch)]"
    in_keras, in_torch = value(tiny, misses)
    threading.Timer(2, os.kill, (tiny.value("os.getpid()"), signal.SIGINT)).start()
    with pytest.raises(CellExecutionError) as caught:
        tiny.execute("train_pair(4, 9999, DIFFERENCES)")
    assert caught.value.ename == "KeyboardInterrupt"
    # What was done is kept, and nothing of what was begun is in the next training.
    assert value(tiny, "train_pair(0, 24, DIFFERENCES)[0] is before[0]")
    assert value(tiny, misses) == [in_keras + 1, in_torch]
    setting = "('precision', 'rounded β'), 'relu', 1e-7"
    again = f"train_keras.__wrapped__(0, 24, {setting}).weights == before[0].weights"
    assert value(tiny, f"np.all({again})")


# The assertions that stop the notebook.


@pytest.mark.parametrize("name", [name for name in ALL if name != "precision"])
def test_the_proof_stops_if_a_default_is_not_equal(tiny, name):
    tiny.execute(f"{HELPERS}other = train_pair(0, 1, without({name!r}))[1].weights[0]")
    with planted(tiny, "list(pairs.values())[1][1].weights", "[0] = other"):
        assert "AssertionError: two computations" in error_of(tiny, PROOF, 1)
    assert not error_of(tiny, PROOF, 1)


@pytest.mark.parametrize(
    ("batch", "rate", "seed", "row"),
    [(32, 0.001, 0, 1), (32, 0.001, 7, 15), (32, 0.001, 7, 16), (32, 0.001, 8, 1)]
    + [(32, 0.1, 0, 1), (64, 0.001, 0, 1)],
)
def test_the_proof_stops_for_a_prediction_only_where_none_is_known_to_differ(
    tiny, batch, rate, seed, row
):
    parameters = {"batch_size": batch, "learning_rate": rate, "seeds": [seed, 2]}
    array, change = "list(pairs.values())[1][1].predictions", f"[{row}, 7] += 1"
    with planted(tiny, array, change, **parameters):
        found = error_of(tiny, PROOF, 1)
    stops = (batch, rate) == (32, 0.001) and seed < 8 and row < 16
    assert ("predictions that differ" in found) == stops


def test_the_proof_counts_the_epochs_and_hands_on_the_protocols_last(tiny):
    array, proof = "list(pairs.values())[1][1].predictions", under(tiny.notebook, PROOF)
    with planted(tiny, array, "[[2, 15, 16], :3] += 1", batch_size=64):
        text = printed(tiny.execute(proof[1].source))
        differing = tiny.value("{n: int(v) for n, v in aligned_differing.items()}")
    assert "no prediction differs after 13 of 15 epochs" in text
    assert differing == {"Keras Sequential": 0, "Keras Functional": 0, "PyTorch": 3}
    tiny.execute(proof[1].source)
    assert "no prediction differs after 15 of 15 epochs" in printed(proof[1])


def test_the_proof_stops_if_functional_differs_in_one_bit(tiny):
    array = "list(pairs.values())[1][0].weights"
    with planted(tiny, array, "[15, 5] = np.nextafter(target[15, 5], 9)"):
        assert "Sequential and Functional differ" in error_of(tiny, PROOF, 1)


@pytest.mark.parametrize("row", [5, 7])
@pytest.mark.parametrize("protocol", [True, False])
def test_softplus_with_a_large_epsilon_stops_for_one_prediction(tiny, row, protocol):
    """In the protocol's run only; row 5 is of one moved bit, row 7 of the frameworks."""
    array = f"list(pairs.values())[{row}][0].predictions"
    with planted(tiny, array, "[24, 7] += 1", is_protocol=protocol):
        found = error_of(tiny, AMPLIFIERS, 0)
    assert found.startswith("AssertionError") == protocol


# What the text says.


def test_at_a_high_learning_rate_rounding_parts_pytorch_from_itself(short_run):
    """Every weight starts one bit off, up or down at random."""
    short_run.execute(
        "kept, bits, learning_rate = draw, np.random.default_rng(0), 0.1\n"
        "def draw(*setting):\n"
        "    weights, orders = kept(*setting)\n"
        "    weights = [array.astype('float64') for array in weights]\n"
        "    ways = [bits.choice([-9, 9], size=array.shape) for array in weights]\n"
        "    return list(map(np.nextafter, weights, ways)), orders\n"
        "setting = 7, 1, DIFFERENCES, 'relu', 1e-7\n"
        "moved = train_torch.__wrapped__(*setting)\n"
        "draw = kept\n"
        "parted = moved, train_torch.__wrapped__(*setting)\n"
        "learning_rate = 0.001"
    )
    (first, epoch), _ = value(short_run, "gaps(parted)")
    assert 0 < first < 1e-12 and epoch > 1e-2


def test_the_ladder_is_as_the_text_reads_it(full_run):
    rows = lines(full_run.notebook, LADDER)
    update, epoch, _, alone = (
        [[float(n) for n in row[i].split(" to ") if n] for row in rows]
        for i in range(1, 5)
    )
    assert min(alone[1] + alone[2]) > max(map(max, alone[3:]))
    # In row 2 the size of ε is left, in row 5 only a rounded β.
    assert max(update[5]) < 1e-4 * min(update[2])
    assert min(epoch[5]) > 0.1 * max(epoch[2])
    assert max(update[6]) < 1e-13 and rows[6][3] == "0"


def test_two_things_amplify_in_the_protocols_run(full_run):
    _, other = lines(full_run.notebook, PROOF)
    rows = {row[0]: row[3:] for row in lines(full_run.notebook, AMPLIFIERS)}
    # From which epoch on predictions differ, how many at 15 and at 24, training loss.
    assert int(other[3]) > 15
    for pair in (BIT, OTHER):
        parted, at_15, *_ = rows[f"relu, ε 1e-07: {pair}"]
        assert int(parted) < 6 and 30 < int(at_15) < 400
        assert rows[f"softplus, ε 0.001: {pair}"][0] == "never"
    parted, _, at_24, *_ = rows[f"softplus, ε 1e-07: {BIT}"]
    assert int(parted) >= 10 and int(at_24) > 30
    assert value(full_run, f"list(pairs.values())[4][0].losses[{parted}]") > LOSS
    losses = [float(row[3]) for row in rows.values()]
    assert max(losses) < 10 * min(losses)
    accuracies = [float(a.strip("%")) for r in rows.values() for a in r[4].split(" / ")]
    assert np.ptp(accuracies) < 1


@pytest.mark.full
@pytest.mark.parametrize("seed", [1, 7])
def test_the_proof_holds_on_other_first_seeds(short_run, seed):
    _, counts = value(short_run, f"gaps(train_pair({seed}, 15, DIFFERENCES))")
    assert not any(counts)


@pytest.mark.full
def test_relu_with_a_large_epsilon_parts_by_luck(short_run):
    pairs = "[gaps(one_bit(seed, 5, without('precision'), 'relu', 1e-3))[1] for seed in range(5)]"
    parted = np.any(value(short_run, pairs), axis=1)
    print(f"of five seeds, these part within five epochs: {np.flatnonzero(parted)}")
    assert 0 < sum(parted) < 5


@pytest.mark.full
def test_float64_with_a_large_epsilon_stays_together(short_run):
    pair = "train_pair(0, 24, DIFFERENCES, 'relu', 1e-3)"
    assert not any(value(short_run, f"gaps({pair})")[1])


@pytest.mark.full
def test_a_smaller_learning_rate_does_not_amplify(short_run):
    """Down to a training loss below the one at which the protocol's rate had parted."""
    with planted(short_run, "np.zeros(1)", "[0] = 0", learning_rate=2e-4):
        # Seed 0 is trained for 60 epochs at this rate only, so the cache holds no other.
        _, counts = value(
            short_run, "gaps(one_bit(0, 60, without('precision'), 'softplus', 1e-7))"
        )
    assert not any(counts)
    losses = "train_torch(0, 60, without('precision'), 'softplus', 1e-7).losses"
    assert value(short_run, f"{losses}[-1]") < LOSS
