"""Section 8's two tables: what stands in a row is what both frameworks compute."""

import math
import re

import numpy as np
import pytest
from harness import committed, definitions, fields, table

n = definitions()
keras, tf, torch = n.keras, n.tf, n.torch
layers, optimizers, nn, F = (
    keras.layers,
    keras.optimizers,
    torch.nn,
    torch.nn.functional,
)
CAUSES, OTHERS, CHECKS = "### The usual causes", "### Other optimizers", {}
Sparse = keras.losses.SparseCategoricalCrossentropy


def row(start):
    """Keep the check of the row that starts like this; it gets the other two fields."""
    return lambda check: CHECKS.setdefault(start, check)


def below(heading):
    """The notebook's text from a heading to the next one."""
    cells = [cell for cell in committed().cells if cell.cell_type == "markdown"]
    text = "\n\n".join(cell.source for cell in cells).split(f"{heading}\n")[1]
    return re.split("^##", text, flags=re.MULTILINE)[0]


def rows(heading):
    return [fields(line) for line in table(below(heading))[2:]]


def numbers(text):
    return [float(t) for t in re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?:e-\d+)?", text)]


def code(text):
    return re.findall(r"`([^`]+)`", text)


def plain(x):
    return x.detach().numpy() if torch.is_tensor(x) else keras.ops.convert_to_numpy(x)


def tensor(x, *axes):
    return torch.tensor(plain(x).transpose(axes or None) if axes else plain(x))


def near(a, b, tolerance=1e-4):
    a, b = plain(a), plain(b)
    return a.size in (b.size, 1) and np.allclose(a.ravel(), b.ravel(), tolerance, 1e-6)


def random(*shape):
    return np.random.default_rng(0).normal(size=shape).astype("float32")


def fill(layer, *arrays):
    for parameter, values in zip(layer.parameters(), arrays, strict=True):
        parameter.data = tensor(values)


def step(optimizer, gradient, start=0.0, **options):
    """By how much an optimizer's first step lowers a weight."""
    if issubclass(optimizer, torch.optim.Optimizer):
        weight = nn.Parameter(torch.tensor([start]))
        weight.grad = torch.tensor([gradient])
        optimizer([weight], **options).step()
    else:
        weight = keras.Variable([start])
        optimizer(**options).apply([tf.constant([gradient])], [weight])
    return start - plain(weight)[0]


@row("Adam's ε")
def adam(ours, theirs):
    [mine], [other], v = numbers(ours), numbers(theirs), 1e-6 * math.sqrt(1 - 0.999)
    assert near(step(optimizers.Adam, 1e-6), 1e-3 / (1 + mine / v))
    assert near(step(torch.optim.Adam, 1e-6), 1e-3 / (1 + other / 1e-6))
    assert "before the bias" in ours and "after the bias" in theirs


@row("weight decay")
def weight_decay(ours, theirs):
    decay = {"gradient": 0.0, "start": 2.0, "weight_decay": 0.5}
    assert near(step(optimizers.Adam, learning_rate=0.1, **decay), 0.1 * 0.5 * 2)
    assert near(step(torch.optim.AdamW, lr=0.1, **decay), 0.1 * 0.5 * 2)
    assert "takes rate · λw" in ours and "`AdamW` it takes rate · λw" in theirs
    # Adam's first step is the rate, whatever the gradient.
    assert near(step(torch.optim.Adam, lr=0.2, **decay), 0.2)
    mine, other = (re.search(r"adds (\d?)λw", text)[1] for text in (ours, theirs))
    penalty = keras.regularizers.L2(0.5)
    assert near(penalty(tf.constant([3.0])), int(mine) * 0.5 * 3**2 / 2)
    assert other == "" and near(step(torch.optim.SGD, lr=1, **decay), 0.5 * 2)


@row("shapes (n, 1)")
def shapes(ours, theirs):
    x = np.float32([[0], [1], [1], [0]])
    model = keras.Sequential([layers.Dense(1, kernel_initializer="ones")])
    assert "losses given to `compile`" in ours and "a metric of your own broad" in ours

    def own(y, p):
        return (y - p) ** 2

    for loss in ("mse", own):
        model.compile("sgd", loss, metrics=["mse", "accuracy", own])
        assert model.evaluate(x, x[:, 0], verbose=0) == [0, 0, 1, 0.5]

    class Subclass(keras.losses.Loss):
        def call(self, y, p):
            return own(y, p)

    assert Subclass()(x[:, 0], x) == 0.5
    for name in re.findall(r"[A-Z]\w+", ours.split("subclass")[1]):
        results = [getattr(keras.metrics, name)() for _ in range(2)]
        results[0].update_state(x, x[::-1] / 2 + 0.1)
        results[1].update_state(x[:, 0], x[::-1] / 2 + 0.1)
        assert abs(results[0].result() - results[1].result()) > 1e-3, name
    p, y = tensor(x), tensor(x[:, 0])
    difference, warns, *refuse = code(theirs)
    assert eval(difference, {"p": p, "y": y}).shape == (4, 4)
    with pytest.warns(UserWarning, match="target size"):
        assert getattr(nn, warns)()(p, y) == 0.5
    for name in refuse:
        with pytest.raises(ValueError, match="arget size"):
            getattr(nn, name)()(p, y)


@row("what goes into")
def loss(ours, theirs):
    pattern = r"`(\w+)`(?: and `(\w+)`)? takes? ([\w-]+)"
    found = re.findall(pattern, ours) + re.findall(pattern, theirs)
    names = [(name, kind) for *pair, kind in found for name in pair if name]
    z, y = tensor(random(5, 3)), torch.arange(5) % 3
    for name, kind in names:
        p, target = z.softmax(1), y
        expected = F.cross_entropy(z, y)
        if name.startswith("B"):
            p, target = z.sigmoid(), F.one_hot(y).float()
            expected = -(p * target + (1 - p) * (1 - target)).log().mean()
        inputs = {"logits": z, "probabilities": p, "log-probabilities": p.log()}
        if hasattr(nn, name):
            assert near(getattr(nn, name)()(inputs[kind], target), expected)
        else:
            of = getattr(keras.losses, name)
            assert near(of()(target.numpy(), inputs[kind].numpy()), expected)
            assert near(of(from_logits=True)(target.numpy(), z.numpy()), expected)
    assert len(names) == 6
    assert not near(F.cross_entropy(z.softmax(1), y), F.cross_entropy(z, y), 0.01)
    means = Sparse().reduction, nn.CrossEntropyLoss().reduction
    assert means == (code(ours)[-1], code(theirs)[-1])


@row("batch normalization")
def batch_normalization(ours, theirs):
    x, layer, other = random(6, 1) / 50, layers.BatchNormalization(), nn.BatchNorm1d(1)
    (old, epsilon), (new, small) = numbers(ours), numbers(theirs)[:2]
    centred, mean, variance = x - x.mean(), x.mean(), x.var()
    assert near(layer(x, training=True), centred / (variance + epsilon) ** 0.5)
    assert near(other(tensor(x)), centred / (variance + small) ** 0.5)
    assert near(layer.moving_mean, (1 - old) * mean)
    assert near(other.running_mean, new * mean)
    assert near(layer.moving_variance, old + (1 - old) * variance, 1e-6)
    assert near(other.running_var, 1 - new + new * x.var(ddof=1), 1e-6)
    assert "of the old" in ours and "of the new" in theirs and "over n − 1" in theirs


@row("initial weights")
def initial_weights(ours, theirs):
    keras.utils.set_random_seed(0)
    torch.manual_seed(0)
    pairs = [(layers.Dense(128), nn.Linear(784, 128), (2, 784), 784, 128)]
    pairs += [(layers.Conv2D(32, 3), nn.Conv2d(16, 32, 3), (2, 9, 9, 16), 144, 288)]
    for layer, other, shape, fan_in, fan_out in pairs:
        fans = {"fan_in": fan_in, "fan_out": fan_out}
        layer.build(shape)
        weights = (layer.kernel, layer.bias), (other.weight, other.bias)
        for text, (kernel, bias) in zip((ours, theirs), weights, strict=True):
            limit = re.search(r"±(√\(.*\))[, ]", text)[1].replace("√", "sqrt")
            limit = eval(limit, fans | {"sqrt": math.sqrt})
            kernel, bias = np.abs(plain(kernel)), np.abs(plain(bias)).max()
            assert near([kernel.max(), 2 * kernel.mean()], [limit, limit], 0.05)
            assert bias == 0 if "biases 0" in text else 0.7 * limit < bias <= limit
    embeddings = plain(layers.Embedding(100, 50)(np.arange(100)))
    assert near(np.abs(embeddings).max(), numbers(ours)[-1], 0.01)
    assert near(nn.Embedding(100, 50).weight.std(), numbers(theirs)[-1], 0.05)


@row("layout")
def layout(ours, theirs):
    names = [re.findall(r"\(([^)]+)\)", text) for text in (ours, theirs)]
    pairs = [[axes.split(", ") for axes in pair] for pair in zip(*names, strict=True)]
    of_dense, of_kernel, of_images = [[a.index(x) for x in b] for a, b in pairs]
    x, dense, linear = random(7, 3, 2, 4), layers.Dense(5), nn.Linear(4, 5)
    images = tensor(x, *of_images)
    expected = dense(x[:, 0, 0])
    fill(linear, tensor(dense.kernel, *of_dense), dense.bias)
    assert near(linear(images[:, :, 0, 0]), expected)
    convolution, other = layers.Conv2D(5, (3, 2)), nn.Conv2d(4, 5, (3, 2))
    expected = convolution(x)
    fill(other, tensor(convolution.kernel, *of_kernel), convolution.bias)
    assert near(other(images), expected)
    flat, of_torch = tensor(layers.Flatten()(x)), nn.Flatten()(images)
    assert near(flat, x) and near(of_torch, images) and not near(flat, of_torch)


@row('`padding="same"`')
def padding(ours, theirs):
    kernel, stride = map(int, numbers(ours))
    word, option, pad = code(theirs)
    assert (kernel, stride) == (3, 2) and "even size" in ours
    layer = layers.Conv2D(5, kernel, strides=stride, padding="same")
    x, other = random(1, 8, 8, 3), nn.Conv2d(3, 5, kernel, stride)
    expected, images = tensor(layer(x), 0, 3, 1, 2), tensor(x, 0, 3, 1, 2)
    fill(other, tensor(layer.kernel, 3, 2, 0, 1), layer.bias)
    padded = eval(pad, {"F": F, "x": images})
    assert near(other(padded), expected) and padded.shape[2:] == (9, 9)
    other.padding = 2 * (int(option.removeprefix("padding=")),)
    assert other(images).shape == expected.shape and not near(other(images), expected)
    odd = layer(x[:, :7, :7])
    assert near(other(images[..., :7, :7]), tensor(odd, 0, 3, 1, 2))
    with pytest.raises(ValueError, match="strided"):
        nn.Conv2d(3, 5, kernel, stride, padding=word.strip('"'))
    assert "only at the right and the bottom" in ours


@row("LSTM")
def lstm(ours, theirs):
    x, layer, steps = random(3, 4, 2), layers.LSTM(5), []
    with tf.GradientTape() as tape:
        total = tf.reduce_sum(layer(x))
    kernel, recurrent, bias = layer.trainable_weights
    expected, bias = tape.gradient(total, bias.value), plain(bias)
    for freeze in (True, False):
        other = nn.LSTM(2, 5, batch_first=True)
        fill(other, plain(kernel).T, plain(recurrent).T, bias, 0 * bias)
        copied, zero = (other.get_parameter(name) for name in code(theirs))
        zero.requires_grad_(not freeze)
        output = other(tensor(x))[0][:, -1].sum()
        assert near(output, total) and not zero.any()
        output.backward()
        torch.optim.SGD(other.parameters(), lr=1).step()
        steps.append(bias - plain(copied + zero))
    assert near(steps[0], expected) and near(steps[1], 2 * expected)
    assert ours == "one bias" and "two, and both are trained" in theirs
    assert "to 0 and freeze" in theirs


@row("GRU")
def gru(ours, theirs):
    texts = [re.search("order ((?:., )+.)", text)[1] for text in (ours, theirs)]
    order, other_order = (text.replace("h", "n").split(", ") for text in texts)
    x, other = random(3, 4, 2), nn.GRU(2, 5, batch_first=True)
    for after in (True, False):
        layer = layers.GRU(5, reset_after=after, bias_initializer="normal")
        expected = layer(x)
        kernel, recurrent, bias = layer.get_weights()
        for gates in (order, other_order):
            arrays = []
            for weights in (kernel, recurrent, *(bias if after else (bias, 0 * bias))):
                blocks = dict(zip(gates, np.split(weights.T, 3), strict=True))
                arrays.append(np.concatenate([blocks[gate] for gate in other_order]))
            fill(other, *arrays)
            agree = near(other(tensor(x))[0][:, -1], expected)
            assert agree == (after and gates == order)
    assert layers.GRU(5).reset_after and code(ours) == ["reset_after=True"]


@row("class weights")
def class_weights(ours, theirs):
    z, y, weights = random(4, 3), np.array([0, 1, 2, 2]), np.float32([1, 2, 5])
    model = keras.Sequential([layers.Dense(3, kernel_initializer="identity")])
    model.compile("sgd", Sparse(from_logits=True))
    mine = model.train_on_batch(z, y, class_weight=dict(enumerate(weights)))
    other = nn.CrossEntropyLoss(weight=tensor(weights))(tensor(z), tensor(y))
    each = F.cross_entropy(tensor(z), tensor(y), reduction="none")
    total = weights[y] @ plain(each)
    assert near(mine, total / 4) and "sum over the number of rows" in ours
    assert near(other, total / 13) and "sum over the sum of the rows' w" in theirs


@row("gradient clipping")
def clipping(ours, theirs):
    found = dict(re.findall("`(.+?)` for (each|all)", ours + theirs))
    gradients, added = np.float32([3e-6, 4e-6]), numbers(theirs)[0]
    expected = {"each": np.ones(2), "all": np.array([0.6, 0.8])}
    for option in ("clipnorm", "global_clipnorm"):
        pair = [keras.Variable(0.0) for _ in gradients]
        sgd = optimizers.SGD(1.0, **{option: 1e-6})
        sgd.apply([tf.constant(gradient) for gradient in gradients], pair)
        assert near([-1e6 * plain(value) for value in pair], expected[found[option]])
    pair = [nn.Parameter(torch.tensor(0.0)) for _ in gradients]
    for parameter, gradient in zip(pair, gradients, strict=True):
        parameter.grad = torch.tensor(gradient)
    nn.utils.clip_grad_norm_(pair, 1e-6)
    clipped = expected[found["clip_grad_norm_"]] * 5e-6 / (5e-6 + added)
    assert near([1e6 * parameter.grad for parameter in pair], clipped)


@row("other layers'")
def layer_defaults(ours, theirs):
    x, (slope, by_name, epsilon) = np.float32([[-0.01, 0.01]]), numbers(ours)
    assert near(layers.LeakyReLU()(x), [-0.01 * slope, 0.01])
    assert near(layers.Activation("leaky_relu")(x), [-0.01 * by_name, 0.01])
    assert near(layers.LayerNormalization()(x), x / math.sqrt(1e-4 + epsilon))
    slope, epsilon = numbers(theirs)
    assert near(nn.LeakyReLU()(tensor(x)), [-0.01 * slope, 0.01])
    assert near(nn.LayerNorm(2)(tensor(x)), x / math.sqrt(1e-4 + epsilon))


@row("axis of the classes")
def class_axis(ours, theirs):
    three, other, axis = (int(digit) for digit in re.findall(r"\d", theirs))
    for shape, guess in (((2, 3), other), ((2, 3, 4), three), ((2, 3, 4, 5), other)):
        z = tensor(random(*shape))
        with pytest.warns(UserWarning, match="dim"):
            assert near(nn.Softmax()(z), z.softmax(guess))
        assert near(layers.Softmax()(plain(z)), z.softmax(-1)) and ours == "the last"
    z, y = random(2, 3, 4), np.array([[0, 1, 2], [3, 2, 1]])
    found = nn.CrossEntropyLoss()(tensor(z).movedim(-1, axis), tensor(y))
    assert near(found, Sparse(from_logits=True)(y, z))
    assert "if there are three" in theirs and "if two or four" in theirs


@row("padding tokens")
def padding_tokens(ours, theirs):
    long, short = np.array([[2, 1, 0, 0]]), np.array([[2, 1]])
    for option, skips in ((code(ours)[0], True), ("mask_zero=False", False)):
        embedding = eval(f"layers.Embedding(3, 4, {option})", {"layers": layers})
        for layer in (layers.LSTM(5), layers.GlobalAveragePooling1D()):
            assert near(layer(embedding(long)), layer(embedding(short))) == skips
    embedding = eval(f"nn.Embedding(3, 4, {code(theirs)[0]})", {"nn": nn})
    layer = nn.LSTM(4, 5, batch_first=True)
    last, other = (layer(embedding(tensor(x)))[0][:, -1] for x in (long, short))
    last.sum().backward()
    gradient = embedding.weight.grad
    assert not near(last, other) and gradient[1].any() and not gradient[0].any()
    assert (
        not embedding.weight[0].any()
        and "LSTM and `GlobalAveragePooling1D` skip token 0" in ours
    )
    assert "its vector is 0 and stays 0" in theirs


def slices_and_sum(name, gradients, rate):
    """A token's first step with its gradients as slices, and with their sum."""
    slices = tf.IndexedSlices(tf.constant(gradients)[:, None], [0, 0], [2, 1])
    weights = [keras.Variable([[1.0], [1.0]]) for _ in "12"]
    for weight, gradient in zip(
        weights, (slices, tf.convert_to_tensor(slices)), strict=True
    ):
        getattr(optimizers, name)(rate).apply([gradient], [weight])
    return [1 - plain(weight)[0, 0] for weight in weights]


@row("a token twice")
def token_twice(ours, theirs):
    rate, *pair, first = numbers(ours)
    layer, other = layers.Embedding(3, 1), nn.Embedding(3, 1)
    with tf.GradientTape() as tape:
        total = tf.reduce_sum(layer(np.array([1, 1]))[:, 0] * pair)
    gradient = tape.gradient(total, layer.embeddings.value)
    assert near(gradient.values, pair) and near(gradient.indices, [1, 1])
    (other(torch.tensor([1, 1]))[:, 0] * torch.tensor(pair)).sum().backward()
    by_torch = step(torch.optim.Adam, other.weight.grad[1].item(), lr=rate)
    assert near(by_torch, numbers(theirs)[0])
    text, agree = below(CAUSES).split("each token. ")[1].split("SGD")
    names = re.findall(r"\b[A-Z]\w+", text.split("one by one")[0])
    kinds = {name: [False, False] for name in names} | {"Adamax": [True, False]}
    kinds |= {"SGD": [True, True], "Lion": [True, True]}
    for name, expected in kinds.items():
        steps = [slices_and_sum(name, values, rate) for values in (pair, [1.0, -2.0])]
        assert [near(*both) for both in steps] == expected, name
        assert name != "Adam" or near(steps[0], [first, numbers(theirs)[0]], 2e-3)
    assert len(kinds) == len(names) + 2 == 11 and agree.startswith(" and Lion agree")


class Recorder(keras.Model):
    """A model that only keeps the rows that it is shown."""

    def train_step(self, data):
        self.seen.append(plain(data[0]).ravel().tolist())
        return {"loss": 0.0}


@row("order of the rows")
def order_of_rows(ours, theirs):
    x, recorder = np.arange(20.0), Recorder()
    keras.utils.set_random_seed(0)
    recorder.seen = []
    recorder.compile("sgd", run_eagerly=True)
    recorder.fit(x[:, None], x, 20, epochs=3, verbose=0)
    first = recorder.seen[0]
    assert first != sorted(first) == list(x) and recorder.seen == [first] * 3
    [batch] = torch.utils.data.DataLoader(x, batch_size=20)
    assert batch.tolist() == list(x) and "does not shuffle" in theirs
    assert "shuffles arrays; with a seed set, into one order" in ours


@pytest.mark.parametrize("start", CHECKS)
def test_a_cause_is_as_its_row_says(start):
    [found] = [row for row in rows(CAUSES) if row[0].startswith(start)]
    CHECKS[start](*found[1:])


def test_every_cause_has_a_check():
    starts, found = list(CHECKS), [row[0] for row in rows(CAUSES)]
    assert len(found) == len(starts)
    assert all(map(str.startswith, found, starts))


OPTIONS = {
    "learning rate": "learning_rate lr",
    "momentum": "momentum",
    "ρ or β": "rho alpha beta_1 beta_2 adam_beta_1 adam_beta_2 betas",
    "ε": "epsilon eps",
    "accumulator": "initial_accumulator_value",
    "weight decay": "weight_decay",
}


def shown(defaults, names):
    """An option of a fresh optimizer as the table shows it."""
    values = [
        np.ravel(defaults[name] or 0) for name in names.split() if name in defaults
    ]
    texts = [f"{value:.6g}" for value in np.ravel(values)]
    return ", ".join(texts).replace("e-0", "e-") or "–"


def test_the_optimizers_table_is_that_of_fresh_optimizers():
    assert fields(table(below(OTHERS))[0])[1:] == list(OPTIONS)
    assert len(rows(OTHERS)) == 9
    for name, *texts in rows(OTHERS):
        other = getattr(torch.optim, name.replace("Na", "NA"), None)
        if name == "Muon" and other is None:
            continue
        mine = getattr(optimizers, name)().get_config()
        theirs = other([nn.Parameter(torch.zeros(2, 2))]).defaults
        for text, names in zip(texts, OPTIONS.values(), strict=True):
            a, b = shown(mine, names), shown(theirs, names)
            assert text == (a if a == b else f"**{a} / {b}**"), name


def test_the_place_of_epsilon_in_rmsprop_and_adagrad():
    assert "RMSprop and Adagrad add ε inside the square root in K" in below(OTHERS)
    for name, mine, other in (("RMSprop", 0.1, 0.01), ("Adagrad", 1.1, 1)):
        moved = step(getattr(optimizers, name), 1.0, learning_rate=1.0, epsilon=3)
        assert near(moved, 1 / math.sqrt(mine + 3))
        moved = step(getattr(torch.optim, name), 1.0, lr=1, eps=3)
        assert near(moved, 1 / (math.sqrt(other) + 3))


@pytest.mark.parametrize(
    ("name", "tolerance", "option", "value"),
    [("NAdam", 1e-5, "momentum_decay", 1)]
    + [("Muon", 5e-3, "adjust_lr_fn", "match_rms_adamw")]
    * hasattr(torch.optim, "Muon"),
)
def test_an_option_brings_keras_formula(name, tolerance, option, value):
    assert f"`{option}={value}`" in below(OTHERS).replace('"', "")
    start, gradients = random(6, 4), [random(6, 4), np.roll(random(6, 4), 1)]
    layer = layers.Dense(4, use_bias=False)
    layer.build((None, 6))
    layer.kernel.assign(start)
    optimizer = getattr(optimizers, name.replace("NA", "Na"))(0.1, weight_decay=0.0)
    for gradient in gradients:
        optimizer.apply([tf.constant(gradient)], [layer.kernel])
    off = []
    for options in ({}, {option: value}):
        weight = nn.Parameter(tensor(start, 1, 0))
        options |= {"eps": 1e-7, "weight_decay": 0}
        theirs = getattr(torch.optim, name)([weight], 0.1, **options)
        for gradient in gradients:
            weight.grad = tensor(gradient, 1, 0)
            theirs.step()
        off.append(np.abs(plain(weight).T - plain(layer.kernel)).max())
    assert off[1] < tolerance and 3 * tolerance < off[0]
