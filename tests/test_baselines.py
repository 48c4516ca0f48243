"""Tests Gaussian VI and NUTS on a target with known moments, with and without XLA."""

from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf

from avb_tf.posteriors import baselines, tails
from avb_tf.posteriors.coordinates import Start

MEAN = np.array([1.0, -2.0], np.float32)
FACTOR = np.array([[1.0, 0.0], [0.8, 0.5]], np.float32)
START = Start(np.zeros(2), np.eye(2), np.zeros([1, 2]), tails.light(2), 1)


def target(unknown_to_xla):
    """Returns a correlated Gaussian target."""

    def log_density(u):
        z = tf.linalg.triangular_solve(FACTOR, tf.transpose(u - MEAN))
        density = -0.5 * tf.reduce_sum(z**2, 0)
        if unknown_to_xla:
            density += tf.numpy_function(np.float32, [0.0], tf.float32)
        return density

    return SimpleNamespace(dim=2, dtype=tf.float32, log_density=log_density)


@pytest.mark.parametrize("unknown_to_xla", [False, True])
def test_a_gaussian_of_full_rank_finds_the_gaussian(unknown_to_xla):
    draws, again = (
        baselines.gaussian(target(unknown_to_xla), START, True, 4000, steps=800) for _ in range(2)
    )
    np.testing.assert_array_equal(draws, again)
    np.testing.assert_allclose(draws.mean(0), MEAN, atol=0.1)  # allows for Adam's noise
    np.testing.assert_allclose(np.cov(draws.T), FACTOR @ FACTOR.T, atol=0.1)


def test_a_gaussian_of_mean_field_has_the_conditional_variances():
    draws = baselines.gaussian(target(False), START, False, 4000, steps=800)
    precision = np.linalg.inv(FACTOR @ FACTOR.T)
    np.testing.assert_allclose(draws.mean(0), MEAN, atol=0.1)
    np.testing.assert_allclose(draws.var(0), 1.0 / np.diag(precision), rtol=0.15)
    assert abs(np.corrcoef(draws.T)[0, 1]) < 0.06


@pytest.mark.parametrize(
    ("unknown_to_xla", "draws", "r_hat"), [(False, 3000, baselines.R_HAT_LIMIT), (True, 100, 1.1)]
)
def test_nuts_draws_from_the_posterior(unknown_to_xla, draws, r_hat):
    chains = baselines.nuts(target(unknown_to_xla), START, draws, adaptation=draws // 2)
    assert chains.r_hat < r_hat
    error = 4.0 / np.sqrt(chains.effective_sample_size)
    np.testing.assert_allclose(chains.u.mean(0), MEAN, atol=error)
    np.testing.assert_allclose(np.cov(chains.u.T), FACTOR @ FACTOR.T, atol=2.0 * error)
