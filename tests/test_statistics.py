"""The permutation test of section 7, as functions and as its cells print it."""

import itertools
import json
import math
import re

import numpy as np
import pytest
from harness import cell_with, columns, definitions, printed

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


CELLS = "def p_value(", "def interval("
# An interval without zero, with ties, and with too few seeds.
PLANTED = [
    (KERAS, PYTORCH),
    (KERAS, KERAS - [60, 90, 100, 80, 70]),
    (KERAS, KERAS + 1),
    (KERAS[:4], KERAS[:4] + [201, 210, 190, 200]),
    (KERAS[:3], PYTORCH[:3] + 300),
]


def assert_printed(text, keras, pytorch):
    """The two cells' lines say what counting says of these numbers of right answers."""
    keras, pytorch = list(map(int, keras)), list(map(int, pytorch))
    number = r"([+-](?:[\d.]+|inf))"
    difference, p, ways, low, high, shown = re.fullmatch(
        rf"PyTorch minus Keras: {number} points of test accuracy, p = ([\d.e-]+) from "
        rf"([\d,]+) ways\n95 % interval {number} to {number} points: "
        r"a difference is (shown|not shown)\n",
        text,
    ).groups()
    n = len(keras)
    assert float(difference) == pytest.approx(
        (sum(pytorch) - sum(keras)) / n / 100, abs=0.0051
    )
    assert p == f"{by_counting(pytorch, keras):.2g}"
    assert int(ways.replace(",", "")) == math.comb(2 * n, n)
    if n < 4:
        assert (low, high, shown) == ("-inf", "+inf", "not shown")
        return
    low, high = round(100 * float(low)), round(100 * float(high))
    for shift, inside in [(low - 1, 0), (low, 1), (high, 1), (high + 1, 0)]:
        shifted = [count - shift for count in pytorch]
        assert (by_counting(shifted, keras) > 0.05) == inside
    assert (shown == "shown") == (by_counting(pytorch, keras) <= 0.05)


@pytest.mark.parametrize(("keras", "pytorch"), PLANTED)
def test_the_cells_print_the_test_of_planted_accuracies(short_run, keras, pytorch):
    cells = [cell_with(short_run.notebook, text) for text in CELLS]
    # Keras reports float32, PyTorch's loop a Python float.
    accuracies = (
        (keras / 10_000).astype("float32").tolist(),
        (pytorch / 10_000).tolist(),
    )
    short_run.execute(
        "kept = tests, seeds\n"
        f"first, second = {json.dumps(accuracies)}\n"
        "columns = zip(APIS, (first, first, second), strict=True)\n"
        "tests = {a: {s: {'accuracy': v} for s, v in enumerate(c)} for a, c in columns}\n"
        "seeds = list(range(len(first)))"
    )
    text = "".join(printed(short_run.execute(cell.source)) for cell in cells)
    short_run.execute("tests, seeds = kept")
    for cell in cells:
        short_run.execute(cell.source)
    assert_printed(text, keras, pytorch)


@pytest.mark.parametrize("run", ["short_run", "full_run"])
def test_the_cells_print_the_test_of_the_table_of_seeds(request, run):
    notebook = request.getfixturevalue(run).notebook
    rows = columns(notebook, "### Several seeds instead of one").values()
    counts = [
        [round(100 * float(row[api].rstrip("%"))) for row in rows]
        for api in ("Keras Sequential", "PyTorch")
    ]
    text = "".join(printed(cell_with(notebook, part)) for part in CELLS)
    assert_printed(text, *counts)
