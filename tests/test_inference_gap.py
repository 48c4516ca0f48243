"""Tests the split of the inference gap where its parts are known."""

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import tensorflow as tf

from avb_tf import build
from avb_tf.encoders import GaussianEncoder
from avb_tf.likelihood_estimation import inference_gap, joint, quadrature
from tests.linear_gaussian import SCALE, WEIGHT
from tests.test_importance import X, set_posterior

PRECISION = np.eye(2) + WEIGHT.T @ WEIGHT / SCALE**2


def test_the_best_gaussians_of_a_linear_gaussian_model(linear_gaussian):
    model, evidence = linear_gaussian
    set_posterior(model, 0.6)
    diagonal, full = inference_gap.best_gaussians(model)(X)
    truth = evidence.logpdf(X)
    np.testing.assert_allclose(full.bound.mean(0), truth, atol=5e-3)  # no part of the gap is shape
    mean = X @ WEIGHT / SCALE**2 @ np.linalg.inv(PRECISION)
    np.testing.assert_allclose(full.loc, mean, atol=0.06)
    covariance = full.scale_tril @ np.swapaxes(full.scale_tril, 1, 2)
    np.testing.assert_allclose(covariance, np.tile(np.linalg.inv(PRECISION), (6, 1, 1)), atol=0.06)
    # The best diagonal Gaussian has the precision's diagonal, so its KL has a closed form.
    kl = 0.5 * (np.log(np.diag(PRECISION)).sum() - np.linalg.slogdet(PRECISION)[1])
    assert kl > 0.03
    np.testing.assert_allclose(diagonal.bound.mean(0), truth - kl, atol=0.03)


class Bent:
    """Decoder logits of a model whose posteriors are not Gaussian."""

    LOGITS = np.array([[3.0, 0.0], [-3.0, 0.0], [0.0, 3.0], [0.0, -3.0]], np.float32)


def four_points_model():
    """Returns a model of four points with a decoder that gives each x a wedge of the plane."""
    model = build("vae", (4,), latent_dim=2, width=8, depth=1, ema_decay=0.0)
    kernel = np.zeros((2, 8), np.float32)
    kernel[:, :4] = Bent.LOGITS.T
    head = np.zeros((8, 4), np.float32)
    head[:4] = 2.0 * np.eye(4) - 1.0
    model.decoder.set_weights([kernel, np.zeros(8), head, np.full(4, -0.5)])
    return model


def test_on_four_points_the_shape_part_matches_quadrature():
    model, x = four_points_model(), np.eye(4, dtype=np.float32)[:2]
    log_likelihood = quadrature.log_likelihood(model, x, 400)
    _, full = inference_gap.best_gaussians(model)(x)
    # The reference is the best Gaussian with full covariance, by Gauss-Hermite quadrature.
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    noise = np.stack(np.meshgrid(nodes, nodes), -1).reshape(-1, 2)
    mass = np.outer(weights, weights).ravel() / weights.sum() ** 2
    for i in range(2):

        def negative_bound(p, i=i):
            scale = np.array([[np.exp(p[2]), 0.0], [p[3], np.exp(p[4])]])
            z = p[:2] + noise @ scale.T
            hidden = np.maximum(0.0, z @ Bent.LOGITS.T)
            logits = hidden @ (2.0 * np.eye(4) - 1.0) - 0.5
            log_likelihood = (x[i] * logits - np.logaddexp(0.0, logits)).sum(-1)
            log_prior = scipy.stats.norm.logpdf(z).sum(-1)
            entropy = 1.0 + np.log(2.0 * np.pi) + p[2] + p[4]
            return -(mass @ (log_likelihood + log_prior) + entropy)

        starts = np.random.default_rng(0).normal(0.0, 0.7, (6, 5))
        options = {"maxiter": 3000, "maxfev": 3000, "xatol": 1e-5, "fatol": 1e-7}
        losses = [
            scipy.optimize.minimize(negative_bound, s, method="Nelder-Mead", options=options).fun
            for s in starts
        ]
        shape = log_likelihood[i] + min(losses)
        assert shape > 0.02  # a posterior on a wedge is not Gaussian
        assert log_likelihood[i] - full.bound[:, i].mean() == pytest.approx(shape, abs=0.02)


class Hidden(GaussianEncoder):
    """A Gaussian encoder without its density."""

    def draw(self, parameters, noise, training=False):
        return super().draw(parameters, noise, training)._replace(log_prob=None)


@pytest.mark.parametrize("width", [0.5, 1.0])
def test_the_interval_contains_the_elbo_of_a_gaussian(linear_gaussian, width):
    """The noise keeps mean and covariance, so it does not change a Gaussian."""
    model, evidence = linear_gaussian
    set_posterior(model, width)
    kl = 0.5 * 2 * (width**2 - 1.0 - np.log(width**2))
    model.averaged_encoder = Hidden(*model.encoder._arguments.values())
    model.averaged_encoder(X, np.zeros((1, 6, 2), np.float32))
    model.averaged_encoder.set_weights(model.encoder.get_weights())
    interval = inference_gap.smoothed_bounds(model)(X, 20_000, 250)
    assert interval.lower.shape == interval.upper.shape == (inference_gap.REPEATS, len(X))
    truth = (evidence.logpdf(X) - kl).mean()
    for end, sign in ((interval.lower, -1.0), (interval.upper, 1.0)):
        means = end.mean(1)  # of each repeat
        error = means.std(ddof=1) / np.sqrt(len(means)) + 0.005
        assert sign * (means.mean() - truth) > -4.0 * error
    assert 0.0 < (interval.upper - interval.lower).mean() < 0.1


def test_the_posterior_of_a_wedge_has_no_bound_above_its_log_likelihood():
    """q is uniform on a disc inside each wedge of the plane, so it has sharp edges."""
    model, x = four_points_model(), np.eye(4, dtype=np.float32)
    log_likelihood = quadrature.log_likelihood(model, x, 400)
    directions = tf.constant(1.2 * Bent.LOGITS / 3.0)

    def encode(x, count, seed=0):
        noise = tf.random.stateless_uniform([count, 2], [seed, 0])
        radius, angle = tf.sqrt(noise[:, 0]), 2.0 * np.pi * noise[:, 1]
        disc = radius[:, tf.newaxis] * tf.stack([tf.cos(angle), tf.sin(angle)], -1)
        return (disc + tf.matmul(x, directions))[:, tf.newaxis]

    model.encode = encode
    interval = inference_gap.smoothed_bounds(model)(x, 100_000, 250)
    assert (interval.lower.mean(0) < log_likelihood).all()
    # The reference is E[log p(x, z)] over the disc plus the disc's entropy, log pi.
    z = encode(tf.constant(x[:1]), 200_000, 5)
    elbo = joint.log_joint(model, tf.constant(x[:1]), z).numpy().mean() + np.log(np.pi)
    # The noise blurs the edge by a twentieth of the radius, which changes the ELBO only a little.
    assert interval.lower.mean(0)[0] - 0.1 < elbo < interval.upper.mean(0)[0] + 0.1


def test_components_are_shared_by_the_examples_of_the_plane(monkeypatch):
    monkeypatch.setattr(inference_gap, "PLANAR_COMPONENTS", 4_000_000)
    assert inference_gap.smoothing_sizes(8, 4)["components"] == inference_gap.COMPONENTS
    few, many = (inference_gap.smoothing_sizes(2, n)["components"] for n in (4, 1000))
    assert few > many >= inference_gap.COMPONENTS
