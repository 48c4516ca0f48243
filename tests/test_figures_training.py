"""Tests training curves, which are read from TensorBoard's files."""

import numpy as np
import tensorflow as tf

from avb_tf.figures import training as training_curves


def write(workdir, steps, values, tag=training_curves.BOUND):
    writer = tf.summary.create_file_writer(str(workdir / "logs" / "validation"))
    for step, value in zip(steps, values, strict=True):
        with writer.as_default(step):
            tf.summary.scalar(tag, value)
    writer.close()


def test_a_resumed_run_replaces_the_steps_that_it_repeats(tmp_path):
    write(tmp_path, [10, 20, 30], [-3.0, -2.0, -1.5])
    write(tmp_path, [30, 40], [-1.25, -1.0])
    write(tmp_path, [10], [7.0], tag="elbo")
    expected = [[10, -3.0], [20, -2.0], [30, -1.25], [40, -1.0]]
    np.testing.assert_array_equal(training_curves.read(tmp_path), expected)
    np.testing.assert_array_equal(training_curves.read(tmp_path, "elbo"), [[10, 7.0]])


def test_a_run_without_logs_has_an_empty_curve(tmp_path):
    assert training_curves.read(tmp_path).shape == (0, 2)
    write(tmp_path, [10], [1.0], tag="elbo")
    assert training_curves.read(tmp_path).shape == (0, 2)


def test_every_run_is_drawn_in_both_panels_in_its_methods_colour():
    steps = np.arange(1, 5) * 100.0
    runs = ("vae-0", "vae-1", "avb_ac-0")
    curves = {run: np.stack([steps, -100 / (i + 1) - 1e3 / steps], 1) for i, run in enumerate(runs)}
    methods = {run: run.split("-")[0] for run in runs}
    whole, close = training_curves.draw(curves, methods).axes
    lines = [line for line in whole.lines if len(line.get_xdata())]
    for line, curve in zip(lines, curves.values(), strict=True):
        np.testing.assert_array_equal(line.get_xydata(), curve)
    assert lines[0].get_color() == lines[1].get_color() != lines[2].get_color()
    assert [text.get_text() for text in whole.get_legend().get_texts()] == ["vae", "avb_ac"]
    low, high = close.get_ylim()
    best = max(curve[:, 1].max() for curve in curves.values())
    assert low == best - 6.0
    assert high > best


def test_one_panel_shows_curves_that_are_close_and_a_single_point():
    curves = {"vae": np.array([[100.0, -3.0]]), "avb": np.array([[100.0, -2.5], [200.0, -2.0]])}
    (axes,) = training_curves.draw(curves, {run: run for run in curves}).axes
    assert {line.get_marker() for line in axes.lines if len(line.get_xdata())} == {"o"}


def test_a_run_is_drawn_with_both_bounds_of_the_same_examples(tmp_path):
    for tag, value in {
        "elbo": -2.0, "monitored_elbo": -2.5, training_curves.BOUND: -2.25,
        training_curves.DIFFERENCE: -0.25, f"{training_curves.DIFFERENCE}_lower": -0.5,
        f"{training_curves.DIFFERENCE}_upper": 0.0,
    }.items():  # fmt: skip
        write(tmp_path, [10], [value], tag)
    elbo, same, difference = training_curves.of_run(tmp_path).axes
    assert [line.get_ydata()[0] for line in elbo.lines] == [-2.0]
    assert [line.get_ydata()[0] for line in same.lines] == [-2.5, -2.25]
    assert difference.lines[0].get_ydata()[0] == -0.25
    (interval,) = difference.collections
    np.testing.assert_array_equal(np.unique(interval.get_paths()[0].vertices[:, 1]), [-0.5, 0.0])
    # A single logged point is visible, because lines have markers.
    assert {line.get_marker() for axes in (elbo, same) for line in axes.lines} == {"o"}


def test_nothing_is_drawn_without_logs(tmp_path):
    assert training_curves.of_run(tmp_path) is None
