import json
import math

import keras
import numpy as np
import pytest
import tensorflow as tf

from avb_tf import assembly, configuration
from avb_tf.benchmarks import step as benchmark
from avb_tf.commands import train
from avb_tf.errors import UserError

SMALL = {
    "latent_dim": 2, "width": 8, "depth": 1, "bases": 3, "basis_width": 4, "adversary_width": 8,
    "adversary_depth": 1, "products": 8, "draws": 2, "adversary_draws": 2, "flow_width": 8,
}  # fmt: skip


@pytest.mark.parametrize("method", ["avb", "avb_ac", "avb_flow", "avb_ac_paper"])
def test_the_plainly_written_step_is_the_same_step(method):
    x = (np.random.default_rng(0).random((16, 6)) < 0.5).astype(np.float32)
    weights = []
    for written in ("ours", "plainly"):
        keras.utils.set_random_seed(0)
        model = assembly.build(method, (6,), **SMALL)
        model.compile(keras.optimizers.SGD(0.1), keras.optimizers.SGD(0.1))
        step = (
            model.train_step
            if written == "ours"
            else lambda x, m=model: benchmark.reference_step(m, x)
        )
        for _ in range(3):
            step(tf.constant(x))
        weights.append([keras.ops.convert_to_numpy(w) for w in model.weights])
    for ours, plain in zip(*weights, strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-6)


def test_the_plainly_written_step_in_sixteen_bits():
    config = configuration.default("avb_ac_paper", **SMALL)
    config.precision = "mixed_bfloat16"
    model = train.create(config, (6,))
    before = model.adversary.s.kernel.numpy()
    benchmark.reference_step(model, tf.ones([16, 6]))  # x is not 0, because theta(0) is 0
    assert (model.adversary.s.kernel.numpy() != before).any()
    assert all(np.isfinite(w.numpy()).all() for w in model.weights)


def test_arithmetic_counts_products_that_run():
    a, b = tf.zeros([3, 4]), tf.zeros([4, 5])
    image, kernel = tf.zeros([2, 8, 8, 3]), tf.Variable(tf.zeros([5, 5, 3, 7]))

    def function():
        a @ b @ tf.zeros([5, 6])  # nothing depends on this product, so it never runs
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.nn.conv2d(image, kernel, 2, "SAME") ** 2)
        kernel.assign_sub(tape.gradient(loss, kernel))
        return tf.matmul(tf.zeros([2, 4, 3]), tf.zeros([2, 4, 5]), transpose_a=True), a @ b

    convolution = 2 * (2 * 4 * 4 * 7) * (5 * 5 * 3)
    expected = (
        2 * 2 * 4 * 3 * 5 + 2 * 3 * 4 * 5 + 2 * convolution
    )  # forward and the kernel's gradient
    assert benchmark.arithmetic(tf.function(function).get_concrete_function()) == expected


def test_arithmetic_knows_a_kernel_by_the_shape_that_is_given():
    function = tf.function(
        lambda image, gradient: tf.raw_ops.Conv2DBackpropFilter(
            input=image, filter_sizes=[5, 5, 3, 7], out_backprop=gradient,
            strides=[1, 2, 2, 1], padding="SAME",
        )
    )  # fmt: skip
    traced = function.get_concrete_function(tf.zeros([2, 8, 8, 3]), tf.zeros([2, 4, 4, 7]))
    assert benchmark.arithmetic(traced) == 2 * (2 * 4 * 4 * 7) * (5 * 5 * 3)


def test_a_benchmark_is_written_and_compared(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "seconds_of", once)
    monkeypatch.setattr(benchmark, "POSTERIOR_STEPS", 25)
    peaks = {"matmul float32 GFLOP/s": 2.0}  # measuring the peaks takes long
    monkeypatch.setattr(benchmark, "_machine", lambda: peaks)
    config = configuration.default("avb_ac", **SMALL)
    config.name = "small"
    (tmp_path / "before.json").write_text('{"machine: matmul float32 GFLOP/s": 4.0}')
    benchmark.benchmark(config, tmp_path, str(tmp_path / "before.json"))
    assert f"{2.0:12.4g}     0.50 x" in capsys.readouterr().out
    measured = json.loads((tmp_path / benchmark.FILE).read_text())
    assert all(math.isfinite(value) and value > 0 for value in measured.values())
    percent = 100.0 * measured["step: GFLOP/s"] / 2.0
    assert measured["step: % of the float32 matmul peak"] == pytest.approx(percent)


def once(*functions, **_):
    for function in functions:
        function()
    return [1.0 for _ in functions]


def test_no_turn_begins_when_the_time_is_over():
    calls = []
    benchmark.seconds_of(lambda: calls.append(0), repeats=5, at_most=0.0)
    assert len(calls) == 2  # the first call traces


@pytest.mark.parametrize("content", [None, "no json", '["a"]', '{"step": "fast"}'])
def test_a_baseline_that_is_none_is_refused(tmp_path, content):
    file = tmp_path / "baseline.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match="cannot use --baseline="):
        benchmark.benchmark(configuration.default("vae"), tmp_path, str(file))
