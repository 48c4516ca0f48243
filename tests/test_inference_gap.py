"""The split of the inference gap where its parts are known."""

import numpy as np
import pytest
import scipy.optimize
import scipy.stats

from avb_tf import build
from avb_tf.likelihood_estimation import entropy, inference_gap, quadrature
from tests.linear_gaussian import SCALE, WEIGHT
from tests.test_importance import X, set_posterior

PRECISION = np.eye(2) + WEIGHT.T @ WEIGHT / SCALE**2


def test_the_best_gaussians_of_a_linear_gaussian_model(linear_gaussian):
    model, evidence = linear_gaussian
    set_posterior(model, 0.6)
    diagonal, full = inference_gap.best_gaussians(model)(X)
    truth = evidence.logpdf(X)
    np.testing.assert_allclose(full.bound, truth, atol=5e-3)  # no part of the gap is shape
    mean = X @ WEIGHT / SCALE**2 @ np.linalg.inv(PRECISION)
    np.testing.assert_allclose(full.loc, mean, atol=0.06)
    covariance = full.scale_tril @ np.swapaxes(full.scale_tril, 1, 2)
    np.testing.assert_allclose(covariance, np.tile(np.linalg.inv(PRECISION), (6, 1, 1)), atol=0.06)
    # The best diagonal Gaussian has the diagonal of the precision, and a KL in closed form.
    kl = 0.5 * (np.log(np.diag(PRECISION)).sum() - np.linalg.slogdet(PRECISION)[1])
    assert kl > 0.03
    np.testing.assert_allclose(diagonal.bound, truth - kl, atol=0.03)


class Bent:
    """log p(x, z) of a posterior that is no Gaussian, as a function of z alone."""

    LOGITS = np.array([[3.0, 0.0], [-3.0, 0.0], [0.0, 3.0], [0.0, -3.0]], np.float32)


def four_points_model():
    """Four points whose decoder is set by hand: each x owns a wedge of the plane."""
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
    # Independently: the best of full covariance, its bound by Gauss-Hermite quadrature.
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
        found = [
            scipy.optimize.minimize(negative_bound, s, method="Nelder-Mead", options=options).fun
            for s in starts
        ]
        shape = log_likelihood[i] + min(found)
        assert shape > 0.02  # a wedge is no Gaussian
        assert log_likelihood[i] - full.bound[i] == pytest.approx(shape, abs=0.02)


@pytest.mark.parametrize(("n", "bias"), [(2, 0.1), (8, 1.5)])
def test_the_entropy_of_a_gaussian_and_of_a_cube(n, bias):
    draws = np.random.default_rng(1).standard_normal((3000, n)) * 2.0
    exact = n * (0.5 * np.log(2.0 * np.pi * np.e) + np.log(2.0))
    assert entropy.entropy_beside_gaussian(draws) == pytest.approx(exact, abs=0.15)
    cube = np.random.default_rng(1).uniform(0.0, 3.0, (3000, n))
    # Neighbours near a wall are further away than the density says: many walls, much bias.
    assert 0.0 < entropy.entropy_beside_gaussian(cube) - n * np.log(3.0) < bias


def test_the_bound_of_draws_is_the_elbo_where_that_is_known(linear_gaussian):
    model, evidence = linear_gaussian
    set_posterior(model, 0.7)
    kl = 0.5 * 2 * (0.49 - 1.0 - np.log(0.49))
    found = inference_gap.bound_of_draws(model)(X)
    np.testing.assert_allclose(found, evidence.logpdf(X) - kl, atol=0.15)
    assert abs((found - evidence.logpdf(X) + kl).mean()) < 0.05
