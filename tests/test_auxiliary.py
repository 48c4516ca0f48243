"""Tests the bound of the auxiliary model against a closed form and against quadrature."""

import numpy as np
import scipy.special
import scipy.stats
import tensorflow as tf
from linear_gaussian import SCALE, WEIGHT
from numpy.testing import assert_allclose

import avb_tf
from avb_tf.auxiliary import AuxiliaryEncoder
from avb_tf.likelihood_estimation import quadrature
from avb_tf.networks import DenseTrunk

X = np.random.default_rng(0).standard_normal((3, 3)).astype(np.float32)
DRAWS = 20_000


def affine(layer, kernel, bias):
    """Sets the mean of a conditional Gaussian to latent @ kernel + bias and keeps its scale.

    A bias far above 0 keeps the ReLUs in the range where they are the identity.
    """
    kernel = np.asarray(kernel, np.float32)
    inputs = len(kernel)
    shift = 50.0
    first = np.zeros(layer.from_latent.kernel.shape, np.float32)
    first[:, :inputs] = np.eye(inputs)
    layer.from_latent.kernel.assign(first)
    head = np.zeros(layer.mean.kernel.shape, np.float32)
    head[:inputs] = kernel
    layer.mean.kernel.assign(head)
    layer.mean.bias.assign(np.asarray(bias) - shift * kernel.sum(0))
    layer.log_scale.kernel.assign(tf.zeros_like(layer.log_scale.kernel))
    return shift


def linear_encoder(log_scales):
    """Returns an encoder that ignores x.

    q(a|x) = N(m, s^2), q(z|a) = N(a C, s'^2) and r(a|z) = N(z D, s''^2).
    """
    encoder = AuxiliaryEncoder(DenseTrunk(4, 1), 2, 2, 6, 1)
    encoder(X, tf.zeros([1, 3, 4]))
    shift = affine(encoder.latent, C, np.zeros(2))
    affine(encoder.auxiliary, D, np.zeros(2))
    for layer, log_scale in zip((encoder.latent, encoder.auxiliary), log_scales[1:], strict=True):
        layer.log_scale.bias.assign(np.full(2, log_scale))
    encoder.from_features.kernel.assign(tf.zeros_like(encoder.from_features.kernel))
    bias = np.concatenate([M, np.full(2, log_scales[0]), np.full(12, shift)])
    encoder.from_features.bias.assign(bias)
    return encoder


M = np.array([0.3, -0.5])
C = np.array([[0.6, 0.2], [-0.1, 0.5]])
D = np.array([[0.4, 0.1], [0.3, 0.7]])
LOG_SCALES = (-0.7, -0.5, -0.3)


def test_the_bound_of_a_linear_gaussian_model_is_its_closed_form():
    encoder = linear_encoder(LOG_SCALES)
    noise = np.random.default_rng(1).standard_normal((DRAWS, 3, 4), np.float32)
    posterior = encoder(X, noise)
    z = np.asarray(posterior.z, np.float64)
    x_given_z = scipy.stats.norm(z @ WEIGHT.T, SCALE).logpdf(X).sum(-1)
    elbo = x_given_z + scipy.stats.norm.logpdf(z).sum(-1) - np.asarray(posterior.log_prob)

    a, q, r = np.exp(2 * np.array(LOG_SCALES))  # variances, without the negligible floor
    mean, cov = M @ C, a * C.T @ C + q * np.eye(2)
    entropy = 2 * np.log(2 * np.pi * np.e) + np.log(a) + np.log(q)  # of q(a, z), independent noise
    # a - z D for (a, z) ~ q: mean M - M C D, covariance of a (I - C D) - noise D.
    left = np.eye(2) - C @ D
    squares = ((M @ left) ** 2).sum() + np.trace(a * left.T @ left + q * D.T @ D)
    log_r = -np.log(2 * np.pi) - np.log(r) - 0.5 * squares / r
    residual = ((X - mean @ WEIGHT.T) ** 2).sum(-1) + np.trace(WEIGHT @ cov @ WEIGHT.T)
    log_x = -1.5 * np.log(2 * np.pi * SCALE**2) - 0.5 * residual / SCALE**2
    log_z = -np.log(2 * np.pi) - 0.5 * (mean @ mean + np.trace(cov))
    expected = log_x + log_z + log_r + entropy
    assert (np.abs(elbo.mean(0) - expected) < 5 * elbo.std(0) / np.sqrt(DRAWS)).all()

    evidence = scipy.stats.multivariate_normal(
        np.zeros(3), WEIGHT @ WEIGHT.T + SCALE**2 * np.eye(3)
    ).logpdf(X)
    assert (expected < evidence).all()


def test_with_the_exact_auxiliary_posterior_it_is_the_exact_density_of_every_draw():
    encoder = linear_encoder(LOG_SCALES)
    a, q = np.exp(2 * np.array(LOG_SCALES[:2]))
    # One common scale of r suffices where C is orthogonal: q(a|z) has precision 1/a + c^2/q.
    rotation = 0.6 * np.array([[0.8, 0.6], [-0.6, 0.8]])
    variance = 1 / (1 / a + 0.36 / q)
    affine(encoder.latent, rotation, np.zeros(2))
    affine(encoder.auxiliary, variance / q * rotation.T, variance / a * M)
    encoder.auxiliary.log_scale.bias.assign(np.full(2, 0.5 * np.log(variance)))
    noise = np.random.default_rng(1).standard_normal((50, 3, 4), np.float32)
    posterior = encoder(X, noise)
    exact = scipy.stats.multivariate_normal(M @ rotation, (0.36 * a + q) * np.eye(2))
    # The difference that remains is due to the floor of 1e-3 on every scale.
    assert_allclose(posterior.log_prob, exact.logpdf(posterior.z), atol=0.05)


def test_the_trained_bound_is_below_log_p_by_quadrature_and_unbiased_as_a_weight():
    x = np.repeat(np.eye(6, dtype=np.float32)[:3], 50, 0)
    model = avb_tf.build("auxvae", (6,), latent_dim=2, width=16)
    model.compile()
    model.fit(x, batch_size=50, epochs=60, verbose=0)
    x = x[::50]
    evidence = quadrature.log_likelihood(model, x)
    noise = tf.random.stateless_normal([DRAWS, 3, model.encoder.noise_dim], [0, 0])
    log_weights = model.terms(tf.constant(x), noise).elbo.numpy().astype(np.float64)
    error = log_weights.std(0) / np.sqrt(DRAWS)
    assert (log_weights.mean(0) < evidence + 3 * error).all()
    weights = np.exp(log_weights - evidence[:, np.newaxis].T)
    assert (np.abs(weights.mean(0) - 1) < 5 * weights.std(0) / np.sqrt(DRAWS)).all()
