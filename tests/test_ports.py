"""Section 8's check on ports between Keras and PyTorch, most of which failed in public.

Each is said as what differs from a plain classifier, below its source, and each of its
mistakes as the step at which it must show, a text of the port and what replaces it.
"""

import subprocess
import sys

import numpy as np
import pytest
from harness import code_cells, committed

CELLS = [cell.source for cell in code_cells(committed().cells)]
[CELL] = [cell for cell in CELLS if "def check_port(" in cell]
check = {"__name__": "copied"}
exec(CELL, check)
keras, torch, by_order = check["keras"], check["torch"], check["copy_in_order"]
L, optimizers, nn, F = keras.layers, keras.optimizers, torch.nn, torch.nn.functional

random = np.random.default_rng(0)
X, T = random.normal(size=(16, 6)), random.normal(size=16)
FAR, MEAN = 1e4 + X, 1e4 + random.normal(size=6)  # float32 has few digits of these
Y, TOKENS = np.arange(16) % 3, random.integers(0, 6, size=(16, 5))
IMAGES = random.normal(size=(16, 6, 6, 2)).astype("float32")
CLASS_WEIGHTS = np.array([0.5, 1, 3])
ACCURACY = {"accuracy": "(z.argmax(1) == y).double().mean()"}
MSE = {"loss": "'mse'", "their_loss": "F.mse_loss(z, y)"}
MSE["metrics"] = {"mse": "F.mse_loss(z, y)", "mae": "F.l1_loss(z, y)"}
PORT = """
def build_keras():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input(x.shape[1:]), {ours}])
    model.compile({by}, {loss}, metrics={names})
    return model

def build_pytorch():
    model = nn.Sequential({theirs})
    if ported:
        with torch.no_grad():
            fill(build_keras(), model)
    return model, {their_by}

def train_step(model, optimizer, x, y, weights=None):
    model.zero_grad()
    z = model(x)
    loss = {their_loss}
    loss.backward()
    {step}
    return {{"loss": loss.item(), {values}}}

x, y = {data}
keras_batch = x, y{weights}
torch_batch = np.moveaxis(x, -1, 1), {their_y}{weights}
copy_weights, ported, fill = {copy}, False, by_order
"""
STEPS = ["data", "weights", "forward pass", "loss", "accuracy", "mae", "mse"]
STEPS += ["gradient", "first update", "second update", "running averages"]
ARGUMENTS = "build_keras build_pytorch train_step keras_batch torch_batch"
CASES = []


def source(
    *changes,
    ours='L.Dense(6, "relu"), L.Dense(3, "softmax")',
    theirs="nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)",
    loss='"sparse_categorical_crossentropy"',
    their_loss="F.cross_entropy(z, y)",
    metrics=ACCURACY,
    by="optimizers.SGD(0.1)",
    their_by="torch.optim.SGD(model.parameters(), 0.1)",
    step="optimizer.step()",
    copy="by_order",
    data="X, Y",
    their_y="y",
    weights="",
):
    """A port, and the texts in it that are changed: old, new, old, new, ..."""
    values = ", ".join(f'"{name}": {value}' for name, value in metrics.items())
    text = PORT.format(**locals(), names=sorted(metrics))
    for old, new in zip(changes[::2], changes[1::2], strict=True):
        assert old in text
        text = text.replace(old, new, 1)
    return text


def run(text):
    port = globals().copy()
    exec(text, port)
    names = *ARGUMENTS.split(), "copy_weights", "ported"
    return check["check_port"](**{name: port[name] for name in names})


def case(thread, *mistakes, **parts):
    for step, *changes in [("none",), *mistakes]:
        name = " ".join([step, "in", thread, *changes])
        CASES.append(pytest.param(step, source(*changes, **parts), id=name))


class Do(nn.Module):
    """A function of a module and its input; the module has these layers and buffers."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            add = self.register_buffer if torch.is_tensor(part) else self.add_module
            add(name, part)

    def forward(self, x):
        return self.function(self, x)


def one_bias(lstm):
    lstm.bias_hh_l0.requires_grad_(False)
    return lstm


def to_lstm(keras_model, model):
    arrays = keras_model.get_weights()
    arrays.insert(4, 0 * arrays[3])
    for i, (tensor, array) in enumerate(zip(model.parameters(), arrays, strict=True)):
        tensor.copy_(torch.from_numpy(array.T if i else array))


def by_name(keras_model, model):
    for name, layer in model[0].named_children():
        kernel, bias = map(torch.from_numpy, keras_model.get_layer(name).get_weights())
        layer.weight.copy_(kernel.T)
        layer.bias.copy_(bias)


def reshaped(keras_model, model):
    for p, array in zip(model.parameters(), keras_model.get_weights(), strict=True):
        p.copy_(torch.from_numpy(array).reshape(p.shape))


def scheduled(model, factor):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    optimizer.register_step_post_hook(lambda *_: scheduler.step())
    return optimizer


ADAMS = ["optimizers.SGD(0.1)", "optimizers.Adam(0.001, epsilon=1e-15)"]
ADAMS += ["torch.optim.SGD(model.parameters(), 0.1)"]
ADAMS += ["torch.optim.Adam(model.parameters(), 0.001, eps=1e-15)"]
case(
    "https://discuss.pytorch.org/t/160720",
    ("loss", ", nn.Flatten(0)", ""),
    ("forward pass", "nn.ReLU(), ", ""),
    ("mae", "F.l1_loss(z, y)", "F.l1_loss(z, y) / 2"),
    ("none", "X, T", "X, 3e5 + 1e5 * T"),
    ours='L.Dense(8, "relu"), L.Dense(1)',
    theirs="nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1), nn.Flatten(0)",
    **MSE,
    data="X, T",
)
case(
    "a question of Stack Overflow, retold at php.cn/faq/1588581.html",
    ("accuracy", ".mean()", ".mean() / 100"),
    ("accuracy", "z > 0", "z > 0.5"),
    ("loss", "nn.Linear(8, 1)", "nn.Linear(8, 1), nn.Sigmoid()"),
    ("forward pass", "nn.Linear(8, 1)", "nn.Linear(8, 1), nn.Softmax(1)"),
    ("none", "8, 1)", "8, 1), nn.Sigmoid()", "_with_logits", "", "z > 0", "z > 0.5"),
    ours='L.Dense(8, "relu"), L.Dense(1, "sigmoid")',
    theirs="nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1)",
    loss='"binary_crossentropy"',
    their_loss="F.binary_cross_entropy_with_logits(z, y)",
    metrics={"accuracy": "((z > 0) == (y > 0.5)).double().mean()"},
    data="X, (X[:, :1] > 0.2) * 1.0",
)
case(
    "https://discuss.pytorch.org/t/184306",
    ("forward pass", "x.movedim(1, 3)", "x"),
    ("loss", "nn.Linear(48, 3)", "nn.Linear(48, 3), nn.Softmax(1)"),
    ours='L.Conv2D(3, 3, activation="relu"), L.Flatten(), L.Dense(3, "softmax")',
    theirs="nn.Conv2d(2, 3, 3), nn.ReLU(), Do(lambda m, x: x.movedim(1, 3)), "
    "nn.Flatten(), nn.Linear(48, 3)",
    data="IMAGES, Y",
)
case(
    "https://github.com/gzuidhof/nn-transfer/pull/3",
    ("forward pass", "eps=1e-3, ", ""),
    ours="L.Dense(4), L.BatchNormalization(moving_variance_initializer=lambda shape, "
    "dtype: 3e-4 * np.ones(shape)), L.Dense(2, 'softmax')",
    theirs="nn.Linear(6, 4), nn.BatchNorm1d(4, eps=1e-3, momentum=0.01), nn.Linear(4, 2)",
    data="9 * X[:4], Y[:4] % 2",
)
case(
    "https://github.com/r9y9/tacotron_pytorch/issues/19",
    ("running averages", "momentum=0.01", "momentum=0.99"),
    ("forward pass", "m.norm(x)", "m.norm.train()(x)"),
    ("second update", ".step()", ".step(), model.eval()"),
    ours='L.Dense(8), L.BatchNormalization(), L.ReLU(), L.Dense(3, "softmax")',
    theirs="nn.Linear(6, 8), Do(lambda m, x: m.norm(x), norm=nn.BatchNorm1d(8, eps=1e-3, "
    "momentum=0.01)), nn.ReLU(), nn.Linear(8, 3)",
    data="X[:4], Y[:4]",
)
case(
    "https://github.com/znxlwm/UGATIT-pytorch/issues/6",
    ("loss", " + 0.01 * model[0].weight.square().sum()", ""),
    ("forward pass", "LeakyReLU(0.3)", "LeakyReLU()"),
    ours='L.Conv2D(4, 3, kernel_regularizer="l2"), L.LeakyReLU(), L.Conv2D(1, 3)',
    theirs="nn.Conv2d(2, 4, 3), nn.LeakyReLU(0.3), nn.Conv2d(4, 1, 3)",
    **MSE | {"their_loss": "F.mse_loss(z, y) + 0.01 * model[0].weight.square().sum()"},
    data="IMAGES, IMAGES[:, :2, :2, :1]",
    their_y="np.moveaxis(y, -1, 1)",
)
case(
    "e-com-net.com/article/1602482873162563584.htm, class weights",
    ("loss", ".mean()", ".sum() / weights.sum()"),
    ("loss", " * weights", ""),
    their_loss="(F.cross_entropy(z, y, reduction='none') * weights).mean()",
    weights=", CLASS_WEIGHTS[y]",
)
case(
    "e-com-net.com/article/1602482873162563584.htm, label smoothing",
    ("loss", ", label_smoothing=0.1)\n", ")\n"),
    ("data", "1), Y", "1), Y[::-1].copy()"),
    loss="keras.losses.CategoricalCrossentropy(label_smoothing=0.1)",
    their_loss="F.cross_entropy(z, y, label_smoothing=0.1)",
    data="X, np.eye(3)[Y]",
    their_y="Y",
)
case(
    "https://discuss.pytorch.org/t/186336",
    ("loss", "F.smooth_l1_loss", "F.mse_loss"),
    ("first update", "0.1 * p.grad", "0.01 * p.grad"),
    ours="L.Dense(1)",
    theirs="nn.Linear(6, 1)",
    loss='"huber"',
    their_loss="F.smooth_l1_loss(z, y)",
    metrics={},
    data="X, 9 * T[:, None]",
    step="[p.data.sub_(0.1 * p.grad) for p in model.parameters()]",
)
case(
    "https://github.com/keras-team/keras/issues/2808",
    ("second update", "1 / (1 + 1e4 * t)", "1"),
    ("second update", "1e4 * t", "9e3 * t"),
    ("first update", "1e4 * t", "1e4 * (t + 1)"),
    by="optimizers.SGD(optimizers.schedules.InverseTimeDecay(0.1, 1, 1e4))",
    their_by="scheduled(model, lambda t: 1 / (1 + 1e4 * t))",
)
case(
    "no thread: a frozen layer",
    ("gradient", ", trainable=False", ""),
    ("gradient", "nn.Linear(6, 8).requires_grad_(False)", "nn.Linear(6, 8)"),
    ("gradient", ", trainable=False", "", "SGD(model", "SGD(model[2]", "(False)", "()"),
    ("none", "(False)", "()", "SGD(model", "SGD(model[2]"),
    ours='L.Dense(8, "relu", trainable=False), L.Dense(3, "softmax")',
    theirs="nn.Linear(6, 8).requires_grad_(False), nn.ReLU(), nn.Linear(8, 3)",
)
case(
    "no thread: layers that are created in another order",
    ("forward pass", "by_name", "by_order"),
    ("weights", ", False", ", True"),
    ours='L.Dense(6, "tanh", name="first"), L.Dense(6, name="second")',
    theirs="Do(lambda m, x: m.second(m.first(x).tanh()), second=nn.Linear(6, 6), "
    "first=nn.Linear(6, 6))",
    **MSE,
    data="X, X[::-1].copy()",
    copy="by_name",
)
case(
    "https://github.com/pytorch/pytorch/issues/2674",
    ("forward pass", ", batch_first=True", ""),
    ("gradient", "one_bias", ""),
    ours='L.Embedding(6, 6), L.LSTM(7), L.Dense(3, "softmax")',
    theirs="nn.Embedding(6, 6), one_bias(nn.LSTM(6, 7, batch_first=True)), "
    "Do(lambda m, x: x[0][:, -1]), nn.Linear(7, 3)",
    data="TOKENS, Y",
    copy="to_lstm",
)
case(
    "whosebug.com/question/3988429",
    ("forward pass", "nn.Linear(4, 3)", "nn.Linear(4, 3), nn.Softmax(1)"),
    ("loss", "nn.Linear(4, 3)", "nn.Linear(4, 3), nn.Softmax(2)"),
    ("none", "nn.Linear(4, 3)", "nn.Linear(4, 3), Do(lambda m, x: x.mT)", "z.mT", "z"),
    ours='L.Embedding(6, 4), L.Dense(3, "softmax")',
    theirs="nn.Embedding(6, 4), nn.Linear(4, 3)",
    their_loss="F.cross_entropy(z.mT, y)",
    metrics={},
    data="TOKENS, TOKENS % 3",
)
case(
    "https://discuss.pytorch.org/t/135659",
    ("weights", "False, by_order", "True, lambda *_: None"),
    ("gradient", "nn.Embedding(6, 6", "nn.Embedding(6, 6, padding_idx=0"),
    ("first update", *ADAMS),
    ours='L.Embedding(6, 6), L.Flatten(), L.Dense(3, "softmax")',
    theirs="nn.Embedding(6, 6), nn.Flatten(), nn.Linear(30, 3)",
    data="TOKENS, Y",
)
case(
    "https://github.com/pytorch/pytorch/issues/23796",
    ("first update", "epsilon=1e-15", "epsilon=1e-3", "eps=1e-15", "eps=1e-3"),
    by="optimizers.RMSprop(0.001, 0.9, epsilon=1e-15)",
    their_by="torch.optim.RMSprop(model.parameters(), 0.001, 0.9, eps=1e-15)",
    step="optimizer.step(), optimizer.zero_grad()",
)
case(
    "no thread: Adam",
    ("first update", "eps=1e-15", "eps=1e-7", "epsilon=1e-15", "epsilon=1e-7"),
    ("first update", "0.001", "0.00101"),
    by=ADAMS[1],
    their_by=ADAMS[3],
)
case(
    "no thread: clipped gradients",
    ("gradient", "global_clipnorm", "clipnorm"),
    by="optimizers.SGD(0.1, global_clipnorm=1)",
    step="nn.utils.clip_grad_norm_(model.parameters(), 1), optimizer.step()",
    data="30 * X, Y",
)
case(
    "no thread: a module in float32, as usual",
    ("none", "False, by_order", "True, by_order"),
    ("forward pass", "nn.Tanh()", "nn.Softsign()"),
    ours="*[L.Dense(units, 'tanh', kernel_initializer=keras.initializers.RandomNormal("
    "stddev=1)) for units in (200, 100)], L.Dense(3, 'softmax')",
    theirs="nn.Linear(6, 200), nn.Tanh(), nn.Linear(200, 100), nn.Tanh(), "
    "nn.Linear(100, 3)",
    their_loss="F.cross_entropy(z @ torch.eye(3), y)",
)
case(
    "no thread: mistakes that need no special layer",
    ("data", "np.moveaxis(x, -1, 1)", "255 * x"),
    ("weights", "False, by_order", "True, reshaped"),
    ("loss", "z, y)\n", "z, y, reduction='sum')\n"),
    ("accuracy", "== y)", "== y[:, None])"),
    ("gradient", "nn.ReLU()", "nn.ReLU(), Do(lambda m, x: x.detach())"),
    ("second update", "    model.zero_grad()\n", ""),
    ("loss", "loss.item()", "float('nan')"),
)


@pytest.fixture(autouse=True)
def float_types():
    def now():
        policy = keras.config.dtype_policy().name
        return keras.config.floatx(), policy, torch.get_default_dtype()

    before = now()
    yield
    assert now() == before


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("step", "text"), CASES)
def test_the_first_step_that_is_off(step, text):
    found = run(text)
    assert check["first_off"](found) == step, found
    assert list(found) == [step for step in STEPS if step in found]


FLOAT32 = keras.Sequential([keras.Input((6,)), L.Dense(6, "relu"), L.Dense(3)])
LOADED = "model = keras.models.clone_model(FLOAT32)\n    model.compile("
FILLED = "= lambda k, m: m[0].weight.zero_() + m[2].bias.zero_()"
CACHED = "import functools\n@functools.cache\ndef build_"
REFUSED = [
    ("tuple", "keras_batch = x, y", "keras_batch = x"),
    ("tuple", "torch_batch = np.moveaxis(x, -1, 1), y", "torch_batch = x"),
    ("new model", "def build_", CACHED),
    ("new model", "def build_pytorch", f"{CACHED}pytorch"),
    ("compile", "model.compile(", "model.name or model.compile("),
    ("dtype", "model.compile(", LOADED),
    ("dtype", 'L.Dense(6, "relu")', "FLOAT32.layers[0]"),
    ("kernel|6, 3|2.weight|4, 6", "nn.Linear(6, 3)", "nn.Linear(6, 4)"),
    ("kernel|6, 3|2.weight|3, 6", "nn.Linear(6, 3)", "nn.Linear(6, 3, bias=False)"),
    ("0.bias|2.weight", "= by_order", FILLED),
    ('"loss"', '"loss": loss', '"lost": loss'),
    ('"loss"', 'return {"loss"', 'return loss.item() or {"loss"'),
    ("accuracy|loss", '"accuracy"', '"right"'),
    (".to(p.dtype)", "model(x)", "model(x.float())"),
]


@pytest.mark.parametrize(("message", "changes"), [(m, c) for m, *c in REFUSED])
def test_what_cannot_be_compared_is_refused(message, changes):
    with pytest.raises(ValueError) as refusal:
        run(source(*changes))
    assert [part for part in message.split("|") if part not in str(refusal.value)] == []


def test_another_backend_is_refused(monkeypatch):
    for place in keras.backend, keras.config:
        monkeypatch.setattr(place, "backend", lambda: "jax")
    with pytest.raises(ValueError, match="TensorFlow"):
        run(source())


@pytest.mark.parametrize("shifted", ["x - m.mean", "x.sub_(m.mean)"])
def test_arrays_that_a_port_shares_stay_as_they_were(shifted):
    layers = "Do(lambda m, x: {}, mean=torch.from_numpy(MEAN)), nn.Linear(6, 3)"
    text = source(
        *("np.moveaxis(x, -1, 1), y", "torch.from_numpy(x), torch.from_numpy(y)"),
        ours="L.Normalization(mean=MEAN, variance=np.ones(6)), L.Dense(3, 'softmax')",
        theirs=layers.format(shifted),
        data="FAR, Y",
    )
    before = MEAN.copy(), FAR.copy(), Y.copy()
    found = run(text)
    assert all(map(np.array_equal, before, (MEAN, FAR, Y)))
    assert (check["first_off"](found) == "none") == (shifted == "x - m.mean")


def test_the_cell_runs_alone_in_a_process_of_its_own(tmp_path):
    names = """import numpy as np
L, optimizers, nn, F = keras.layers, keras.optimizers, torch.nn, torch.nn.functional
X, Y, by_order = np.random.default_rng(0).normal(size=(9, 6)), np.arange(9) % 3, None
"""
    call = f"print(first_off(check_port({', '.join(ARGUMENTS.split())})))"
    script = tmp_path / "cell.py"
    script.write_text("\n".join([CELL, names, source(*ADAMS), call]), encoding="utf-8")
    command = [sys.executable, script]
    options = {"cwd": tmp_path, "capture_output": True, "text": True}
    ended = subprocess.run(command, check=False, **options)
    assert (ended.returncode, ended.stdout.split()[-1:]) == (0, ["none"]), ended.stderr
