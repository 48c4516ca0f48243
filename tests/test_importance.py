"""Tests importance-weighted bounds against the closed form of a linear Gaussian model."""

import keras
import numpy as np
import pytest

from avb_tf import build, diagnostics
from avb_tf.likelihood_estimation import importance
from tests.linear_gaussian import set_posterior

X = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)


class Implicit(keras.Model):
    """An encoder without the density of the encoder it wraps."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.latent_dim, self.noise_dim = encoder, 2, 2
        self.moments_from_draws = False

    def call(self, x, noise, training=False):
        return self.encoder(x, noise, training=training)._replace(log_prob=None)


def test_the_exact_posterior_makes_all_weights_equal(linear_gaussian):
    model, evidence = linear_gaussian
    set_posterior(model, 1.0)
    sampler = importance.ImportanceSampler(model)
    assert sampler.proposal == "q"
    log_weights = sampler.log_weights(X, 50)
    np.testing.assert_allclose(log_weights, np.tile(evidence.logpdf(X), (50, 1)), atol=1e-3)


@pytest.mark.parametrize("implicit", [False, True])
def test_bounds_rise_to_log_p(linear_gaussian, implicit):
    model, evidence = linear_gaussian
    set_posterior(model, 0.7)
    if implicit:
        model.averaged_encoder = Implicit(model.encoder)
    sampler = importance.ImportanceSampler(model)
    assert ("Gaussian" in sampler.proposal) == implicit
    log_weights = sampler.log_weights(X, 10_000)
    bounds = [importance.bounds(log_weights, k).mean() for k in (1, 10, 1000)]
    truth = evidence.logpdf(X)
    assert bounds[0] < bounds[1] < bounds[2] < truth.mean() + 0.01
    weights = np.exp(log_weights - truth)  # their expectation is 1
    error = weights.std(0) / np.sqrt(len(weights))
    assert (np.abs(weights.mean(0) - 1.0) < 4 * error).all()
    if not implicit:  # the first bound is the ELBO: log p(x) - KL(q || p(z|x))
        kl = 0.5 * 2 * (0.49 - 1.0 - np.log(0.49))
        error = log_weights.std(0) / np.sqrt(len(log_weights))
        single = importance.bounds(log_weights, 1)
        assert (np.abs(single - (truth - kl)) < 4 * error).all()


def test_a_posterior_half_too_narrow_is_flagged_and_a_wide_one_is_not(linear_gaussian):
    model, _ = linear_gaussian
    sampler = importance.ImportanceSampler(model)
    set_posterior(model, 0.45)
    narrow = diagnostics.pareto_k(sampler.log_weights(X, 5000))
    set_posterior(model, 1.3)
    wide = diagnostics.pareto_k(sampler.log_weights(X, 5000))
    assert narrow.mean() > diagnostics.PARETO_K_LIMIT
    assert (wide < diagnostics.PARETO_K_LIMIT).all()


@pytest.mark.parametrize("method", ["vae", "avb", "avb_ac", "avb_flow", "avb_ac_paper", "iaf"])
def test_every_method_has_weights_that_its_seed_fixes(method):
    model = build(method, (5,), latent_dim=3, width=8, adversary_width=8, bases=4, basis_width=4)
    x = np.round(np.random.default_rng(0).random((4, 5))).astype(np.float32)
    sampler = importance.ImportanceSampler(model)
    log_weights = sampler.log_weights(x, 20)
    assert log_weights.shape == (20, 4)
    np.testing.assert_array_equal(log_weights, sampler.log_weights(x, 20))
    # The same draws; the last bit depends on the size of the tensors.
    np.testing.assert_allclose(log_weights[:7], sampler.log_weights(x, 7), rtol=1e-5)
    assert (log_weights != sampler.log_weights(x, 20, seed=1)).all()
