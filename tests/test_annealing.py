"""Tests `model.log_likelihood` against a closed form, with missing values, and its diagnostics."""

import keras
import numpy as np
import pytest
import scipy.stats

import avb_tf
from avb_tf.columns import TableTrunk
from avb_tf.data.table import Column, Table
from avb_tf.encoders import GaussianEncoder
from avb_tf.errors import UserError
from avb_tf.likelihood_estimation.annealing import LogLikelihood
from avb_tf.likelihoods import SCALE_FLOOR
from avb_tf.networks import DenseDecoder

SHIFT, UNIT = np.array([1.0, -2.0, 0.0]), np.array([2.0, 0.5, 1.0])
WEIGHT = np.array([[1.0, 0.4], [-0.3, 0.8], [0.5, 0.5]])
NOISE = SCALE_FLOOR + np.log(2.0)  # softplus(0)
COVARIANCE = np.outer(UNIT, UNIT) * (WEIGHT @ WEIGHT.T + NOISE**2 * np.eye(3))
ABSENT = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 1], [1, 1, 1], [0, 0, 1]], bool)
X = np.random.default_rng(0).multivariate_normal(SHIFT, COVARIANCE, 5).astype(np.float32)
X[ABSENT] = np.nan


@pytest.fixture(scope="module")
def model():
    """Returns a model of a table with missing values, x = shift + unit (W z + noise)."""
    columns = [
        Column(name, "gaussian", *pair)
        for name, *pair in zip("abc", SHIFT.tolist(), UNIT.tolist(), strict=True)
    ]
    table, decoder = Table(tuple(columns), missing=True), DenseDecoder((), 6, 2, 0)
    keras.utils.set_random_seed(0)
    encoder = GaussianEncoder(TableTrunk(table, 4, 1), 2)
    made = avb_tf.AVB((3,), encoder, decoder, likelihood=table)
    for layer in (encoder.mean, encoder.log_scale):  # the chains start from q = N(0, I)
        layer.set_weights([np.zeros((4, 2)), np.zeros(2)])
    pairs = np.zeros((2, 3, 2))
    pairs[..., 0] = WEIGHT.T  # locations; the raw scales are 0
    decoder.head.set_weights([pairs.reshape(2, 6), np.zeros(6)])
    return made


def test_log_p_is_that_of_the_values_that_are_there(model):
    log_p = model.log_likelihood(X, temperatures=20, chains=64, leapfrog_steps=3, verbose=False)
    for row, absent, value, error in zip(X, ABSENT, log_p.values, log_p.errors, strict=True):
        known = np.flatnonzero(~absent)
        exact = 0.0
        if len(known):
            part = COVARIANCE[np.ix_(known, known)]
            exact = scipy.stats.multivariate_normal(SHIFT[known], part).logpdf(row[known])
        assert abs(value - exact) < 4 * error + 1e-4
        assert error < 0.2
    assert log_p.mean == pytest.approx(log_p.values.mean())
    assert log_p.standard_error == pytest.approx(log_p.values.std(ddof=1) / np.sqrt(5))
    assert (log_p.pareto_k < 0.7).all()
    assert log_p.warnings == []
    assert "nats over 5 examples, by AIS with 64 chains and 20 temperatures" in str(log_p)
    again = model.log_likelihood(
        model.table.frame(X), temperatures=20, chains=64, leapfrog_steps=3, verbose=False
    )
    np.testing.assert_array_equal(again.values, log_p.values)


def test_errors_are_standard_errors_and_bad_weights_warn():
    weights = np.exp(np.random.default_rng(0).normal(size=(2000, 16, 1)))  # trials of 16 chains
    estimates = np.log(weights.mean(1))[:, 0]
    effective = np.sum(weights, 1) ** 2 / np.sum(weights**2, 1)
    claimed = np.sqrt((1 / effective - 1 / 16) * 16 / 15)
    assert np.sqrt(np.mean(claimed**2)) == pytest.approx(estimates.std(), rel=0.1)
    bad = LogLikelihood(
        np.zeros(10), np.ones(10), np.ones(10), np.full(10, 0.9), np.array([0.5, 0.1]), 32
    )
    assert str(bad).count("Warning") == 2
    assert "Pareto k is above 0.7 for 100%" in str(bad)


def test_a_single_chain_has_no_error(model):
    alone = model.log_likelihood(X, temperatures=3, chains=1, leapfrog_steps=2, verbose=False)
    assert np.isfinite(alone.values).all()
    assert np.isnan(alone.errors).all()


def test_what_has_no_log_p_is_refused(model):
    with pytest.raises(UserError, match="temperatures is 0"):
        model.log_likelihood(X, temperatures=0)
    binary = avb_tf.build("vae", (2,), latent_dim=1, width=2, depth=1)
    with pytest.raises(UserError, match="values between 0 and 1"):
        binary.log_likelihood(np.full((3, 2), 0.5, np.float32))
