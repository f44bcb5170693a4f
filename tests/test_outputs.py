"""What sections 1 to 5 show is what was computed, and what a run says of itself."""

import ast
import importlib.metadata
import os
import re

import numpy as np
import pytest
from harness import code_cells, columns, markdown, printed, section, under
from refresh import RESULTS

# The sections, by what their names begin with.
APIS = {"sequential": 3, "functional": 4, "pytorch": 5}


def text_of(notebook, number):
    """What a section printed."""
    return printed(*code_cells(section(notebook, number)))


def numbers(notebook, number, start):
    """The numbers in each line with this start that a section printed."""
    lines = text_of(notebook, number).splitlines()
    lines = [line for line in lines if line.startswith(start)]
    return [[float(n) for n in re.findall(r"\d+\.?\d*", line)] for line in lines]


def test_a_run_says_its_versions_its_parameters_and_its_minutes(short_run):
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
    minutes, cores = re.search(r"took (.*) minutes on (\d+) CPU", caption).groups()
    # The kernel's start and the first imports come before the notebook's clock.
    assert short_run.minutes - 0.7 < float(minutes) < short_run.minutes + 0.06
    allowed = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))(0)
    assert int(cores) == len(allowed)


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
    means = "[float(n) for n in (images.mean(), images.std(), x_test.mean())]"
    assert short_run.value(means) == pytest.approx([0.1307, 0.3081, 0.1325], abs=1e-4)


@pytest.mark.parametrize("api", APIS)
def test_an_epoch_has_every_image_once_in_a_new_order_of_all(short_run, api):
    """The labels are the images' places here."""
    passes = f"[batches_{api}(0)] * 2"
    if api == "pytorch":
        passes = "[batches_pytorch(), batches_pytorch()]"
    short_run.execute(
        "kept, y_train = y_train, np.arange(50_000)\n"
        f"one, two = [list(batches) for batches in {passes}]\n"
        "y_train = kept\n"
        "order, other = [np.concatenate([y for _, y in n]) for n in (one, two)]\n"
        "assert np.all(np.sort([order, other]) == np.arange(50_000))\n"
        "assert not np.array_equal(order, other)\n"
        "assert order[:32].max() > 20_000 and order[-32:].min() < 20_000\n"
        "assert np.array_equal(one[-1][0], x_train[order[-16:]])\n"
        "assert len(one[0][0]) == 32"
    )


@pytest.mark.parametrize("api", APIS)
def test_epochs_1_2_every_fifth_and_the_last_are_printed(small_run, api):
    history = small_run.value(f"{api}_run.history")
    metrics = [history[n] for n in ("loss", "accuracy", "val_loss", "val_accuracy")]
    rows = np.transpose([range(1, 16), *metrics])
    shown = numbers(small_run.notebook, APIS[api], "epoch")
    assert np.allclose(shown, rows[[0, 1, 4, 9, 14]], atol=6e-5)


@pytest.mark.parametrize("api", APIS)
def test_what_is_shown_of_a_model_is_computed_with_its_weights(small_run, api):
    text, model = text_of(small_run.notebook, APIS[api]), f"{api}_run.model"
    assert "\n101,770 parameters\n" in f"\n{text}"
    epsilon = "1e-08" if api == "pytorch" else "1e-07"
    assert f"Adam with epsilon {epsilon}\n" in text
    for start, network, images, tolerance in [
        ("untrained", f"build_{api}(0)", "x_val, y_val", 0.0051),
        ("epoch 15", model, "x_val, y_val", 6e-5),
        ("test loss", model, "x_test, y_test", 6e-5),
    ]:
        expected = small_run.value(f"by_hand({network}, {images})")
        [shown] = numbers(small_run.notebook, APIS[api], start)
        assert shown[-2:] == pytest.approx(expected, abs=tolerance)
    read = f"logits_by_hand({model}, x_test[:10]).argmax(axis=1)"
    digits = small_run.value(f"[str(y_test[:10]), str({read})]")
    assert "the first digits {} are read as {}\n".format(*digits) in text


@pytest.mark.parametrize("api", APIS)
def test_training_numbers_are_means_over_the_images(small_run, api):
    """At a learning rate of 0 they are those of the network as it starts."""
    small_run.execute(
        "learning_rate, epochs, start = 0.0, 1, time.perf_counter()\n"
        f"run = train_{api}(0, print)\n"
        "share = run.seconds / (time.perf_counter() - start)\n"
        "learning_rate, epochs = 0.001, 15"
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
    [shown] = numbers(small_run.notebook, 4, "mean cosine")
    assert shown == pytest.approx(expected, abs=0.0051)


def test_the_images_are_what_their_captions_say(small_run):
    small_run.execute(
        "w, b, v, c = weights_of(pytorch_run.model)\n"
        "on = (x_test[:10] @ w + b) > 0\n"
        "gradients = (on * v.T[y_test[:10]]) @ w.T\n"
        "digits = [x_train[list(y_train).index(i)] for i in range(10)]\n"
        "units = weights_of(sequential_run.model)[0].T[:20]\n"
        "scales = []\n"
        "expected = digits, units, [*x_test[:10], *gradients]\n"
        "for figure, rows in zip(shown_figures, expected):\n"
        "    images = [axis.images[0] for axis in figure.axes]\n"
        "    found = np.array([image.get_array() for image in images])\n"
        "    assert np.allclose(found.reshape(-1, 784), rows, atol=1e-5)\n"
        "    # More is darker.\n"
        "    assert all(n.get_cmap()(1.0) < n.get_cmap()(0.0) for n in images)\n"
        "    scales += [image.get_clim() for image in images]"
    )
    # Grey is zero in the second and third.
    assert all(low == -high for low, high in small_run.value("scales[10:]"))


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
        lines = numbers(full_run.notebook, number, "epoch")
        assert lines[0] == numbers(short_run.notebook, number, "epoch")[0]
        loss, accuracy, val_loss, val_accuracy = np.transpose(lines)[1:]
        assert val_accuracy[-1] < accuracy[-1] and loss[-1] < 0.1 * loss[0]
        assert val_loss[-1] > 1.05 * min(val_loss)
    for row in columns(full_run.notebook, RESULTS).values():
        assert 96.5 < float(row["test accuracy"].split()[0]) < 98.5


@pytest.mark.full
def test_speed_settings_pay(full_run):
    rows = columns(full_run.notebook, "### What makes it fast")
    for setting in ("Keras: + `steps_per_execution`", "PyTorch: + `fused=True`"):
        assert float(rows[setting]["times as fast"]) > 1
