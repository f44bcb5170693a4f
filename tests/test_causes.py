"""Section 8's causes: what stands in a row is what both frameworks compute."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
from harness import committed, definitions, fields, section, table

n = definitions()
keras, tf, torch, torchvision = n.keras, n.tf, n.torch, n.torchvision
layers, losses = keras.layers, keras.losses
nn, F, tensor = torch.nn, torch.nn.functional, torch.tensor


CELLS = [c.source for c in section(committed(), 8) if c.cell_type == "markdown"]
CAUSES_TEXT = "\n".join(CELLS).split("### The usual causes\n")[1]
LINES = [fields(line) for line in table(CAUSES_TEXT)[2:]]
CAUSES = {re.sub(r' \(.*|[`"]', "", what): pair for what, *pair in LINES}


def numbers(text):
    """The numbers in a text; a digit in a name is none."""
    return [float(t) for t in re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?:e-\d+)?", text)]


def plain(x):
    return x.detach().numpy() if torch.is_tensor(x) else keras.ops.convert_to_numpy(x)


def near(a, b, tolerance=1e-4):
    a, b = plain(a).ravel(), plain(b).ravel()
    return a.size in (b.size, 1) and np.allclose(a, b, tolerance, 1e-6)


def random(*shape):
    return np.random.default_rng(0).normal(size=shape).astype("float32")


def channels_first(x):
    """Keras's images (n, h, w, c), or series (n, t, c), as PyTorch has them."""
    return tensor(np.moveaxis(plain(x), -1, 1))


def fill(layer, *arrays):
    """Write these arrays into a PyTorch layer's parameters."""
    for parameter, values in zip(layer.parameters(), arrays, strict=True):
        parameter.data = tensor(plain(values))


def copy_kernel(layer, other):
    """Give PyTorch's layer the weights of Keras's dense layer or convolution."""
    fill(other, np.moveaxis(plain(layer.kernel), [-1, -2], [0, 1]), layer.bias)


def test_every_cause_is_tested():
    files = Path(__file__).parent.glob("test_*.py")
    source = "".join(path.read_text(encoding="utf-8") for path in files)
    assert [what for what in CAUSES if f'CAUSES["{what}"]' not in source] == []


def test_what_broadcasts_with_shapes_n_1_and_n():
    ours, theirs = CAUSES["shapes"]
    x = np.float32([[0], [1], [1], [0]])

    class Own(losses.Loss):
        def call(self, y, p):
            return (y - p) ** 2

    model = keras.Sequential([layers.Dense(1, kernel_initializer="ones")])
    model.compile("sgd", Own().call, metrics=["mse", "accuracy", Own().call])
    assert model.evaluate(x, x[:, 0], verbose=0) == [0, 0, 1, 0.5]
    assert Own()(x[:, 0], x) == 0.5
    assert "most metrics make them one shape; a `Loss` subclass and a metric" in ours
    with pytest.warns(UserWarning, match="target size"):
        assert nn.MSELoss()(tensor(x), tensor(x[:, 0])) == 0.5
    for loss in (nn.BCELoss(), nn.BCEWithLogitsLoss()):
        with pytest.raises(ValueError, match="arget size"):
            loss(tensor(x), tensor(x[:, 0]))
    assert "`p - y` is (n, n); `MSELoss` only warns; `BCELoss`" in theirs


def test_what_goes_into_the_loss():
    ours, theirs = CAUSES["what goes into the loss"]
    z, y = random(5, 1), tensor(np.arange(5) % 2)
    # The same forecast as two logits, so that all losses are one number.
    two, z = tensor(np.hstack([0 * z, z])), tensor(z[:, 0])
    p, loss = two.softmax(dim=1), nn.CrossEntropyLoss()(two, y)
    assert near(nn.BCEWithLogitsLoss()(z, y.float()), loss)
    assert near(nn.NLLLoss()(p.log(), y), loss)
    assert near(nn.BCELoss()(p[:, 1], y.float()), loss)
    assert "BCEWithLogitsLoss` take logits, `NLLLoss` takes log-probabilit" in theirs
    assert "`BCELoss` takes probabilities" in theirs
    forms = {"SparseCategorical": (p, two), "Binary": (p[:, 1], z)}
    for name, (probabilities, logits) in forms.items():
        of = getattr(losses, f"{name}Crossentropy")
        assert near(of()(y.numpy(), probabilities.numpy()), loss)
        assert near(of(from_logits=True)(y.numpy(), logits.numpy()), loss)
    assert "`BinaryCrossentropy` take probabilities, unless `from_logits=True`" in ours


@pytest.mark.filterwarnings("ignore:reduction")
def test_what_other_losses_divide_by():
    ours, theirs = CAUSES["other losses"]
    q, p = tensor(random(2, 2, 3)).softmax(dim=2)
    of_rows = (p * (p / q).log()).sum(dim=1)
    assert near(losses.KLDivergence()(p.numpy(), q.numpy()), of_rows.mean())
    assert near(nn.KLDivLoss()(q.log(), p), of_rows.sum() / 6)
    assert near(nn.KLDivLoss(reduction="batchmean")(q.log(), p), of_rows.mean())
    assert "takes probabilities, its mean is over the rows" in ours
    assert "takes log-probabilities, its mean is over rows and classes" in theirs
    assert 'unless `reduction="batchmean"`' in theirs
    zero, three, huber = torch.zeros(1), torch.full([1], 3.0), 0.5 * (3 - 0.5 / 2)
    assert near(losses.Huber(0.5)(zero.numpy(), three.numpy()), huber)
    assert near(nn.HuberLoss(delta=0.5)(three, zero), huber) and "slope δ" in ours
    assert near(nn.SmoothL1Loss(beta=0.5)(three, zero), huber / 0.5)
    assert "`HuberLoss` is Huber, `SmoothL1Loss` is Huber / β" in theirs
    z, y, lengths = random(2, 8, 4), np.array([[1, 2, 3], [2, 1, 0]]), [3, 2]
    given = tensor(z).log_softmax(dim=2).movedim(0, 1), tensor(y), [8, 8], lengths
    of_rows = F.ctc_loss(*given, reduction="none")
    assert near(losses.CTC()(y, z), of_rows.mean())
    assert near(nn.CTCLoss()(*given), (of_rows / tensor(lengths)).mean())
    assert "`CTC` is the mean over the rows" in ours
    assert "takes log-probabilities and divides each row by its target's" in theirs


def test_momentum_epsilon_and_axis_of_batch_normalization():
    ours, theirs = CAUSES["batch normalization"]
    layer, other = layers.BatchNormalization(), nn.BatchNorm1d(5)
    x = random(6, 5, 3) / 10
    [old, epsilon], [axis, new, small] = numbers(ours), numbers(theirs)[:3]
    mean, variance = x.mean((0, 1)), x.var((0, 1))
    assert near(layer(x, training=True), (x - mean) / (variance + epsilon) ** 0.5)
    assert near(layer.moving_mean, (1 - old) * mean) and "last axis; mo" in ours
    assert near(layer.moving_variance, old + (1 - old) * variance, 1e-6)
    mean, variance = x.mean((0, 2), keepdims=True), x.var((0, 2), keepdims=True)
    assert near(other(tensor(x)), (x - mean) / (variance + small) ** 0.5)
    assert near(other.running_mean, new * mean) and axis == 1
    assert near(other.running_var, 1 - new + new * variance * 18 / 17, 1e-6)
    assert "of the old" in ours and "of the new" in theirs and "n − 1" in theirs


def is_uniform(weights, limit):
    """Whether weights are uniform between -limit and limit."""
    sizes = np.abs(plain(weights))
    return near([sizes.max(), 2 * sizes.mean()], [limit, limit], 0.05)


def test_the_initial_weights():
    ours, theirs = CAUSES["initial weights"]
    keras.utils.set_random_seed(0)
    torch.manual_seed(0)
    dense, convolution = layers.Dense(128), layers.Conv2D(32, 3)
    dense.build((None, 784))
    convolution.build((None, 9, 9, 16))
    for layer, fan_in, fan_out in ((dense, 784, 128), (convolution, 144, 288)):
        assert is_uniform(layer.kernel, math.sqrt(6 / (fan_in + fan_out)))
        assert not plain(layer.bias).any()
    assert "uniform in ±√(6/(fan_in + fan_out)), biases 0" in ours
    for layer, fan_in in ((nn.Linear(784, 900), 784), (nn.Conv2d(16, 900, 3), 144)):
        for weights in layer.parameters():
            assert is_uniform(weights, math.sqrt(1 / fan_in))
    assert "uniform in ±√(1/fan_in), biases too" in theirs
    assert is_uniform(layers.Embedding(100, 50)(np.arange(100)), numbers(ours)[-1])
    assert near(nn.Embedding(100, 50).weight.std(), numbers(theirs)[-1], 0.05)


def test_the_layout_of_kernels_and_images():
    ours, theirs = CAUSES["layout, also after Flatten"]
    x, layer = random(7, 3, 2, 4), layers.Conv2D(5, (3, 2))
    expected, other = layer(x), nn.Conv2d(4, 5, (3, 2))
    images = channels_first(x)
    copy_kernel(layer, other)
    assert near(other(images), channels_first(expected))
    assert near(layers.Flatten()(x), x) and near(nn.Flatten()(images), images)
    assert "(in, out) and (h, w, in, out); images (n, h, w, c)" in ours
    assert "(out, in) and (out, in, h, w); (n, c, h, w)" in theirs


def test_the_sides_that_same_pads_with_a_stride():
    ours, theirs = CAUSES["padding=same with a stride"]
    x, layer = random(1, 8, 8, 3), layers.Conv2D(5, 3, strides=2, padding="same")
    other, images = nn.Conv2d(3, 5, 3, stride=2), channels_first(x)
    expected = channels_first(layer(x))
    copy_kernel(layer, other)
    assert near(other(F.pad(images, (0, 1, 0, 1))), expected)
    assert "kernel 3, stride 2, even size: pads only at the right and the bot" in ours
    other.padding = (1, 1)
    assert not near(other(images), expected)
    with pytest.raises(ValueError, match="strided"):
        nn.Conv2d(3, 5, 3, stride=2, padding="same")
    assert "refuses a stride, `padding=1` pads all four sides; before the" in theirs


def test_the_biases_and_gates_of_recurrent_layers():
    ours, theirs = CAUSES["LSTM"]
    x, layer, other = random(3, 4, 2), layers.LSTM(5), nn.LSTM(2, 5, batch_first=True)
    with tf.GradientTape() as tape:
        total = tf.reduce_sum(layer(x))
    gradient = tape.gradient(total, layer.trainable_weights[2].value)
    kernel, recurrent, bias = layer.get_weights()
    fill(other, kernel.T, recurrent.T, bias, 0 * bias)
    output = other(tensor(x))[0][:, -1].sum()
    output.backward()
    assert near(output, total) and ours == "one bias"
    # Both biases move, so that their sum moves twice as far, unless one is frozen.
    assert near(other.bias_ih_l0.grad, gradient) and "into `bias_ih_l0`" in theirs
    assert near(other.bias_hh_l0.grad, gradient) and "both are trained" in theirs
    assert "set `bias_hh_l0` to 0 and freeze it" in theirs
    ours, theirs = CAUSES["GRU"]
    layer, other = layers.GRU(5, bias_initializer="normal"), nn.GRU(2, 5, 1)
    expected = layer(x)[:, None]
    kernel, recurrent, bias = layer.get_weights()
    arrays = [kernel.T, recurrent.T, *bias]
    for i, array in enumerate(arrays):
        z, r, h = np.split(array, 3)
        arrays[i] = np.concatenate([r, z, h])
    fill(other, *arrays)
    assert near(other(tensor(x).movedim(0, 1))[1], expected)
    assert "order z, r, h" in ours and "order r, z, n" in theirs
    assert layer.reset_after and "`reset_after=True`, the default, is" in ours


def test_what_class_weights_divide_by():
    ours, theirs = CAUSES["class weights"]
    x, y, weights = np.zeros((4, 3), "float32"), np.array([0, 1, 2, 2]), [1.0, 2.0, 5.0]
    model = keras.Sequential([layers.Dense(3, "softmax")])
    model.compile("sgd", "sparse_categorical_crossentropy")
    loss = model.train_on_batch(x, y, class_weight=dict(enumerate(weights)))
    assert near(loss, 13 / 4 * math.log(3)) and "over the number of rows" in ours
    loss = nn.CrossEntropyLoss(tensor(weights))(tensor(x), tensor(y))
    assert near(loss, 13 / 13 * math.log(3)) and "the sum of the rows' w" in theirs


def test_the_constants_of_other_layers():
    ours, theirs = CAUSES["other layers: constants"]
    x = np.float32([[-0.01, 0.01]])
    slope, by_name, of_prelu, epsilon = numbers(ours.replace("=[1, 2]", ""))
    assert near(layers.LeakyReLU()(x), [-0.01 * slope, 0.01])
    assert near(layers.Activation("leaky_relu")(x), [-0.01 * by_name, 0.01])
    for layer in (layers.LayerNormalization(), layers.GroupNormalization(1)):
        assert near(layer(x), x / math.sqrt(1e-4 + epsilon))
    for axes, shape in ((None, (4, 4, 3)), ([1, 2], (1, 1, 3))):
        layer = layers.PReLU(shared_axes=axes)
        layer.build((None, 4, 4, 3))
        assert near(layer.alpha, np.full(shape, of_prelu))
    assert "a slope for each element" in ours and "each channel with `sh" in ours
    slope, of_prelu, epsilon = numbers(theirs)
    assert near(nn.LeakyReLU()(tensor(x)), [-0.01 * slope, 0.01])
    for layer in (nn.LayerNorm(2), nn.GroupNorm(1, 2)):
        assert near(layer(tensor(x)), x / math.sqrt(1e-4 + epsilon))
    assert near(nn.PReLU().weight, [of_prelu]) and nn.PReLU(3).weight.shape == (3,)
    assert "`PReLU()` has one slope" in theirs and "`PReLU(c)` one for each" in theirs


def test_the_padding_and_order_of_other_layers():
    ours, theirs = CAUSES["other layers: padding and order"]
    x = random(1, 4, 4, 8)
    images = channels_first(x)
    pooled = channels_first(layers.AveragePooling2D(3, 1, padding="same")(x))
    assert near(nn.AvgPool2d(3, 1, 1, count_include_pad=False)(images), pooled)
    assert not near(nn.AvgPool2d(3, 1, 1)(images), pooled)
    assert "leaves its padding out" in ours and "counts it, unless `count" in theirs
    split = x.reshape(1, 4, 4, 2, 2, 2)
    shuffled = tf.nn.depth_to_space(x, 2)
    assert near(shuffled, split.transpose(0, 1, 3, 2, 4, 5))
    assert near(nn.PixelShuffle(2)(images), split.transpose(0, 3, 1, 4, 2, 5))
    assert "(row, column, channel)" in ours and "(channel, row, column)" in theirs
    x, layer = random(1, 6, 2), layers.Conv1D(3, 3, padding="causal")
    expected, other = channels_first(layer(x)), nn.Conv1d(2, 3, 3)
    copy_kernel(layer, other)
    assert near(other(F.pad(channels_first(x), (2, 0))), expected)
    other.padding = (2,)
    assert near(other(channels_first(x))[..., :-2], expected)
    assert '`padding="causal"` pads the start only' in ours
    assert "`padding=2` pads both ends, `F.pad(x, (2, 0))` the start" in theirs


def test_the_axis_of_the_classes():
    ours, theirs = CAUSES["axis of the classes"]
    z, y = random(2, 3, 4), np.array([[0, 1, 2], [3, 2, 1]])
    p, loss = layers.Softmax()(z), losses.SparseCategoricalCrossentropy()
    assert near(p, nn.Softmax(dim=-1)(tensor(z))) and ours == "the last"
    with pytest.warns(UserWarning, match="dim"):
        assert not near(p, nn.Softmax()(tensor(z)))
    assert near(nn.CrossEntropyLoss()(channels_first(z), tensor(y)), loss(y, p))
    assert "axis 1 in `CrossEntropyLoss`; `nn.Softmax(dim=-1)` takes the last" in theirs


def test_what_padding_tokens_do():
    ours, theirs = CAUSES["padding tokens"]
    long, short = np.array([[2, 1, 0, 0]]), np.array([[2, 1]])
    for masked in (True, False):
        embedding = layers.Embedding(3, 4, mask_zero=masked)
        for layer in (layers.LSTM(5), layers.GlobalAveragePooling1D()):
            assert near(layer(embedding(long)), layer(embedding(short))) == masked
    assert "`mask_zero=True`: LSTM and `GlobalAveragePooling1D` skip token 0" in ours
    embedding = nn.Embedding(3, 4, padding_idx=0)
    layer = nn.LSTM(4, 5, batch_first=True)
    last, expected = (layer(embedding(tensor(x)))[0][:, -1] for x in (long, short))
    last.sum().backward()
    assert not near(last, expected) and embedding.weight.grad[1].any()
    assert not embedding.weight[0].any() and not embedding.weight.grad[0].any()
    assert "`padding_idx=0`: token 0 has the vector 0 and no gradient, and no" in theirs


def test_what_true_in_a_mask_and_the_rate_of_dropout_mean():
    ours, theirs = CAUSES["attention masks, dropout"]
    x, mask = random(1, 3, 4), np.array([[True, True, False]])
    attend, expected = layers.Attention(), layers.Attention()([x, x[:, :2]])
    assert near(attend([x, x], mask=[None, mask]), expected)
    x, mask = tensor(x), tensor(mask)
    attend, left = nn.MultiheadAttention(4, 1, batch_first=True), x[:, 2:]
    assert near(attend(x, x, x, key_padding_mask=mask)[0], attend(x, left, left)[0])
    attend, left = F.scaled_dot_product_attention, x[:, :2]
    assert near(attend(x, x, x, attn_mask=mask), attend(x, left, left))
    assert "True: may be attended to" in ours and "True: left out in `nn.M" in theirs
    assert "attended to in `scaled_dot_product_attention`" in theirs
    ones, share = np.ones((100, 100), "float32"), "is the share dropped"
    old = tf.compat.v1.nn.dropout(ones, keep_prob=0.2)
    new = layers.Dropout(0.2)(ones, training=True), nn.Dropout(0.2)(tensor(ones))
    dropped = [np.mean(plain(x) == 0) for x in (*new, old)]
    assert near(dropped, [0.2, 0.2, 0.8], 0.1) and f"`p` {share}" in theirs
    assert f"`rate` {share} (TensorFlow 1's `keep_prob` the share kept)" in ours


def test_what_ready_made_networks_do_inside():
    ours, theirs = CAUSES["ready-made networks"]
    pixels = np.full((2, 32, 32, 3), 255, "float32")
    for name in ("EfficientNetB0", "MobileNetV3Small", "ConvNeXtTiny"):
        network = getattr(keras.applications, name)
        model = network(weights=None, input_shape=(32, 32, 3))
        scaled = model.layers[1](pixels)
        assert f"`{name}`" in ours and np.abs(scaled).max() < 3
    transform = torchvision.models.ConvNeXt_Tiny_Weights.DEFAULT.transforms()
    white = transform(torch.full([3, 32, 32], 255, dtype=torch.uint8))
    assert near(white[:, 0, 0], scaled[0, 0, 0])
    assert "scale pixels from 0 to 255 inside" in ours and "before the m" in theirs
    assert near(model(pixels, training=True), model(pixels)) and "no stoch" in ours
    paths = [
        m.p for m in torchvision.models.convnext_tiny().modules() if hasattr(m, "p")
    ]
    assert numbers(theirs) == [max(paths)] and "has stochastic depth" in theirs


def test_who_shuffles_the_rows():
    ours, theirs = CAUSES["order of the rows"]
    x, seen, model = np.arange(20.0), [], keras.Sequential([layers.Dense(1)])

    def record(y, p):
        seen.append(plain(y).ravel().tolist())
        return 0 * p

    model.compile("sgd", record, run_eagerly=True)
    keras.utils.set_random_seed(0)
    model.fit(x[:, None], x, batch_size=20, epochs=3, verbose=0)
    assert seen[0] != sorted(seen[0]) == list(x) and seen == [seen[0]] * 3
    assert "`fit` shuffles arrays; with a seed set, into one order" in ours
    [batch] = torch.utils.data.DataLoader(x, batch_size=20)
    assert batch.tolist() == list(x) and "does not shuffle" in theirs
