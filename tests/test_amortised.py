import collections
import functools
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy import stats
from tensorflow_probability import distributions as tfd

import avb_tf
from avb_tf import UserError
from avb_tf.amortised import calibration, judging, sources, training
from avb_tf.posteriors import models
from avb_tf.posteriors.mixture import Mixture
from avb_tf.serving.saved_model import RunError, SavedModel
from avb_tf.training import optimizers

TINY = {
    "verbose": False,
    "width": 16,
    "trunk_width": 16,
    "depth": 1,
    "trunk_depth": 1,
    "components": 2,
    "batch_size": 128,
}
WEIGHT = np.array([[1.0, 0.4], [-0.3, 0.8], [0.5, 0.5]], np.float32)
SCALE = 0.6


def linear():
    """Returns the model mu ~ N(0, I), y = W mu + noise, whose posterior is a Gaussian."""
    return tfd.JointDistributionNamed(
        {
            "mu": tfd.MultivariateNormalDiag(tf.zeros(2), tf.ones(2)),
            "y": lambda mu: tfd.Independent(tfd.Normal(tf.linalg.matvec(WEIGHT, mu), SCALE), 1),
        }
    )


def exact(y):
    """Returns the exact posterior of `linear`."""
    covariance = np.linalg.inv(np.eye(2) + WEIGHT.T @ WEIGHT / SCALE**2)
    return stats.multivariate_normal(covariance @ WEIGHT.T @ y / SCALE**2, covariance)


def log_evidence(y):
    return stats.multivariate_normal.logpdf(
        y, np.zeros(3), WEIGHT @ WEIGHT.T + SCALE**2 * np.eye(3)
    )


@pytest.fixture(scope="module")
def linear_fit():
    return avb_tf.fit_amortised(linear(), "y", steps=1500, **TINY)


OBSERVED = np.array([[0.9, -0.4, 0.3], [-1.5, 1.0, 0.2]], np.float32)


# Exact checks.


def test_draws_and_density_are_those_of_a_gaussian_posterior(linear_fit):
    for y in OBSERVED:
        draws = linear_fit.sample(y, 20_000)["mu"].numpy()
        truth = exact(y)
        np.testing.assert_allclose(draws.mean(0), truth.mean, atol=0.06)
        np.testing.assert_allclose(np.cov(draws.T), truth.cov, atol=0.03)
        mu = truth.rvs(2000, random_state=0).astype(np.float32)
        kl = np.mean(truth.logpdf(mu) - linear_fit.log_prob({"mu": mu}, y))
        assert -0.01 < kl < 0.05


def test_the_same_seed_gives_the_same_draws(linear_fit):
    a, b, other = (linear_fit.sample(OBSERVED[0], 5, seed)["mu"] for seed in (3, 3, 4))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, other)


def test_a_good_fit_is_trusted_with_its_exact_evidence(linear_fit):
    posterior = linear_fit.posterior(OBSERVED[0])
    verdict = posterior.verdict
    assert verdict.verdict == "trust"
    assert verdict.distance < 0.1
    evidence = posterior.evidence
    assert abs(evidence.value - log_evidence(OBSERVED[0])) < 5.0 * evidence.standard_error + 1e-3
    answer = linear_fit.sample(OBSERVED[0], 100, escalate=True)
    assert answer.method == "network"
    assert answer.parameters["mu"].shape == (100, 2)


@pytest.mark.parametrize("arguments", [{"steps": 7}, {"chains": 0}, {"seed": None}])
def test_arguments_of_refine_that_are_out_of_range(linear_fit, arguments):
    ((name, value),) = arguments.items()
    with pytest.raises(UserError, match=f"{name} is {value!r}; expected a whole number"):
        linear_fit.posterior(OBSERVED[1]).refine(**arguments)


def test_refined_draws_are_of_the_posterior(linear_fit):
    refined = linear_fit.posterior(OBSERVED[1]).refine(steps=10, chains=2000)
    truth = exact(OBSERVED[1])
    error = np.sqrt(np.diag(truth.cov) / 2000)
    assert (np.abs(refined.u.mean(0) - truth.mean) < 5.0 * error).all()
    assert refined.r_hat.max() < 1.05


def test_a_wrong_network_is_repaired(linear_fit):
    """The network's draws are twice as wide as the posterior, or far too narrow."""
    bias = linear_fit.q.head_bias
    before = bias.numpy()
    wider = before.copy()
    wider[..., 4:] += np.log(2.0)  # log scales of both components
    narrow = before.copy()
    narrow[..., 4:] -= np.log(5.0)
    truth = exact(OBSERVED[0])
    try:
        for changed, method in ((wider, "importance resampling"), (narrow, None)):
            bias.assign(changed)
            answer = linear_fit.sample(OBSERVED[0], 4000, escalate=True)
            assert answer.diagnostics.verdict != "trust"
            assert answer.method == (method or "Hamiltonian Monte Carlo")
            mu = answer.parameters["mu"].numpy()
            np.testing.assert_allclose(np.cov(mu.T), truth.cov, atol=0.03)
            assert len(np.unique(mu, axis=0)) > 0.98 * len(mu)
    finally:
        bias.assign(before)


def test_the_density_of_constrained_parameters_integrates_to_one():
    joint = tfd.JointDistributionNamed(
        {
            "rate": tfd.Gamma(2.0, 1.0),
            "y": lambda rate: tfd.Independent(tfd.Poisson(rate[..., tf.newaxis] * tf.ones(3)), 1),
        }
    )
    fit = avb_tf.fit_amortised(joint, ("y",), steps=400, **TINY)
    y = np.array([2, 0, 3])
    rate = np.linspace(1e-4, 20.0, 40_001).astype(np.float32)
    density = np.exp(fit.log_prob({"rate": rate}, y))
    assert np.trapezoid(density, rate) == pytest.approx(1.0, abs=2e-3)
    truth = stats.gamma(2 + y.sum(), scale=1.0 / (1.0 + len(y)))
    kl = np.trapezoid(truth.pdf(rate) * (truth.logpdf(rate) - np.log(density)), rate)
    assert 0.0 <= kl < 0.05
    assert (fit.sample(y, 1000)["rate"].numpy() > 0.0).all()


# The verdict.


class OneDimension:
    """One-dimensional q and posterior from scipy, with the interface of `judging.Given`."""

    def __init__(self, q, p):
        self.q, self.p = q, p

    def draw(self, count, rng):
        return self.q.draw(count, rng)

    def log_density(self, u):
        return self.q.log_density(u)

    def scores(self, u):
        step = 1e-5
        slope = (self.p.log_density(u + step) - self.p.log_density(u - step)) / (2.0 * step)
        return self.p.log_density(u), slope[:, np.newaxis]


def gaussians(means, scales, weights=None):
    means = np.array(means, float)[:, np.newaxis]
    weights = np.full(len(means), 1.0 / len(means)) if weights is None else np.array(weights)
    return Mixture(weights, means, np.array(scales, float).reshape(-1, 1, 1), np.inf)


@pytest.mark.parametrize(
    ("q", "trusted"),
    [
        (gaussians([-3.0, 3.0], [0.3, 0.3]), True),
        (gaussians([3.0], [0.3]), False),  # a lost mode
        (gaussians([-3.0], [0.3]), False),
        (gaussians([-3.0, 3.0], [0.3, 0.3], [0.8, 0.2]), False),  # wrong shares
        (gaussians([-3.0, 3.0], [0.3, 0.1]), False),  # a mode that is too narrow
    ],
)
def test_a_lost_mode_is_not_trusted(q, trusted):
    p = gaussians([-3.0, 3.0], [0.3, 0.3])
    rng = np.random.default_rng(0)
    prior = 5.0 * rng.normal(size=[64, 1])
    judged = judging.judge(OneDimension(q, p), p.draw(64, rng), prior)
    assert (judged.diagnostics.verdict == "trust") == trusted
    assert abs(judged.log_evidence.value) < 5.0 * judged.log_evidence.standard_error + 1e-3
    share = np.mean(judged.states > 0.0)
    assert abs(share - 0.5) < 0.12  # there are 256 chains, which jump between modes


def test_a_point_where_the_density_fails_is_as_good_as_outside():
    """A singular matrix makes TensorFlow raise an error for the whole batch."""

    def scores(u, y):
        if np.any(u.numpy() > 1.0):
            raise tf.errors.InvalidArgumentError(None, None, "Input is not invertible")
        return u[:, 0], tf.ones_like(u)

    compiled = SimpleNamespace(given=lambda y: None, scores=scores, dtype=tf.float32)
    density, gradient = judging.Given(compiled, np.zeros([1, 1])).scores(
        np.array([[0.0], [2.0], [0.5], [3.0], [0.25]])
    )
    np.testing.assert_array_equal(density, [0.0, -np.inf, 0.5, -np.inf, 0.25])
    np.testing.assert_array_equal(gradient[:, 0], [1.0, 0.0, 1.0, 0.0, 1.0])


# Calibration.


def test_ranks_are_uniform_and_those_of_a_wrong_scale_are_not(linear_fit):
    check = linear_fit.check(pairs=400)
    assert min(check.p_values.values()) > 1e-3
    assert (np.abs(check.coverage(0.9) - 0.9) < 5.0 * np.sqrt(0.09 / 400) + 0.02).all()
    assert "simulated data sets" in str(check)
    assert max(calibration.deviation(r, check.draws) for r in check.ranks_of_outcomes.T) < 0.11
    ranks, outcomes, coverage, *recovery, empty = check.plot().axes
    assert (len(outcomes.get_lines()), len(recovery)) == (3, 2)  # of y, and of mu
    assert not empty.axison
    np.testing.assert_allclose(coverage.get_lines()[1].get_ydata()[17], check.coverage(0.9)[1])
    truth = recovery[0].get_lines()[0].get_xdata()
    np.testing.assert_array_equal(truth, check.parameters[: len(truth), 0])
    lines = ranks.get_lines()
    assert len(lines) == 4
    largest = np.abs(lines[0].get_ydata()).max()
    assert largest == pytest.approx(calibration.deviation(check.ranks[:, 0], check.draws))
    bias = linear_fit.q.head_bias
    before = bias.numpy()
    wider = before.copy()
    wider[..., 4:] += np.log(2.0)
    try:
        bias.assign(wider)
        assert not linear_fit.check(pairs=400).calibrated
    finally:
        bias.assign(before)


def test_the_deviation_of_ranks_by_hand():
    assert calibration.deviation(np.array([0, 1, 2, 3]), 3) == 0.0
    assert calibration.deviation(np.array([0, 0, 0, 0]), 3) == 0.75


def test_equal_outcomes_are_ranked_at_random():
    compiled = SimpleNamespace(outcome=lambda u, seed: np.zeros([len(u), 1]), dtype=tf.float32)
    ranks = calibration._ranks_of_outcomes(compiled, np.zeros([2000, 1]), np.zeros([9, 2000, 1]), 0)
    assert stats.chisquare(np.bincount(ranks[:, 0], minlength=10)).pvalue > 1e-3


def test_data_unlike_the_model_are_flagged_and_its_own_rarely(linear_fit):
    own = linear().sample(60, seed=(5, 5))["y"].numpy()
    flagged = sum(linear_fit.surprise(y).flagged for y in own)
    assert flagged <= 9  # more than 9 of 60 at a rate of 1/20 have a probability of 0.001
    rng = np.random.default_rng(0)
    strange = OBSERVED[0] + np.array([0.0, 8.0, 0.0])
    assert linear_fit.surprise(strange).flagged
    assert "unlike" in str(linear_fit.surprise(strange))
    noisy = own[:20] + 6.0 * SCALE * rng.normal(size=[20, 3])
    assert sum(linear_fit.surprise(y).flagged for y in noisy) >= 15


# Simulators, other kinds of models, saving.


def simulate(parameters, seed):
    rng = np.random.default_rng(np.asarray(seed))
    mean = np.asarray(parameters) @ WEIGHT.T
    return mean + SCALE * rng.normal(size=mean.shape)


def test_a_simulator_of_numpy_without_a_density(tmp_path):
    prior = tfd.MultivariateNormalDiag(tf.zeros(2), tf.ones(2))
    fit = avb_tf.fit_amortised(simulate, "y", prior=prior, steps=800, **TINY)
    draws = fit.sample(OBSERVED[0], 10_000).numpy()
    np.testing.assert_allclose(draws.mean(0), exact(OBSERVED[0]).mean, atol=0.1)
    np.testing.assert_allclose(np.cov(draws.T), exact(OBSERVED[0]).cov, atol=0.05)
    with pytest.raises(UserError, match="simulator without a density"):
        fit.posterior(OBSERVED[0]).verdict  # noqa: B018
    assert not fit.surprise(OBSERVED[0]).flagged
    fit.save(tmp_path)
    loaded = avb_tf.AmortisedFit.load(tmp_path)
    np.testing.assert_allclose(loaded.sample(OBSERVED[0], 10_000), draws, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="saved without its simulator"):
        loaded.check()


def test_a_simulator_of_tensorflow_and_a_joint_prior():
    prior = tfd.JointDistributionNamed(
        {"shape": tfd.LogNormal(0.0, 0.5), "low": tfd.Uniform(0.0, 1.0)}
    )

    def model(parameters, seed):
        noise = tf.random.stateless_gamma([len(parameters["low"]), 4], seed, 2.0)
        return {"y": parameters["low"][:, tf.newaxis] + noise, "n": parameters["shape"]}

    fit = avb_tf.fit_amortised(model, ("y", "n"), prior=prior, steps=1, **TINY)
    draws = fit.sample({"y": np.ones(4), "n": 1.0}, 50)
    assert sorted(draws) == ["low", "shape"]
    assert (draws["low"].numpy() < 1.0).all()


def test_pairs_of_an_auto_batched_joint_are_independent():
    """A model written for one draw may use indexing, and every draw has its own noise."""

    @tfd.JointDistributionCoroutineAutoBatched
    def joint():
        mean = yield tfd.Normal(tf.zeros(2), 1.0, name="mean")
        yield tfd.Normal(mean[0], 0.1, name="x")

    source = sources.of_joint(joint, ("x",))
    u, y, _ = (np.asarray(part) for part in source.simulate(2000, tf.constant([0, 5])))
    noise = (y[:, 0] - u[:, 0]) / 0.1
    assert stats.kstest(noise, stats.norm.cdf).pvalue > 1e-3
    again = np.asarray(source.simulate(2000, tf.constant([0, 6]))[0])
    assert not np.isin(again, u).any()


# Images and series.

PIXELS = np.linspace(-1.0, 1.0, 8, dtype=np.float32)


def spot(place):
    """Returns an image [8, 8] of a spot in the middle row, in noise."""
    lit = tf.exp(-0.5 * ((PIXELS - place[..., tf.newaxis]) / 0.3) ** 2)
    mean = tf.exp(-0.5 * (PIXELS / 0.3) ** 2)[:, tf.newaxis] * lit[..., tf.newaxis, :]
    return tfd.Independent(tfd.Normal(mean, 0.4), 2)


def bump(place):
    """Returns a series [8] of a bump, in noise."""
    lit = tf.exp(-0.5 * ((PIXELS - place[..., tf.newaxis]) / 0.3) ** 2)
    return tfd.Independent(tfd.Normal(lit, 0.2), 1)


@pytest.mark.parametrize("data", [spot, bump])
def test_convolutions_read_images_and_series(data, tmp_path):
    model = tfd.JointDistributionNamed({"place": tfd.Uniform(-0.8, 0.8), "y": data})
    sizes = TINY | {"width": 32, "trunk_width": 32, "components": 4}
    fit = avb_tf.fit_amortised(model, steps=1000, **sizes, filters=8)
    drawn = model.sample(20, seed=(1, 2))
    grid = np.linspace(-0.8, 0.8, 2001, dtype=np.float32)[1:-1]
    kl, kl_prior = [], []
    for y in drawn["y"].numpy():
        log_p = data(grid).log_prob(y).numpy().astype(np.float64)
        log_p -= np.log(np.exp(log_p - log_p.max()).sum() * (grid[1] - grid[0])) + log_p.max()
        for found, log_q in (
            (kl, fit.log_prob({"place": grid}, y)),
            (kl_prior, model.model["place"].log_prob(grid)),
        ):
            found.append(np.sum(np.exp(log_p) * (log_p - log_q)) * (grid[1] - grid[0]))
    assert np.mean(kl_prior) > 0.7
    assert -0.001 < np.mean(kl) < 0.25 * np.mean(kl_prior)
    fit.save(tmp_path / "fit")
    loaded = avb_tf.AmortisedFit.load(tmp_path / "fit")
    a, b = (f.sample(drawn["y"][0], 9, seed=1)["place"] for f in (fit, loaded))
    np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize("structure", [dict, collections.namedtuple("Parts", "p R a y")])
def test_parameters_keep_their_names_in_any_order(structure):
    """`tf.nest` sorts a dict's keys, capitals first; a joint orders them by dependence."""
    joint = tfd.JointDistributionNamed(
        structure(
            p=tfd.Normal(100.0, 1.0),
            R=tfd.Normal(-100.0, 1.0),
            a=lambda p: tfd.Normal(p - 93.0, 1.0),
            y=lambda p, R, a: tfd.Normal(p + R + a, 1.0),
        )
    )
    source = sources.of_joint(joint, ("y",))
    u, *_ = source.simulate(100, tf.constant([0, 1]))
    parameters = source.constrain(u)
    parameters = parameters if structure is dict else parameters._asdict()
    for name, value in {"p": 100.0, "R": -100.0, "a": 7.0}.items():
        assert np.mean(parameters[name]) == pytest.approx(value, abs=1.0)
    target = models.of_joint(models.pin(joint, {"y": 0.0}))
    parameters = target.constrain(tf.constant(target.prior_draws(100, 0), tf.float32))
    parameters = parameters if structure is dict else parameters._asdict()
    assert np.mean(parameters["p"]) == pytest.approx(100.0, abs=1.0)


def test_several_observed_parts_keep_their_types():
    joint = tfd.JointDistributionNamed(
        {
            "mean": tfd.Normal(0.0, 1.0),
            "count": lambda mean: tfd.Binomial(9.0, logits=mean),
            "x": lambda mean: tfd.Sample(tfd.Normal(mean, 1.0), 2),
        }
    )
    source = sources.of_joint(joint, ("x", "count"))
    row = source.flat({"x": [0.5, 1.0], "count": 3})
    np.testing.assert_array_equal(row, [[0.5, 1.0, 3.0]])
    mean = np.array([[0.2], [1.3]], np.float32)
    expected = stats.norm.logpdf(mean[:, 0]) + stats.binom.logpmf(
        3, 9, 1.0 / (1.0 + np.exp(-mean[:, 0]))
    )
    expected += stats.norm.logpdf(np.array([0.5, 1.0]), mean, 1.0).sum(1)
    np.testing.assert_allclose(source.log_density(mean, row[0]), expected, rtol=1e-5)


def test_a_saved_fit_needs_no_model(linear_fit, tmp_path):
    linear_fit.save(tmp_path / "first")
    avb_tf.AmortisedFit.load(tmp_path / "first").save(tmp_path / "fit")
    loaded = avb_tf.AmortisedFit.load(tmp_path / "fit")
    y = {"y": OBSERVED[0]}
    before, after = (fit.sample(y, 100, seed=1)["mu"] for fit in (linear_fit, loaded))
    np.testing.assert_allclose(before, after, rtol=1e-5, atol=1e-6)
    mu = {"mu": before}
    np.testing.assert_allclose(
        linear_fit.log_prob(mu, y), loaded.log_prob(mu, y), rtol=1e-4, atol=1e-4
    )
    assert loaded.posterior(y).verdict.verdict == "trust"
    # The data sets are simulated anew: the standard error of the p-values' difference is 0.02.
    assert abs(loaded.surprise(y).p_value - linear_fit.surprise(y).p_value) < 0.1
    assert loaded.history == linear_fit.history
    served = SavedModel(loaded.export(tmp_path / "export", draws=7, max_batch=100))
    rows = {"y": np.repeat(OBSERVED[:1], 100, 0), "mu": before.numpy()}
    density = served.run("log_prob", rows)["log_prob"]
    np.testing.assert_allclose(density, linear_fit.log_prob(mu, y), rtol=1e-4, atol=1e-4)
    assert served.run("sample", {"y": OBSERVED})["mu"].shape == (2, 7, 2)
    with pytest.raises(RunError, match="not finite"):
        served.run("sample", {"y": OBSERVED * np.float32(np.nan)})


def test_arviz_has_draws_weights_and_data(linear_fit):
    data = linear_fit.to_arviz(OBSERVED[0], draws=50)
    assert data.posterior["mu"].shape == (1, 50, 2)
    weight = data.sample_stats["log_weight"].to_numpy()
    assert abs(weight.mean() - log_evidence(OBSERVED[0])) < 0.3
    np.testing.assert_allclose(data.observed_data["y"], OBSERVED[0])


# Mistakes.


def batched_wrongly():
    return tfd.JointDistributionNamed(
        {
            "mu": tfd.Sample(tfd.Normal(0.0, 1.0), 2),
            "y": lambda mu: tfd.Normal(mu[0], 1.0),
        }
    )


def discrete():
    return tfd.JointDistributionNamed({"k": tfd.Poisson(1.0), "y": lambda k: tfd.Normal(k, 1.0)})


def test_steps_that_are_not_finite_are_left_out_of_the_mean_loss():
    """Every second step has a loss of NaN; the others have 2 w - log 3 with w = 1."""
    weight = keras.Variable(1.0)

    def simulate(count, seed):
        return tf.fill([count, 1], tf.cast(seed[1] % 2, tf.float32)), 0, tf.fill([count], True)

    def log_density(u, y):
        return tf.where(u[:, 0] > 0.0, np.nan, np.log(3.0) - 2.0 * weight.value)

    optimizer = optimizers.Adam(0.0)
    optimizer.build([weight])
    stage = training._Stage(0, "log_q", log_density, [weight], 1.0)
    steps = training._steps(stage, optimizer, SimpleNamespace(simulate=simulate), 4, 0)
    loss = float(steps(tf.constant(0), tf.constant(training.CHUNK)))
    assert loss == pytest.approx(2.0 - np.log(3.0), rel=1e-5)
    assert int(optimizer.iterations) == training.CHUNK // 2 + 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda fit: fit(linear(), ("z",)), "observed 'z' is no part of the joint"),
        (lambda fit: fit(linear(), ()), "expected names of the parts"),
        (lambda fit: fit(linear(), ("mu", "y")), "all parts are observed"),
        (lambda fit: fit(linear(), 3), "expected names of the parts"),
        (lambda fit: fit(7, "y"), "the model is of type int"),
        (lambda fit: fit(tfd.Normal(0.0, 1.0), "y"), "the model is of type Normal"),
        (lambda fit: fit(simulate, "y"), "prior is of type NoneType"),
        (lambda fit: fit(linear(), "y", prior=tfd.Normal(0.0, 1.0)), "came with a `prior`"),
        (
            lambda fit: fit(
                lambda p, seed: p + np.random.normal(size=p.shape), "y", prior=tfd.Normal(0.0, 1.0)
            ),
            "different 'y' for the same parameters and seed",
        ),
        (
            lambda fit: fit(
                lambda p, seed: p + tf.random.normal(p.shape), "y", prior=tfd.Normal(0.0, 1.0)
            ),
            "different 'y' for the same parameters and seed",
        ),
        (
            lambda fit: fit(lambda p, seed: 2.0 * np.asarray(p), "y", prior=tfd.Normal(0.0, 1.0)),
            "the simulator returned the same data for 20 seeds",
        ),
        (
            lambda fit: fit(  # it fails for all seeds but the first
                lambda p, seed: np.asarray(p) * [1.0][int(seed[1])], "y", prior=tfd.Normal(0.0, 1.0)
            ),
            "the simulator fails .IndexError",
        ),
        (lambda fit: fit(linear(), "y", steps=0), "steps is 0; expected a whole number"),
        (lambda fit: fit(linear(), "y", seconds="60"), "seconds is '60'; expected a number"),
        (lambda fit: fit(linear(), "y", steps=5, seed=None), "seed is None; expected a whole"),
        (lambda fit: fit(linear(), "y", widht=3), "unknown setting 'widht'"),
        (
            lambda fit: fit(linear(), "y", width=0.5),
            "width is 0.5; expected a whole number of at least 1",
        ),
        (
            lambda fit: fit(
                tfd.JointDistributionNamed(
                    {
                        "mu": tfd.Normal(0.0, 1.0),
                        "y": lambda mu: tfd.Sample(tfd.Normal(mu, 1.0), [8, 8]),
                    }
                ),
                filters=2,
            ),
            "filters is above 0, but the data are a set of rows; expected filters=0",
        ),
        (
            lambda fit: fit(two_parts(), ("x", "y"), filters=2),
            r"but the data are of shapes \[\[\], \[\]\]; expected filters=0, or one observed part",
        ),
        (lambda fit: fit(linear(), "y", filters=-1), "filters is -1; expected a whole number"),
        (lambda fit: fit(linear(), "y", depth=True), "depth is True; expected a whole number"),
        (lambda fit: fit(linear(), "y", learning_rate=np.nan), "learning_rate is nan"),
        (lambda fit: fit(linear(), "y", clip_norm=np.inf), "clip_norm is inf"),
        (lambda fit: fit(batched_wrongly(), "y"), "write it for batches"),
        (lambda fit: fit(discrete(), "y"), "'k' .Poisson. has no default bijector"),
        (
            lambda fit: fit(lambda p, seed: 1 / 0, "y", prior=tfd.Normal(0.0, 1.0)),
            "the simulator fails",
        ),
        (
            lambda fit: fit(lambda p, seed: np.ones(3), "y", prior=tfd.Normal(0.0, 1.0)),
            r"expected numbers \[5, ...\]",
        ),
        (
            lambda fit: fit(lambda p, s: {"a": np.asarray(p)}, "y", prior=tfd.Normal(0.0, 1.0)),
            "the simulator returned a; expected y",
        ),
        (
            lambda fit: fit(lambda p, s: np.asarray(p) * np.nan, "y", prior=tfd.Normal(0.0, 1.0)),
            "100% of the simulated pairs are not finite",
        ),
    ],
)
def test_models_that_cannot_be_fitted(call, message):
    fit = functools.partial(avb_tf.fit_amortised, **{"steps": 1, **TINY})

    def with_changes(*arguments, **changes):
        return avb_tf.fit_amortised(*arguments, **{**fit.keywords, **changes})

    with pytest.raises(UserError, match=message):
        call(with_changes)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (np.zeros(2), r"has shape \(2,\); expected \(3,\)"),
        (np.zeros([5, 3]), "a single data set"),
        ({"x": np.zeros(3)}, "expected a dict with y"),
        ([1.0, np.nan, 0.0], r"is nan at \[1\]"),
        (["a", "b", "c"], "is not numeric"),
    ],
)
def test_data_that_do_not_fit_the_model(linear_fit, y, message):
    with pytest.raises(UserError, match=message):
        linear_fit.sample(y, 3)


def two_parts():
    return tfd.JointDistributionNamed({
        "mu": tfd.Normal(0.0, 1.0),
        "x": lambda mu: tfd.Normal(mu, 1.0),
        "y": lambda mu: tfd.Normal(mu, 2.0),
    })  # fmt: skip


def test_a_damaged_fit_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be loaded"):
        avb_tf.AmortisedFit.load(tmp_path)
