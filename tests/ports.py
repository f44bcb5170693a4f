"""The check, and what the ports of test_check are made of."""

import numpy as np
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
FLOAT32 = keras.Sequential([keras.Input((6,)), L.Dense(6, "relu"), L.Dense(3)])


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
