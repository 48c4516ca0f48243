"""Tests training with 16-bit products: weights and bounds stay in 32 bits, and results agree."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from avb_tf import configuration
from avb_tf.commands import train
from avb_tf.settings import methods

EVENT = (6, 6, 1)
rng = np.random.default_rng(0)
X = (rng.random([64, *EVENT]) < rng.random(EVENT)).astype(np.float32)
SIZES = {
    "width": 32, "bases": 4, "basis_width": 16, "adversary_width": 32, "products": 64,
    "noise_dim": 0, "adversary_draws": 4, "ema_decay": 0.999,
}  # fmt: skip


def model_of(method, precision, **settings):
    config = configuration.default(method, latent_dim=2, **SIZES | settings)
    config.precision = precision
    configuration.validate(config)
    return train.create(config, EVENT)


def trained(model, steps=60):
    x = tf.data.Dataset.from_tensors(X).repeat()
    model.fit(x, steps_per_epoch=steps, shuffle=False, verbose=0)
    return model


@pytest.mark.parametrize(
    ("method", "network"), [(m, "dense") for m in methods.METHODS] + [("avb_ac_paper", "conv")]
)
def test_weights_bounds_and_gradients_are_float32(method, network):
    model = model_of(method, "mixed_bfloat16", network=network, filters=(4, 8), strides=(2, 2))
    noise = model._noise(X, 0, model.encoder.noise_dim)
    with tf.GradientTape() as tape:
        terms = model.terms(tf.constant(X), noise, training=True)
        loss = tf.reduce_mean(terms.elbo)
    gradients = tape.gradient(loss, model.primal_variables)
    assert {t.dtype for t in (*terms, *gradients)} == {tf.float32}
    assert {v.dtype for v in model.weights} <= {"float32", "int32", "int64"}


def products(model, dtype):
    step = tf.function(model.train_step).get_concrete_function(tf.constant(X))
    operations = step.graph.get_operations()
    return sum(op.type == "MatMul" and op.outputs[0].dtype == dtype for op in operations)


def test_the_large_products_are_in_16_bits():
    assert products(model_of("avb_ac_paper", "mixed_bfloat16"), tf.bfloat16) >= 20
    assert products(model_of("avb_ac_paper", "float32"), tf.bfloat16) == 0


@pytest.mark.parametrize(
    ("method", "precision"), [("avb_ac_paper", "mixed_bfloat16"), ("avb", "mixed_float16")]
)
def test_training_reaches_the_same_bound(method, precision):
    # Rounding acts as noise: after the same steps the bounds agree, but not the weights.
    bounds = {}
    for p in ("float32", precision):
        model = trained(model_of(method, p))
        bounds[p] = model.evaluate(X, batch_size=64, verbose=0, return_dict=True)["elbo"]
        assert int(model.skipped) <= 2  # float16 may have to lower its loss scale at first
    assert abs(bounds[precision] - bounds["float32"]) < 0.02 * abs(bounds["float32"])


def test_float16_scales_both_losses_and_an_overflow_changes_no_weight(caplog):
    model = model_of("avb_ac", "mixed_float16")
    both = model.optimizer, model.adversary_optimizer
    assert all(isinstance(o, keras.optimizers.LossScaleOptimizer) for o in both)
    for optimizer in both:
        optimizer.dynamic_scale.assign(1e38)
    before = [v.numpy() for v in model.primal_variables]
    logs = model.fit(X, batch_size=64, steps_per_epoch=1, verbose=0).history
    assert int(model.skipped) == 1
    assert np.isfinite(list(logs.values())).all()  # the terms of the step are finite
    assert "float16 has to find its loss scale" in caplog.text
    for old, new in zip(before, model.primal_variables, strict=True):
        np.testing.assert_array_equal(old, new.numpy())
    assert float(model.optimizer.dynamic_scale) < 1e38


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_a_loaded_model_continues_in_float32(precision, tmp_path):
    model = trained(model_of("avb", precision), 3)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for a, b in zip(model.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())
    assert not products(loaded, tf.bfloat16) + products(loaded, tf.float16)
    trained(loaded, 1)
