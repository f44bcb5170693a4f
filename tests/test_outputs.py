"""What sections 1 to 5 show is what was computed, and what a run says of itself."""

import ast
import importlib.metadata
import os
import re

import numpy as np
import pytest
from harness import code_cells, columns, markdown, printed, section, under

RESULTS = "### The shared results table"
# The sections, by what their names begin with.
APIS = {"sequential": 3, "functional": 4, "pytorch": 5}


def text_of(notebook, number):
    """What a section printed."""
    return printed(*code_cells(section(notebook, number)))


def epoch_lines(notebook, number):
    lines = text_of(notebook, number).splitlines()
    return [line for line in lines if line.startswith("epoch")]


def two_numbers(pattern, text):
    return [float(number) for number in re.search(pattern, text).groups()]


def test_a_run_says_which_versions_and_parameters_it_has_and_how_long_it_took(
    short_run,
):
    versions, parameters = text_of(short_run.notebook, 1).splitlines()
    for name, version in ast.literal_eval(versions).items():
        installed = importlib.metadata.version(name).split("+")[0]
        assert version.split("+")[0] == installed
    given = "epochs=1, batch_size=32, learning_rate=0.001, seeds=[0, 3]"
    assert parameters.startswith(given)
    caption = markdown(under(short_run.notebook, RESULTS)[0])
    start = "**Results of a shortened or changed run**: epochs 1, batch size 32, "
    start += "learning rate 0.001, seeds 0, 3. The whole notebook took "
    assert caption.startswith(start)
    minutes, cores = two_numbers(r"took (.*) minutes on (\d+) CPU cores\.\n", caption)
    # The kernel's start and the first imports come before the notebook's clock.
    assert short_run.minutes - 0.7 < minutes < short_run.minutes + 0.06
    allowed = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))(0)
    assert cores == len(allowed)


def test_splits_are_the_first_50000_the_last_10000_and_the_test_set(short_run):
    assert text_of(short_run.notebook, 2) == (
        "training (50000, 784), validation (10000, 784), test (10000, 784)\n"
    )
    # MNIST's labels begin and end with these.
    labels = "[y.tolist() for y in (y_train[:5], y_val[-3:], y_test[:3], y_test[-3:])]"
    expected = [[5, 0, 4, 1, 9], [5, 6, 8], [7, 2, 1], [4, 5, 6]]
    assert short_run.value(labels) == expected
    # Its training images have this mean and deviation, its test images this mean.
    short_run.execute("images = np.concatenate([x_train, x_val])")
    numbers = "[float(n) for n in (images.mean(), images.std(), x_test.mean())]"
    assert short_run.value(numbers) == pytest.approx([0.1307, 0.3081, 0.1325], abs=1e-4)


@pytest.mark.parametrize(
    "passes",
    [
        "[batches_sequential(0)] * 2",
        "[batches_functional(0)] * 2",
        "[batches_pytorch(), batches_pytorch()]",
    ],
)
def test_an_epoch_has_every_image_once_in_a_new_order_of_all(short_run, passes):
    """The labels are the images' places here."""
    short_run.execute(
        "kept, y_train = y_train, np.arange(50_000)\n"
        f"one, two = [list(batches) for batches in {passes}]\n"
        "y_train = kept\n"
        "order, other = [np.concatenate([y for x, y in epoch]) for epoch in (one, two)]\n"
        "assert np.array_equal(np.sort(order), np.arange(50_000))\n"
        "assert np.array_equal(np.sort(other), np.arange(50_000))\n"
        "assert not np.array_equal(order, other)\n"
        "assert order[:32].max() > 20_000 and order[-32:].min() < 20_000\n"
        "assert np.array_equal(one[-1][0], x_train[order[-16:]])\n"
        "assert len(one[0][0]) == 32"
    )


@pytest.mark.parametrize("api", APIS)
def test_epochs_1_2_every_fifth_and_the_last_are_printed_from_the_history(
    small_run, api
):
    history = small_run.value(f"{api}_run.history")
    template = "epoch {:2}    training loss {:.4f}, accuracy {:.4f}"
    template += "   validation loss {:.4f}, accuracy {:.4f}"
    expected = []
    for epoch in (1, 2, 5, 10, 15):
        metrics = ("loss", "accuracy", "val_loss", "val_accuracy")
        numbers = [history[metric][epoch - 1] for metric in metrics]
        expected.append(template.format(epoch, *numbers))
    assert epoch_lines(small_run.notebook, APIS[api]) == expected


@pytest.mark.parametrize("api", APIS)
def test_parameters_losses_accuracies_and_predictions_are_those_of_the_model(
    small_run, api
):
    text, model = text_of(small_run.notebook, APIS[api]), f"{api}_run.model"
    assert "\n101,770 parameters\n" in f"\n{text}"
    epsilon = "1e-08" if api == "pytorch" else "1e-07"
    assert f"Adam with epsilon {epsilon}\n" in text
    fresh = small_run.value(f"by_hand(build_{api}(0), x_val, y_val)")
    shown = two_numbers("untrained: validation loss (.+), accuracy (.+)", text)
    assert shown == pytest.approx(fresh, abs=0.0051)
    last = small_run.value(f"by_hand({model}, x_val, y_val)")
    shown = two_numbers(r"epoch 15.*validation loss (.+), accuracy (.+)", text)
    assert shown == pytest.approx(last, abs=6e-5)
    test = small_run.value(f"by_hand({model}, x_test, y_test)")
    shown = two_numbers("test loss (.+), accuracy (.+)", text)
    assert shown == pytest.approx(test, abs=6e-5)
    read = f"logits_by_hand({model}, x_test[:10]).argmax(axis=1)"
    digits = small_run.value(f"[str(y_test[:10]), str({read})]")
    assert "the first digits {} are read as {}\n".format(*digits) in text


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize(("rate", "batch"), [(0.0, 32), (0.01, 1000)])
def test_training_numbers_are_means_over_the_images_before_each_update(
    small_run, api, rate, batch
):
    """At a rate of 0 or in one batch, they are those of the network as it starts."""
    small_run.execute(
        f"old = learning_rate, batch_size, steps_per_epoch, epochs\n"
        f"learning_rate, batch_size, epochs = {rate}, {batch}, 1\n"
        "steps_per_epoch, start = math.ceil(1000 / batch_size), time.perf_counter()\n"
        f"run = train_{api}(0, print)\n"
        "share = run.seconds / (time.perf_counter() - start)\n"
        "learning_rate, batch_size, steps_per_epoch, epochs = old"
    )
    found = small_run.value("[run.history['loss'][0], run.history['accuracy'][0]]")
    expected = small_run.value(f"by_hand(build_{api}(0), x_train, y_train)")
    assert found == pytest.approx(expected, abs=1e-5)
    assert 0.5 < small_run.value("share") < 1


def test_the_mean_cosines_are_those_of_the_hidden_activations(small_run):
    small_run.execute(
        "w, b = weights_of(functional_run.model)[:2]\n"
        "ours = np.maximum(x_test @ w + b, 0)\n"
        "ours /= np.linalg.norm(ours, axis=1, keepdims=True)\n"
        "angles = (ours[:5000] * ours[5000:]).sum(axis=1)\n"
        "equal = y_test[:5000] == y_test[5000:]"
    )
    expected = small_run.value("[angles[equal].mean(), angles[~equal].mean()]")
    pattern = "cosine: (.+) for the same digit, (.+) for two"
    shown = two_numbers(pattern, text_of(small_run.notebook, 4))
    assert shown == pytest.approx(expected, abs=0.0051)


@pytest.mark.parametrize(
    ("figure", "expected"),
    [
        (0, "[x_train[list(y_train).index(i)] for i in range(10)]"),
        (1, "weights_of(sequential_run.model)[0].T[:20]"),
        (2, "[*x_test[:10], *gradients]"),
    ],
)
def test_the_images_are_what_their_captions_say(small_run, figure, expected):
    small_run.execute(
        "w, b, v, c = weights_of(pytorch_run.model)\n"
        "on = (x_test[:10] @ w + b) > 0\n"
        "gradients = (on * v.T[y_test[:10]]) @ w.T\n"
        f"images = [axis.images[0] for axis in shown_figures[{figure}].axes]\n"
        f"found = np.array([image.get_array() for image in images]).reshape(-1, 784)\n"
        f"assert np.allclose(found, {expected}, atol=1e-5)\n"
        "# More is darker, and grey is zero.\n"
        "assert all(image.get_cmap()(1.0) < image.get_cmap()(0.0) for image in images)"
    )
    scales = small_run.value("[image.get_clim() for image in images]")
    assert figure == 0 or all(low == -high for low, high in scales)


def test_sections_that_are_run_again_print_the_same(small_run):
    first = [text_of(small_run.notebook, number) for number in (3, 4, 5, 7)]
    small_run.run_sections(3, 4, 5, 7)
    assert [text_of(small_run.notebook, number) for number in (3, 4, 5, 7)] == first


@pytest.mark.full
def test_a_full_run_begins_like_a_short_one_learns_and_overfits(short_run, full_run):
    """So the environment of the short one has changed nothing."""
    protocol = "epochs 15, batch size 32, learning rate 0.001, seeds 0, 1, 2, 3, 4."
    caption = markdown(under(full_run.notebook, RESULTS)[0])
    assert caption.startswith(f"**Results**: {protocol}")
    for number in (3, 4, 5):
        lines = epoch_lines(full_run.notebook, number)
        assert lines[0] == epoch_lines(short_run.notebook, number)[0]
        numbers = np.array([re.findall(r"\d\.\d+", line) for line in lines], float)
        loss, accuracy, val_loss, val_accuracy = numbers.T
        assert val_accuracy[-1] < accuracy[-1] and loss[-1] < 0.1 * loss[0]
        assert val_loss[-1] > 1.05 * min(val_loss)
    for row in columns(full_run.notebook, RESULTS).values():
        assert 96.5 < float(row["test accuracy"].split()[0]) < 98.5
        assert 0.06 < float(row["test loss"].split()[0]) < 0.16


@pytest.mark.full
def test_speed_settings_pay(full_run):
    rows = columns(full_run.notebook, "### What makes it fast").values()
    faster = [float(row["times as fast"]) for row in rows]
    assert faster[2] > 1 and faster[5] > 1
