"""Tests how the network of an amortised fit scales the data, above all those of many magnitudes."""

import numpy as np
import pytest
import tensorflow as tf
from tensorflow_probability import distributions as tfd

import avb_tf
from avb_tf.amortised import calibration, network

WIDE, NARROW = 3.0, 0.3


def positive(count=5000, scale=WIDE, seed=0):
    return np.exp(scale * np.random.default_rng(seed).normal(size=[count, 1]))


def test_the_logarithm_is_taken_where_it_makes_numbers_symmetric():
    rng = np.random.default_rng(0)
    columns = {
        "of several magnitudes": positive(),
        "the same with zeros": np.where(rng.random([5000, 1]) < 0.2, 0.0, positive()),
        "counts with zeros": rng.poisson(rng.gamma(0.5, 100.0, [5000, 1])),
        "of any sign": positive() - 1e-3,
        "symmetric": rng.uniform(0.0, 1.0, [5000, 1]),
        "zeros alone": np.zeros([5000, 1]),
        "smaller than float32 holds": 1e-60 * positive(),
    }
    y = np.concatenate(list(columns.values()), 1).astype(np.float64)
    floor = dict(zip(columns, network.floors(y), strict=True))
    smallest = np.where(y > 0.0, y, np.inf).min(0)
    assert floor["of several magnitudes"] == smallest[0]
    assert floor["the same with zeros"] == smallest[1] > 0.0
    assert floor["counts with zeros"] == 1.0
    assert floor["of any sign"] == floor["symmetric"] == floor["zeros alone"] == 0.0
    assert np.float32(floor["smaller than float32 holds"]) > 0.0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_network_sees_what_numpy_computes_and_keeps_missing_rows(dtype):
    y = np.concatenate([positive(), np.random.default_rng(1).normal(size=[5000, 1])], 1)
    q = network.ConditionalMixture(1, 2, 3, 8, 1, 8, 1, rows=True)
    q((tf.zeros([1, 1]), tf.zeros([1, 2])))
    scaling = network.scaling(np.zeros([5000, 1]), y)
    q.standardise(scaling)
    sets = y[:6].reshape(3, 2, 2).astype(dtype)
    sets[1, 1] = np.nan
    seen = q._seen(tf.constant(sets.reshape(3, 4))).numpy()
    expected = np.stack([np.log(sets[..., 0] + scaling.y_floor[0]), sets[..., 1]], -1)
    expected = (expected - scaling.y_mean) / scaling.y_scale
    expected = 12.0 * np.arcsinh(expected / 12.0)  # compresses what is far out
    np.testing.assert_allclose(seen, expected, rtol=1e-4, atol=1e-5)
    assert np.isnan(seen[1, 1]).all()
    assert np.isfinite(np.delete(seen.reshape(6, 2), 3, 0)).all()


def test_zero_and_negative_data_are_seen_as_the_smallest():
    floor = network.floors(positive())
    seen = network.logged(np.array([[0.0], [-1.0], [floor[0]]]), floor)
    np.testing.assert_allclose(seen.numpy()[:, 0], np.log([floor[0], floor[0], 2.0 * floor[0]]))


def test_small_data_have_exact_posteriors():
    """theta ~ N(0, 9) and log y ~ N(theta, 0.09), for y of seven magnitudes."""

    def data(theta):
        return tfd.Independent(tfd.LogNormal(theta[..., tf.newaxis] + tf.zeros(2), NARROW), 1)

    model = tfd.JointDistributionNamed({"theta": tfd.Normal(0.0, WIDE), "y": data})
    small = {"width": 32, "trunk_width": 64, "trunk_depth": 2}
    fit = avb_tf.fit_amortised(model, steps=1500, verbose=False, **small)
    deviation = (WIDE**-2 + 2.0 * NARROW**-2) ** -0.5
    for log_y in ([-8.0, -7.8], [-5.0, -5.3], [0.0, 0.4], [7.0, 7.1]):
        mean = deviation**2 * np.sum(log_y) / NARROW**2
        draws = fit.sample(np.exp(log_y), 4000)["theta"].numpy()
        assert abs(draws.mean() - mean) < 0.25 * deviation
        assert 0.85 < draws.std() / deviation < 1.15


def test_a_positive_number_that_is_far_too_small_is_unusual():
    y = positive(300, 0.5)
    distance = np.abs(calibration.standardised(np.concatenate([[[1e-6]], y])))
    assert distance[0] > distance[1:].max()


def test_no_data_set_has_no_draws():
    q = network.ConditionalMixture(3, 2, 3, 8, 1, 8, 1)
    q((tf.zeros([1, 3]), tf.zeros([1, 2])))
    context = tf.function(q.given)(tf.zeros([0, 2])).repeated(5)
    assert tf.function(q.sample_given)(context, tf.constant(0), (0, 0)).shape == (0, 3)
