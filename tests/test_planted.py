"""Sections 7 and 10 show what they should of trainings that never happened."""

import re

import numpy as np
import pytest
from harness import markdown, printed, section, table
from nbclient.exceptions import CellExecutionError

# The right answers, of 10,000, of one training for each seed.
KERAS = [9785, 9798, 9805, 9757, 9764]
PYTORCH = [9765, 9757, 9752, 9757, 9793]
# Training i of Keras misreads so many images from number 50 on, as the next digit, and
# that of PyTorch as the digit after that one. Everything else of PyTorch is doubled.
PLANT = """
import timeit


def plant(api, counts, step, wait):
    runs = []
    for i, right in enumerate(counts):
        predictions = y_test.copy()
        predictions[50 : 10_050 - right] += step
        model = {"predictions": predictions % 10, "loss": step * (i + 1) / 10}
        rising = [step * (epoch + i * i) for epoch in range(1, 7)]
        history = {"loss": rising, "val_loss": [10 * loss for loss in rising]}
        runs.append(Run(model, history, 10 * (i * i + 1) + wait))

    def predict(model, x):
        assert x is x_test
        return model["predictions"]

    def evaluate(model, x, y):
        assert y is y_test
        # Keras reports float32.
        accuracy = np.float32(np.mean(predict(model, x) == y))
        return {"loss": model["loss"], "accuracy": float(accuracy)}

    planted[f"{api}_run"] = runs[0]
    planted[f"train_{api}"] = lambda seed, report: runs[seed - 10]
    planted[f"predict_{api}"], planted[f"evaluate_{api}"] = predict, evaluate


def turns(function, number, repeat):
    best = fastest.pop(0)
    return [2 * best, best][:repeat]


figures, images, fastest = [], [], [1.0, 0.5, 0.25, 0.8, 0.6, 0.4]
timeit.repeat = turns
planted = globals() | {
    "epochs": 6,
    "seeds": [*range(10, 10 + len(KERAS))],
    "show": lambda figure, caption: figures.append(figure),
    "show_images": lambda *shown: images.append(shown),
    "aligned_differing": {"PyTorch": 7},
}
plant("sequential", KERAS, 1, 0)
plant("functional", KERAS, 1, 1)
plant("pytorch", PYTORCH, 2, 2)
"""


def run_planted(session, keras=KERAS, pytorch=PYTORCH, change=""):
    """Execute section 7 after these trainings; returns a cell with its outputs."""
    session.execute(f"KERAS, PYTORCH = {[*keras]}, {[*pytorch]}\n{PLANT}{change}")
    return session.run_in("planted", section(session.notebook, 7))


# Right answers of Keras and of PyTorch, and what section 7 says of them. Where all of
# one framework are above all of the other, only this way to deal out the names and its
# mirror image are as extreme: 2 of 20 for three runs each, 2 of 70 for four. For nine,
# the real way and 20,000 random ones count; all 48,620 ways give p = 0.043.
CASES = """
[9785] | [9765] | -0.20 | 1 from 2 | -inf to +inf | not shown
[9785] * 3 | [9700] * 3 | -0.85 | 0.1 from 20 | -inf to +inf | not shown
[9700] * 4 | [9700] * 4 | +0.00 | 1 from 70 | +0.00 to +0.00 | not shown
range(700, 704) | range(710, 714) | +0.10 | 0.029 from 70 | +0.07 to +0.13 | shown
KERAS | PYTORCH | -0.17 | 0.21 from 252 | -0.46 to +0.12 | not shown
range(700, 708) | range(705, 713) | +0.05 | 0.0025 from 12,870 | +0.03 to +0.07 | shown
range(700, 709) | range(703, 712) | +0.03 | 0.044 from 20,001 | +0.01 to +0.05 | shown
[700] * 15 | [700] * 8 + [701] * 7 | +0.00 | 0.0055 from 20,001 | +0.00 to +0.00 | shown
"""


def test_p_and_the_interval_are_those_of_counting_every_way(small_run):
    for case in CASES.strip().splitlines():
        keras, pytorch, difference, p, interval, verdict = case.split(" | ")
        text = printed(run_planted(small_run, eval(keras), eval(pytorch)))
        assert f"Keras: {difference} points of test accuracy, p = {p} ways\n" in text
        assert f" {interval} points: a difference is {verdict}\n" in text


def test_what_is_counted_over_the_seeds_and_which_digits_are_shown(small_run):
    cell = run_planted(small_run)
    assert markdown(cell).splitlines()[2:7] == [
        "| 10 | 97.85% | 97.85% | 97.65% |",
        "| 11 | 97.98% | 97.98% | 97.57% |",
        "| 12 | 98.05% | 98.05% | 97.52% |",
        "| 13 | 97.57% | 97.57% | 97.57% |",
        "| 14 | 97.64% | 97.64% | 97.93% |",
    ]
    text = printed(cell)
    assert "Sequential and Functional: equal metrics, epochs 6, seeds 5\n" in text
    different = "Keras/PyTorch 235 to 248, Keras/Keras 7 to 48, PyTorch/PyTorch 0 to 41"
    assert f"answered differently: {different}\n" in text
    assert "\n215 of 10,000 test images are misread by all three\n" in text
    small_run.execute(
        "shown, caption, titles = images[0]\n"
        "assert np.array_equal(shown, x_test[50:70])\n"
        "labels = y_test[50:70]\n"
        "expected = [f'{y} → {(y + 1) % 10}, {(y + 2) % 10}' for y in labels]\n"
        "assert titles == expected"
    )


def test_the_figure_of_all_runs_has_their_means_and_dots(small_run):
    run_planted(small_run)
    small_run.execute("left, right = figures[0].axes")
    lines = "[[n.get_ls(), n.get_xdata().tolist(), n.get_ydata().tolist()] for n in {}]"
    drawn = small_run.value(lines.format("left.lines"))
    assert [x for _, x, _ in drawn] == [[1, 2, 3, 4, 5, 6]] * 6
    # The caption tells them apart: PyTorch is dotted, Functional dashed.
    styles = [style for style, _, _ in drawn]
    assert styles == ["-", "--", ":"] * 2
    losses = [y for _, _, y in drawn]
    keras, pytorch = [7, 8, 9, 10, 11, 12], [14, 16, 18, 20, 22, 24]
    assert np.allclose(losses[:3], [keras, keras, pytorch])
    assert np.allclose(losses[3:], np.multiply(10, [keras, keras, pytorch]))
    ends = small_run.value("[[t.get_text(), t.get_position()[1]] for t in left.texts]")
    assert ends == [["training", pytest.approx(24)], ["validation", pytest.approx(240)]]
    labels = "[left.get_xlabel(), left.get_ylabel(), right.get_xlabel()]"
    expected = ["epoch", "cross-entropy (nats)", "test accuracy (%)"]
    assert small_run.value(labels) == expected
    names = "[label.get_text() for label in right.get_yticklabels()]"
    assert small_run.value(names) == ["Keras Sequential", "Keras Functional", "PyTorch"]
    # Upside down, so that the first API and the first seed are on top.
    assert small_run.value("right.get_ylim()[0]") > 2
    dots = small_run.value(lines.format("right.lines"))
    for place, counts in enumerate([KERAS, KERAS, PYTORCH]):
        (_, x, y), (_, mean, height) = dots[2 * place : 2 * place + 2]
        assert np.allclose(x, np.divide(counts, 100), atol=1e-4)
        assert y == sorted(set(y)) and max(abs(np.subtract(y, place))) < 0.5
        assert np.allclose(mean, np.mean(counts) / 100, atol=1e-4)
        assert height == [place]


def test_sequential_and_functional_that_differ_stop_the_notebook(small_run):
    change = "planted['functional_run'].history['loss'][-1] += 1e-6"
    with pytest.raises(CellExecutionError, match="Sequential and Functional differ"):
        run_planted(small_run, change=change)


def test_means_deviations_medians_rates_and_the_fastest_turns(small_run):
    run_planted(small_run)
    shown = small_run.run_in("planted", section(small_run.notebook, 10))
    speed, results = markdown(shown).split("**Results")
    assert [line.split(" | ", 1)[1] for line in table(speed)[2:]] == [
        "1.00 | 1,000 | 1.0 |",
        "0.50 | 2,000 | 2.0 |",
        "0.25 | 4,000 | 4.0 |",
        "0.80 | 1,250 | 1.0 |",
        "0.60 | 1,667 | 1.3 |",
        "0.40 | 2,500 | 2.0 |",
    ]
    keras = "97.82 ± 0.21 % (n = 5) | 0.3000 ± 0.1581"
    pytorch = "97.65 ± 0.16 % (n = 5) | 0.6000 ± 0.3162"
    assert table(results)[2:] == [
        f"| Keras Sequential | {keras} | 101,770 | 50.0 | 120 | 0 | – |",
        f"| Keras Functional | {keras} | 101,770 | 51.0 | 118 | 0 | – |",
        f"| PyTorch | {pytorch} | 101,770 | 52.0 | 115 | 235 to 248 | 7 |",
    ]


def test_one_seed_has_no_deviation_and_no_pair_of_seeds(small_run):
    cell = run_planted(small_run, KERAS[:1], PYTORCH[:1])
    assert re.search("answered differently: Keras/PyTorch 235(?![ ,])", printed(cell))
    shown = small_run.run_in("planted", section(small_run.notebook, 10))
    row = "| 97.85 % (n = 1) | 0.1000 | 101,770 | 10.0 | 600 | 0 | – |\n"
    assert row in markdown(shown)
