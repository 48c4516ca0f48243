"""Tests the bound against closed forms, its gradients, and the minimiser of the dual loss."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp

from avb_tf import contrast, objectives
from avb_tf.encoders import GaussianEncoder, Posterior

tfd = tfp.distributions

MEAN = np.array([0.7, -0.4], np.float32)
SCALE_TRIL = np.array([[0.5, 0.0], [0.6, 0.3]], np.float32)  # correlation 0.89
Q = tfd.MultivariateNormalTriL(MEAN, SCALE_TRIL)
PRIOR = contrast.prior(2)
EXACT_KL = float(tfd.kl_divergence(Q, PRIOR))

every_contrast = pytest.mark.parametrize("name", ["prior", "diagonal", "full"])


def hermite(points, dimensions):
    """Returns nodes [points^dimensions, dimensions] and weights for a standard normal."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(points)
    weights = weights / weights.sum()
    grids = np.meshgrid(*[nodes] * dimensions, indexing="ij")
    products = np.prod(np.meshgrid(*[weights] * dimensions, indexing="ij"), axis=0)
    return np.stack(grids, -1).reshape(-1, dimensions), products.ravel()


def gaussian_posterior(noise):
    z = MEAN + noise @ SCALE_TRIL.T
    mean, scale = MEAN[np.newaxis], SCALE_TRIL[np.newaxis]
    return Posterior(
        tf.constant(z[:, np.newaxis], tf.float32), tf.constant(mean), tf.constant(scale)
    )


def test_the_adversary_loss_is_2_log_2_for_a_blind_adversary():
    zeros = tf.zeros(3)
    np.testing.assert_allclose(objectives.adversary_loss(zeros, zeros), 2 * np.log(2), rtol=1e-6)
    np.testing.assert_allclose(objectives.adversary_accuracy(zeros, zeros), 0.5)


def test_accuracy_counts_both_sides():
    t_posterior, t_contrast = tf.constant([2.0, 1.0, -1.0]), tf.constant([-3.0, 1.0, 1.0])
    accuracy = objectives.adversary_accuracy(t_posterior, t_contrast)
    np.testing.assert_allclose(accuracy, [1.0, 0.5, 0.0])


def test_the_adversary_loss_is_stationary_at_the_log_density_ratio():
    q = tfd.Normal(tf.constant(0.7, tf.float64), tf.constant(0.5, tf.float64))
    r = tfd.Normal(tf.constant(0.5, tf.float64), tf.constant(0.8, tf.float64))
    nodes, weights = hermite(80, 1)
    scale, shift, bend = (tf.Variable(v, dtype=tf.float64) for v in (1.0, 0.0, 0.0))

    def t(z):  # the exact ratio, and three directions away from it
        return scale * (q.log_prob(z) - r.log_prob(z)) + shift + bend * z**2

    def loss():
        losses = objectives.adversary_loss(
            t(q.loc + q.scale * nodes[:, 0]), t(r.loc + r.scale * nodes[:, 0])
        )
        return tf.reduce_sum(weights * losses)

    with tf.GradientTape() as tape:
        value = loss()
    gradients = tape.gradient(value, [scale, shift, bend])
    np.testing.assert_allclose(gradients, np.zeros(3), atol=1e-7)
    for variable in (scale, shift, bend):  # the point is a minimum, not a saddle
        for move in (-0.1, 0.1):
            variable.assign_add(move)
            assert loss() > value
            variable.assign_add(-move)


@every_contrast
def test_kl_with_the_optimal_t_is_the_closed_form(name):
    posterior = gaussian_posterior(np.random.default_rng(0).standard_normal((50_000, 2)))
    r = contrast.CONTRASTS[name](posterior)
    t = Q.log_prob(posterior.z) - r.log_prob(posterior.z)
    terms = objectives.Terms(tf.zeros_like(t), contrast.divergence(r, PRIOR), t)
    kl = terms.kl.numpy()
    assert abs(kl.mean() - EXACT_KL) <= 5 * kl.std() / np.sqrt(kl.size) + 1e-5
    np.testing.assert_allclose(terms.elbo, -kl)


@every_contrast
def test_primal_gradients_at_the_optimal_t_equal_those_of_the_exact_kl(name):
    # T* is frozen as a function of the whitened z, like the adversary in a primal step. The
    # gradient that this drops vanishes only in expectation, so quadrature replaces random noise.
    noise, weights = hermite(24, 2)
    encoder = GaussianEncoder(keras.layers.Flatten(), 2, full_covariance=True)
    x = tf.constant([[1.0, 0.5]])
    encoder(x, tf.zeros([1, 1, 2]))
    rng = np.random.default_rng(1)
    encoder.set_weights([0.3 * rng.standard_normal(w.shape) for w in encoder.get_weights()])

    def posterior_and_contrast():
        posterior = encoder(x, tf.constant(noise[:, np.newaxis], tf.float32))
        return posterior, contrast.CONTRASTS[name](posterior)

    posterior, r = posterior_and_contrast()
    mean_w = contrast.whiten(posterior.mean[np.newaxis], r)[0]
    q_whitened = tfd.MultivariateNormalTriL(
        tf.constant(mean_w.numpy()), tf.constant(r.scale.solve(posterior.scale_tril).numpy())
    )
    standard = contrast.prior(2)

    with tf.GradientTape() as tape:
        posterior, r = posterior_and_contrast()
        w = contrast.whiten(posterior.z, r)
        t = q_whitened.log_prob(w) - standard.log_prob(w)
        terms = objectives.Terms(tf.zeros_like(t), contrast.divergence(r, PRIOR), t)
        loss = tf.reduce_sum(tf.constant(weights, tf.float32)[:, np.newaxis] * terms.kl)
    gradients = tape.gradient(loss, encoder.trainable_variables)

    with tf.GradientTape() as tape:
        posterior, _ = posterior_and_contrast()
        q = tfd.MultivariateNormalTriL(posterior.mean, posterior.scale_tril)
        exact = tf.reduce_sum(tfd.kl_divergence(q, PRIOR))
    expected = tape.gradient(exact, encoder.trainable_variables)
    np.testing.assert_allclose(loss, exact, atol=1e-4)
    for a, b in zip(gradients, expected, strict=True):
        assert np.abs(b).max() > 1e-3
        np.testing.assert_allclose(a, b, atol=2e-4)


def test_the_bound_at_the_exact_posterior_is_the_evidence_of_a_linear_gaussian_model():
    # For x = W z + noise of scale s, the posterior and log p(x) have closed forms.
    rng = np.random.default_rng(2)
    weight, scale = rng.standard_normal((3, 2)).astype(np.float32), 0.7
    x = rng.standard_normal(3).astype(np.float32)
    precision = np.eye(2) + weight.T @ weight / scale**2
    covariance = np.linalg.inv(precision)
    mean = covariance @ weight.T @ x / scale**2
    evidence = tfd.MultivariateNormalFullCovariance(
        np.zeros(3, np.float32), (weight @ weight.T + scale**2 * np.eye(3)).astype(np.float32)
    ).log_prob(x)

    noise, weights = hermite(8, 2)  # exact for the quadratics below
    cholesky = np.linalg.cholesky(covariance)
    z = tf.constant((mean + noise @ cholesky.T)[:, np.newaxis], tf.float32)
    posterior = Posterior(
        z, tf.constant(mean[np.newaxis], tf.float32), tf.constant(cholesky[np.newaxis], tf.float32)
    )
    q = tfd.MultivariateNormalTriL(posterior.mean, posterior.scale_tril)
    log_likelihood = tf.reduce_sum(
        tfd.Normal(tf.einsum("ij,sbj->sbi", weight, z), scale).log_prob(x), -1
    )
    for choose in contrast.CONTRASTS.values():
        r = choose(posterior)
        t = objectives.exact_t(posterior._replace(log_prob=q.log_prob(z)), r)
        terms = objectives.Terms(log_likelihood, contrast.divergence(r, PRIOR), t)
        bound = np.sum(weights * terms.elbo.numpy()[:, 0])
        np.testing.assert_allclose(bound, evidence, atol=1e-4)


def test_the_description_depends_only_on_the_shape_of_the_posterior():
    def description(columns, mean):
        columns = tf.constant([columns], tf.float32)
        scale = tf.linalg.cholesky(columns @ tf.linalg.matrix_transpose(columns))
        posterior = Posterior(tf.zeros([1, 1, 2]), tf.constant([mean]), scale, columns)
        return objectives.description(posterior, contrast.full_contrast(posterior))

    columns = np.array([[1.0, 0.2, 0.5], [0.0, 0.7, -0.3]])
    first = description(columns, [0.0, 0.0])
    moved = description(np.array([[2.0, 0.0], [0.5, 0.3]]) @ columns, [3.0, -1.0])
    bent = description(columns * [1.0, 1.0, 3.0], [0.0, 0.0])
    np.testing.assert_allclose(first, moved, atol=1e-5)  # the same shape, shifted and scaled
    assert np.abs(first - bent).max() > 0.1
