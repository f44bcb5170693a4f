"""Sections 7 and 10 show what they should of trainings that never happened."""

import itertools
import math
import re
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
from harness import code_cells, fields, markdown, printed, section, table
from nbclient.exceptions import CellExecutionError

# The right answers of 10,000 in some runs: with a difference and without, with ties,
# with too few seeds, with so many that not every way is counted.
KERAS = np.array([9785, 9798, 9805, 9757, 9764])
PYTORCH = np.array([9765, 9757, 9752, 9757, 9793])
MANY = np.random.default_rng(1).integers(9700, 9800, size=(2, 9))
PLANTED = {
    "not shown": (KERAS, PYTORCH),
    "shown": (KERAS, KERAS - [60, 90, 100, 80, 70]),
    "ties": (KERAS, KERAS + 1),
    "four seeds": (KERAS[:4], KERAS[:4] + [201, 180, 190, 170]),
    "eight seeds": MANY[:, :8],
    "nine seeds": MANY,
    "three seeds": (KERAS[:3], PYTORCH[:3] - 300),
    "one seed": (KERAS[:1], PYTORCH[:1]),
}
# A training's model is here its framework and its place among the seeds.
PLANT = """
planted, figures = dict(np.load(PATH)), []
metrics = ("loss", "accuracy", "val_loss", "val_accuracy")


def planted_training(framework, wait=0):
    def train(seed, report=None):
        i = seed - 10
        history = dict(zip(metrics, planted[f"{framework} histories"][:, i].tolist()))
        seconds = float(planted[f"{framework} seconds"][i] + wait)
        return Run((framework, i), history, seconds)
    return train


def planted_predict(model, x):
    return planted[f"{model[0]} answers"][model[1]]


def planted_evaluate(model, x, y):
    # Keras reports float32.
    accuracy = np.float32(np.mean(planted_predict(model, x) == y))
    loss = planted[f"{model[0]} losses"][model[1]]
    return {"loss": float(loss), "accuracy": float(accuracy)}


planted_names = globals() | {"seeds": [*range(10, 10 + SEEDS)], "epochs": 6}
planted_names |= {"show": lambda figure, caption: figures.append(figure)}
planted_names |= {"show_images": lambda images, caption, titles: figures.append(titles)}
for i, api in enumerate(("sequential", "functional", "pytorch")):
    train = planted_training("pytorch" if i == 2 else "keras", wait=i)
    planted_names |= {f"train_{api}": train, f"{api}_run": train(10)}
    planted_names |= {f"predict_{api}": planted_predict, f"evaluate_{api}": planted_evaluate}
"""


@pytest.fixture
def plant(short_run, tmp_path):
    """A function that runs section 7 on planted trainings, under names of their own."""
    rng, labels = np.random.default_rng(0), np.array(short_run.value("y_test.tolist()"))

    def answers(right):
        wrong, read = rng.permutation(1000)[: 10_000 - right], labels.copy()
        read[wrong] = (read[wrong] + rng.integers(1, 10, len(wrong))) % 10
        return read

    def run_section(number):
        sources = [c.source for c in code_cells(section(short_run.notebook, number))]
        return short_run.execute(
            f"for source in {sources}:\n    exec(source, planted_names)"
        )

    def run(case, before=""):
        values = {}
        for framework, counts in zip(("keras", "pytorch"), PLANTED[case], strict=True):
            n = len(counts)
            values[f"{framework} answers"] = np.array([answers(c) for c in counts])
            values[f"{framework} histories"] = rng.uniform(0.1, 1, (4, n, 6))
            values[f"{framework} losses"] = rng.uniform(0.05, 0.2, n)
            values[f"{framework} seconds"] = rng.uniform(10, 90, n)
        path = tmp_path / "planted.npz"
        np.savez(path, **values)
        short_run.execute(f"PATH, SEEDS = {str(path)!r}, {n}\n{PLANT}\n{before}")
        run = SimpleNamespace(values=values, labels=labels, run_section=run_section)
        run.execute, run.value = short_run.execute, short_run.value
        run.shown = run_section(7)
        return run

    return run


def by_counting(a, b):
    """The p-value, one split at a time and in whole numbers."""
    pooled, real = [*a, *b], abs(sum(a) - sum(b))
    ways = itertools.combinations(range(len(pooled)), len(a))
    differences = [2 * sum(pooled[i] for i in way) - sum(pooled) for way in ways]
    return sum(abs(d) >= real for d in differences) / len(differences)


@pytest.mark.parametrize("case", PLANTED)
def test_p_and_the_interval_are_those_of_counting_every_way(plant, case):
    keras, pytorch = (counts.tolist() for counts in PLANTED[case])
    number = r"([+-](?:[\d.]+|inf))"
    difference, p, ways, low, high, shown = re.search(
        rf"PyTorch minus Keras: {number} points of test accuracy, p = ([\d.e-]+) from "
        rf"([\d,]+) ways\n95 % interval {number} to {number} points: "
        r"a difference is (shown|not shown)\n",
        printed(plant(case).shown),
    ).groups()
    n, expected = len(keras), by_counting(pytorch, keras)
    mean = (sum(pytorch) - sum(keras)) / n / 100
    assert float(difference) == pytest.approx(mean, abs=0.0051)
    if n > 8:
        # The real way and 20,000 random ones.
        assert ways == "20,001" and float(p) == pytest.approx(expected, abs=0.02)
        return
    assert (p, ways) == (f"{expected:.2g}", f"{math.comb(2 * n, n):,}")
    if n < 4:
        assert (low, high, shown) == ("-inf", "+inf", "not shown")
        return
    low, high = round(100 * float(low)), round(100 * float(high))
    for shift, inside in [(low - 1, 0), (low, 1), (high, 1), (high + 1, 0)]:
        shifted = [count - shift for count in pytorch]
        assert (by_counting(shifted, keras) > 0.05) == inside
    assert (shown == "shown") == (expected <= 0.05) == (low > 0 or high < 0)


@pytest.mark.parametrize("case", ["four seeds", "one seed"])
def test_answered_differently_counts_answers_of_pairs(plant, case):
    run = plant(case)
    line = re.search("answered differently.*", printed(run.shown)).group()
    keras, pytorch = run.values["keras answers"], run.values["pytorch answers"]
    expected = {"Keras/PyTorch": zip(keras, pytorch, strict=True)}
    if case != "one seed":
        expected["Keras/Keras"] = itertools.combinations(keras, 2)
        expected["PyTorch/PyTorch"] = itertools.combinations(pytorch, 2)
    for name, pairs in expected.items():
        counts = sorted(int((one != two).sum()) for one, two in pairs)
        ends = dict.fromkeys([counts[0], counts[-1]])
        expected[name] = " to ".join(map(str, ends))
    assert dict(re.findall(r"(\w+/\w+) (\d+(?: to \d+)?)", line)) == expected


def test_the_table_of_seeds_and_the_misread_digits_are_those_of_the_answers(plant):
    run = plant("not shown")
    accuracies = zip(KERAS / 100, KERAS / 100, PYTORCH / 100, strict=True)
    expected = [
        [str(seed), *(f"{accuracy:.2f}%" for accuracy in row)]
        for seed, row in enumerate(accuracies, 10)
    ]
    assert [fields(line) for line in table(markdown(run.shown))][2:] == expected
    keras, pytorch = run.values["keras answers"][0], run.values["pytorch answers"][0]
    hard = np.flatnonzero((keras != run.labels) & (pytorch != run.labels))
    line = f"\n{len(hard)} of 10,000 test images are misread by all three\n"
    assert line in printed(run.shown)
    titles = [f"{run.labels[i]} → {keras[i]}, {pytorch[i]}" for i in hard[:20]]
    assert run.value("figures[-1]") == titles


def test_the_figure_of_all_runs_has_their_means_and_dots(plant):
    run = plant("four seeds")
    keras = run.values["keras histories"].mean(axis=1)
    pytorch = run.values["pytorch histories"].mean(axis=1)
    run.execute(
        "left, right = figures[0].axes\n"
        "def points(line):\n"
        "    return [np.ravel(data).tolist() for data in line.get_data()]"
    )
    found = {}
    for style, x, y in run.value("[[n.get_ls(), *points(n)] for n in left.lines]"):
        assert x == [1, 2, 3, 4, 5, 6]
        found.setdefault(style, []).append(y)
    # The caption tells them apart: PyTorch is dotted, Functional dashed.
    for style, history in [("-", keras), ("--", keras), (":", pytorch)]:
        assert np.allclose(found.pop(style), history[[0, 2]])
    assert found == {}
    texts = run.value("[[t.get_text(), t.get_position()[1]] for t in left.texts]")
    for row, (text, height) in zip((0, 2), texts, strict=True):
        assert text.strip() == ("validation" if row else "training")
        assert height in (keras[row, -1], pytorch[row, -1])
    labels = run.value("[left.get_xlabel(), left.get_ylabel(), right.get_xlabel()]")
    assert labels == ["epoch", "cross-entropy (nats)", "test accuracy (%)"]
    ticks = run.value("[right.get_yticks().tolist(), right.get_ylim()[0]]")
    # Upside down, so that the first API and the first seed are on top.
    assert ticks[0] == [0, 1, 2] and ticks[1] > 2
    shown = run.value("[t.get_text() for t in right.get_yticklabels()]")
    assert shown == ["Keras Sequential", "Keras Functional", "PyTorch"]
    dots = run.value("[points(line) for line in right.lines]")
    for place, which in enumerate((0, 0, 1)):
        counts = PLANTED["four seeds"][which]
        (x, y), (mean, height) = dots[2 * place : 2 * place + 2]
        assert np.allclose(x, counts / 100, atol=1e-4) and y == sorted(set(y))
        assert np.allclose([*mean, *height], [counts.mean() / 100, place], atol=1e-4)
        assert max(abs(np.array(y) - place)) < 0.5


def test_sequential_and_functional_that_differ_stop_the_notebook(plant):
    unequal = "planted_names['functional_run'].history['loss'][-1] += 1e-6"
    with pytest.raises(CellExecutionError, match="Sequential and Functional differ"):
        plant("not shown", before=unequal)


TURNS = """
import timeit

repeat, best = timeit.repeat, [1.0, 0.5, 0.25, 0.8, 0.6, 0.4]


def turns(function, number, repeat):
    function()
    seconds = best.pop(0)
    return [3 * seconds, seconds, 2 * seconds][:repeat]


timeit.repeat = turns
aligned = {"Keras Sequential": 0, "Keras Functional": 5, "PyTorch": 7}
planted_names |= {"aligned_differing": aligned}
planted_names |= {"x_train": x_train[:1000], "y_train": y_train[:1000]}
"""


@pytest.mark.parametrize("case", ["not shown", "one seed"])
def test_means_deviations_medians_rates_and_the_fastest_turns(plant, case):
    run = plant(case)
    run.execute(TURNS)
    cell = run.run_section(10)
    run.execute("timeit.repeat = repeat")
    speed, results = re.findall(r"(?:^\|.*\n?)+", markdown(cell), flags=re.MULTILINE)
    found = [" ".join(fields(line)[1:]) for line in speed.splitlines()[2:]]
    assert found == [
        *("1.00 1,000 1.0", "0.50 2,000 2.0", "0.25 4,000 4.0"),
        *("0.80 1,250 1.0", "0.60 1,667 1.3", "0.40 2,500 2.0"),
    ]
    expected = []
    for i, name in enumerate(["Keras Sequential", "Keras Functional", "PyTorch"]):
        framework = "pytorch" if i == 2 else "keras"
        answers, losses, seconds = (
            run.values[f"{framework} {what}"]
            for what in ("answers", "losses", "seconds")
        )
        accuracies = 100 * (answers == run.labels).mean(axis=1)
        accuracy, loss = f"{accuracies.mean():.2f}", f"{losses.mean():.4f}"
        if case != "one seed":
            accuracy += f" ± {statistics.stdev(accuracies):.2f}"
            loss += f" ± {statistics.stdev(losses):.4f}"
        middle = statistics.median(seconds) + i
        row = [name, f"{accuracy} % (n = {len(seconds)})", loss, "101,770"]
        row += [f"{middle:.1f}", f"{6 * 1000 / middle:,.0f}", str((0, 5, 7)[i])]
        expected.append(row)
    assert [fields(line) for line in results.splitlines()[2:]] == expected
