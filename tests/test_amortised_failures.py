"""Simulators that fail for some parameters: their posteriors, calibration and errors."""

import re
import time

import numpy as np
import pytest
import tensorflow as tf
from absl import logging
from tensorflow_probability import distributions as tfd

import avb_tf
from avb_tf import UserError
from avb_tf.amortised import calibration, sources
from avb_tf.amortised.network import ConditionalMixture
from avb_tf.amortised.rows import Rows

TINY = {"verbose": False, "width": 16, "trunk_width": 32, "depth": 1, "trunk_depth": 1,
        "components": 3, "batch_size": 128, "whitening_share": 0.3,
        "learning_rate": 4e-3}  # fmt: skip
NOISE = 0.7
GRID = np.linspace(-5.0, 5.0, 2001)


def works(theta):
    """The probability that a row of data is finite: a half on average."""
    return 1.0 / (1.0 + np.exp(2.0 * theta))


def simulator(theta, seed):
    seeds = tf.random.split(seed, 2)
    y = theta + NOISE * tf.random.stateless_normal(tf.shape(theta), seeds[0])
    uniform = tf.random.stateless_uniform(tf.shape(theta), seeds[1])
    return tf.where(uniform < tf.sigmoid(-2.0 * theta), y, np.nan)


def in_numpy(theta, seed):
    rng, theta = np.random.default_rng(np.asarray(seed)), np.asarray(theta)
    y = theta + NOISE * rng.normal(size=theta.shape)
    return np.where(rng.uniform(size=theta.shape) < works(theta), y, np.inf)


def moments(rows):
    """Mean and sd of the posterior given finite rows, by quadrature."""
    log_p = -0.5 * GRID**2 + len(rows) * np.log(works(GRID))
    log_p -= 0.5 * ((np.reshape(rows, [-1, 1]) - GRID) ** 2).sum(0) / NOISE**2
    p = np.exp(log_p - log_p.max())
    mean = (p * GRID).sum() / p.sum()
    return mean, np.sqrt((p * (GRID - mean) ** 2).sum() / p.sum())


PRIOR = tfd.Normal(0.0, 1.0)


@pytest.mark.parametrize("model", [simulator, in_numpy])
def test_posteriors_of_finite_data_are_right_and_calibrated(model, monkeypatch):
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: warnings.append(text % values))
    fit = avb_tf.fit_amortised(model, "y", prior=PRIOR, steps=1500, **TINY)
    assert len(warnings) == 1
    assert re.match(r"(49|50|51)(\.\d)?% of the simulated data sets are not finite", warnings[0])
    for y in (-2.0, -0.5, 1.0):
        mean, sd = moments([y])
        draws = np.asarray(fit.sample(np.float32(y), 4000))
        assert draws.mean() == pytest.approx(mean, abs=0.12 * sd)
        assert draws.std() == pytest.approx(sd, rel=0.1)
    check = fit.check(pairs=400, draws=49)
    assert check.calibrated
    assert len(np.unique(check.parameters)) == 400
    ranks = check.ranks_of_outcomes[:, 0]  # most outcomes fail, as most predicted ones do
    assert calibration.deviation(ranks, 49) < 1.63 / np.sqrt(400)  # Kolmogorov's 1% limit


def test_only_the_rows_of_a_data_set_have_to_be_finite(tmp_path):
    fit = avb_tf.fit_amortised(simulator, "y", prior=PRIOR, rows=(1, 3), steps=1500, **TINY)
    fit.save(tmp_path / "fit")
    for one in (fit, avb_tf.AmortisedFit.load(tmp_path / "fit")):
        for y in ([-0.5], [0.3, 0.9], [-2.0, -1.0, -1.2]):
            mean, sd = moments(y)
            draws = np.asarray(one.sample(np.float32(y), 4000))
            assert draws.mean() == pytest.approx(mean, abs=0.15 * sd)
            assert draws.std() == pytest.approx(sd, rel=0.1)
        assert one.check(pairs=300, draws=49).calibrated


def test_parameters_are_drawn_whether_or_not_their_data_are_finite():
    u, finite = sources.of_simulator(simulator, PRIOR, "y").sample_prior(4000, tf.constant([0, 1]))
    assert np.all(finite)
    assert np.mean(u) == pytest.approx(0.0, abs=4.0 / np.sqrt(4000))


def test_sizes_of_data_sets_that_are_hardly_ever_finite_are_refused():
    with pytest.raises(UserError, match="% of the simulated data sets of 40 rows are not finite"):
        avb_tf.fit_amortised(simulator, "y", prior=PRIOR, rows=(1, 40), steps=1, **TINY)


def test_calibration_does_not_wait_for_finite_data_for_ever():
    one = sources.of_simulator(simulator, PRIOR, "y")
    with pytest.raises(UserError, match="of 1000 simulated data sets are finite; expected 10"):
        calibration.simulated(Rows(one, 200, 200), 10, 0)


def slow(theta, seed):
    time.sleep(0.005 * len(theta))
    return in_numpy(theta, seed)


def test_a_slow_simulator_ends_in_time_with_a_warning(monkeypatch):
    """Each step takes 0.6 s; calls of 25 steps would take 16."""
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: warnings.append(text % values))
    fit = avb_tf.fit_amortised(slow, "y", prior=PRIOR, seconds=8, **TINY)
    assert fit.steps <= 15
    assert f"only {fit.steps} steps of 128 pairs fitted into 8 seconds" in warnings[-1]


def test_steps_are_kept_where_seconds_suffice(monkeypatch):
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: warnings.append(text % values))
    model = tfd.JointDistributionNamed({"mu": PRIOR, "y": lambda mu: tfd.Normal(mu, NOISE)})
    fit = avb_tf.fit_amortised(model, steps=50, seconds=300, **TINY)
    assert fit.steps == 50
    assert not warnings


@pytest.mark.parametrize("failing", [0.0, 0.5, 1.0])
def test_noise_is_looked_for_where_data_are_finite(failing):
    """The data are exact, apart from failures at random."""

    def exact(theta, seed):
        fails = np.random.default_rng(np.asarray(seed)).uniform(size=theta.shape) < failing
        return np.where(fails, np.nan, 2.0 * np.asarray(theta))

    message = "the same data for 20 seeds" if failing < 1.0 else "100% of the simulated pairs"
    with pytest.raises(UserError, match=message):
        avb_tf.fit_amortised(exact, "y", prior=PRIOR, steps=1, **TINY)


def test_rows_that_share_their_noise_are_refused_where_some_fail():
    def shared(theta, seed):
        y = theta + tf.random.stateless_normal([], seed)
        return tf.where(y < -0.5, np.nan, y)

    with pytest.raises(UserError, match="rows of the same parameters are all equal"):
        avb_tf.fit_amortised(shared, "y", prior=PRIOR, rows=(1, 2), steps=1, **TINY)


def test_a_model_without_a_finite_loss_is_refused_after_few_steps(monkeypatch):
    plain = ConditionalMixture.log_student
    monkeypatch.setattr(
        ConditionalMixture, "log_student", lambda self, u, y: np.nan * plain(self, u, y)
    )
    with pytest.raises(UserError, match="the loss has not been finite since step 0"):
        avb_tf.fit_amortised(simulator, "y", prior=PRIOR, steps=50, **TINY)


def test_parameters_of_a_numpy_simulator_are_drawn_without_it():
    calls = []

    def counted(theta, seed):
        calls.append(len(theta))
        return in_numpy(theta, seed)

    one = sources.of_simulator(counted, PRIOR, "y")
    calls.clear()
    Rows(one, 1, 5).simulate(20, tf.constant([0, 1]))
    assert calls == [100]
