"""Section 8's KerasAdam takes the updates of the installed Keras's Adam, in float64."""

import contextlib
import copy

import numpy as np
import pytest
from harness import code_cells, committed, definitions

n = definitions()
keras, tf, torch, LambdaLR = n.keras, n.tf, n.torch, n.torch.optim.lr_scheduler.LambdaLR
CELLS = [cell.source for cell in code_cells(committed().cells)]
namespace = {"torch": torch, "nn": torch.nn}
exec(*[cell for cell in CELLS if "class KerasAdam" in cell], namespace)
KerasAdam = namespace["KerasAdam"]
random = np.random.default_rng(0)
START = [random.normal(size=size) for size in (7, 5)]
# Small ones too, where ε and its place matter.
ROWS = random.choice([-1, 1], (10, 12)) * 10.0 ** random.uniform(-9, 0, size=(10, 12))
GRADIENTS = [np.split(row, [7]) for row in ROWS]
GAPS = [list(pair) for pair in GRADIENTS]
GAPS[2][1] = GAPS[3][1] = GAPS[5][0] = GAPS[9][1] = None
# Keras rounds β, and a schedule's rates, to float32, which holds these exactly.
EXACT = {"betas": (0.875, 0.9990234375), "lr": 2**-7}
HALVED = keras.optimizers.schedules.ExponentialDecay(2**-7, 1, 0.5)


@pytest.fixture(autouse=True)
def float64():
    kept = keras.config.floatx(), keras.config.dtype_policy()
    for floatx, policy in ("float64", "float64"), kept:
        keras.config.set_floatx(floatx)
        keras.config.set_dtype_policy(policy)
        if floatx is not kept[0]:
            yield


def keras_run(gradients=GRADIENTS, by_hand=None, only=slice(None), **options):
    """How far the variables are from their start after each update."""
    (beta_1, beta_2), rate = options.pop("betas"), options.pop("lr")
    optimizer = keras.optimizers.Adam(rate, beta_1, beta_2, **options)
    variables, moved = [keras.Variable(s, dtype="float64") for s in START[only]], []
    for t, now in enumerate(gradients):
        if by_hand:
            optimizer.learning_rate = by_hand(t)
        held = [None if g is None else tf.constant(g) for g in now[only]]
        optimizer.apply(held, variables)
        pairs = zip(variables, START[only], strict=True)
        moved.append(np.concatenate([v.numpy() - s for v, s in pairs]))
    assert moved[0].dtype == np.float64 and np.abs(moved[-1]).max() > 1e-3
    return np.array(moved)


def torch_run(make, gradients=GRADIENTS, before=lambda t, p, o: (p, o)):
    """The same; `before` may give other parameters and another optimizer."""
    parameters = [torch.nn.Parameter(torch.from_numpy(s.copy())) for s in START]
    optimizer, moved = make(parameters), []
    for t, now in enumerate(gradients):
        parameters, optimizer = before(t, parameters, optimizer)
        for p, g in zip(parameters, now, strict=True):
            p.grad = None if g is None else torch.from_numpy(g.copy())
        optimizer.step()
        pairs = zip(parameters, START, strict=True)
        moved.append(np.concatenate([p.detach().numpy() - s for p, s in pairs]))
    return np.array(moved)


def apart(ours, theirs):
    """The largest difference, relative to the largest number at that update."""
    return (np.abs(ours - theirs).max(axis=1) / np.abs(ours).max(axis=1)).max()


def test_with_the_default_options():
    ours = keras_run(betas=(0.9, 0.999), lr=0.001)
    plain = torch_run(lambda parameters: torch.optim.Adam(parameters, eps=1e-7))
    assert apart(ours[:1], plain[:1]) > 1e-4
    assert apart(ours, torch_run(KerasAdam)) < 1e-5
    assert np.abs(ours - torch_run(KerasAdam)).max() < 1e-7


OPTIONS = [({}, {}), ({}, {"fused": True}), ({"epsilon": 1e-3}, {"eps": 1e-3})]
OPTIONS += [({"amsgrad": True},) * 2, ({"weight_decay": 0.125},) * 2]


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize(("ours", "theirs"), OPTIONS)
@pytest.mark.parametrize("gradients", [GRADIENTS, GAPS], ids=["all", "gaps"])
def test_options_and_parameters_without_a_gradient(ours, theirs, gradients):
    moved = torch_run(lambda p: KerasAdam(p, **EXACT | theirs), gradients)
    assert apart(keras_run(gradients, **EXACT | ours), moved) < 1e-12


def test_each_group_has_its_own_options():
    first = keras_run(only=slice(1), **EXACT)
    second = keras_run(only=slice(1, 2), **EXACT | {"lr": 0.002, "epsilon": 1e-4})

    def make(p):
        own = {"params": p[1:], "lr": 0.002, "eps": 1e-4}
        return KerasAdam([{"params": p[:1]}, own], **EXACT)

    assert apart(np.hstack([first, second]), torch_run(make)) < 1e-12


def scheduled(t, parameters, optimizer):
    if t == 0:
        optimizer.scheduler = LambdaLR(optimizer, lambda t: 0.5**t)
    else:
        optimizer.scheduler.step()
    return parameters, optimizer


def by_hand(t, parameters, optimizer):
    optimizer.param_groups[0]["lr"] = 0.5**t
    return parameters, optimizer


def loaded(t, parameters, optimizer):
    fresh = KerasAdam(parameters)
    fresh.load_state_dict(optimizer.state_dict())
    return parameters, fresh if t == 4 else optimizer


def copied(t, *both):
    return copy.deepcopy(both) if t == 4 else both


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize(
    ("before", "options"),
    [(scheduled, {"lr": HALVED}), (by_hand, {"by_hand": lambda t: 0.5**t})]
    + [(loaded, {}), (copied, {})],
)
def test_what_changes_between_the_updates(before, options):
    moved = torch_run(lambda p: KerasAdam(p, **EXACT), GAPS, before)
    assert apart(keras_run(GAPS, **EXACT | options), moved) < 1e-12


@pytest.mark.parametrize("fails", [False, True])
def test_a_closure_leaves_the_options(fails):
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = KerasAdam([parameter], 0.5, weight_decay=0.25)

    def closure():
        parameter.grad = torch.ones(2)
        return 1 / (1 - fails)

    before = optimizer.state_dict()["param_groups"]
    with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext():
        assert optimizer.step(closure) == 1
    assert optimizer.state_dict()["param_groups"] == before
    assert (parameter[0].item() == 1) == fails and before[0]["eps"] == 1e-7
