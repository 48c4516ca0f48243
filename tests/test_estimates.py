"""Estimates of one model again and again: with the weights of the moment, in the same graphs."""

import numpy as np
import scipy.stats

from avb_tf.encoders import GaussianEncoder
from avb_tf.likelihood_estimation import estimates, inference_gap, quadrature
from tests.linear_gaussian import SCALE, WEIGHT, LinearDecoder, set_posterior

X = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
WIDTH = 1.1  # of q beside the exact posterior
SIZES = {"temperatures": 40, "chains": 32, "leapfrog_steps": 5}


def evaluate(model, directory):
    """The bound, and the weights of importance sampling and AIS, beside all else with graphs."""
    found, weighted = estimates.importance_weighted(model, X, 1, directory)
    _, annealed = estimates.annealed(model, X, SIZES, directory)
    log_likelihood = found["log_likelihood_iwae_5000"].values
    elbo = estimates.bound(model, X)
    inference_gap.bound_of_draws(model)(X[:1])
    estimates.bidirectional(model, 2, SIZES, directory)
    estimates.inference_gap(model, X, log_likelihood, elbo, directory)
    quadrature.posterior_divergence(model, X[:1], log_likelihood, draws=500)
    return elbo, weighted.log_weights, annealed.log_weights


def test_a_second_evaluation_sees_new_weights_and_traces_nothing(
    linear_gaussian, tmp_path, monkeypatch
):
    model, _ = linear_gaussian
    traced, decode, draw = [], LinearDecoder.call, GaussianEncoder.draw
    monkeypatch.setattr(LinearDecoder, "call", lambda *a: traced.append("decode") or decode(*a))
    monkeypatch.setattr(GaussianEncoder, "draw", lambda *a: traced.append("draw") or draw(*a))
    kl = 0.5 * 2 * (WIDTH**2 - 1.0 - np.log(WIDTH**2))
    for weight in (WEIGHT, 0.3 * WEIGHT):
        traced.clear()
        model.decoder.dense.set_weights([weight.T])
        set_posterior(model, WIDTH, weight)
        covariance = weight @ weight.T + SCALE**2 * np.eye(3)
        evidence = scipy.stats.multivariate_normal(np.zeros(3), covariance).logpdf(X)
        elbo, *both = evaluate(model, tmp_path)
        assert np.abs(elbo - (evidence - kl)).max() < 0.6  # 4 standard errors of 64 draws
        for log_weights in both:
            ratios = np.exp(log_weights - evidence)  # of estimates to p(x): 1 in the mean
            error = ratios.std(0) / np.sqrt(len(ratios))
            assert (np.abs(ratios.mean(0) - 1.0) < 4.0 * error).all()
    # Data are simulated from the model without a graph.
    assert traced == ["decode"]
