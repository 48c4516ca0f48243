"""Tests quadrature for two latents against closed forms."""

import numpy as np
import pytest

from avb_tf import UserError, build
from avb_tf.likelihood_estimation import quadrature
from tests.linear_gaussian import SCALE, WEIGHT


def test_log_likelihood_of_a_linear_gaussian_model(linear_gaussian):
    model, evidence = linear_gaussian
    x = np.random.default_rng(0).standard_normal((40, 3)).astype(np.float32)
    np.testing.assert_allclose(
        quadrature.log_likelihood(model, x, 200), evidence.logpdf(x), atol=2e-4
    )


def test_an_example_does_not_depend_on_its_batch_mates(linear_gaussian):
    model, _ = linear_gaussian
    x = np.random.default_rng(0).standard_normal((3, 3)).astype(np.float32)
    together = quadrature.log_likelihood(model, x, 100)
    alone = [quadrature.log_likelihood(model, x[i : i + 1], 100)[0] for i in range(3)]
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_posterior_on_grid_is_a_density_with_the_exact_moments(linear_gaussian):
    model, _ = linear_gaussian
    x = np.array([0.5, -0.2, 0.9], np.float32)
    covariance = np.linalg.inv(np.eye(2) + WEIGHT.T @ WEIGHT / SCALE**2)
    mean = covariance @ WEIGHT.T @ x / SCALE**2
    log_evidence = quadrature.log_likelihood(model, x[np.newaxis])[0]
    z, log_p = quadrature.posterior_on_grid(
        model, x, np.zeros(2), np.eye(2), log_evidence, cells=200
    )
    mass = np.exp(log_p) * (10 / 200) ** 2
    np.testing.assert_allclose(mass.sum(), 1.0, atol=1e-3)
    np.testing.assert_allclose(np.einsum("ij,ijk->k", mass, z), mean, atol=1e-3)


def test_another_number_of_latents_is_refused():
    model = build("vae", (3,), latent_dim=3, width=4)
    with pytest.raises(UserError, match="2 latents, found 3"):
        quadrature.log_likelihood(model, np.zeros((1, 3), np.float32))
