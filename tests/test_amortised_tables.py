"""Amortised fits of finished pairs: posteriors, what is held out, and what strangers may bring."""

import numpy as np
import pytest
import tensorflow as tf
from absl import logging
from tensorflow_probability import distributions as tfd

import avb_tf
from avb_tf import UserError
from avb_tf.amortised import calibration, stored, training

TINY = {"verbose": False, "width": 16, "trunk_width": 32, "depth": 1, "trunk_depth": 1,
        "components": 3, "batch_size": 128, "whitening_share": 0.3,
        "learning_rate": 4e-3}  # fmt: skip
NOISE = 0.7
PRIOR = tfd.Normal(0.0, 1.0)


def pairs(n, seed=0, repeats=1):
    rng = np.random.default_rng(seed)
    theta = np.repeat(rng.normal(size=n), repeats).astype(np.float32)
    return theta, theta + NOISE * rng.normal(size=len(theta))


@pytest.fixture
def warnings(monkeypatch):
    found = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: found.append(text % values))
    return found


def fitted(table, steps=1000, **changes):
    return avb_tf.fit_amortised(table, "y", prior=PRIOR, steps=steps, **{**TINY, **changes})


def test_posteriors_of_a_table_are_right_and_calibrated(tmp_path, warnings):
    fit = fitted(pairs(4000))
    for y in (-1.5, 0.3, 1.8):
        draws = np.asarray(fit.sample(y, 4000))
        assert draws.mean() == pytest.approx(y / (1.0 + NOISE**2), abs=0.12)
        assert draws.std() == pytest.approx(NOISE / np.sqrt(1.0 + NOISE**2), rel=0.12)
    check = fit.check()
    assert len(check.ranks) == 400  # a tenth is held out
    assert check.calibrated, check
    assert "over 400" in str(check)
    check.plot()
    assert not fit.surprise(0.3).flagged
    assert fit.surprise(9.0).flagged
    assert warnings == []
    fit.save(tmp_path / "fit")
    loaded = avb_tf.AmortisedFit.load(tmp_path / "fit")
    np.testing.assert_array_equal(loaded.sample(0.3, 5), fit.sample(0.3, 5))
    with pytest.raises(UserError, match="saved without its simulator"):
        loaded.check()
    with pytest.raises(UserError, match="without a density"):
        fit.posterior(0.3).verdict  # noqa: B018


def test_training_never_sees_the_pairs_held_out_nor_their_parameters():
    simulation = stored.of_pairs(*pairs(600, repeats=3), PRIOR, "y")
    assert len(simulation.table.u) == pytest.approx(180, abs=3)
    assert simulation.table.count + len(simulation.table.u) == 1800
    u, y, usable = (np.asarray(part) for part in simulation.simulate(20_000, tf.constant([0, 1])))
    assert usable.all()
    assert len(np.unique(y)) == simulation.table.count  # 1620 pairs in 20,000 draws
    assert not np.isin(simulation.table.u, u).any()
    fresh, data = calibration.simulated(simulation, 100, 3)
    assert len(np.unique(data)) == 100
    assert np.isin(fresh, simulation.table.u).all()


def test_data_that_say_nothing_leave_the_prior(warnings):
    """A network without the pairs held out learns 600 such pairs by heart: log q is -7 there."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=600).astype(np.float32), rng.normal(size=(600, 20))
    fit = fitted(table, steps=3000, trunk_width=128, trunk_depth=3, width=64)
    theta, y = rng.normal(size=(1, 2000)), rng.normal(size=(2000, 20))
    log_q = np.asarray(
        fit.compiled.log_prob_given(
            tf.constant(theta.T, tf.float32), fit.compiled.given(tf.constant(y))
        )
    )
    exact = -0.5 * theta**2 - 0.5 * np.log(2.0 * np.pi)
    assert log_q.mean() > exact.mean() - 0.2
    assert fit.history["log_q"][-1] > max(fit.history["log_q_held_out"]) + 1.0  # learned by heart
    assert warnings == []


def test_pairs_that_fail_are_left_out(warnings):
    theta, y = pairs(3000)
    y[theta > 0.0] = np.nan  # the posterior of finite data lies below 0
    fit = fitted((theta, y))
    assert len(warnings) == 1
    assert f"{100 * np.mean(theta > 0.0):.3g}% of the pairs fail" in warnings[0]
    assert np.mean(fit.sample(1.0, 2000) > 0.05) < 0.05


def test_parameters_that_are_not_draws_of_the_prior_are_reported(warnings):
    theta, y = pairs(3000)
    stored.of_pairs(theta, y, tfd.Normal(0.2, 1.0), "y")
    assert len(warnings) == 1
    assert "not draws of the prior" in warnings[0]
    stored.of_pairs(*pairs(1000, repeats=5), PRIOR, "y")
    assert len(warnings) == 1


def test_parts_by_name_and_bounded_parameters():
    prior = tfd.JointDistributionNamed(
        {
            "rate": tfd.LogNormal(0.0, 0.5),
            "share": tfd.Independent(tfd.Uniform(tf.zeros(2), 1.0), 1),
        }
    )
    parameters = {k: v.numpy() for k, v in prior.sample(1000, seed=(0, 1)).items()}
    parameters["share"][3, 1] = 0.0  # on the boundary: possible, but without a finite u
    rng = np.random.default_rng(0)
    data = {"count": rng.poisson(parameters["rate"]), "x": parameters["share"] + 0.1}
    fit = avb_tf.fit_amortised((parameters, data), ("count", "x"), prior=prior, steps=50, **TINY)
    draws = fit.sample({"count": 2, "x": [0.5, 0.6]}, 10)
    assert {name: value.shape for name, value in draws.items()} == {"rate": [10], "share": [10, 2]}
    assert fit.simulation.table.count + len(fit.simulation.table.u) == 999
    with pytest.raises(UserError, match=r"expected a dict with count, x"):
        stored.of_pairs(parameters, {"count": data["count"]}, prior, ("count", "x"))
    with pytest.raises(UserError, match="expected the structure of the prior's draws"):
        stored.of_pairs(parameters["rate"], data, prior, ("count", "x"))


def test_the_same_call_resumes_and_another_table_is_refused(tmp_path, monkeypatch):
    table = pairs(2000)
    whole = fitted(table, steps=200)
    real, count = training.Workdir.log, iter(range(100))

    def log(self, *arguments):
        self.save_now = next(count)
        if self.save_now == 5:
            raise KeyboardInterrupt
        real(self, *arguments)

    monkeypatch.setattr(training.Workdir, "due", property(lambda self: True))
    with monkeypatch.context() as patch:
        patch.setattr(training.Workdir, "log", log)
        with pytest.raises(KeyboardInterrupt):
            fitted(table, steps=200, workdir=tmp_path)
    resumed = fitted(table, steps=200, workdir=tmp_path)
    for one, other in zip(whole.q.variables, resumed.q.variables, strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(UserError, match="holds a training with table = "):
        fitted(pairs(2000, seed=1), steps=200, workdir=tmp_path)


THETA, Y = pairs(600)


@pytest.mark.parametrize(
    ("table", "match"),
    [
        ((THETA, Y[:-1]), r"\[600, 599\] rows"),
        ((THETA[:499], Y[:499]), "499 different parameters; expected 500"),
        ((np.repeat(THETA[:100], 6), Y), "100 different parameters"),
        ((THETA[:, np.newaxis], Y), r"shape \[600, 1\]; expected \['n'\]"),
        ((THETA.astype(str), Y), "parameters is <U"),
        ((THETA, np.array([None] * 600)), "'y' is object"),
        ((THETA, Y + 1j), "'y' is complex128"),
        ((THETA, 3.0), r"'y' is float64 of shape \(\)"),
        ((THETA, np.full(600, np.nan)), "100% of the simulated pairs are not finite"),
        ((THETA, {"x": Y}), "the data are x; expected a dict with y"),
        ((THETA, Y, Y), "of type tuple"),
        ([THETA, Y], "of type list"),
    ],
)
def test_wrong_tables_are_refused_in_one_line(table, match):
    with pytest.raises(UserError, match=match) as error:
        fitted(table)
    assert "\n" not in str(error.value)


def test_a_table_without_its_prior_or_with_rows_is_refused():
    with pytest.raises(UserError, match="prior is of type NoneType"):
        avb_tf.fit_amortised((THETA, Y), "y", steps=10, **TINY)
    with pytest.raises(UserError, match="lie outside the prior's support, the first in row"):
        avb_tf.fit_amortised((THETA, Y), "y", prior=tfd.LogNormal(0.0, 1.0), steps=10, **TINY)
    with pytest.raises(UserError, match=r"rows is \(1, 5\) with a table"):
        fitted((THETA, Y), rows=(1, 5))
