"""The permutation test of section 6, as a function."""

import itertools
import math

import numpy as np
import pytest
from harness import definitions

notebook = definitions("PermutationTest", "permutation_test")
permutation_test = notebook.permutation_test

# The right answers of 10,000 in the first edition's committed run.
KERAS = np.array([9785, 9798, 9805, 9757, 9764])
PYTORCH = np.array([9765, 9757, 9752, 9757, 9793])


def by_counting(a, b):
    """The p-value, one split at a time and in whole numbers."""
    pooled, real = [*a, *b], abs(sum(a) - sum(b))
    splits = itertools.combinations(range(len(pooled)), len(a))
    differences = [2 * sum(pooled[i] for i in split) - sum(pooled) for split in splits]
    return sum(abs(d) >= real for d in differences) / len(differences)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("seed", range(5))
def test_p_is_the_share_of_splits_even_with_many_ties(n, seed):
    a, b = np.random.default_rng(seed).integers(9750, 9756, size=(2, n))
    assert permutation_test(a, b).p == pytest.approx(
        by_counting(a.tolist(), b.tolist())
    )


def test_the_first_edition_has_52_of_252_splits_which_float32_would_lose():
    assert permutation_test(PYTORCH, KERAS).p == pytest.approx(52 / 252)
    # Keras reports float32, PyTorch's loop a Python float.
    lossy = (KERAS / 10_000).astype("float32").astype("float64")
    assert permutation_test(PYTORCH / 10_000, lossy).p == pytest.approx(48 / 252)


def test_right_answers_are_whole_numbers_again():
    counted = definitions(
        "right_answers",
        y_test=np.zeros(10_000),
        runs={"Keras": [Run({"accuracy": float(np.float32(0.9785))})]},
    )
    [count] = counted.right_answers("Keras")
    assert count == 9785 and isinstance(int(count), int)


class Run:
    def __init__(self, test):
        self.test = test


@pytest.mark.parametrize("n", [4, 5, 8, 9])
def test_the_interval_holds_the_shifts_that_the_test_does_not_reject(n):
    a, b = np.random.default_rng(n).integers(0, 10**6, size=(2, n))
    result = permutation_test(a, b)
    assert result.low < result.difference < result.high
    for shift, inside in [
        (result.low - 1, False),
        (result.low + 1, True),
        (result.high - 1, True),
        (result.high + 1, False),
    ]:
        assert (permutation_test(a - shift, b).p > 0.05) == inside


def test_names_exchanged_change_the_sign_and_nothing_else():
    one, other = permutation_test(PYTORCH, KERAS), permutation_test(KERAS, PYTORCH)
    assert one.difference == -other.difference
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low))
    assert one.p == other.p


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_seeds_bound_nothing(n):
    result = permutation_test(np.arange(n) + 100, np.arange(n))
    assert (result.low, result.high) == (-math.inf, math.inf)


def test_exact_up_to_eight_random_splits_above():
    assert permutation_test(np.arange(8), np.arange(8)).splits == math.comb(16, 8)
    result = permutation_test(np.arange(30) + 3, np.arange(30))
    assert result.splits == 20_001
    assert permutation_test(np.arange(30) + 3, np.arange(30)) == result
    assert 0 < result.p < 1
