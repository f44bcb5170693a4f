"""The permutation test of section 6, as functions."""

import itertools
import math

import numpy as np
import pytest
from harness import definitions

notebook = definitions("splits", "p_value", "interval")
splits, p_value, interval = notebook.splits, notebook.p_value, notebook.interval

# The right answers of 10,000 in the first edition's committed run.
KERAS = np.array([9785, 9798, 9805, 9757, 9764])
PYTORCH = np.array([9765, 9757, 9752, 9757, 9793])


def by_counting(a, b):
    """The p-value, one split at a time and in whole numbers."""
    pooled, real = [*a, *b], abs(sum(a) - sum(b))
    ways = itertools.combinations(range(len(pooled)), len(a))
    differences = [2 * sum(pooled[i] for i in way) - sum(pooled) for way in ways]
    return sum(abs(d) >= real for d in differences) / len(differences)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("seed", range(5))
def test_p_is_the_share_of_splits_even_with_many_ties(n, seed):
    a, b = np.random.default_rng(seed).integers(9750, 9756, size=(2, n))
    expected = by_counting(a.tolist(), b.tolist())
    assert p_value(a, b, splits(n)) == pytest.approx(expected)


def test_the_first_edition_has_52_of_252_splits_which_float32_would_lose():
    assert p_value(PYTORCH, KERAS, splits(5)) == pytest.approx(52 / 252)
    # Keras reports float32, PyTorch's loop a Python float.
    lossy = (KERAS / 10_000).astype("float32").astype("float64")
    assert p_value(PYTORCH / 10_000, lossy, splits(5)) == pytest.approx(48 / 252)


@pytest.mark.parametrize("n", [4, 5, 8, 9])
def test_the_interval_holds_the_shifts_that_the_test_does_not_reject(n):
    a, b = np.random.default_rng(n).integers(9700, 9850, size=(2, n))
    low, high = interval(a, b, splits(n))
    assert low <= a.mean() - b.mean() <= high
    for shift, inside in [(low - 1, 0), (low, 1), (high, 1), (high + 1, 0)]:
        assert (p_value(a - shift, b, splits(n)) > 0.05) == inside


def test_no_shift_is_kept_beyond_the_ones_that_are_tried():
    a, b = np.array([9800, 9801, 9802, 9803]), np.array([9700, 9701, 9702, 9703])
    wide = [s for s in range(1000) if p_value(a - s, b, splits(4)) > 0.05]
    assert interval(a, b, splits(4)) == (wide[0], wide[-1])


def test_names_exchanged_change_the_sign_and_nothing_else():
    low, high = interval(PYTORCH, KERAS, splits(5))
    assert interval(KERAS, PYTORCH, splits(5)) == (-high, -low)
    assert p_value(KERAS, PYTORCH, splits(5)) == p_value(PYTORCH, KERAS, splits(5))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_seeds_bound_nothing(n):
    bounds = interval(np.arange(n) + 100, np.arange(n), splits(n))
    assert bounds == (-math.inf, math.inf)


def test_exact_up_to_eight_random_splits_above():
    assert len(splits(8)) == math.comb(16, 8)
    ways = splits(30)
    assert ways.shape == (20_001, 30)
    assert ways[0].tolist() == list(range(30))
    assert np.array_equal(ways, splits(30))
    assert 0 < p_value(np.arange(30) + 3, np.arange(30), ways) < 1
