"""Section 7: the frameworks compute the same, and its assertions notice when they do not."""

import contextlib
import itertools

import pytest
from harness import definitions, fields, table_under
from nbclient.exceptions import CellExecutionError

SEEDS = range(5)


def test_the_ladder_descends_on_every_seed(full_run):
    first = full_run.value(
        "[[gap.weights[0] for gap in gaps] for gaps in ladder.values()]"
    )
    assert len(first) == 7
    for seed in SEEDS:
        starts = [rung[seed] for rung in first]
        assert all(b < 1.5 * a for a, b in itertools.pairwise(starts)), starts
        assert starts[0] > 1e-2 and starts[-1] < 1e-13


def test_a_small_start_ends_an_epoch_as_far_apart_as_a_large_one(full_run):
    """The text says so of the rungs "size of ε" and "precision" of the protocol's run."""
    pairs = full_run.value(
        "[[gap.weights for gap in ladder[name]] for name in ('size of ε', 'precision')]"
    )
    for (large, after_large), (small, after_small) in zip(*pairs, strict=True):
        assert small < 1e-4 * large
        assert after_small > 0.05 * after_large


def test_another_seeds_draws_change_more_than_adam_on_every_seed(full_run):
    rows = map(fields, table_under(full_run.notebook, "### The ladder")[2:])
    alone = {row[0]: [int(n) for n in row[4].split(" to ")] for row in rows}
    drawn = min(alone["initial weights"][0], alone["order of images"][0])
    adam = max(alone[name][-1] for name in alone if "ε" in name or "β" in name)
    assert drawn > adam


@pytest.mark.parametrize(
    ("setting", "at_least"),
    [
        ("weights", 1e-2),
        ("batches", 1e-3),
        ("epsilon", 1e-6),
        ("keras_place", 1e-6),
        ("dtype", 1e-9),
        ("rounded_beta", 1e-12),
    ],
)
def test_each_setting_put_back_brings_a_difference_back(short_run, setting, at_least):
    changed = f"ALIGNED._replace({setting}=DEFAULTS.{setting})"
    assert short_run.value(f"framework_gap(0, {changed}).weights[0]") > at_least


@pytest.mark.full
@pytest.mark.parametrize("seed", SEEDS[1:])
def test_the_proof_holds_for_15_epochs_on_every_other_seed(short_run, seed):
    gap = short_run.value(f"framework_gap({seed}, ALIGNED, 15)._asdict()")
    assert gap["predictions"] == [0] * 16
    assert max(gap["weights"]) < 1e-6


@pytest.mark.full
@pytest.mark.parametrize("seed", SEEDS[1:])
def test_softplus_agrees_for_15_epochs_in_float32_on_every_other_seed(short_run, seed):
    smooth = "ALIGNED._replace(dtype='float32', activation='Softplus')"
    assert short_run.value(f"framework_gap({seed}, {smooth}, 15).predictions[15]") == 0


def test_the_full_run_proves_it_for_the_first_seed_in_its_own_cells(full_run):
    assert full_run.value("proof.predictions") == [0] * 16
    assert full_run.value("max(proof.weights)") < 1e-6


@pytest.mark.parametrize(
    "fault",
    [
        "ALIGNED._replace(epsilon=1e-8)",
        "ALIGNED._replace(keras_place=False)",
        "ALIGNED._replace(weights='PyTorch')",
        "ALIGNED._replace(batches='PyTorch')",
        "ALIGNED._replace(rounded_beta=False)",
    ],
)
@pytest.mark.parametrize("learning", [0.001, 0.01])
def test_a_planted_fault_fails_the_proof_at_any_learning_rate(
    short_run, fault, learning
):
    short_run.execute(f"faulty = framework_gap(0, {fault})")
    short_run.execute(f"kept, learning_rate = learning_rate, {learning}")
    try:
        with pytest.raises(CellExecutionError) as caught:
            short_run.execute("check_proof(faulty, control)")
    finally:
        short_run.execute("learning_rate = kept")
    assert caught.value.ename == "AssertionError"


@pytest.mark.parametrize(("rate", "seed"), [(0.001, 4), (0.001, 7), (0.1, 0)])
def test_a_pair_that_parts_after_the_first_update_fails_where_it_is_known_not_to(
    rate, seed
):
    given = {"batch_size": 32, "learning_rate": rate, "seeds": [seed]}
    notebook = definitions("Gap", "check_proof", **given)
    parted = notebook.Gap([2e-14, 8.0], [0, 5650])
    control = notebook.Gap([4e-16, 4e-16], [0, 0])
    known = (rate, seed) == (0.001, 4)
    with pytest.raises(AssertionError) if known else contextlib.nullcontext():
        notebook.check_proof(parted, control)


def test_one_changed_label_fails_the_proof(short_run):
    with pytest.raises(CellExecutionError) as caught:
        short_run.execute(
            "image, calls = draw('Keras', 0, 1)[1][0][0], trace_pytorch.__wrapped__\n"
            "y_train[image] = (y_train[image] + 1) % 10\n"
            "try:\n"
            "    check_proof(gap(sequential_trace, calls(0, 1, ALIGNED)), control)\n"
            "finally:\n"
            "    y_train[image] = (y_train[image] + 9) % 10"
        )
    assert caught.value.ename == "AssertionError"


def test_at_a_high_learning_rate_rounding_parts_pytorch_from_itself(short_run):
    """Every weight starts one bit off, up or down at random."""
    short_run.execute(
        "kept, bits, learning_rate = load, np.random.default_rng(0), 0.1\n"
        "def load(model, arrays):\n"
        "    ways = [bits.choice([-9, 9], size=array.shape) for array in arrays]\n"
        "    kept(model, list(map(np.nextafter, arrays, ways)))\n"
        "try:\n"
        "    moved = trace_pytorch.__wrapped__(7, 1, ALIGNED)\n"
        "    load = kept\n"
        "    parted = gap(moved, trace_pytorch.__wrapped__(7, 1, ALIGNED))\n"
        "finally:\n"
        "    load, learning_rate = kept, 0.001"
    )
    first, epoch = short_run.value("parted.weights")
    assert first < 1e-12
    assert epoch > 1e-2


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_control_moves_one_weight_by_its_last_bit(short_run, dtype):
    """The weights that a training loads, with and without the nudge, as whole numbers."""
    bits = f"np.concatenate([w.ravel() for w in loaded]).view('{dtype.replace('float', 'int')}')"
    short_run.execute(
        f"settings, kept, starts = ALIGNED._replace(dtype='{dtype}'), load, []\n"
        "def load(model, loaded):\n"
        f"    starts.append({bits})\n"
        "    raise StopIteration\n"
        "for nudged in (False, True):\n"
        "    with contextlib.suppress(StopIteration):\n"
        "        trace_pytorch.__wrapped__(0, 1, settings._replace(nudged=nudged))\n"
        "load, apart = kept, np.abs(starts[0] - starts[1])"
    )
    assert short_run.value("[int((apart > 0).sum()), int(apart.sum())]") == [1, 1]


def test_relu_amplifies_in_float32_and_softplus_does_not(full_run):
    last = "{name: gap(*pair).predictions[15] for name, pair in PAIRS.items()}"
    relu = full_run.value(last.replace("PAIRS", "relu_pairs"))
    softplus = full_run.value(last.replace("PAIRS", "softplus_pairs"))
    assert all(30 < differing < 400 for differing in relu.values()), relu
    assert softplus["PyTorch / PyTorch, one bit off"] == 0
    assert softplus["Keras / PyTorch"] == 0
    assert softplus["Keras / PyTorch, own Adams"] < 20


def test_with_softplus_adam_and_precision_change_no_prediction_in_an_epoch(full_run):
    found = full_run.value(
        "{name: put_back(REMOVED[name], 'Softplus', seeds[:3])[1] for name in REMOVED}"
    )
    for name, predictions in found.items():
        drawn = name in ("initial weights", "order of images")
        fits = [(p > 50) if drawn else (p == 0) for p in predictions]
        assert all(fits), (name, predictions)


def test_both_frameworks_train_the_activation_that_they_were_given(short_run):
    short_run.execute(
        "model, _ = compiled_keras(build_sequential, 'float32', 'Softplus')\n"
        "weights = draw('Keras', 0, 1)[0]\n"
        "model.set_weights(weights)\n"
        "smooth = build_pytorch(1)\n"
        "load(smooth, [w.T for w in weights])\n"
        "smooth.activation = nn.Softplus()\n"
        "ours = model(x_test[:8]).numpy()\n"
        "with torch.no_grad():\n"
        "    theirs = smooth(torch.from_numpy(x_test[:8])).softmax(dim=1).numpy()"
    )
    assert short_run.value("float(abs(ours - theirs).max())") < 1e-5
