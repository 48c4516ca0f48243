"""Tests that repeated estimates of a model use its current weights and reuse the same graphs."""

import numpy as np
import scipy.stats

from avb_tf import results
from avb_tf.encoders import GaussianEncoder
from avb_tf.likelihood_estimation import estimates, inference_gap
from tests.linear_gaussian import SCALE, WEIGHT, LinearDecoder, set_posterior

X = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
WIDTH = 1.1  # of q, relative to the exact posterior
SIZES = {"temperatures": 40, "chains": 32, "leapfrog_steps": 5}


def evaluate(model, directory):
    """Runs everything that has graphs; returns the bound and the weights of both samplers."""
    named, weighted = estimates.importance_weighted(model, X, 1, directory)
    _, annealed = estimates.annealed(model, X, SIZES, directory)
    log_likelihood = named["log_likelihood_iwae_5000"].values
    elbo, _ = estimates.bound(model, X)
    inference_gap.smoothed_bounds(model)(X[:1], 500, 10)
    estimates.bidirectional(model, 2, SIZES, directory)
    own = estimates.own_bounds(model, X, elbo, directory)
    estimates.inference_gap(model, X, log_likelihood, own, directory)
    return elbo.values, weighted.log_weights, annealed.log_weights


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
        assert np.abs(elbo - (evidence - kl)).max() < 0.03  # 4 standard errors
        for log_weights in both:
            ratios = np.exp(log_weights - evidence)  # estimates divided by p(x), with mean 1
            error = ratios.std(0) / np.sqrt(len(ratios))
            assert (np.abs(ratios.mean(0) - 1.0) < 4.0 * error).all()
    # The simulation of data from the model has no graph.
    assert traced == ["decode"]


def test_the_stated_error_of_a_bound_of_few_examples_covers_its_draws(linear_gaussian):
    """The error over four examples says nothing about the error of the draws of z."""
    model, evidence = linear_gaussian
    set_posterior(model, WIDTH)
    exact = evidence.logpdf(X) - 0.5 * 2 * (WIDTH**2 - 1.0 - np.log(WIDTH**2))
    z_scores = []
    for seed in range(20):
        elbo, _ = estimates.bound(model, X, seed=seed)
        assert len(X) * elbo.settings["draws"] >= estimates.ALL_DRAWS
        summary = results.estimate(elbo.values, elbo.repeats, **elbo.settings)
        error = summary["standard_error_over_repeats"]
        assert error < 0.02
        z_scores.append((summary["mean"] - exact.mean()) / error)
    assert 0.5 < np.std(z_scores) < 1.6  # 0.85 to 1.15 times 1, the rest for 20 seeds
    assert abs(np.mean(z_scores)) < 3.5 / np.sqrt(20)


def test_an_interval_of_the_elbo_makes_intervals_of_the_gaps():
    lower, upper = np.array([[1.0, 2.0], [1.2, 2.2]]), np.array([[1.5, 2.5], [1.7, 2.7]])
    own = estimates.OwnBounds(lower, upper, {"bound": "smoothed"})
    gaps = own.below("gap", np.array([2.0, 3.0]))
    assert gaps.keys() == {"gap_lower", "gap_upper"}
    np.testing.assert_allclose(gaps["gap_lower"].values, [0.4, 0.4])
    np.testing.assert_allclose(gaps["gap_upper"].values, [0.9, 0.9])
    np.testing.assert_allclose(gaps["gap_upper"].repeats, [[1.0, 1.0], [0.8, 0.8]])
    assert own.first(1).lower.shape == (2, 1)


def test_the_aggregate_of_exact_posteriors_is_the_prior(linear_gaussian):
    model, evidence = linear_gaussian
    set_posterior(model, 1.0)
    x = evidence.rvs(4000, random_state=0).astype(np.float32)
    named, (_, reconstruction) = estimates.latent_space(model, x), estimates.bound(model, x)
    low, high = (named[f"kl_aggregate_posterior_{end}"] for end in ("lower", "upper"))
    error = 4.0 * low.repeats.mean(1).std(ddof=1) / 2.0
    assert low.values.mean() - error - 0.01 < 0.0 < high.values.mean() + error
    assert high.values.mean() - low.values.mean() < 0.1
    # E |x - W z|^2 over the posterior with covariance C includes the trace tr(W C W^T).
    covariance = np.linalg.inv(np.eye(2) + WEIGHT.T @ WEIGHT / SCALE**2)
    residual = x - x @ WEIGHT @ covariance @ WEIGHT.T / SCALE**2
    squares = (residual**2).sum(1) + np.trace(WEIGHT @ covariance @ WEIGHT.T)
    exact = 0.5 * squares / SCALE**2 + 3 * np.log(SCALE * np.sqrt(2.0 * np.pi))
    error = reconstruction.values - exact
    assert abs(error.mean()) < 4.0 * error.std() / np.sqrt(len(x))


def test_the_aggregate_of_posteriors_that_ignore_x_has_their_divergence(linear_gaussian):
    """If q(z|x) = N(0, diag(0.5, 0.8)^2) for all x, the KL has a closed form."""
    model, evidence = linear_gaussian
    scales = np.array([0.5, 0.8])
    weights = [np.zeros_like(w) for w in model.encoder.get_weights()]
    weights[3] = np.log(scales)
    model.encoder.set_weights(weights)
    x = evidence.rvs(50, random_state=0).astype(np.float32)
    named = estimates.latent_space(model, x)
    exact = np.sum(0.5 * (scales**2 - 1.0) - np.log(scales))
    low, high = (named[f"kl_aggregate_posterior_{end}"] for end in ("lower", "upper"))
    error = 4.0 * low.repeats.mean(1).std(ddof=1) / 2.0 + 0.01
    assert low.values.mean() - error < exact < high.values.mean() + error


def test_a_known_elbo_makes_values_of_the_gaps(linear_gaussian, tmp_path):
    model, _ = linear_gaussian
    elbo = np.arange(4.0)
    both = estimates.Estimate(elbo, {"draws": 9}, np.stack([elbo - 0.1, elbo + 0.1]))
    own = estimates.own_bounds(model, X, both, tmp_path)
    assert own.exact
    assert own.first(2).exact
    (gap,) = estimates.posterior_divergence(own, np.full(4, 5.0)).items()
    assert gap[0] == "kl_q_exact_posterior"
    np.testing.assert_allclose(gap[1].values, [5.0, 4.0, 3.0, 2.0])
    np.testing.assert_allclose(gap[1].repeats[:, 0], [5.1, 4.9])
    assert gap[1].settings["draws"] == 9
    assert estimates.smoothed_elbo(own) == {}
