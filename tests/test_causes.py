"""Section 8's causes and optimizers: what stands there is what both frameworks do."""

import math
import re

import numpy as np
import pytest
import torchvision
from harness import committed, executed, fields, section, table

n = executed("def check_port(")
keras, tf, torch = n.keras, n.tf, n.torch
layers, losses, optimizers = keras.layers, keras.losses, keras.optimizers
nn, F, tensor = torch.nn, torch.nn.functional, torch.tensor

TEXT = "\n".join(cell.source for cell in section(committed(), 8))
_, CAUSES, OPTIMIZERS = re.split("### The usual causes\n|### Other optimizers\n", TEXT)
# What is decisive in both fields of each row, with gaps. What no test below computes,
# test_check, test_mistakes, test_why or test_side_by_side does.
WORDS = """
Adam's ε | 1e-7, … before the bias | 1e-8, … after the bias
weight decay | rate · λw from w, … adds 2λw | `Adam` adds λw … takes rate · λw
shapes | most metrics make … subclass and a metric | (n, n); … only warns; … refuse
what goes | take probabilities, … clip … 1e-7 | take logits, … `BCELoss` takes prob
batch | axis; … 0.99, … 1e-3; … over n; … its run | 1; … 0.1, … 1e-5; … n − 1; … still
initial | fan_in + fan_out)), biases 0; … ±0.05 | 1/fan_in), biases too; … deviation 1
layout | (h, w, in, out); images (n, h, w, c) | (out, in, h, w); (n, c, h, w)
`padding="same"` | right and the bottom | refuses … all four sides; … (0, 1, 0, 1)
LSTM | one bias | `bias_ih_l0`, set `bias_hh_l0` to 0 and freeze
GRU | z, r, h; `reset_after=True` | r, z, n
class weights | number of rows | sum of the rows' weights
other losses | over the rows; … mean over the rows | classes, unless … / β; … divides
gradient clipping | variable by itself, `global_clipnorm` for all | for all … + 1e-6
other layers: constants | 0.3, but 0.2 … each channel … 1e-3 | 0.01; … 0.25 … 1e-5
other layers: padding | leaves … start only; … (row, col | counts … (2, 0))` … (channel,
axis of the classes | the last | axis 1 in … (dim=-1)` takes the last
padding tokens | skip token 0 | vector 0 and no gradient, and nothing is skipped
attention | True: may … share dropped … share kept | left out … attended … share dropped
ready-made | inside … no stochastic depth | before … p up to 0.1
a token twice | 0.134 | 0.1
order of the rows | one order for all epochs | does not shuffle
"""


def test_what_the_table_says():
    for row in WORDS.strip().splitlines():
        place, *columns = row.split(" | ")
        [line] = [line for line in table(CAUSES) if line.startswith(f"| {place}")]
        for words, field in zip(columns, fields(line)[1:], strict=True):
            pattern = ".*".join(map(re.escape, words.split(" … ")))
            assert re.search(pattern, field), words


def near(a, b, tolerance=1e-4):
    a, b = [x.detach() if torch.is_tensor(x) else x for x in (a, b)]
    return np.allclose(np.ravel(a), np.ravel(b), tolerance, 1e-6)


def random(*shape):
    return np.random.default_rng(0).normal(size=shape).astype("float32")


def test_what_broadcasts_with_shapes_n_1_and_n():
    class Own(losses.Loss):
        def call(self, y, p):
            return (y - p) ** 2

    x = np.float32([[0], [1], [1], [0]])
    model = keras.Sequential([layers.Dense(1, kernel_initializer="ones")])
    model.compile("sgd", Own().call, metrics=["mse", "accuracy", Own().call])
    assert model.evaluate(x, x[:, 0], verbose=0) == [0, 0, 1, 0.5]
    assert Own()(x[:, 0], x) == 0.5
    with pytest.warns(UserWarning, match="target size"):
        assert nn.MSELoss()(tensor(x), tensor(x[:, 0])) == 0.5
    for loss in (nn.BCELoss(), nn.BCEWithLogitsLoss()):
        with pytest.raises(ValueError, match="arget size"):
            loss(tensor(x), tensor(x[:, 0]))


def test_what_goes_into_the_loss_and_the_axis_of_the_classes():
    z, y = tensor(random(5, 2)), tensor([0, 1, 0, 1, 0])
    p, expected = z.softmax(dim=1), nn.CrossEntropyLoss()(z, y)
    several, binary = losses.SparseCategoricalCrossentropy, losses.BinaryCrossentropy
    assert near(several(from_logits=True)(y, z), expected)
    saturated = layers.Softmax()(tf.constant([[0.0, 100.0]]))
    assert near(several()(np.array([0]), saturated), 100)
    assert near(several()(np.array([0]), saturated + 0.0), -math.log(1e-7))
    assert near(binary(from_logits=True)(y, z[:, 1] - z[:, 0]), expected)
    assert near(nn.NLLLoss()(p.log(), y), expected)
    assert near(nn.BCELoss()(p[:, 1], y.float()), expected)
    z, y = tensor(random(2, 3, 4)), tensor([[0, 1, 2], [3, 2, 1]])
    p = layers.Softmax()(z)
    assert near(nn.Softmax(dim=-1)(z), p)
    with pytest.warns(UserWarning, match="dim"):
        assert not near(nn.Softmax()(z), p)
    assert near(nn.CrossEntropyLoss()(z.movedim(2, 1), y), several()(y, p))


@pytest.mark.filterwarnings("ignore:reduction")
def test_what_losses_divide_by():
    x, y, weights = np.zeros((4, 3), "float32"), np.array([0, 1, 2, 2]), [1.0, 2.0, 5.0]
    model = keras.Sequential([layers.Dense(3, "softmax")])
    model.compile("sgd", "sparse_categorical_crossentropy")
    loss = model.train_on_batch(x, y, class_weight=dict(enumerate(weights)))
    assert near(loss, 13 / 4 * math.log(3))
    loss = nn.CrossEntropyLoss(tensor(weights))(tensor(x), tensor(y))
    assert near(loss, 13 / 13 * math.log(3))
    q, p = tensor(random(2, 2, 3)).softmax(dim=2)
    of_rows = nn.KLDivLoss(reduction="batchmean")(q.log(), p)
    assert near(losses.KLDivergence()(p, q), of_rows)
    assert near(nn.KLDivLoss()(q.log(), p), of_rows / 3)
    zero, three, huber = torch.zeros(1), torch.full([1], 3.0), 0.5 * (3 - 0.5 / 2)
    assert near(losses.Huber(0.5)(zero, three), huber)
    assert near(nn.HuberLoss(delta=0.5)(three, zero), huber)
    assert near(nn.SmoothL1Loss(beta=0.5)(three, zero), huber / 0.5)
    z, y, lengths = tensor(random(2, 8, 4)), tensor([[1, 2, 3], [2, 1, 0]]), [3, 2]
    given = z.log_softmax(dim=2).movedim(0, 1), y, [8, 8], lengths
    of_rows = F.ctc_loss(*given, reduction="none")
    assert near(losses.CTC()(y, z), of_rows.mean())
    assert near(nn.CTCLoss()(*given), (of_rows / tensor(lengths)).mean())


def test_the_initial_weights_of_layers():
    keras.utils.set_random_seed(0)
    torch.manual_seed(0)
    layer, other = layers.Conv2D(32, 3), nn.Conv2d(16, 900, 3)
    layer.build((None, 9, 9, 16))
    embedding = layers.Embedding(100, 50)(np.arange(100))
    uniform = [(layer.kernel, math.sqrt(6 / (144 + 288))), (embedding, 0.05)]
    uniform += [(p.data, math.sqrt(1 / 144)) for p in other.parameters()]
    for weights, limit in uniform:
        sizes = np.abs(np.asarray(weights))
        assert near([sizes.max(), 2 * sizes.mean()], [limit, limit], 0.05)
    assert not np.any(layer.bias)
    assert near(nn.Embedding(100, 50).weight.std(), 1.0, 0.05)
    assert nn.PReLU().weight.tolist() == [0.25]
    x, layer = random(6, 5, 3), layers.PReLU()
    assert near(layer(x), np.maximum(x, 0)) and layer.alpha.shape == (5, 3)


def test_the_slopes_and_normalizations_of_layers():
    assert layers.LeakyReLU().negative_slope == 0.3
    assert near(layers.Activation("leaky_relu")(tf.constant(-1.0)), -0.2)
    assert nn.LeakyReLU().negative_slope == 0.01
    gelu = nn.GELU()(tensor(1.0))
    assert near(layers.Activation("gelu")(tf.constant(1.0)), gelu, 1e-6)
    for layer in (layers.LayerNormalization(), layers.GroupNormalization()):
        assert layer.epsilon == 1e-3
    for layer in (nn.LayerNorm(1), nn.GroupNorm(1, 1), nn.BatchNorm1d(1)):
        assert layer.eps == 1e-5
    assert nn.BatchNorm1d(1).momentum == 0.1
    x, layer = random(6, 5, 3), layers.BatchNormalization()
    other = nn.BatchNorm1d(3, eps=1e-3, momentum=0.01)
    output, variance = layer(x, training=True), x.var((0, 1))
    assert near(other(tensor(x).movedim(2, 1)).movedim(1, 2), output)
    assert near(layer.moving_variance, 0.99 + 0.01 * variance, 1e-6)
    assert near(other.running_var, 0.99 + 0.01 * variance * 30 / 29, 1e-6)
    # Frozen, Keras's leaves the batch aside, and PyTorch's does not.
    layer.trainable = False
    assert near(layer(x, training=True), layer(x, training=False))
    other.requires_grad_(False)
    assert near(other(tensor(x).movedim(2, 1)).movedim(1, 2), output)


def test_the_sides_that_are_padded():
    x, square, row = random(1, 1, 8, 8), torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3)
    images, series = tensor(x), tensor(x.reshape(8, 1, 8))
    layer = layers.Conv2D(1, 3, 2, padding="same", kernel_initializer="ones")
    expected = layer(x.reshape(1, 8, 8, 1))
    assert near(F.conv2d(F.pad(images, (0, 1, 0, 1)), square, stride=2), expected)
    assert not near(F.conv2d(images, square, stride=2, padding=1), expected)
    with pytest.raises(ValueError, match="strided"):
        nn.Conv2d(1, 1, 3, stride=2, padding="same")
    layer = layers.Conv1D(1, 3, padding="causal", kernel_initializer="ones")
    expected = layer(x.reshape(8, 8, 1))
    assert near(F.conv1d(F.pad(series, (2, 0)), row), expected)
    assert near(F.conv1d(series, row, padding=2)[..., :-2], expected)


def test_the_order_of_gates_and_of_channels():
    x, layer = random(3, 4, 2), layers.GRU(5, bias_initializer="normal")
    expected, other = layer(x), nn.GRU(2, 5, batch_first=True)
    kernel, recurrent, biases = layer.get_weights()
    arrays = kernel.T, recurrent.T, *biases
    for parameter, array in zip(other.parameters(), arrays, strict=True):
        z, r, h = np.split(array, 3)
        parameter.data = tensor(np.concatenate([r, z, h]))
    assert near(other(tensor(x))[1], expected) and layer.reset_after
    x = random(1, 4, 4, 8)
    split = x.reshape(1, 4, 4, 2, 2, 2)
    assert near(tf.nn.depth_to_space(x, 2), split.transpose(0, 1, 3, 2, 4, 5))
    shuffled = nn.PixelShuffle(2)(tensor(x).movedim(3, 1))
    assert near(shuffled, split.transpose(0, 3, 1, 4, 2, 5))


def test_what_padding_tokens_do():
    long, short = np.array([[2, 1, 0, 0]]), np.array([[2, 1]])
    for masked in (True, False):
        embedding = layers.Embedding(3, 4, mask_zero=masked)
        for layer in (layers.LSTM(5), layers.GlobalAveragePooling1D()):
            assert near(layer(embedding(long)), layer(embedding(short))) == masked
    embedding = nn.Embedding(3, 4, padding_idx=0)
    layer = nn.LSTM(4, 5, batch_first=True)
    last = layer(embedding(tensor(long)))[0][:, -1]
    assert not near(last, layer(embedding(tensor(short)))[0][:, -1])
    last.sum().backward()
    assert embedding.weight.grad.any(dim=1).tolist() == [False, True, True]
    assert not embedding.weight[0].any()


def test_what_true_in_a_mask_and_the_rate_of_dropout_mean():
    x, mask = tensor(random(1, 3, 4)), tensor([[True, True, False]])
    attend = layers.Attention()
    assert near(attend([x, x], mask=[None, mask]), attend([x, x[:, :2]]))
    attend, left = nn.MultiheadAttention(4, 1, batch_first=True), x[:, 2:]
    assert near(attend(x, x, x, key_padding_mask=mask)[0], attend(x, left, left)[0])
    attend, left = F.scaled_dot_product_attention, x[:, :2]
    assert near(attend(x, x, x, attn_mask=mask), attend(x, left, left))
    ones = np.ones((100, 100), "float32")
    assert near(np.mean(layers.Dropout(0.2)(ones, training=True) == 0), 0.2, 0.1)
    assert near((nn.Dropout(0.2)(tensor(ones)) == 0).float().mean(), 0.2, 0.1)
    assert near(np.mean(tf.compat.v1.nn.dropout(ones, keep_prob=0.2) == 0), 0.8, 0.1)


def test_what_ready_made_networks_do_inside():
    pixels = np.full((2, 32, 32, 3), 255, "float32")
    for name in ("EfficientNetB0", "MobileNetV3Small", "ConvNeXtTiny"):
        model = getattr(keras.applications, name)(weights=None, input_shape=(32, 32, 3))
        scaled = model.layers[1](pixels)
        assert np.abs(scaled).max() < 3
    transform = torchvision.models.ConvNeXt_Tiny_Weights.DEFAULT.transforms()
    white = transform(torch.full([3, 32, 32], 255, dtype=torch.uint8))
    assert near(white[:, 0, 0], scaled[0, 0, 0])
    assert near(model(pixels, training=True), model(pixels))
    modules = torchvision.models.convnext_tiny().modules()
    assert max(getattr(module, "p", 0) for module in modules) == 0.1


def test_clipnorm_is_for_each_variable_and_pytorch_adds_to_the_norm():
    pair = [keras.Variable(0.0), keras.Variable(0.0)]
    optimizers.SGD(1.0, clipnorm=1.0).apply(tf.unstack([3.0, 4.0]), pair)
    assert near(pair, [-1, -1])
    weight = nn.Parameter(tensor(0.0))
    weight.grad = tensor(4e-6)
    nn.utils.clip_grad_norm_(weight, 1e-6)
    assert near(1e6 * weight.grad, 4 / (4 + 1))


def test_the_gradient_of_a_token_twice_in_a_batch():
    def first_steps(name, *gradients):
        slices, steps = tf.IndexedSlices(tf.constant(gradients), [0, 0], [2]), []
        for gradient in (slices, tf.convert_to_tensor(slices)):
            weight = keras.Variable([0.0, 0.0])
            getattr(optimizers, name)(0.1).apply([gradient], [weight])
            steps.append(-weight.numpy()[0])
        return steps

    assert near(first_steps("Adam", 1.0, 2.0), [0.134, 0.1], 2e-3)
    text = CAUSES.split("for each token. ")[1].split(" agree with the sum.")[0]
    one_by_one, summed = text.split(" take them one by one; PyTorch takes their sum. ")
    for name in re.findall(r"[A-Z]\w+", one_by_one):
        assert not near(*first_steps(name, 1.0, -2.0)), name
    for name in summed.split(" and "):
        assert near(*first_steps(name, 1.0, -2.0)), name


# PyTorch's Muon is younger than the oldest version that the notebook takes.
needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="no Muon")


@needs_muon
def test_the_defaults_of_optimizers():
    # What the options of each column are called.
    options = ["lr|learning_rate", "momentum", "rho|alpha|betas|(adam_)?beta_[12]"]
    options += ["eps|epsilon", "initial_accumulator_value", "weight_decay"]

    def shown(defaults, pattern):
        values = [defaults[key] or 0 for key in defaults if re.fullmatch(pattern, key)]
        texts = [f"{value:.6g}" for value in np.ravel(values)]
        return ", ".join(texts).replace("e-0", "e-") or "–"

    rows = table(OPTIMIZERS)[2:]
    assert len(rows) == 9
    for name, *texts in map(fields, rows):
        ours = getattr(optimizers, name)().get_config()
        other = getattr(torch.optim, name.replace("Na", "NA"))
        theirs = other([nn.Parameter(torch.zeros(2, 2))]).defaults
        for option, text in zip(options, texts, strict=True):
            a, b = (shown(defaults, option) for defaults in (ours, theirs))
            assert text == (a if a == b else f"**{a} / {b}**"), name


def test_rmsprop_and_adagrad_add_epsilon_inside_the_root_in_keras():
    for name, ours, theirs in (("RMSprop", 0.1, 0.01), ("Adagrad", 1.1, 1)):
        weight, other = keras.Variable(0.0), nn.Parameter(tensor(0.0))
        getattr(optimizers, name)(1.0, epsilon=3).apply([tf.constant(1.0)], [weight])
        other.grad = tensor(1.0)
        getattr(torch.optim, name)([other], lr=1, eps=3).step()
        assert near(weight, -1 / math.sqrt(ours + 3))
        assert near(other, -1 / (math.sqrt(theirs) + 3))


@needs_muon
def test_muon_multiplies_the_step_of_a_kernel():
    gradient, kernel = random(64, 16), keras.Variable(np.zeros((64, 16), "float32"))
    optimizers.Muon(0.1, weight_decay=0).apply([tf.constant(gradient)], [kernel])
    for option, factor in {None: 0.2 * math.sqrt(64), "match_rms_adamw": 1}.items():
        other = nn.Parameter(torch.zeros(16, 64))
        other.grad = tensor(gradient.T.copy())
        torch.optim.Muon([other], 0.1, weight_decay=0, adjust_lr_fn=option).step()
        assert near(np.linalg.norm(kernel), factor * other.detach().norm(), 0.01)
