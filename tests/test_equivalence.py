"""Section 6: the three implementations are the same computation, and its assertions notice when they are not."""

import itertools

import pytest
from nbclient.exceptions import CellExecutionError

FINAL = "float64"


def test_forward_loss_and_every_gradient_agree_in_float64(short_run):
    for step, difference in short_run.value(
        "{k: float(v) for k, v in one_batch('float64').items()}"
    ).items():
        assert difference < 1e-14, step


def test_one_update_agrees_in_float64(short_run):
    assert short_run.value(f"ladder['{FINAL}'][1][0]") < 1e-12


def test_an_untransposed_weight_is_noticed(short_run):
    short_run.execute(
        "crooked = [w.copy() for w in initial_weights]\n"
        "crooked[0] = np.ascontiguousarray(crooked[0].T).reshape(crooked[0].shape)"
    )
    for step, difference in short_run.value(
        "{k: float(v) for k, v in one_batch('float64', crooked).items()}"
    ).items():
        assert difference > 1e-4, step


def test_the_ladder_descends(short_run):
    ladder = short_run.value(
        "{rung: [trace[1][0], trace[steps_per_epoch]] for rung, trace in ladder.items()}"
    )
    first_update = [first for first, _ in ladder.values()]
    assert all(after < 1.5 * before for before, after in itertools.pairwise(first_update))
    assert first_update[0] > 1e-2
    after_epoch = {rung: trace[1] for rung, trace in ladder.items()}
    assert after_epoch["the frameworks' defaults"][1] > 100
    assert after_epoch["β rounded to float32"][0] < 1e-4
    assert after_epoch[FINAL][0] < 1e-11
    assert after_epoch[FINAL][1] == 0


@pytest.mark.parametrize(
    ("setting", "default", "at_least"),
    [
        ("weights", None, 1e-2),
        ("order", None, 1e-3),
        ("epsilon", 1e-8, 1e-6),
        ("same_place", False, 1e-6),
        ("dtype", "float32", 1e-9),
        ("betas", (0.9, 0.999), 1e-12),
    ],
)
def test_each_setting_taken_away_brings_a_difference_back(short_run, setting, default, at_least):
    short_run.execute(
        f"without = compare(keras_float64, trace_pytorch(1, **settings | {{'{setting}': {default!r}}}))"
    )
    difference = short_run.value("without[1][0]")
    assert difference > at_least
    assert difference > 10 * short_run.value(f"ladder['{FINAL}'][1][0]")


def test_the_proof_holds_for_15_epochs(full_run):
    proof = full_run.value("list(compare(keras_float64, pytorch_traces['float64']).values())")
    assert full_run.value("proof_epochs") == 15
    assert all(differing == 0 and difference < 1e-6 for difference, differing in proof)
    full_run.execute("check_proof(pytorch_traces['float64'])")


@pytest.mark.parametrize(
    "fault",
    [
        "settings | {'weights': [initial_weights[0].T.reshape(784, 128), *initial_weights[1:]]}",
        "{name: value for name, value in settings.items() if name != 'epsilon'}",
        "settings | {'order': order[:, ::-1].copy()}",
    ],
)
def test_a_planted_fault_fails_the_proof(short_run, fault):
    with pytest.raises(CellExecutionError) as caught:
        short_run.execute(f"check_proof(trace_pytorch(1, **({fault})))")
    assert caught.value.ename == "AssertionError"


def test_one_changed_label_fails_the_proof(short_run):
    with pytest.raises(CellExecutionError) as caught:
        short_run.execute(
            "y_train[order[0, 0]] = (y_train[order[0, 0]] + 1) % 10\n"
            "try:\n"
            "    check_proof(trace_pytorch(1, **settings))\n"
            "finally:\n"
            "    y_train[order[0, 0]] = (y_train[order[0, 0]] + 9) % 10"
        )
    assert caught.value.ename == "AssertionError"


def test_the_control_changes_one_weight_by_one_bit(short_run):
    short_run.execute(
        "changed = nudged_weights[0].view('int32') - initial_weights[0].view('int32')"
    )
    assert short_run.value("[int(np.abs(changed).sum()), int(np.count_nonzero(changed))]") == [1, 1]
    assert (
        short_run.value(
            "[bool((a == b).all()) for a, b in zip(nudged_weights[1:], initial_weights[1:])]"
        )
        == [True] * 3
    )


def test_the_frameworks_differ_no_more_than_the_controls(full_run):
    last = {
        name: trace
        for name, trace in full_run.value("{k: v[last][1] for k, v in comparisons.items()}").items()
    }
    float64 = last.pop("Keras against PyTorch, float64")
    assert float64 == 0
    assert all(30 < differing < 400 for differing in last.values()), last
    assert max(last.values()) < 4 * min(last.values()), last
