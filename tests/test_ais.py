"""Annealed importance sampling against normalisers in closed form."""

import numpy as np
import pytest
import tensorflow as tf
from tensorflow_probability import distributions as tfd

from avb_tf import assembly
from avb_tf.likelihood_estimation import ais

# log p(x, z) = log Z + log N(z; MEAN, SD) for three examples, so log p(x) is LOG_Z.
LOG_Z = np.array([0.3, -2.0, 5.0], np.float32)
MEAN = tf.constant([[1.0, 0.0], [-0.5, 2.0], [0.0, 0.0]])
SD = tf.constant([[0.5, 1.0], [1.0, 0.3], [1.5, 0.8]])
TARGET = tfd.MultivariateNormalDiag(MEAN, SD)
START = tfd.MultivariateNormalDiag(tf.zeros([3, 2]), tf.ones([3, 2]))
# Reverse weights contain 1 / p, so their variance is finite if the start is narrower than p.
NARROW_START = tfd.MultivariateNormalDiag(MEAN + 0.5 * SD, 0.7 * SD)
CHAINS = 4000


NONE = tf.zeros(3)  # x, which this density does not read


def log_joint(x, z):
    return LOG_Z + TARGET.log_prob(z)


ANNEAL = ais.Annealer(log_joint, leapfrog_steps=5)  # compiled once for all tests


def forward(temperatures, chains=CHAINS, start=START, size=0.3, anneal=ANNEAL, **kwargs):
    z = start.sample(chains, seed=(0, 1))
    sizes = np.full((temperatures, 3), size)
    return anneal(NONE, start, ais.sigmoid_schedule(temperatures), z, sizes, **kwargs)


def reverse(temperatures, chains=CHAINS, start=START, size=0.3):
    z = TARGET.sample(chains, seed=(0, 1))
    betas = ais.sigmoid_schedule(temperatures)[::-1]
    return ANNEAL(NONE, start, betas, z, np.full((temperatures, 3), size))


def relative_weights(log_weights, log_normaliser):
    """Returns the mean and standard error of weights with expectation 1, [batch] each."""
    weights = np.exp(log_weights.astype(np.float64) - log_normaliser)
    return weights.mean(0), weights.std(0) / np.sqrt(len(weights))


@pytest.mark.parametrize("temperatures", [3, 5, 10])
def test_forward_weights_are_unbiased(temperatures):
    # With 3 to 10 temperatures a kernel that reuses stale cached results is off by 20%.
    mean, error = relative_weights(forward(temperatures).log_weights, LOG_Z)
    assert (np.abs(mean - 1) < 4 * error).all()
    assert (error < 0.1).all()


@pytest.mark.parametrize("temperatures", [3, 10])
def test_reverse_weights_are_unbiased_for_the_inverse(temperatures):
    mean, error = relative_weights(reverse(temperatures, start=NARROW_START).log_weights, -LOG_Z)
    assert (error > 1e-3).all()  # not all equal
    assert (np.abs(mean - 1) < 4 * error).all()


def test_the_bounds_close_around_the_truth_as_temperatures_grow():
    gaps = []
    for temperatures in (3, 30):
        # Each bound is that of a single chain, averaged over many chains.
        lower = forward(temperatures, size=0.5).log_weights
        upper = -reverse(temperatures, size=0.5).log_weights
        gaps.append((upper.mean(0) - lower.mean(0)).mean())
        errors = [3 * bound.std(0) / np.sqrt(CHAINS) for bound in (lower, upper)]
        assert (lower.mean(0) - errors[0] < LOG_Z).all()
        assert (upper.mean(0) + errors[1] > LOG_Z).all()
    assert 0.0 < gaps[1] < 0.3 * gaps[0]


def test_a_start_at_the_posterior_makes_all_weights_equal():
    annealed = forward(4, 50, start=TARGET).log_weights
    np.testing.assert_allclose(annealed, np.broadcast_to(LOG_Z, annealed.shape), atol=1e-4)


def test_an_example_does_not_depend_on_its_batch_mates():
    def moved(x, z):  # another density for all but the first
        return log_joint(x, z) - tf.constant([0.0, 1.0, 1.0]) * tf.reduce_sum(z**4, -1)

    annealed, expected = forward(5, 20, anneal=ais.Annealer(moved, 5)), forward(5, 20)
    np.testing.assert_allclose(annealed.log_weights[:, 0], expected.log_weights[:, 0], atol=1e-5)
    assert np.abs(annealed.log_weights - expected.log_weights)[:, 1:].max() > 0.1


def test_adaptation_reaches_the_target_acceptance_for_each_example():
    pilot = forward(400, 16, size=3.0, adapt=True)
    assert (pilot.acceptance[0] < 0.6).any()
    again = forward(400, 16, size=pilot.step_size, seed=(5, 5))
    np.testing.assert_array_equal(again.step_size, pilot.step_size)
    late = again.acceptance[200:].mean(0)
    assert (np.abs(late - ais.TARGET_ACCEPTANCE) < 0.1).all()


def test_a_nan_energy_is_rejected():
    def broken(x, z):  # NaN beyond 2
        return tf.where(z[..., 0] > 2.0, np.nan, log_joint(x, z))

    z = START.sample(200, seed=(0, 1))
    z = tf.where(z > 1.9, 1.0, z)
    sizes = np.full((10, 3), 0.7)
    annealed = ais.Annealer(broken, 5)(NONE, START, ais.sigmoid_schedule(10), z, sizes)
    assert np.isfinite(annealed.log_weights).all()
    assert (annealed.z[..., 0] <= 2.0).all()
    assert (annealed.acceptance < 1.0).any()


def test_the_schedule_runs_from_0_to_1():
    betas = ais.sigmoid_schedule(50)
    assert (betas[0], betas[-1], len(betas)) == (0.0, 1.0, 51)
    assert (np.diff(betas) > 0).all()
    assert np.diff(betas)[0] < np.diff(betas)[25]


def standard_errors(log_weights):
    """Returns standard errors of the log mean weight, to first order, [batch]."""
    weights = np.exp(log_weights - log_weights.max(0)).astype(np.float64)
    return weights.std(0) / weights.mean(0) / np.sqrt(len(weights))


def test_the_bound_of_a_linear_gaussian_model_is_its_log_p(linear_gaussian):
    model, evidence = linear_gaussian
    model.encoder.set_weights([np.zeros(w.shape) for w in model.encoder.get_weights()])  # N(0, I)
    x = np.random.default_rng(0).standard_normal((10, 3)).astype(np.float32)
    chains = ais.AnnealedSampler(model, temperatures=100, chains=64).forward(x)
    error = standard_errors(chains.log_weights)
    assert error.max() < 0.2
    bound = ais.lower_bound(chains.log_weights)
    assert (np.abs(bound - evidence.logpdf(x)) < 4 * error + 1e-3).all()


def test_bidirectional_bounds_of_simulated_data_hold_the_truth(linear_gaussian):
    model, evidence = linear_gaussian
    model.encoder.set_weights([np.zeros(w.shape) for w in model.encoder.get_weights()])
    gaps = []
    for temperatures in (4, 80):
        annealed = ais.AnnealedSampler(
            model, temperatures, chains=16, leapfrog_steps=5
        ).bidirectional(40)
        lower, upper = ais.lower_bound(annealed.forward), ais.upper_bound(annealed.reverse)
        truth = evidence.logpdf(annealed.x)
        for below, above in ((lower, truth), (truth, upper), (lower, upper)):
            difference = above - below
            assert difference.mean() > -3 * difference.std() / np.sqrt(40)
        gaps.append((upper - lower).mean())
    assert abs(gaps[1]) < 0.2 * gaps[0]
    assert abs(gaps[1]) < 0.1


def test_one_example_of_a_convolutional_model_has_more_chains_than_the_pilot():
    small = {"filters": (4, 8), "width": 8}
    model = assembly.build("vae", (8, 8, 1), network="conv", **small)
    sampler = ais.AnnealedSampler(model, temperatures=2, chains=ais.PILOT_CHAINS + 1)
    assert sampler.forward(np.zeros([1, 8, 8, 1], np.float32)).log_weights.shape == (9, 1)
