"""Tests the graphs of `fit`: steps do not depend on the number per call, and suit a GPU."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import avb_tf
from avb_tf.data import pipeline, resident
from avb_tf.data.source import array_split
from avb_tf.errors import UserError
from avb_tf.settings.methods import METHODS

SMALL = {
    "latent_dim": 2, "width": 8, "depth": 1, "bases": 3, "basis_width": 4, "adversary_width": 8,
    "adversary_depth": 1, "products": 8, "adversary_draws": 4, "adversary_steps": 2,
    "flow_width": 8,
}  # fmt: skip
X = (np.random.default_rng(0).random((50, 6)) * 255).astype(np.uint8)


def model_of(method, compiled=False, **compile_settings):
    keras.utils.set_random_seed(0)
    model = avb_tf.build(method, X.shape[1:], **SMALL)
    model.compile(jit_compile=compiled, **compile_settings)
    return model


def state(model):
    optimizers = [o for o in (model.optimizer, model.adversary_optimizer) if o is not None]
    variables = [*model.weights, *(v for o in optimizers for v in o.variables)]
    return [keras.ops.convert_to_numpy(v) for v in variables]


def fitted(model, x, steps_per_call, **settings):
    model.steps_per_execution = steps_per_call
    model.fit(x, batch_size=8, steps_per_epoch=12, epochs=1, verbose=0, **settings)
    return state(model)


def assert_equal(a, b):
    for one, other in zip(a, b, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_has_only_variables_that_a_gpu_keeps(method):
    # TensorFlow keeps int32 variables in the host's memory, which a compiled step cannot read.
    model = model_of(method)
    x = tf.zeros([8, 6])
    graph = tf.function(model.train_step).get_concrete_function(x).graph
    assert tf.int32 not in {variable.dtype for variable in graph.variables}
    assert len(graph.variables) > 10


@pytest.mark.parametrize("method", METHODS)
def test_a_compiled_step_has_no_condition(method):
    # At each condition the host would have to wait for the GPU.
    model = model_of(method, compiled=True)
    assert model.loop_is_compiled
    step = tf.function(model.train_step, autograph=False, jit_compile=True)
    text = step.experimental_get_compiler_ir(tf.zeros([8, 6]))(stage="hlo")
    assert "dot(" in text
    assert "conditional(" not in text


def test_the_number_of_steps_in_a_call_changes_no_bit():
    whole = fitted(model_of("avb", compiled=True), X, 12)
    assert_equal(whole, fitted(model_of("avb", compiled=True), X, 5))  # two calls of 5, one of 2


def test_data_on_the_device_are_those_of_a_stream():
    split = array_split(X)
    stream = pipeline.training_batches(split, 8, 0, 0)
    on_device = fitted(model_of("avb"), split, 5)  # two calls of 5 steps and one of 2
    assert_equal(on_device, fitted(model_of("avb"), stream, 1, shuffle=False))
    model = model_of("avb")
    model.resident_megabytes = 0
    assert_equal(on_device, fitted(model, split, 1))


def test_a_batch_may_be_larger_than_the_split():
    split = array_split(X[:3])
    stream = pipeline.training_batches(split, 8, 0, 0)
    assert_equal(
        fitted(model_of("vae"), split, 4),
        fitted(model_of("vae"), stream, 1, shuffle=False),
    )


def test_compiled_data_on_the_device_are_those_of_a_stream():
    # XLA fuses the decoding of bytes with the step, which changes rounding.
    stream = pipeline.training_batches(array_split(X), 8, 0, 0)
    on_device = fitted(model_of("avb", compiled=True), X, 6)
    streamed = fitted(model_of("avb", compiled=True), stream, 3, shuffle=False)
    for one, other in zip(on_device, streamed, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_a_compiled_step_is_the_step():
    # The noise is fixed, because XLA and TensorFlow on a CPU draw different numbers.
    x = np.repeat(X[:1], 8, 0)
    models = [model_of("vae", compiled) for compiled in (False, True)]
    for model in models:
        model._noise = lambda x, stream, dim: tf.ones([1, tf.shape(x)[0], dim])
        model._inputs = lambda data: tf.cast(data, tf.float32)
        model.optimizer.global_clipnorm = 0.5
    plain, compiled = (fitted(model, x, 4) for model in models)
    for one, other in zip(plain, compiled, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_a_compiled_loop_skips_a_step_that_is_not_finite():
    model = model_of("avb", compiled=True)
    kernel = model.adversary.weights[0]
    kernel.assign(np.full(kernel.shape, np.nan))  # T, losses and gradients become NaN
    before = state(model)
    fitted(model, X, 6)
    names = [v.path for v in model.weights]
    for name, old, new in zip(names, before, state(model), strict=False):  # weights come first
        if name.endswith(("/step", "/skipped", "/skipped_in_a_row")):
            assert new == 12
        else:
            np.testing.assert_array_equal(old, new, name)


def test_a_resumed_fit_goes_on_with_the_next_batches():
    whole = model_of("avb")
    whole.fit(X, batch_size=8, steps_per_epoch=6, epochs=4, verbose=0)
    parts = model_of("avb")
    for _ in range(2):
        parts.fit(X, batch_size=8, steps_per_epoch=6, epochs=2, verbose=0)
    assert_equal(state(whole), state(parts))


def test_fit_takes_validation_split_and_order_of_the_data():
    model = model_of("vae")
    history = model.fit(X, batch_size=10, validation_split=0.2, shuffle=False, verbose=0).history
    assert int(model.step.numpy()) == 4
    assert np.isfinite(history["val_elbo"]).all()


def test_a_split_is_not_split_again():
    with pytest.raises(UserError, match="validation_split goes with an array"):
        model_of("vae").fit(array_split(X), validation_split=0.2, verbose=0)


def test_an_example_larger_than_the_limit_is_a_stream():
    split = array_split(X)
    assert resident.fits(split, X.nbytes / 2**20)
    assert not resident.fits(split, (X.nbytes - 1) / 2**20)
