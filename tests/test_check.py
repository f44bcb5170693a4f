"""Section 8's check on ports between Keras and PyTorch, many of which failed in public.

A case says its source, what differs from a plain classifier, and mistakes: the step at
which one must show, perhaps with the layer, a text of the port, and what replaces it.
"""

import numpy as np
import pytest
from harness import executed

check = executed("def check_port(", "class KerasAdam(")
keras, torch, KerasAdam = check.keras, check.torch, check.KerasAdam
L, optimizers, nn, F = keras.layers, keras.optimizers, torch.nn, torch.nn.functional

random = np.random.default_rng(0)
X, T, Y = random.normal(size=(16, 6)), random.normal(size=(16, 1)), np.arange(16) % 3
MEAN, START = random.normal(size=6), random.normal(size=(6, 6))
IMAGES = random.normal(size=(16, 6, 6, 2)).astype("float32")
MASK, LAST = np.array([0, 0, -1e9]), {}
BASE = L.Dense(6, "relu", dtype="float64")
BASE.build((None, 6))
FLOAT32 = L.Dense(6, "relu", dtype="float32")


class Do(nn.Module):
    """A function of a module and its input; the module has these parts and a state."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function, self.state = function, None
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.function(self, x)


def frozen(module, name):
    """The module, one parameter of which is not trained."""
    getattr(module, name).requires_grad_(False)
    return module


def fill(model, keras_model, place, constant):
    """Keras's trained weights in order, with a constant at one place between them."""
    parameters = list(model.parameters())
    parameters.pop(place).fill_(constant)
    for parameter, w in zip(parameters, keras_model.trainable_weights, strict=True):
        parameter.copy_(torch.from_numpy(w.numpy().T))


def doubled(module, x):
    """Twice the input, in two parts that are written in place."""
    x[:, :3] *= 2
    x[:, 3:] *= 2
    return x


def next_state(module, x):
    """The last output of a stateful LSTM."""
    steps, state = module.lstm(x, module.state)
    module.state = [numbers.detach() for numbers in state]
    return steps[:, -1]


@torch.no_grad()
def features(model, x):
    """What the frozen part of a model makes of its input."""
    return model[0](x).relu()


def functional():
    """Two inputs to one block, two outputs; PyTorch does three layers in one step."""
    sigmoid = L.Rescaling(1.0, 3.0), L.ReLU(6), L.Rescaling(1 / 6)
    block = keras.Sequential([L.Dense(6, name="inner"), *sigmoid], name="block")
    x = [keras.Input((6,)), keras.Input((6,))]
    one, two = block(x[0]), block(x[1])
    both = L.Add(name="add")([one, two])
    outputs = [L.Dense(1, name="first")(one), L.Dense(1, name="last")(both)]
    return keras.Model(x, outputs)


class Subclassed(keras.Model):
    """Two layers, and what the model computes between and behind them itself."""

    def __init__(self, between=1, behind=1):
        super().__init__(name="own")
        self.first, self.second = L.Dense(6, name="first"), L.Dense(3, name="second")
        self.between, self.behind = between, behind
        self.returns_its_input = L.Dropout(0.0)

    def call(self, x):
        hidden = self.returns_its_input(self.first(x) * self.between)
        return self.second(hidden) * self.behind


class OwnStep(Subclassed):
    """The same, but its train_step calls the layers one after the other."""

    def train_step(self, batch):
        weights = self.trainable_weights
        with check.tf.GradientTape() as tape:
            outputs = self.second(self.first(batch[0]))
            loss = keras.ops.mean((outputs - batch[1]) ** 2)
        gradients = tape.gradient(loss, [weight.value for weight in weights])
        self.optimizer.apply(gradients, weights)
        return {"loss": loss}


PORT = """
def build_keras():
    keras.utils.set_random_seed(0)
    layers = [{ours}]
    model = {model}
    model.compile({by}, {loss}, metrics={metrics})
    return model

def build_pytorch():
    model = nn.Sequential({theirs})
    return model, {their_by}

def train_step(model, optimizer, x, y, weights=None):
    optimizer.zero_grad()
    z = {output}
    loss = {their_loss}
    loss.backward()
    optimizer.step()
    return {{"loss": loss.item(), {values}}}

x, y = {data}
port = build_keras, build_pytorch, train_step, {batches}
options = dict({options})
"""
PLAIN = """
ours = L.Dense(6, "relu", name="first"), L.Dense(3, "softmax")
theirs = nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)
model = keras.Sequential([keras.Input(batch_shape=x.shape), *layers])
by = optimizers.SGD(0.1)
their_by = torch.optim.SGD(model.parameters(), 0.1)
output = model(x)
loss = "sparse_categorical_crossentropy"
their_loss = F.cross_entropy(z, y)
metrics = []
values = **{}
data = X, Y
batches = (x, y), (np.moveaxis(x, -1, 1), y)
options = **{}
"""
STEPS = "data, weights, forward pass, loss, accuracy, mse, mae, gradient, "
STEPS += "first update, second update, running averages"
CASES = []


def source(*changes, parts=()):
    """A port as text, with some texts in it changed: old, new, old, new, ..."""
    lines = [*PLAIN.strip().splitlines(), *parts]
    text = PORT.format(**dict(line.split(" = ", 1) for line in lines))
    for old, new in zip(changes[::2], changes[1::2], strict=True):
        assert old in text
        text = text.replace(old, new, 1)
    return text


def run(text):
    names = globals().copy()
    exec(text, names)
    return check.check_port(*names["port"], **names["options"])


def case(text):
    """The right port gives "none", and each mistake what its line says first."""
    thread, *lines = text.strip().splitlines()
    mistakes = [line for line in lines if " |" in line]
    parts = [line for line in lines if " |" not in line]
    for line in ["none", *mistakes]:
        expected, *changes = [field.strip() for field in line.split("|")]
        port = source(*changes, parts=parts)
        CASES.append(pytest.param(expected, port, id=f"{line} in {thread}"))


case("""no thread: what needs no special layer
metrics = ["accuracy"]
values = "accuracy": (z.argmax(1) == y).double().mean()
data | np.moveaxis(x, -1, 1) | 255 * x
weights | **{} | ported=True
loss: Keras 1. | (z, y) | (z, y, reduction='sum')
loss | loss.item() | float('nan')
gradient | 6, "relu" | 6, "relu", trainable=False
first update | parameters(), 0.1 | parameters(), 0.1001
none | SGD(0.1) | SGD(0.1, global_clipnorm=0.1) | loss.backward() | loss.backward(), \
nn.utils.clip_grad_norm_(model.parameters(), 0.1)
none | optimizer.step() | optimizer.step(), optimizer.zero_grad()
none | optimizer.step() | [p.data.sub_(0.1 * p.grad) for p in model.parameters()]
none | = model(x) | = model(x) + 0 * model(-x)
none | model = nn | model = LAST["built"] = nn | model(x) | LAST["built"](x)
none | optimizers.SGD(0.1) | optimizers.LossScaleOptimizer(optimizers.SGD(0.1))
none | L.Dense(6, "relu", name="first") | BASE
none | L.D | L.Rescaling(2.0), L.D | model(x) | model(x.mul_(2))
forward pass: first, after 0 | L.D | L.Rescaling(2.0), L.D | nn.L | Do(doubled), nn.L \
| nn.ReLU | nn.ELU
forward pass: first, after the batch | nn.ReLU | nn.LeakyReLU | X, Y | 1000 * X, Y
forward pass: scale, after the batch | L.D | L.Rescaling(1 / 255, name="scale"), L.D \
| nn.L | Do(lambda m, x: x / 256), nn.L | X, Y | np.arange(96).reshape(16, 6), Y
forward pass: shares, after 1 | name="first") | name="x"), L.Softmax(name="shares") \
| nn.ReLU() | nn.ReLU(), nn.Hardswish(), nn.Softmax(1) | X, Y | 2e-4 * X, Y
forward pass: first, after the batch | nn.ReLU() | nn.ELU() | "softmax" | \
lambda z: z + MASK | 6, 3) | 6, 3), Do(lambda m, z: z + torch.tensor(MASK)) \
| "sparse_categorical_crossentropy" | keras.losses.SparseCategoricalCrossentropy(True) \
| X, Y | X, Y % 2
none | Dense(6, "relu", name="first") | Embedding(6, 6, name="kernel") | X, Y | Y, Y \
| nn.Linear(6, 6), nn.ReLU() | nn.Embedding(6, 6) | (np.moveaxis(x, -1, 1) | (x
none | L.D | L.Normalization(mean=MEAN, variance=np.ones(6)), \
L.Dense(6, use_bias=False), L.D | nn.L | Do(lambda m, x: (x - m.mean) @ m.w.T, \
mean=nn.Buffer(torch.from_numpy(MEAN)), w=nn.Parameter(torch.from_numpy(START))), nn.L
""")
case("""https://discuss.pytorch.org/t/160720
ours = L.Dense(1)
theirs = nn.Linear(6, 1)
loss = "mse"
their_loss = F.mse_loss(z, y)
metrics = ["mse", "mae"]
values = "mse": loss, "mae": F.l1_loss(z, y)
data = X, T
loss: Keras | 6, 1) | 6, 1), nn.Flatten(0)
none | 6, 1) | 6, 1), nn.Flatten(0) | -1, 1), y | -1, 1), y[:, 0]
none | L.Dense(1) | L.Dense(1, "sigmoid") | = model(x) | = model(x).sigmoid()
mae | F.l1_loss(z, y) | F.l1_loss(z, y) / 2
""")
case("""https://discuss.pytorch.org/t/184306 and pytorch/pytorch/issues/8644 of GitHub
ours = L.Conv2D(3, 3), L.AveragePooling2D(3, 1, "same", name="pool"), L.Flatten(), \
L.Dense(3, "softmax", name="digits")
theirs = nn.Conv2d(2, 3, 3), nn.AvgPool2d(3, 1, 1, count_include_pad=False), \
Do(lambda m, x: x.movedim(1, 3)), nn.Flatten(), nn.Linear(48, 3)
data = IMAGES, Y
forward pass: digits, after 1; its kernel's numbers are in 4.w | x.movedim(1, 3) | x
forward pass: pool, after 0 | , count_include_pad=False |
""")
case("""https://github.com/keras-team/keras/issues/13543, slopes and kernels in order
ours = L.DepthwiseConv2D(3, depth_multiplier=2), L.PReLU("random_normal", \
name="slopes", shared_axes=[1, 2]), L.GlobalAveragePooling2D(), L.Dense(3, "softmax")
theirs = nn.Conv2d(2, 4, 3, groups=2), nn.PReLU(4), Do(lambda m, x: x.mean((2, 3))), \
nn.Linear(4, 3)
data = IMAGES, Y
forward pass: slopes, after 0 | nn.PReLU(4) | nn.ReLU(), nn.PReLU(4)
""")
case("""https://github.com/r9y9/tacotron_pytorch/issues/19
ours = L.Dense(8), L.BatchNormalization(name="norm"), L.Dense(3, "softmax")
theirs = nn.Linear(6, 8), Do(lambda m, x: m.variant(x), variant=nn.BatchNorm1d(8, \
eps=1e-3, momentum=0.01)), nn.Linear(8, 3)
running averages | momentum=0.01 | momentum=0.99
forward pass: norm, after 0 | eps=1e-3 | eps=1e-5
forward pass: Keras [16, 3], PyTorch [16, 3]; in training mode | eps=1e-3 | eps=1e-5 \
| L.Dense(3 | L.BatchNormalization(epsilon=1e-9), L.Dense(3 \
| nn.Linear(8, 3) | nn.BatchNorm1d(8, 1e-9, 0.01), nn.Linear(8, 3)
""")
case("""features without gradients; from Stack Overflow, php.cn/faq/1588581.html
ours = L.Dense(6, name="base", trainable=False), L.ReLU(), L.Dense(1, "sigmoid", \
name="head")
theirs = nn.Linear(6, 6), nn.Linear(6, 1)
output = model[1](features(model, x))
their_by = torch.optim.SGD(model[1].parameters(), 0.1)
loss = "binary_crossentropy"
their_loss = F.binary_cross_entropy_with_logits(z, y)
data = X, (X[:, :1] > 0.2) * 1.0
forward pass: head, after your loop | , nn.Linear(6, 1) \
| , nn.Sequential(nn.Tanh(), nn.Linear(6, 1))
""")
case("""InceptionV3 of keras.applications and of torchvision: no γ in Keras
ours = L.Dense(6), L.LayerNormalization(scale=False, epsilon=1e-5), \
L.Dense(3, "softmax")
theirs = nn.Linear(6, 6), frozen(nn.LayerNorm(6), 'weight'), nn.Linear(6, 3)
options = copy_weights=lambda ours, model: fill(model, ours, place=2, constant=1)
""")
case("""https://github.com/znxlwm/UGATIT-pytorch/issues/6
ours = L.Conv2D(4, 3, kernel_regularizer="l2"), L.LeakyReLU(name="leaky"), \
L.Conv2D(1, 3)
theirs = nn.Conv2d(2, 4, 3), nn.LeakyReLU(0.3), nn.Conv2d(4, 1, 3)
loss = "mse"
their_loss = F.mse_loss(z, y) + 0.01 * model[0].weight.square().sum()
data = IMAGES, IMAGES[:, :2, :2, :1]
batches = (x, y), (np.moveaxis(x, -1, 1), np.moveaxis(y, -1, 1))
loss: Keras | + 0.01 * model[0].weight.square().sum() |
forward pass: leaky, after 0 | LeakyReLU(0.3) | LeakyReLU()
""")
case("""no thread: padded steps in the output, which the loss leaves out, and in a mean
ours = L.Embedding(3, 6, mask_zero=True), L.Dense(3, "softmax")
theirs = Do(lambda m, x: m.b(m.a(x)) * (x > 0)[..., None], a=nn.Embedding(3, 6), \
b=nn.Linear(6, 3)),
their_loss = F.cross_entropy(z[x > 0], y[x > 0])
data = np.arange(64).reshape(16, 4) % 3, np.arange(64).reshape(16, 4) % 3
batches = (x, y), (x, y)
loss: Keras | z[x > 0], y[x > 0] | z.movedim(2, 1), y
forward pass: mean, after 0.a; or a layer behind it: padded \
| L.D | L.GlobalAveragePooling1D(name="mean"), L.D | z[x > 0], y[x > 0] | z, y \
| (m.a(x)) * (x > 0)[..., None] | (m.a(x).mean(1)) | (x, y), (x, y) | (x, Y), (x, Y)
""")
case("""no thread: steps first, as recurrent networks of PyTorch have them
ours = L.Dense(3, "softmax", name="last"),
theirs = nn.Linear(6, 3), Do(lambda m, z: z.transpose(0, 1))
their_loss = F.cross_entropy(z.permute(1, 2, 0), y)
data = IMAGES.reshape(16, 12, 6), np.tile(Y[:, None], 12)
batches = (x, y), (x, y)
forward pass: last, after the batch; if it looks right | 0, 1) | 0, 1).flip(2)
""")
case("""e-com-net.com/article/1602482873162563584.htm, class weights, label smoothing
loss = keras.losses.CategoricalCrossentropy(label_smoothing=0.1)
their_loss = F.cross_entropy(z, y, label_smoothing=0.1, reduction="none") @ weights / 16
data = X, np.eye(3)[Y]
batches = (x, y, 1.0 + Y), (np.moveaxis(x, -1, 1), y.argmax(1), 1.0 + Y)
loss: Keras | / 16 | / weights.sum()
""")
case("""github.com/pytorch/pytorch/issues/2674, jessicayung/blog-code-snippets/issues/3
ours = L.LSTM(7, stateful=True, name="steps"), L.Dense(3, "softmax")
theirs = Do(next_state, lstm=frozen(nn.LSTM(6, 7, batch_first=True), 'bias_hh_l0')), \
nn.Linear(7, 3)
data = IMAGES.reshape(16, 12, 6), Y
batches = (x, y), (x, y)
options = copy_weights=lambda ours, model: fill(model, ours, place=3, constant=0)
forward pass: steps, after the batch | , batch_first=True |
second update | next_state | lambda m, x: m.lstm(x)[0][:, -1]
""")
case("""https://github.com/paiml/aprender/pull/2123, a batch in two halves
output = torch.cat([model(x[:8]), model(x[8:])])
forward pass: Keras [16, 3] | nn.ReLU() | nn.GELU()
""")
case("""no thread: a shared block, two inputs, two outputs
model = functional()
theirs = Do(lambda m, x: (m.first(m.block(x[0])), m.last(m.block(x[0]) + m.block(x[1]\
))), block=nn.Sequential(nn.Linear(6, 6), nn.Hardsigmoid()), first=nn.Linear(6, 1), \
last=nn.Linear(6, 1))
loss = ["mse", "mse"]
their_loss = F.mse_loss(z[0], y[0]) + F.mse_loss(z[1], y[1])
data = [X, 1 + X], [T, 2 * T]
batches = (x, y), (x, y)
forward pass: block/inner, after the batch | m.block(x[1]) | m.block(-x[1])
forward pass: add, after 0.block.1 | + m | - m
forward pass: last, after 0 | m.last( | -m.last(
data | (x, y), (x, y) | (x, y), (x, y[0])
""")
case("""no thread: a subclassed model
model = Subclassed()
theirs = nn.Linear(6, 6), nn.Linear(6, 3)
loss = "mse"
their_loss = F.mse_loss(z, y)
data = X, X[:, :3]
forward pass: second, after 0 | , nn | , nn.Tanh(), nn
forward pass: before second; what stands between | Subclassed() | Subclassed(between=2)
forward pass: in own, behind its layers | Subclassed() | Subclassed(behind=2)
none | Subclassed() | OwnStep()
forward pass: first, after the batch | Subclassed() | OwnStep() | nn.L | nn.Tanh(), nn.L
""")


@pytest.fixture(autouse=True)
def nothing_of_the_reader_is_changed():
    """After a right port, a wrong one and an exception."""
    arrays = [X, T, Y, MEAN, START, IMAGES]

    def settings():
        types = keras.config.floatx(), keras.config.dtype_policy().name
        return *types, torch.get_default_dtype(), keras.Operation.__call__

    before, kept = settings(), [array.copy() for array in arrays]
    weights = BASE.get_weights()
    yield
    assert settings() == before
    assert all(map(np.array_equal, kept, arrays))
    assert all(map(np.array_equal, weights, BASE.get_weights()))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("expected", "text"), CASES)
def test_the_first_step_that_is_off_and_its_layer(expected, text):
    found = run(text)
    step = check.first_off(found)
    said = f"{step}: {found[step].where}" if ":" in expected else step
    assert said[: len(expected)] == expected, found
    assert list(found) == [step for step in STEPS.split(", ") if step in found]


LEAKY = """
ours = L.Dense(99), L.LeakyReLU(), L.Dense(3, "softmax")
theirs = nn.Linear(6, 99), nn.LeakyReLU(0.3), nn.Linear(99, 3)
by = optimizers.Adam(0.001)
their_by = KerasAdam(model.parameters())
"""


def test_adam_does_not_magnify_a_constant_that_keras_rounds():
    """KerasAdam's defaults are Keras's; the second update depends on β too."""
    found = run(source(parts=LEAKY.strip().splitlines()))
    assert found["gradient"].difference > 1e-10 > found["first update"].difference
    assert found["second update"].difference < 1e-5


def test_the_second_update_counts_from_the_weights_before_it():
    """PyTorch makes none."""
    stop = "optimizer.step(), optimizer.param_groups[0].update(lr=0)"
    found = run(source("optimizer.step()", stop))
    assert found["first update"].difference < 1e-6
    assert found["second update"].difference == 1


REFUSED = """
A batch is (x, y) | (np.moveaxis(x, -1, 1), y) | x
make a new model | return model | return model.fit(x, y, verbose=0).model
make a new model | keras, build_pytorch | keras, lambda same=build_pytorch(): same
must compile | model.compile( | model.name or model.compile(
float32 | L.Dense(6, "relu", name="first") | FLOAT32
kernel [6, 3] is not PyTorch's 2.weight [4, 6] | nn.Linear(6, 3) | nn.Linear(6, 4)
4 and 3 weights | nn.Linear(6, 3) | nn.Linear(6, 3, bias=False)
leaves out ['0.bias', '2. | **{}) | copy_weights=lambda k, m: m[0].weight.zero_())
must hold the model's parameters | model.par | nn.Linear(1, 1).par
return its outputs | 6, 3) | 6, 3), Do(lambda m, z: z.sum()) | F.cross_entropy(z, y) | z
must be one number | loss.item() | loss.repeat(2)
"loss", not ['d'] | model.c | model.train_step = lambda x: {"d": 0.0}; model.c
must return {"loss" | return {"loss" | return loss.item() or {"loss"
perhaps with ['loss'] | **{}} | "right": 1}
cast by y.to(p.dtype) | model(x) | model(x.float())
a builder makes a new model | return model | return model.sizes
"""


@pytest.mark.parametrize("line", REFUSED.strip().splitlines())
def test_what_cannot_be_compared_is_refused_with_advice(line):
    advice, *changes = [field.strip() for field in line.split("|")]
    with pytest.raises(Exception) as refusal:
        run(source(*changes))
    assert advice in "\n".join([str(refusal.value), *refusal.value.__notes__])


def test_another_backend_is_refused(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(ValueError, match="TensorFlow"):
        run(source())
