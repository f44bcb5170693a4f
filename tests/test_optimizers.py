"""Section 8 on optimizers: what stands there is what both frameworks compute."""

import math
import re

import numpy as np
from harness import fields, table
from test_causes import CAUSES, CAUSES_TEXT, keras, near, nn, numbers, plain, tf, torch

optimizers, tensor = keras.optimizers, torch.tensor
OPTIMIZERS_TEXT = CAUSES_TEXT.split("### Other optimizers\n")[1]


def moved(optimizer, *gradients, start=0.0, **options):
    """By how much an optimizer's steps lower a weight, or an array of weights."""
    start = np.float32(start)
    if issubclass(optimizer, torch.optim.Optimizer):
        weight = nn.Parameter(tensor(start))
        optimizer = optimizer([weight], **options)
        for gradient in gradients:
            weight.grad = tensor(np.float32(gradient))
            optimizer.step()
    else:
        weight, optimizer = keras.Variable(start), optimizer(**options)
        for gradient in gradients:
            optimizer.apply([tf.constant(gradient)], [weight])
    return start - plain(weight)


def test_size_and_place_of_adams_epsilon():
    ours, theirs = CAUSES["Adam's ε"]
    # Before the bias correction √v is this, after it the gradient.
    root = 1e-6 * math.sqrt(1 - 0.999)
    assert near(moved(optimizers.Adam, 1e-6), 1e-3 / (1 + numbers(ours)[0] / root))
    assert near(moved(torch.optim.Adam, 1e-6), 1e-3 / (1 + numbers(theirs)[0] / 1e-6))
    assert "before the bias" in ours and "after the bias" in theirs


def test_where_weight_decay_goes():
    ours, theirs = CAUSES["weight decay"]
    decay = {"start": 2.0, "weight_decay": 0.05}
    assert near(moved(optimizers.Adam, 0.0, learning_rate=0.1, **decay), 0.1 * 0.05 * 2)
    assert near(moved(torch.optim.AdamW, 0.0, lr=0.1, **decay), 0.1 * 0.05 * 2)
    assert "takes rate · λw" in ours and "in `AdamW` it takes rate · λw" in theirs
    # Adam's first step is the rate, whatever the gradient; that of SGD shows it.
    assert near(moved(torch.optim.Adam, 0.0, lr=0.1, **decay), 0.1)
    assert near(moved(torch.optim.SGD, 0.0, lr=1, **decay), 0.05 * 2)
    assert near(keras.regularizers.L2(0.05)(tf.constant(2.0)), 0.05 * 2**2)
    assert "`L2(λ)` adds 2λw" in ours and "in `Adam` adds λw" in theirs


def test_what_gradient_clipping_divides_by():
    ours, theirs = CAUSES["gradient clipping"]
    gradients = [3e-6, 4e-6]
    for option, expected in (("clipnorm", [1, 1]), ("global_clipnorm", [0.6, 0.8])):
        pair = [keras.Variable(0.0), keras.Variable(0.0)]
        sgd = optimizers.SGD(1e6, **{option: 1e-6})
        sgd.apply([tf.constant(gradient) for gradient in gradients], pair)
        assert near([-plain(weight) for weight in pair], expected)
    assert "`clipnorm` for each" in ours and "`global_clipnorm` for all" in ours
    pair = [nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))]
    for weight, gradient in zip(pair, gradients, strict=True):
        weight.grad = tensor(gradient)
    nn.utils.clip_grad_norm_(pair, 1e-6)
    clipped = 4e-6 / (5e-6 + numbers(theirs)[0])
    assert near(1e6 * weight.grad, clipped) and "for all together" in theirs


def first_steps(name, gradients):
    """A token's first step with its gradients as slices, and with their sum."""
    slices, steps = tf.IndexedSlices(tf.constant(gradients), [0, 0], [2]), []
    for gradient in (slices, tf.convert_to_tensor(slices)):
        weight = keras.Variable([1.0, 1.0])
        getattr(optimizers, name)(0.1).apply([gradient], [weight])
        steps.append(1 - plain(weight)[0])
    return steps


def test_the_gradient_of_a_token_twice_in_a_batch():
    ours, theirs = CAUSES["a token twice in a batch"]
    *given, by_slice = numbers(ours)
    assert given == [0.1, 1, 2] and "their sum" in theirs
    assert near(first_steps("Adam", given[1:]), [by_slice, *numbers(theirs)], 2e-3)
    assert near(moved(torch.optim.Adam, 3.0, lr=0.1), numbers(theirs))
    text = CAUSES_TEXT.split("for each token. ")[1]
    one_by_one, summed = text.split(" take them one by one; PyTorch takes their sum. ")
    for name in re.findall(r"[A-Z]\w+", one_by_one):
        assert not near(*first_steps(name, [1.0, -2.0])), name
    for name in summed.split(" agree with the sum.")[0].split(" and "):
        assert near(*first_steps(name, [1.0, -2.0])), name


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
    values = [defaults[name] or 0 for name in names.split() if name in defaults]
    texts = [f"{value:.6g}" for one in values for value in np.ravel(one)]
    return ", ".join(texts).replace("e-0", "e-") or "–"


def test_the_defaults_of_optimizers():
    header, _, *lines = map(fields, table(OPTIMIZERS_TEXT))
    assert header[1:] == list(OPTIONS) and len(lines) == 9
    for name, *texts in lines:
        other = getattr(torch.optim, name.replace("Na", "NA"), None)
        if name == "Muon" and other is None:
            continue
        mine = getattr(optimizers, name)().get_config()
        theirs = other([nn.Parameter(torch.zeros(2, 2))]).defaults
        for text, names in zip(texts, OPTIONS.values(), strict=True):
            a, b = shown(mine, names), shown(theirs, names)
            assert text == (a if a == b else f"**{a} / {b}**"), name


def test_the_formulas_of_rmsprop_adagrad_and_nadam():
    for name, ours, theirs in (("RMSprop", 0.1, 0.01), ("Adagrad", 1.1, 1)):
        inside = moved(getattr(optimizers, name), 1.0, learning_rate=1.0, epsilon=3)
        outside = moved(getattr(torch.optim, name), 1.0, lr=1, eps=3)
        assert near(inside, 1 / math.sqrt(ours + 3))
        assert near(outside, 1 / (math.sqrt(theirs) + 3))
    assert "and Adagrad add ε inside the square root in Keras, out" in OPTIMIZERS_TEXT
    expected = moved(optimizers.Nadam, 1.0, -0.5, learning_rate=0.1)
    nadam, gradients = torch.optim.NAdam, [1.0, -0.5]
    assert near(moved(nadam, *gradients, lr=0.1, momentum_decay=1), expected)
    assert not near(moved(nadam, *gradients, lr=0.1), expected)
    assert "has Keras's formula with `momentum_decay=1`" in OPTIMIZERS_TEXT
