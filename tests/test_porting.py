"""Section 8: the check finds every planted mistake, passes what is right, and refuses the rest."""

import copy
import math

import numpy as np
import pytest
from harness import definitions, fields, table_under
from nbclient.exceptions import CellExecutionError

n = definitions(
    *("float_type", "KerasAdam", "train_one_epoch", "option"),
    *("STEPS", "probabilities", "right_share", "largest_difference", "keras_steps"),
    *("pytorch_steps", "check_port", "first_off"),
)
keras, nn, torch = n.keras, n.nn, n.torch


@pytest.fixture(params=[1, 7])
def seeded(request, short_run):
    """The short run with another first seed; with 0, its own cells would stop."""
    short_run.execute(f"kept, seeds = seeds, [{request.param}]")
    yield short_run
    short_run.execute("seeds = kept")


def test_every_mistake_is_caught_where_the_table_says(seeded):
    found = seeded.value(
        "[[name, first_off(check(port)), expected] for name, expected, port in MISTAKES]"
    )
    assert len(found) >= 14
    assert [row for row in found if row[1] != row[2]] == []


def test_the_right_port_stays_at_rounding(seeded):
    assert seeded.value("float(max(check(Port()).values()))") < 1e-13


def test_a_mistake_caught_elsewhere_than_expected_stops_the_notebook(short_run):
    with pytest.raises(CellExecutionError, match="caught at none, not at data"):
        short_run.execute("mistake_row('planted', 'data', Port())")


def test_accuracy_does_not_tell_right_from_wrong(short_run):
    rows = map(fields, table_under(short_run.notebook, "### The mistakes")[2:])
    accuracy = {row[0]: float(row[4].rstrip("%")) for row in rows}
    right = accuracy["none (to PyTorch)"]
    assert accuracy["none (to Keras)"] == pytest.approx(right, abs=2)
    close = [name for name in accuracy if abs(accuracy[name] - right) < 1]
    assert '`reduction="sum"`' in close and len(close) >= 6


class Images(nn.Module):
    """The PyTorch half of a small convolutional network with global pooling."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, stride=2)
        self.output = nn.Linear(8, 5)

    def forward(self, x):
        hidden = torch.relu(self.second(torch.relu(self.first(x))))
        return self.output(hidden.mean(dim=(2, 3)))


def image_models():
    """The same network in both, with equal weights; kernels are square where they can be."""
    keras.utils.set_random_seed(0)
    layers = [
        keras.Input((12, 10, 3)),
        keras.layers.Conv2D(8, 3, activation="relu"),
        keras.layers.Conv2D(8, 3, strides=2, activation="relu"),
        keras.layers.GlobalAveragePooling2D(),
        keras.layers.Dense(5),
    ]
    keras_model, model = keras.Sequential(layers), Images()
    with n.float_type("float64"):
        adam = keras.optimizers.Adam(1e-3)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    keras_model.compile(adam, loss, metrics=["accuracy"])
    permutations = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}
    with torch.no_grad():
        weights = keras_model.get_weights()
        for parameter, weight in zip(model.parameters(), weights, strict=True):
            moved = weight.transpose(permutations[weight.ndim]).copy()
            parameter.copy_(torch.from_numpy(moved))
    return keras_model, model


def check_images(keras_model, model, channels_first=True, rate=1e-3):
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(7, 12, 10, 3)).astype("float32"), np.arange(7) % 5
    moved = torch.from_numpy(np.moveaxis(x, -1, 1).copy() if channels_first else x)
    adam = n.KerasAdam(model.parameters(), rate)
    batch = moved, torch.from_numpy(y)
    loss = nn.CrossEntropyLoss()
    training = loss, adam, n.train_one_epoch
    return n.check_port(keras_model, (x, y), model, *training, batch)


def test_a_convolutional_port_passes_and_stays_as_it_was():
    keras_model, model = image_models()
    before = keras_model.get_weights(), copy.deepcopy(model.state_dict())
    differences = check_images(keras_model, model)
    assert list(differences) == n.STEPS
    assert max(differences.values()) < 1e-12
    for old, new in zip(before[0], keras_model.get_weights(), strict=True):
        assert np.array_equal(old, new)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, before[1][name])
    assert keras.config.floatx() == "float32"


def test_a_square_convolution_kernel_that_is_only_transposed_is_found():
    keras_model, model = image_models()
    with torch.no_grad():
        weight = model.second.weight
        weight.copy_(weight.transpose(2, 3).clone())
    assert n.first_off(check_images(keras_model, model)) == "weights"


def test_an_embedding_is_not_transposed():
    keras.utils.set_random_seed(0)
    layers = [keras.Input((4,), dtype="int32"), keras.layers.Embedding(6, 6)]
    output = keras.layers.Dense(3, activation="softmax")
    layers += [keras.layers.GlobalAveragePooling1D(), output]
    keras_model = keras.Sequential(layers)
    embedding, kernel, bias = keras_model.get_weights()
    pooling = nn.AdaptiveAvgPool2d((1, None))
    model = nn.Sequential(nn.Embedding(6, 6), pooling, nn.Flatten(), nn.Linear(6, 3))
    arrays = embedding, kernel.T, bias
    with torch.no_grad():
        for parameter, array in zip(model.parameters(), arrays, strict=True):
            parameter.copy_(torch.from_numpy(array.copy()))
    tokens = np.random.default_rng(0).integers(0, 6, size=(5, 4)).astype("int32")
    with torch.no_grad():
        ported = model(torch.from_numpy(tokens)).softmax(dim=1).numpy()
    assert np.allclose(ported, keras_model(tokens).numpy(), atol=1e-6)


def small_pair(*hidden, torch_hidden, shape=(6, 4)):
    """A Keras model and its PyTorch port: these layers, then ten or so classes."""
    keras.utils.set_random_seed(0)
    keras_model = keras.Sequential([keras.Input(shape), *hidden, keras.layers.Dense(5)])
    output = nn.Linear(keras_model.layers[-1].kernel.shape[0], 5)
    model = nn.Sequential(*torch_hidden, output)
    arrays = [w.numpy() for w in keras_model.trainable_weights]
    with torch.no_grad():
        for parameter, array in zip(model.parameters(), arrays, strict=True):
            parameter.copy_(torch.from_numpy(array.T.copy()))
    return keras_model, model


def check_small(keras_model, model, metrics=("accuracy",), steps=0):
    """check_port on a random batch, after some steps of PyTorch's optimizer."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(9, *keras_model.input_shape[1:])).astype("float32")
    y = np.arange(9) % 5
    with n.float_type("float64"):
        adam = keras.optimizers.Adam(1e-3)
    keras_model.compile(adam, ON_LOGITS, metrics=list(metrics))
    loss = nn.CrossEntropyLoss()
    adam = n.KerasAdam(model.parameters(), 1e-3, eps=1e-7)
    kept = copy.deepcopy(model.state_dict())
    batch = torch.from_numpy(x), torch.from_numpy(y)
    for _ in range(steps):
        n.train_one_epoch(model, loss, adam, [batch])
    model.load_state_dict(kept)
    training = loss, adam, n.train_one_epoch
    return n.check_port(keras_model, (x, y), model, *training, batch)


ON_LOGITS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


@pytest.mark.parametrize("metrics", [["accuracy"], ["acc"], []])
@pytest.mark.parametrize("steps", [0, 20])
def test_flattened_images_pass_with_or_without_a_metric_or_earlier_steps(
    metrics, steps
):
    pair = small_pair(
        keras.layers.Flatten(),
        keras.layers.Dense(8, activation="relu"),
        torch_hidden=[nn.Flatten(), nn.Linear(24, 8), nn.ReLU()],
    )
    found = check_small(*pair, metrics, steps)
    assert max(found.values()) < 1e-12


@pytest.mark.parametrize(("epsilon", "step"), [(1e-3, "none"), (1e-5, "forward pass")])
def test_batch_normalization_passes_when_its_epsilon_is_keras(epsilon, step):
    layers = [keras.layers.Flatten(), keras.layers.Dense(8)]
    layers.append(keras.layers.BatchNormalization())
    normalization = nn.BatchNorm1d(8, eps=epsilon, momentum=0.01)
    hidden = [nn.Flatten(), nn.Linear(24, 8), normalization]
    pair = small_pair(*layers, torch_hidden=hidden)
    found = check_small(*pair)
    assert n.first_off(found) == step


def test_a_forgotten_penalty_shows_in_the_loss():
    penalized = keras.layers.Dense(8, activation="relu", kernel_regularizer="l2")
    hidden = [nn.Flatten(), nn.Linear(24, 8), nn.ReLU()]
    pair = small_pair(keras.layers.Flatten(), penalized, torch_hidden=hidden)
    found = check_small(*pair)
    assert n.first_off(found) == "loss"


def test_a_layer_frozen_on_both_sides_passes():
    frozen = keras.layers.Dense(8, activation="relu")
    linear = nn.Linear(24, 8)
    hidden = [nn.Flatten(), linear, nn.ReLU()]
    pair = small_pair(keras.layers.Flatten(), frozen, torch_hidden=hidden)
    frozen.trainable = False
    linear.requires_grad_(False)
    found = check_small(*pair)
    assert n.first_off(found) == "none"


def test_kernels_behind_a_flatten_fit_once_the_channels_are_last_again():
    keras.utils.set_random_seed(0)
    layers = [keras.Input((4, 3, 2)), keras.layers.Flatten(), keras.layers.Dense(5)]
    keras_model = keras.Sequential(layers)
    kernel, bias = keras_model.get_weights()
    linear = nn.Linear(24, 5)
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(kernel.T.copy()))
        linear.bias.copy_(torch.from_numpy(bias))
    x = np.random.default_rng(0).normal(size=(7, 4, 3, 2)).astype("float32")
    images = torch.from_numpy(np.moveaxis(x, -1, 1).copy())
    with torch.no_grad():
        right = linear(images.permute(0, 2, 3, 1).flatten(1)).numpy()
        wrong = linear(images.flatten(1)).numpy()
    expected = keras_model(x).numpy()
    assert np.allclose(right, expected, atol=1e-5)
    assert not np.allclose(wrong, expected, atol=0.1)


def test_layers_have_the_defaults_that_the_checklist_names():
    batch = keras.layers.BatchNormalization(), nn.BatchNorm1d(1)
    assert (batch[0].epsilon, batch[0].momentum) == (1e-3, 0.99)
    assert (batch[1].eps, batch[1].momentum) == (1e-5, 0.1)
    epsilons = keras.layers.LayerNormalization().epsilon, nn.LayerNorm(1).eps
    assert epsilons == (1e-3, 1e-5)
    slopes = keras.layers.LeakyReLU().negative_slope, nn.LeakyReLU().negative_slope
    assert slopes == pytest.approx((0.3, 0.01))


@pytest.mark.parametrize("rate", [1e-3, 0.1])
@pytest.mark.parametrize("decay", [0, 0.01])
def test_keras_adam_has_keras_formula_with_and_without_decay(rate, decay):
    with n.float_type("float64"):
        variable = keras.Variable(np.linspace(-1, 1, 7), dtype="float64")
        ours = keras.optimizers.Adam(rate, weight_decay=decay or None)
    parameter = torch.nn.Parameter(torch.linspace(-1, 1, 7, dtype=torch.float64))
    options = {"eps": 1e-7, "weight_decay": decay, "decoupled_weight_decay": True}
    theirs = n.KerasAdam([parameter], rate, **options)
    for step in range(5):
        gradient = np.geomspace(1e-9, 1, 7) * (-1) ** step
        ours.apply([n.tf.constant(gradient)], [variable])
        parameter.grad = torch.from_numpy(gradient.copy())
        theirs.step()
        assert theirs.param_groups[0]["lr"] == rate
        assert theirs.param_groups[0]["eps"] == 1e-7
        assert theirs.param_groups[0]["weight_decay"] == decay
        difference = np.abs(variable.numpy() - parameter.detach().numpy())
        # Keras passes the decay through float32 too, so each step is 2e-8 of it off.
        assert difference.max() < 1e-14 + 5e-7 * rate * decay


def test_keras_adam_keeps_each_groups_epsilon_and_a_rate_that_is_a_tensor():
    small, large = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    rate = torch.tensor(1e-3)
    groups = [{"params": [small]}, {"params": [large], "eps": 1e-3}]
    optimizer = n.KerasAdam(groups, rate)
    small.grad = large.grad = torch.full((1,), 1e-3)
    optimizer.step()
    assert rate.item() == pytest.approx(1e-3, rel=1e-7)
    assert [group["eps"] for group in optimizer.param_groups] == [1e-7, 1e-3]
    assert (1 - small.item()) > 2 * (1 - large.item())


@pytest.mark.parametrize("rate", [1 / 3, 0.1 / 3, 0.05 * 0.95**20])
def test_a_learning_rate_with_many_digits_is_no_mistake(rate):
    keras_model, model = image_models()
    keras_model.optimizer.learning_rate = rate
    assert n.first_off(check_images(keras_model, model, rate=rate)) == "none"


def test_what_is_not_a_number_is_off(short_run):
    assert n.first_off(dict.fromkeys(n.STEPS, 0.0) | {"loss": math.nan}) == "loss"
    short_run.execute("lost = Port(loss_function=lambda z, y: math.nan * z.sum())")
    assert short_run.value("first_off(check(lost))") == "loss"


def test_arrays_of_unequal_size_differ():
    assert n.largest_difference(np.zeros(1), np.zeros(3)) == np.inf


@pytest.mark.parametrize("change", ["number", "shape"])
def test_models_that_do_not_match_are_refused(change):
    keras_model, model = image_models()
    outputs = {"number": nn.Linear(8, 5, bias=False), "shape": nn.Linear(8, 6)}
    model.output = outputs[change]
    with pytest.raises(ValueError, match="differ in number or shape"):
        check_images(keras_model, model)
    assert keras.config.floatx() == "float32"


def test_the_optimizers_defaults_are_those_of_fresh_objects(short_run):
    lines = table_under(short_run.notebook, "### Other optimizers")
    rates = {fields(line)[0]: fields(line)[1] for line in lines[2:]}
    weights = [torch.nn.Parameter(torch.zeros(1))]
    for name, shown in rates.items():
        ours = getattr(keras.optimizers, name.replace("NA", "Na"))()
        theirs = getattr(torch.optim, name)(weights)
        rates = [float(ours.learning_rate), theirs.defaults["lr"]]
        values = [float(value) for value in shown.strip("*").split("/")]
        assert values == pytest.approx(rates if len(values) == 2 else rates[:1])
        assert (len(values) == 2) == shown.startswith("**")


def test_keras_on_pytorch_agrees_with_both_but_for_rounding(short_run):
    table = table_under(short_run.notebook, "### Formula or engine?")
    rows = [fields(line) for line in table[2:]]
    assert len(rows) == 2
    assert all(float(row[1]) < 1e-3 and row[2] == "0" for row in rows)


def test_a_failing_child_says_why(short_run):
    cell = next(c for c in short_run.notebook.cells if "subprocess.run(" in c.source)
    broken = cell.source.replace("model.fit(x, y", 'model.fit(y, "planted"')
    short_run.execute(
        f"try:\n    exec({broken!r})\nexcept RuntimeError as e:\n    why = str(e)"
    )
    assert len(short_run.value("why").splitlines()) <= 5
    assert "Error" in short_run.value("why")
