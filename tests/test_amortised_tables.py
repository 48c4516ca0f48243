"""Amortised fits of finished pairs: posteriors, what is held out, and what strangers may bring."""

import numpy as np
import pandas
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
    return avb_tf.fit_amortised(table, "y", **{"prior": PRIOR, "steps": steps, **TINY, **changes})


def fitted_in_two_runs(table, calls, monkeypatch, **changes):
    """Interrupts a fit after some calls of the training, each with a checkpoint, and resumes it."""
    real, count = training.Workdir.log, iter(range(calls + 1))

    def log(self, *arguments):
        if next(count) == calls:
            raise KeyboardInterrupt
        real(self, *arguments)

    monkeypatch.setattr(training.Workdir, "due", property(lambda self: True))
    with monkeypatch.context() as patch:
        patch.setattr(training.Workdir, "log", log)
        with pytest.raises(KeyboardInterrupt):
            fitted(table, **changes)
    return fitted(table, **changes)


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
    with pytest.raises(UserError, match="saved without its table of pairs"):
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
    assert len(np.unique(fresh)) == len(fresh) == 60  # one data set of each parameter
    assert np.isin(data, simulation.table.y).all()


def test_few_parameters_with_many_data_sets_are_held_out_as_well():
    theta, y = pairs(500, repeats=120)
    simulation = stored.of_pairs(theta, y, PRIOR, "y")
    assert len(simulation.table.u) == 5000  # of 6000
    assert len(np.unique(simulation.table.u)) == 50
    assert simulation.table.count == 450 * 120


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
    assert f"{np.sum(theta > 0.0)} of 3000 pairs are left out" in warnings[0]
    assert np.mean(fit.sample(1.0, 2000) > 0.05) < 0.05


def test_parameters_that_are_not_draws_of_the_prior_are_reported(warnings):
    theta, y = pairs(3000)
    stored.of_pairs(theta, y, tfd.Normal(0.2, 1.0), "y")
    assert len(warnings) == 1
    assert "not draws of the prior" in warnings[0]
    stored.of_pairs(*pairs(500, repeats=300), PRIOR, "y")  # 150,000 data sets
    assert len(warnings) == 1
    both = np.stack([theta, theta + 0.001 * y], 1).astype(np.float32)
    stored.of_pairs(both, y, tfd.Sample(PRIOR, 2), "y")
    assert len(warnings) == 2
    assert "a combination of parameters" in warnings[1]


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
    with pytest.raises(UserError, match="the parameters are ndarray; expected a dict with rate"):
        stored.of_pairs(parameters["rate"], data, prior, ("count", "x"))


def test_the_same_call_resumes_and_another_table_is_refused(tmp_path, monkeypatch):
    table = pairs(2000)
    whole = fitted(table, steps=200)
    resumed = fitted_in_two_runs(table, 5, monkeypatch, steps=200, workdir=tmp_path)
    for one, other in zip(whole.q.variables, resumed.q.variables, strict=True):
        np.testing.assert_array_equal(one, other)
    assert whole.history == resumed.history
    for other, prior in (((table[0], table[1] + 0.1), PRIOR), (np.exp(table), tfd.Gamma(1.0, 1.0))):
        with pytest.raises(UserError, match="holds a training with table = "):
            fitted(tuple(other), steps=200, workdir=tmp_path, prior=prior)


def test_the_best_weights_survive_a_resumption(tmp_path, monkeypatch):
    """The first look is the best here, because the data say nothing, and is before the stop."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=600).astype(np.float32), rng.normal(size=(600, 20))
    changes = {"steps": 500, "trunk_width": 128, "trunk_depth": 3, "width": 64}
    whole = fitted(table, **changes)
    values = whole.history["log_q_held_out"]
    assert np.argmax(values) < 10
    resumed = fitted_in_two_runs(table, 18, monkeypatch, **changes, workdir=tmp_path)
    assert resumed.history["log_q_held_out"] == values
    for one, other in zip(whole.q.variables, resumed.q.variables, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_table_is_read_150_times_at_most_with_a_clock_that_is_read_often(monkeypatch):
    real, counts = training._steps, []

    def steps(*arguments):
        graph = real(*arguments)
        return lambda first, count: counts.append(int(count)) or graph(first, count)

    monkeypatch.setattr(training, "_steps", steps)
    fit = fitted(pairs(600), steps=10_000)
    assert fit.steps == pytest.approx(150 * 540 / 32, abs=training.CHUNK)
    assert counts[0] == training.CHUNK
    counts.clear()
    fitted(pairs(600), steps=None, seconds=3.0)
    assert counts[0] == 1


def test_one_number_that_float32_cannot_hold_does_no_harm(warnings):
    theta, y = pairs(2000)
    y[0], y[1] = 1e300, -np.inf
    fit = fitted((theta, y), steps=300)
    assert np.isfinite(fit.history["log_q_held_out"]).all()
    assert "2 of 2000 pairs are left out" in warnings[0]
    assert np.isfinite(fit.sample(1e300, 10)).all()


def test_surprise_sees_far_data_with_more_numbers_than_pairs_held_out():
    theta, rng = pairs(600)[0], np.random.default_rng(0)
    y = theta[:, np.newaxis] + rng.normal(size=(600, 100))
    fit = fitted((theta, y), steps=50)
    assert fit.surprise(y[0] + 1000.0).flagged
    assert not fit.surprise(theta[0] + rng.normal(size=100)).flagged


@pytest.mark.parametrize(
    ("prior", "values"),
    [
        (tfd.LogNormal(0.0, 1.0), -1.0),
        (tfd.LogNormal(0.0, 1.0, validate_args=True), -1.0),
        (tfd.Exponential(1.0), -0.5),
        (tfd.Uniform(0.0, 2.0), 2.5),
        (tfd.Dirichlet([2.0, 2.0, 2.0]), [0.2, 0.2, 0.2]),
        (tfd.LKJ(2, 1.0), [[1.0, 0.5], [0.3, 1.0]]),
    ],
)
def test_one_parameter_outside_the_prior_is_refused(prior, values):
    theta = prior.sample(600, seed=(0, 1)).numpy()
    stored.of_pairs(theta, Y, prior, "y")
    theta[7] = values
    with pytest.raises(UserError, match="outside the prior's support") as error:
        stored.of_pairs(theta, Y, prior, "y")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("prior", [tfd.Beta(0.1, 0.1), tfd.Dirichlet([0.05] * 3)])
def test_draws_of_the_prior_on_its_edge_are_left_out(prior, warnings):
    theta = prior.sample(1000, seed=(0, 7)).numpy()
    simulation = stored.of_pairs(theta, np.arange(1000.0), prior, "y")
    assert simulation.table.count < 900
    assert len(warnings) == 1
    assert "on the edge of the prior's support" in warnings[0]


def test_masked_numbers_count_as_failures(warnings):
    theta, y = pairs(3000)
    masked = np.ma.masked_array(np.where(y > 0.0, -999.0, y), mask=y > 0.0)
    simulation = stored.of_pairs(theta, masked, PRIOR, "y")
    assert simulation.table.y.min() > -10.0
    assert len(warnings) == 1


def test_parts_of_a_prior_by_name_by_column_or_in_order():
    def model():
        root = tfd.JointDistributionCoroutine.Root
        yield root(tfd.Normal(0.0, 1.0, name="b"))
        yield root(tfd.LogNormal(0.0, 1.0, name="a"))

    prior = tfd.JointDistributionCoroutine(model)
    drawn = prior.sample(600, seed=(0, 1))
    b, a = (part.numpy() for part in drawn)
    frame = pandas.DataFrame({"a": a, "b": b})
    found = [
        stored.of_pairs(parameters, Y, prior, "y")
        for parameters in (drawn, (b, a), {"a": a, "b": b}, frame)
    ]
    assert len({simulation.digest for simulation in found}) == 1
    with pytest.raises(UserError, match="the parameters are a; expected a dict with b, a"):
        stored.of_pairs({"a": a}, Y, prior, "y")


def test_a_saved_fit_takes_only_the_table_it_was_trained_on(tmp_path):
    table = pairs(600)
    fitted(table, steps=25).save(tmp_path / "fit")
    loaded = avb_tf.AmortisedFit.load(tmp_path / "fit")
    assert len(loaded.with_model(stored.of_pairs(*table, PRIOR, "y")).check().ranks) == 60
    with pytest.raises(UserError, match="trained on another table of pairs"):
        loaded.with_model(stored.of_pairs(*pairs(700), PRIOR, "y"))


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
        ((THETA, np.full(600, np.nan)), "0 of 600 pairs are finite"),
        ((THETA, np.full(600, 1e39)), "0 of 600 pairs are finite"),
        ((THETA[:0], Y[:0]), r"float32 of shape \(0,\)"),
        ((THETA, np.zeros([600, 0])), r"'y' is float64 of shape \(600, 0\)"),
        ((THETA, [[1.0], [2.0, 3.0]]), "'y' cannot be read"),
        ((THETA, np.ma.masked_array(Y, mask=True)), "0 of 600 pairs are finite"),
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
    with pytest.raises(UserError, match=r"rows is \(1, 5\) with a table"):
        fitted((THETA, Y), rows=(1, 5))
