"""Tests contrasts: density, whitening and divergence of a Gaussian with q's moments."""

import numpy as np
import pytest
import scipy.stats
import tensorflow as tf
from closed_forms import assert_moments, gaussian_kl

from avb_tf import objectives
from avb_tf.contrast import CONTRASTS, divergence, prior, whiten
from avb_tf.encoders import (
    BlackBoxEncoder,
    GaussianEncoder,
    JointBasisEncoder,
    NoiseBasisEncoder,
    Posterior,
)
from avb_tf.networks import DenseTrunk

MEAN = np.array([[0.7, -1.2, 0.1], [-2.0, 0.0, 0.4]], np.float32)
SCALE_TRIL = np.array(
    [
        [[0.5, 0.0, 0.0], [0.9, 0.2, 0.0], [-0.4, 0.3, 1.5]],
        [[2.0, 0.0, 0.0], [0.1, 0.05, 0.0], [0.3, -0.6, 0.8]],
    ],
    np.float32,
)  # correlations up to 0.98
COVARIANCE = SCALE_TRIL @ SCALE_TRIL.transpose(0, 2, 1)
X = np.random.default_rng(0).random((3, 6), np.float32)

every_contrast = pytest.mark.parametrize("name", CONTRASTS)


def contrast(name):
    """Returns r for posteriors that differ from the prior."""
    mean, scale_tril = tf.constant(MEAN), tf.constant(SCALE_TRIL)
    return CONTRASTS[name](Posterior(mean[tf.newaxis], mean, scale_tril))


def randomise(network):
    for i, weight in enumerate(network.weights):
        weight.assign(0.3 * tf.random.stateless_normal(weight.shape, [i, 7]))


@every_contrast
def test_whitened_draws_of_r_are_standard_normal(name):
    r = contrast(name)
    whitened = whiten(r.sample(100_000, seed=(0, 1)), r)
    for i in range(len(MEAN)):
        assert_moments(whitened[:, i], np.zeros(3), np.eye(3))


@every_contrast
def test_the_density_of_r_is_the_standard_normal_of_whitened_z_over_the_scale(name):
    r = contrast(name)
    z = np.random.default_rng(1).normal(0, 2, (50, 2, 3)).astype(np.float32)
    standard = scipy.stats.norm.logpdf(whiten(z, r)).sum(-1)
    log_scale = 0.5 * np.linalg.slogdet(np.asarray(r.covariance(), np.float64))[1]
    np.testing.assert_allclose(r.log_prob(z), standard - log_scale, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "mean", "covariance"),
    [
        ("prior", np.zeros((2, 3)), [np.eye(3)] * 2),
        ("diagonal", MEAN, COVARIANCE * np.eye(3)),
        ("full", MEAN, COVARIANCE),
    ],
    ids=CONTRASTS,
)
def test_the_moments_of_r(name, mean, covariance):
    r = contrast(name)
    np.testing.assert_allclose(r.mean(), mean)
    np.testing.assert_allclose(r.covariance(), covariance, rtol=1e-5, atol=1e-7)


def test_the_prior_is_standard_normal():
    z = np.random.default_rng(2).standard_normal((20, 4), np.float32)
    expected = scipy.stats.norm.logpdf(z).sum(-1)
    np.testing.assert_allclose(prior(4).log_prob(z), expected, rtol=1e-5)


@every_contrast
def test_the_divergence_is_the_mean_log_ratio_under_a_non_gaussian_q(name):
    encoder, draws = JointBasisEncoder(DenseTrunk(8, 1), 3, 4, 5, 8), 50_000
    noise = np.random.default_rng(3).standard_normal((draws, len(X), 4), np.float32)
    encoder(X, noise[:1])
    randomise(encoder)
    weigh = np.tile([1.0] * 4 + [100.0] * 5, 3)  # amplifies the functions of the noise
    encoder.relative.bias.assign(weigh * encoder.relative.bias)
    posterior = encoder(X, noise)
    assert (np.abs(scipy.stats.kurtosis(posterior.z)) > 0.5).any(-1).all()
    r, p = CONTRASTS[name](posterior), prior(3)
    ratio = np.asarray(r.log_prob(posterior.z) - p.log_prob(posterior.z))
    error = ratio.std(0) / np.sqrt(draws)
    assert (np.abs(divergence(r, p) - ratio.mean(0)) <= 5 * error + 1e-5).all()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("prior", [0.0, 0.0]),
        ("diagonal", list(map(gaussian_kl, MEAN, COVARIANCE * np.eye(3)))),
        ("full", list(map(gaussian_kl, MEAN, COVARIANCE))),
    ],
    ids=CONTRASTS,
)
def test_the_divergence_is_the_closed_form(name, expected):
    actual = divergence(contrast(name), prior(3))
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def nearly_a_point(name):
    """Returns an encoder that maps all noise to nearly the same z, and noise for it."""
    makers = {
        "gaussian": lambda: GaussianEncoder(DenseTrunk(8, 1), 3),
        "black_box": lambda: BlackBoxEncoder(DenseTrunk(8, 1), 3, 4, 8, 2),
        "noise_basis": lambda: NoiseBasisEncoder(DenseTrunk(8, 1), 3, 2, 4, 8),
        "joint_basis": lambda: JointBasisEncoder(DenseTrunk(8, 1), 3, 4, 5, 8),
    }
    encoder = makers[name]()
    noise = np.random.default_rng(4).standard_normal((8, 3, encoder.noise_dim), np.float32)
    encoder(X, noise)
    randomise(encoder)
    heads = {
        "gaussian": [(encoder, "log_scale")],
        "black_box": [(encoder, "head")],
        "noise_basis": [(encoder, "coefficients")],
        "joint_basis": [(encoder, "log_scale"), (encoder, "relative")],
    }
    for owner, attribute in heads[name]:
        head = getattr(owner, attribute)
        head.kernel.assign(tf.zeros_like(head.kernel))
        head.bias.assign(tf.fill(head.bias.shape, -100.0 if attribute == "log_scale" else 0.0))
    return encoder, noise


@every_contrast
@pytest.mark.parametrize("encoder_name", ["gaussian", "black_box", "noise_basis", "joint_basis"])
def test_a_posterior_that_is_nearly_a_point_has_finite_terms_and_gradients(encoder_name, name):
    encoder, noise = nearly_a_point(encoder_name)
    with tf.GradientTape() as tape:
        posterior = encoder(X, noise)
        r = CONTRASTS[name](posterior)
        whitened = whiten(posterior.z, r)
        terms = [r.log_prob(posterior.z), whitened, divergence(r, prior(3))]
        total = tf.add_n([tf.reduce_sum(term) for term in terms])
    assert np.ptp(posterior.z, axis=0).max() < 0.01
    for values in [*terms, *tape.gradient(total, encoder.trainable_variables)]:
        assert values is None or np.isfinite(values).all()
    if posterior.columns is not None:
        assert np.isfinite(objectives.description(posterior, r)).all()
