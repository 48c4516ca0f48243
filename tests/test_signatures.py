"""Tests signatures of a served model against the model's own parts and closed forms."""

import functools

import keras
import numpy as np
import pytest
import scipy.stats
import tensorflow as tf

import avb_tf
from avb_tf.likelihood_estimation import quadrature
from avb_tf.likelihoods import LIKELIHOODS
from avb_tf.serving import signatures
from tests import linear_gaussian as linear_gaussian_model

SMALL = {
    "latent_dim": 3, "width": 8, "depth": 1, "bases": 4, "basis_width": 8, "adversary_width": 8,
    "products": 8, "draws": 4, "adversary_draws": 4, "flow_width": 8,
}  # fmt: skip


def make(method="avb_ac", event_shape=(6,), **changes):
    keras.utils.set_random_seed(3)
    return avb_tf.build(method, event_shape, **{**SMALL, **changes})


def x_of(model, rows=5):
    values = np.random.default_rng(1).integers(0, 2, [rows, *model.event_shape])
    return tf.constant(values, tf.float32)


def graph(function, *arguments):
    """Calls the function in a graph, as a server does."""
    return tf.function(function, autograph=False)(*arguments)


def importance_weighted(model, x, samples):
    bound = lambda x: signatures.importance_weighted(model, x, samples)  # noqa: E731
    return graph(bound, x)["log_likelihood"].numpy()


def normal(seeds, stream, size):
    return graph(lambda seeds: signatures.normal(seeds, stream, size), seeds).numpy()


def test_a_row_of_noise_is_a_function_of_its_own_seed_and_stream():
    seeds = tf.constant([5, -7, 2**62, 5], tf.int64)
    noise = normal(seeds, 1, 4)
    np.testing.assert_array_equal(noise[0], noise[3])
    np.testing.assert_array_equal(noise[1:2], normal(seeds[1:2], 1, 4))
    assert not np.any(np.isclose(noise, normal(seeds, 0, 4)))


def test_noise_of_consecutive_seeds_is_standard_normal_and_uncorrelated():
    draws = normal(tf.range(4000, dtype=tf.int64), 0, 3)
    assert scipy.stats.kstest(draws.ravel(), "norm").pvalue > 0.01
    lagged = [np.corrcoef(draws[1:, i], draws[:-1, i])[0, 1] for i in range(3)]
    assert np.abs([*lagged, *np.corrcoef(draws.T)[np.triu_indices(3, 1)]]).max() < 4 / np.sqrt(4000)


def test_with_the_exact_posterior_any_number_of_draws_gives_the_log_likelihood(linear_gaussian):
    model, evidence = linear_gaussian
    weight, variance = linear_gaussian_model.WEIGHT, linear_gaussian_model.SCALE**2
    covariance = np.linalg.inv(np.eye(2) + weight.T @ weight / variance)
    scale = np.linalg.cholesky(covariance)
    encoder = model.averaged_encoder
    encoder.mean.set_weights([weight @ covariance / variance, np.zeros(2)])
    encoder.log_scale.set_weights([np.zeros([3, 2]), np.log(np.diag(scale))])
    encoder.off_diagonal.set_weights([np.zeros([3, 4]), scale.ravel()])
    x = tf.constant(evidence.rvs(6, random_state=0), tf.float32)
    actual = importance_weighted(model, x, 32)
    np.testing.assert_allclose(actual, evidence.logpdf(x), atol=0.01)  # due to the scale's floor


@pytest.mark.parametrize("method", ["vae", "avb"])
def test_the_importance_weighted_bound_agrees_with_quadrature(method):
    model = make(method, latent_dim=2)
    encoder = model.averaged_encoder
    # The posteriors of an untrained decoder are near the prior, and q should be near it too.
    if method == "avb":
        encoder.head.kernel.assign(6.0 * encoder.head.kernel)
    else:
        encoder.log_scale.set_weights([np.zeros([8, 2]), np.full(2, 0.3)])
    x = x_of(model)
    exact = quadrature.log_likelihood(model, x.numpy(), 100)
    np.testing.assert_allclose(importance_weighted(model, x, 2048), exact, atol=0.1)


def test_the_elbo_of_a_vae_is_below_its_log_likelihood_and_near_the_expectation_by_draws():
    model = make("vae")
    x = x_of(model)
    served = graph(lambda x: signatures.elbo(model, x), x)["elbo"]
    noise = tf.random.stateless_normal([4000, 5, 3], [0, 0])
    draws = model.terms(x, noise).elbo.numpy()
    error = draws.std(0) / np.sqrt(signatures.ELBO_DRAWS)  # Sobol points err less than draws
    assert np.all(np.abs(served - draws.mean(0)) < error)
    assert np.all(served < importance_weighted(model, x, 1024))


@pytest.mark.parametrize("method", ["avb", "avb_ac"])
def test_the_mean_agrees_with_many_draws(method):
    model = make(method)
    x = x_of(model)
    encode = functools.partial(signatures.encode, model)
    mean = graph(encode, x, tf.zeros([5], tf.int64))["mean"]
    draws = model.encode(x, 20_000, seed=1).numpy()
    # The mean of `avb` is over 256 Sobol points, whose error is below that of as many draws.
    tolerance = 5 * draws.std(0) / np.sqrt(20_000) + draws.std(0) / np.sqrt(256)
    assert np.all(np.abs(mean - draws.mean(0)) < tolerance)


def test_seeded_draws_follow_the_posterior():
    model = make("avb")
    x = tf.repeat(x_of(model, 1), 3000, 0)
    seeds = tf.range(3000, dtype=tf.int64)
    z = graph(functools.partial(signatures.encode, model), x, seeds)["z"].numpy()
    draws = model.encode(x[:1], 3000, seed=1)[:, 0].numpy()
    for latent in range(3):
        assert scipy.stats.ks_2samp(z[:, latent], draws[:, latent]).pvalue > 0.01


@pytest.mark.parametrize("value", [np.inf, np.nan, -1.0, 0.5])
@pytest.mark.parametrize("name", ["poisson", "negative_binomial"])
def test_a_graph_of_counts_refuses_other_numbers(name, value):
    valid = functools.partial(graph, functools.partial(signatures._of_support, LIKELIHOODS[name]))
    valid(tf.constant([[0.0, 3.0]]))
    with pytest.raises(tf.errors.InvalidArgumentError, match="x that is not a count"):
        valid(tf.constant([[1.0, value]]))
