"""Tests likelihoods against numpy and scipy, as probability masses or densities."""

import numpy as np
import pytest
import scipy.special
import scipy.stats
import tensorflow as tf

from avb_tf.likelihoods import (
    LIKELIHOODS,
    SCALE_FLOOR,
    Likelihood,
    log_likelihood,
    pairwise_log_likelihood,
)

EVENTS = [(5,), (3, 2, 2)]
LEVELS = np.arange(256) / 255

every_likelihood = pytest.mark.parametrize("name", LIKELIHOODS)


def outputs_for(name, *shape, seed=0):
    """Returns a decoder's output, [*shape, parameters]."""
    shape = (*shape, LIKELIHOODS[name].parameters)
    return np.random.default_rng(seed).normal(0, 2, shape).astype(np.float32)


def data_for(name, *shape, seed=1):
    x = np.random.default_rng(seed).random(shape)
    if LIKELIHOODS[name].support == "count":
        return np.floor(9 * x).astype(np.float32)
    if LIKELIHOODS[name].support == "real":
        return (6 * x - 3).astype(np.float32)
    return (np.round(x) if LIKELIHOODS[name].binary else np.round(255 * x) / 255).astype(np.float32)


def levels_mass(location, scale):
    """Returns the mass of each level under a rounded logistic; the end levels include the tails."""
    edges = (np.arange(255) + 0.5) / 255
    cdf = scipy.stats.logistic.cdf(edges, scipy.special.expit(location), softplus(scale))
    return np.diff(cdf, prepend=0.0, append=1.0)


def softplus(scale):
    return SCALE_FLOOR + np.logaddexp(0.0, scale)


def elementwise(name, outputs, x):
    """Returns log p of each dimension of x, by numpy and scipy."""
    first = outputs[..., 0].astype(np.float64)
    if name == "bernoulli":
        return x * first - np.logaddexp(0.0, first)
    if name == "normal":
        return scipy.stats.norm.logpdf(x, scipy.special.expit(first), softplus(outputs[..., 1]))
    if name == "gaussian":
        return scipy.stats.norm.logpdf(x, first, softplus(outputs[..., 1]))
    if name == "student_t":
        degrees = 2.0 + np.logaddexp(0.0, outputs[..., 2])
        return scipy.stats.t.logpdf(x, degrees, first, softplus(outputs[..., 1]))
    if name == "poisson":
        return scipy.stats.poisson.logpmf(x, np.exp(first))
    if name == "negative_binomial":
        failures = np.exp(-outputs[..., 1].astype(np.float64))
        return scipy.stats.nbinom.logpmf(x, failures, failures / (failures + np.exp(first)))
    pairs = outputs.reshape(-1, 2).astype(np.float64)
    mass = np.reshape([levels_mass(*pair) for pair in pairs], (*first.shape, 256))
    levels = np.broadcast_to(np.rint(255 * x).astype(int), first.shape)
    return np.log(np.take_along_axis(mass, levels[..., np.newaxis], -1)[..., 0])


@every_likelihood
@pytest.mark.parametrize("event", EVENTS, ids=str)
def test_log_likelihood_sums_the_density_over_the_event_only(name, event):
    outputs, x = outputs_for(name, 3, 4, *event), data_for(name, 4, *event)
    actual = log_likelihood(LIKELIHOODS[name], tf.constant(outputs), tf.constant(x))
    expected = elementwise(name, outputs, x).reshape(3, 4, -1).sum(-1)
    np.testing.assert_allclose(actual, expected, rtol=1e-4)


@every_likelihood
@pytest.mark.parametrize("event", EVENTS, ids=str)
def test_pairs_are_log_likelihoods_pair_by_pair(name, event):
    likelihood = LIKELIHOODS[name]
    outputs = tf.constant(outputs_for(name, 6, *event))
    x = tf.constant(data_for(name, 4, *event))
    pairs = pairwise_log_likelihood(likelihood, outputs, x)
    assert pairs.shape == (4, 6)
    for i in range(4):
        for j in range(6):
            one = log_likelihood(likelihood, outputs[j : j + 1], x[i : i + 1])[0]
            np.testing.assert_allclose(pairs[i, j], one, rtol=1e-5, atol=1e-5)


LINKS = {"unit": scipy.special.expit, "real": np.asarray, "count": np.exp}


@every_likelihood
def test_the_mean_is_a_function_of_the_first_parameter(name):
    outputs = outputs_for(name, 1000)
    mean = LIKELIHOODS[name].mean(outputs)
    expected = LINKS[LIKELIHOODS[name].support](outputs[..., 0])
    np.testing.assert_allclose(mean, expected, rtol=1e-5)


def test_the_variance_of_a_negative_binomial_exceeds_that_of_a_poisson_by_its_dispersion():
    outputs = tf.constant([[1.0, -2.0], [0.5, 0.3]])
    mean = np.exp(outputs[..., 0])
    variance = LIKELIHOODS["negative_binomial"].distribution(outputs).variance()
    np.testing.assert_allclose(variance, mean + mean**2 * np.exp(outputs[..., 1]), rtol=1e-5)


def test_the_mean_of_a_bernoulli_is_the_probability_of_one():
    outputs = outputs_for("bernoulli", 50)
    one = LIKELIHOODS["bernoulli"].distribution(outputs).log_prob(np.ones(50, np.float32))
    np.testing.assert_allclose(LIKELIHOODS["bernoulli"].mean(outputs), np.exp(one), rtol=1e-5)


@pytest.mark.parametrize("logit", [-80.0, 80.0])
def test_a_bernoulli_with_extreme_logits_is_finite(logit):
    bernoulli = LIKELIHOODS["bernoulli"].distribution(tf.constant([[logit], [logit]]))
    expected = [-max(logit, 0.0), -max(-logit, 0.0)]
    np.testing.assert_allclose(bernoulli.log_prob([0.0, 1.0]), expected, atol=1e-6)


@pytest.mark.parametrize("raw", [-1000.0, -20.0, 0.0, 3.0])
def test_the_scale_of_a_normal_stays_above_its_floor_and_its_mean_in_the_unit_interval(raw):
    outputs = tf.constant([[-30.0, raw], [0.3, raw], [30.0, raw]])
    normal = LIKELIHOODS["normal"].distribution(outputs)
    np.testing.assert_allclose(normal.stddev(), [softplus(raw)] * 3, rtol=1e-5)
    assert (normal.stddev().numpy() >= np.float32(SCALE_FLOOR)).all()
    np.testing.assert_allclose(normal.mean(), [0.0, scipy.special.expit(0.3), 1.0], atol=1e-6)


@pytest.mark.parametrize("scale", [-30.0, -3.0, 0.0, 4.0])
@pytest.mark.parametrize("location", [-9.0, -1.0, 0.2, 9.0])
def test_the_levels_of_a_logistic_have_mass_one(location, scale):
    logistic = LIKELIHOODS["logistic"].distribution(tf.constant([location, scale]))
    mass = np.exp(logistic.log_prob(tf.constant(LEVELS, tf.float32)))
    assert abs(mass.sum() - 1.0) < 1e-4
    np.testing.assert_allclose(mass, levels_mass(location, scale), rtol=1e-3, atol=1e-6)


def test_a_level_far_from_the_logistic_has_a_finite_density_and_gradient():
    outputs = tf.constant([[-9.0, -30.0]])
    with tf.GradientTape() as tape:
        tape.watch(outputs)
        log_prob = LIKELIHOODS["logistic"].distribution(outputs).log_prob(tf.ones(1))
    # The log of the logistic's tail beyond the last edge, which is 254.5 / 255.
    distance = (254.5 / 255 - scipy.special.expit(-9.0)) / SCALE_FLOOR
    np.testing.assert_allclose(log_prob, [-distance], rtol=1e-4)
    assert np.isfinite(tape.gradient(log_prob, outputs)).all()


@every_likelihood
def test_samples_have_the_mean_of_the_likelihood(name):
    outputs = tf.constant([[0.3, -4.0, 2.0][: LIKELIHOODS[name].parameters]] * 20_000)
    samples = np.asarray(LIKELIHOODS[name].distribution(outputs).sample(seed=(0, 1)), np.float64)
    error = samples.std() / np.sqrt(samples.size)
    assert abs(samples.mean() - LINKS[LIKELIHOODS[name].support](0.3)) < 5 * error
    if name == "logistic":
        assert 10 < len(np.unique(samples)) <= 256
        np.testing.assert_allclose(255 * samples, np.rint(255 * samples), atol=1e-4)


@pytest.mark.parametrize(("unit", "support"), [(True, "unit"), (False, "real")])
def test_a_likelihood_of_an_earlier_file_keeps_its_numbers(unit, support):
    config = LIKELIHOODS["normal"].get_config()
    del config["support"]
    assert Likelihood.from_config(config | {"unit": unit}).support == support
