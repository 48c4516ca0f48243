import contextlib
import random

import arviz
import numpy as np
import pytest
import tensorflow as tf
from scipy import stats
from tensorflow_probability import distributions as tfd

import avb_tf
from avb_tf import UserError
from avb_tf.posteriors import (
    building,
    comparison,
    coordinates,
    fit,
    hmc,
    mixture,
    models,
    result,
    sampler,
    start,
    tails,
    verdict,
)
from avb_tf.settings import posterior

QUICK = {"steps": 50, "verbose": False, "draws": 256, "adversary_steps": 1, "blocks": 1}
QUICK |= {"chart_steps": 0}  # tracing the chart takes longer than training it


def gaussian():
    """Returns (joint, observed): a correlated Gaussian prior and five noisy observations."""
    factor = np.array([[1.0, 0.0], [0.9, 0.5]], np.float32)
    data = np.random.default_rng(0).normal(1.0, 1.0, [5, 2]).astype(np.float32)
    joint = tfd.JointDistributionNamed(
        {
            "mu": tfd.MultivariateNormalTriL(tf.zeros(2), factor),
            "y": lambda mu: tfd.Sample(tfd.Independent(tfd.Normal(mu, 1.0), 1), 5),
        }
    )
    return joint, {"y": data}, factor @ factor.T


@pytest.fixture(scope="module")
def gaussian_fit():
    joint, observed, _ = gaussian()
    return avb_tf.fit_posterior(joint, observed, **{**QUICK, "chart_steps": 1})


# Exact checks.


def test_a_conjugate_gaussian_has_its_moments_and_its_evidence(gaussian_fit):
    _, observed, prior = gaussian()
    data = observed["y"].astype(np.float64)
    covariance = np.linalg.inv(np.linalg.inv(prior) + 5.0 * np.eye(2))
    mean = covariance @ data.sum(0)
    draws = gaussian_fit.sample(20_000)["mu"].numpy()
    np.testing.assert_allclose(draws.mean(0), mean, atol=0.03)
    np.testing.assert_allclose(np.cov(draws.T), covariance, atol=0.03)
    joint_covariance = np.kron(np.ones([5, 5]), prior) + np.eye(10)
    evidence = stats.multivariate_normal.logpdf(data.ravel(), np.zeros(10), joint_covariance)
    assert gaussian_fit.log_evidence.value == pytest.approx(evidence, abs=0.01)


def test_a_fit_leaves_the_callers_random_numbers_alone():
    def numbers(within):
        np.random.seed(5)
        random.seed(5)
        with within:
            pass
        return np.random.normal(), random.random()

    assert numbers(contextlib.nullcontext()) == numbers(fit.seeded(0))


def test_a_density_that_the_adversary_has_lost_is_not_trusted():
    """The weights imply KL < 0, as if q's draws went far away and T did not follow."""
    at_q, at_p = np.zeros(4000), np.zeros(1000)
    assert verdict.diagnose(at_q, at_p, 0.5).verdict == "trust"
    at_q[:100] = 500.0
    judged = verdict.diagnose(at_q, at_p, 0.85)
    assert judged.verdict == "do not trust"
    assert "the adversary has lost the fit, whose KL would be -12.50 nats" in str(judged)


def test_nan_counts_against_the_fit():
    """NaN among the states once gave a distance of 0."""
    level = np.zeros(1000)
    half = np.where(np.arange(1000) < 500, np.nan, 0.0)
    assert verdict.total_variation(level, half)[0] == pytest.approx(0.5, abs=0.01)
    assert verdict.total_variation(half, level)[0] == pytest.approx(0.5, abs=0.01)
    for at_q, at_p in ((level, half), (half, level)):
        judged = verdict.diagnose(at_q, at_p, 0.5)
        assert judged.verdict == "do not trust"
        assert judged.distance == pytest.approx(0.5, abs=0.01)


def test_a_lost_mode_tells_charts_apart_and_a_single_state_does_not():
    rng = np.random.default_rng(0)
    at_p, at_q = 0.1 * rng.standard_normal((2, 1000))
    assert abs(fit.divergence(at_p, at_q)) < 4 * 0.1 * np.sqrt(2 / 1000)
    at_p[0] = 1e9
    assert fit.divergence(at_p, at_q) < 0.03
    at_p[:500] = 60.0  # half of the posterior lies where q has no mass
    assert fit.divergence(at_p, at_q) == pytest.approx(5.0, abs=0.1)


@pytest.mark.parametrize(
    ("by_chart", "by_plain", "expected"),
    [
        (0.0, 10.5, True),  # a funnel
        (0.05, 0.78, True),  # eight schools
        (0.51, 2.32, False),  # a ring
        (1.0, 10.0, True),  # no contrast follows the posterior without a chart
        (6.0, 5.0, False),  # a lost mode
    ],
)
def test_a_chart_is_kept_where_avb_is_better_off_upon_it(by_chart, by_plain, expected):
    assert fit.helps(by_chart, by_plain) == expected


def test_a_conjugate_gaussian_is_trusted(gaussian_fit):
    judged = gaussian_fit.diagnostics()
    assert judged.verdict == "trust"
    assert str(judged).startswith("trust: ")
    assert judged.pareto_k < 0.7
    assert judged.distance < 0.05
    assert abs(judged.kl) < 0.01
    assert judged.adversary_accuracy == pytest.approx(0.5, abs=0.03)


def test_scales_from_a_thousandth_to_a_thousand_are_absorbed():
    mean, sd = np.array([1e3, -2.0, 0.0]), np.array([1e-3, 1.0, 1e3])
    precision = tf.constant(1.0 / sd)

    def log_density(x):
        return -0.5 * tf.reduce_sum(((x - mean) * precision) ** 2, -1)

    # The chains start 10^6 sds away; at least 32 of them estimate the moments within a few standard
    # errors.
    begun = start.find(models.make(log_density, shape=[3], dtype="float64"))
    np.testing.assert_allclose((begun.mean - mean) / sd, 0.0, atol=0.7)
    np.testing.assert_allclose(np.linalg.norm(begun.scale_tril, axis=1) / sd, 1.0, atol=0.4)


def test_the_start_knows_a_nearly_singular_correlation_and_both_modes():
    covariance = np.array([[1.0, 0.998], [0.998, 1.0]])
    precision = tf.constant(np.linalg.inv(covariance), tf.float32)
    target = models.make(
        lambda x: -0.5 * tf.einsum("...i,ij,...j->...", x, precision, x), shape=[2]
    )
    begun = start.find(target)
    correlation = np.corrcoef(begun.scale_tril @ begun.scale_tril.T)
    assert correlation.shape == (2, 2)
    whitened = np.linalg.solve(begun.scale_tril, np.linalg.cholesky(covariance))
    np.testing.assert_allclose(np.linalg.svd(whitened)[1], 1.0, atol=0.3)
    two = tfd.MixtureSameFamily(tfd.Categorical([0.0, 0.0]), tfd.Normal([-3.0, 3.0], 0.7))
    begun = start.find(models.make(lambda x: two.log_prob(x[..., 0]), shape=[1]))
    x = begun.mean + begun.scale_tril[0, 0] * begun.z[:, 0]
    # The 256 chains are resampled from draws of two Gaussians: the effective size is at least 100.
    assert np.mean(x > 0) == pytest.approx(0.5, abs=0.15)


# The model's structure.


def test_draws_have_the_structure_of_the_joint():
    @tfd.JointDistributionCoroutineAutoBatched
    def joint():
        scale = yield tfd.HalfNormal(1.0, name="scale")
        effects = yield tfd.Sample(tfd.Normal(0.0, scale), 3, name="effects")
        yield tfd.Normal(effects, 1.0, name="y")

    fit = avb_tf.fit_posterior(joint.experimental_pin(y=np.ones(3, np.float32)), **QUICK)
    draws = fit.sample(7, seed=1)
    assert draws._fields == ("scale", "effects")
    assert draws.scale.shape == (7,)
    assert draws.effects.shape == (7, 3)
    assert np.all(draws.scale > 0)
    np.testing.assert_array_equal(draws.effects, fit.sample(7, seed=1).effects)


# What a fit can do.


def test_a_saved_fit_comes_back_without_the_model_and_without_pickle(
    gaussian_fit, tmp_path, monkeypatch
):
    monkeypatch.setattr(gaussian_fit, "steps", 700)  # as of a chart that is used alone
    gaussian_fit.save(tmp_path / "fit")
    loaded = avb_tf.load_posterior(tmp_path / "fit")
    np.testing.assert_array_equal(loaded.sample(5)["mu"], gaussian_fit.sample(5)["mu"])
    assert loaded.log_evidence == gaussian_fit.log_evidence
    assert loaded.steps == gaussian_fit.steps
    assert loaded.refine(10, chains=50).u.shape == (50, 2)
    loaded.save(tmp_path / "again")
    again = avb_tf.load_posterior(tmp_path / "again")
    np.testing.assert_array_equal(loaded.sample(5)["mu"], again.sample(5)["mu"])
    kinds = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert kinds <= {".json", ".npz", ".h5", ".pb", ".index", ".data-00000-of-00001"}
    (tmp_path / "fit" / "fit.json").write_text("{")
    with pytest.raises(UserError, match="cannot be loaded"):
        avb_tf.load_posterior(tmp_path / "fit")


def test_inference_data_reaches_netcdf_with_all_groups(gaussian_fit, tmp_path):
    data = gaussian_fit.to_arviz(200)
    data.to_netcdf(str(tmp_path / "posterior.nc"))
    loaded = arviz.from_netcdf(str(tmp_path / "posterior.nc"))
    assert {"posterior", "sample_stats", "observed_data"} <= set(loaded.groups())
    assert loaded.posterior["mu"].shape == (1, 200, 2)
    assert loaded.sample_stats["lp"].shape == (1, 200)
    assert loaded.observed_data["y"].shape == (5, 2)


def test_refining_brings_a_wrong_start_to_the_posterior(gaussian_fit):
    refined = gaussian_fit.refine(60, chains=400)
    assert refined.u.shape == (400, 2)
    assert refined.r_hat.max() < 1.1
    assert refined.effective_sample_size.min() > 1000
    reference = gaussian_fit.unconstrained(400, 3)
    assert comparison.sliced_wasserstein(refined.u, reference) < 0.2


def test_refinement_with_fewer_chains_than_dimensions_moves_in_all_of_them():
    """The covariance of 50 chains has rank 49."""
    for dim, seconds in ((60, 5.0), (201, 8.0)):  # with a full covariance, and with scales alone
        sd = np.geomspace(0.1, 10.0, dim)
        fit = avb_tf.fit_posterior(
            lambda x: -0.5 * tf.reduce_sum((x / sd) ** 2, -1), shape=[dim], dtype="float64",  # noqa: B023
            seconds=seconds, verbose=False,
        )  # fmt: skip
        refined = fit.refine(60, chains=50, verbose=False)
        assert refined.r_hat.max() < 1.2
        # The standard error of the standard deviation of 50 draws is a tenth of it.
        np.testing.assert_allclose(refined.u.std(0) / sd, 1.0, atol=0.5)
        assert np.mean(refined.u.std(0) / sd) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(
    "arguments", [{"steps": 7}, {"steps": 10.5}, {"chains": 1}, {"chains": "9"}, {"seed": -1}]
)
def test_arguments_of_refine_that_are_out_of_range(gaussian_fit, arguments):
    ((name, value),) = arguments.items()
    with pytest.raises(UserError, match=f"{name} is {value!r}; expected a whole number"):
        gaussian_fit.refine(**arguments)


def test_chains_of_hmc_reach_a_gaussian_from_afar():
    scores = hmc.scores(lambda x: -0.5 * tf.reduce_sum((x - 3.0) ** 2, -1), 2, tf.float32)
    rng = np.random.default_rng(0)
    x = rng.normal(size=[500, 2])
    warm = hmc.run_chains(scores, x, np.eye(2), 30, 5, 0.3, rng, adapt=True)
    chains = hmc.run_chains(scores, warm.states[-1], np.eye(2), 20, 5, warm.step_size, rng)
    np.testing.assert_allclose(chains.states[-1].mean(0), 3.0, atol=4 / np.sqrt(500))
    np.testing.assert_allclose(chains.states[-1].std(0), 1.0, atol=0.15)
    assert 0.5 < chains.acceptance.mean() < 1.0


def test_the_pair_plot_shows_every_set(gaussian_fit):
    figure = gaussian_fit.plot(100)
    assert len(figure.axes) == 4
    assert figure.axes[-1].get_xlabel() == "mu[1]"


def test_the_pair_plot_is_of_the_parameters_as_the_model_has_them():
    joint = tfd.JointDistributionNamed(
        {
            "rate": tfd.Gamma(2.0, 1.0),
            "R": tfd.LKJ(2, 1.0),
            "y": lambda rate: tfd.Poisson(rate),
        }
    )
    target = models.make(joint, {"y": 3.0})
    z = np.random.default_rng(0).normal(size=[64, 2])
    begun = coordinates.Start(np.zeros(2), np.eye(2), z, tails.light(2), 4)
    settings = posterior.resolved(2)
    avb = building.avb(target, begun, 0, settings, charted=False)
    figure = result.PosteriorFit(target, begun, avb, 0.0, 0, settings, {}).plot(100)
    labels = [axes.get_xlabel() for axes in figure.axes if axes.get_xlabel()]
    assert labels == ["R[0, 1]", "rate"]  # the rest of R is fixed
    assert figure.axes[-1].get_xlim()[0] > 0


# The verdict.


@pytest.mark.parametrize(
    ("scale", "expected"), [(1.0, "trust"), (0.7, "use with refinement"), (0.25, "do not trust")]
)
def test_the_verdict_on_a_gaussian_of_the_wrong_scale(scale, expected):
    rng = np.random.default_rng(0)
    at_p = rng.normal(size=[1000, 4])
    z = scale * rng.normal(size=[4000, 4])

    def log_ratio(x):
        return (stats.norm.logpdf(x) - stats.norm.logpdf(x, scale=scale)).sum(-1)

    judged = verdict.diagnose(log_ratio(z), log_ratio(at_p), 0.5)
    assert judged.verdict == expected
    if scale == 0.7:  # the distance from the ratios must equal the exact one
        radii = np.random.default_rng(1).normal(size=[100_000, 4])
        p, q = (stats.norm.logpdf(radii * 1.0, scale=s).sum(-1) for s in (1.0, scale))
        exact = np.maximum(0.0, 1.0 - np.exp(q - p)).mean()
        assert judged.distance == pytest.approx(exact, abs=0.03)


def test_the_overlap_of_two_gaussians_and_the_normaliser():
    rng = np.random.default_rng(0)

    def log_ratio(x):  # p = e^3 N(1, 1), q = N(0, 1)
        return 3.0 + stats.norm.logpdf(x, 1.0) - stats.norm.logpdf(x)

    distance, log_normaliser = verdict.total_variation(
        log_ratio(rng.normal(size=4000)), log_ratio(1.0 + rng.normal(size=1000))
    )
    assert distance == pytest.approx(2.0 * stats.norm.cdf(0.5) - 1.0, abs=0.03)
    assert log_normaliser == pytest.approx(3.0, abs=0.08)


@pytest.fixture(scope="module")
def one_mode():
    """Returns a fit that is exact in the mode at 4 (weight 0.7) and lacks the mode at -4 (0.3)."""
    two = tfd.MixtureSameFamily(
        tfd.Categorical(probs=[0.3, 0.7]), tfd.Normal([-4.0, 4.0], [0.5, 0.8])
    )
    target = models.make(lambda x: two.log_prob(x[..., 0]), shape=[1])
    begun = start.find(target)
    u = begun.mean + begun.z @ begun.scale_tril.T
    begun = begun._replace(mean=np.array([4.0]), scale_tril=np.array([[0.8]]), z=(u - 4.0) / 0.8)
    settings = posterior.resolved(1)
    avb = building.avb(target, begun, 0, settings, charted=False)
    return result.PosteriorFit(target, begun, avb, 0.0, 0, settings, {})


def test_a_fit_that_lost_a_mode_is_not_trusted(one_mode):
    alone = one_mode.draws(1000).log_weights  # all equal: q's own draws do not show the lost mode
    assert np.ptp(alone) < 0.01
    judged = one_mode.diagnostics()
    assert judged.verdict != "trust"
    assert judged.distance == pytest.approx(0.3, abs=0.1)
    assert judged.missing == pytest.approx(0.3, abs=0.1)
    assert "next to nothing" in judged.reason


def test_states_that_the_chart_cannot_reach_count_as_lost(one_mode, monkeypatch):
    """A chart's inverse may overflow, and NaN once gave a distance of 0."""
    kind = type(one_mode.model.averaged_decoder)
    inverse = kind.inverse

    def overflowing(chart, z):
        return tf.where(z < 0.0, np.nan, inverse(chart, z))

    monkeypatch.setattr(kind, "inverse", overflowing)
    monkeypatch.setattr(one_mode, "_visited", None)  # evaluated by an earlier test
    states = one_mode._chains()
    assert np.isfinite(states.u).all()
    assert np.isfinite(states.log_density).all()
    lost = one_mode.start.z[:, 0] < 0.0
    np.testing.assert_array_equal(states.log_q == -np.inf, lost)
    assert one_mode.overlap() >= lost.mean() - 0.05


def test_draws_without_a_density_count_against_the_fit(one_mode, monkeypatch):
    density = one_mode.target.log_density

    def outside(u):
        return tf.where(u[:, 0] < 4.0, tf.constant(np.nan, u.dtype), density(u))

    monkeypatch.setattr(one_mode.target, "log_density", outside)
    drawn = one_mode.draws(1000)
    np.testing.assert_array_equal(drawn.log_weights == -np.inf, drawn.u[:, 0] < 4.0)
    assert not np.isnan(drawn.log_weights).any()


def test_refining_brings_a_lost_mode_back(one_mode):
    refined = one_mode.refine(30, chains=2000)
    u = refined.u[:, 0]
    assert refined.r_hat.max() < 1.05  # the chains move between the modes
    assert np.mean(u < 0) == pytest.approx(0.3, abs=0.1)
    assert u[u < 0].std() == pytest.approx(0.5, abs=0.06)
    assert u[u > 0].std() == pytest.approx(0.8, abs=0.06)


def test_a_fit_that_was_given_no_time_is_not_trusted():
    def log_density(x):  # a shell that is too thin for a few Gaussians
        return -40.0 * (tf.reduce_sum(x**2, -1) - 4.0) ** 2

    fit = avb_tf.fit_posterior(log_density, shape=[4], **QUICK)
    assert fit.diagnostics().verdict != "trust"


@pytest.mark.parametrize("seconds", [12.0, None])
def test_modes_that_no_network_reaches_are_fitted_by_a_mixture(seconds, tmp_path):
    """Three spikes in the plane, 100 and more standard deviations apart, 2 to 3 to 5."""
    centres = np.array([[-3.0, 0.0], [0.0, 1.0], [4.0, 0.0]], np.float32)
    weights, width = np.array([0.2, 0.3, 0.5], np.float32), 0.01
    density = tfd.MixtureSameFamily(
        tfd.Categorical(probs=weights),
        tfd.MultivariateNormalDiag(centres, width * np.ones([3, 2], np.float32)),
    )
    settings = {"seconds": seconds, "verbose": False} if seconds else QUICK
    fit = avb_tf.fit_posterior(density.log_prob, shape=[2], **settings)
    assert fit.kind == "mixture"
    assert fit.diagnostics().verdict == "trust"
    u = fit.sample(20_000).numpy()
    nearest = np.linalg.norm(u[:, np.newaxis] - centres, axis=-1).argmin(1)
    np.testing.assert_allclose(np.bincount(nearest) / len(u), weights, atol=0.05)
    away = u - centres[nearest]
    np.testing.assert_allclose(away.std(0), width, rtol=0.05)
    # log q is exact, so the mean log weight is the evidence less a small divergence.
    assert -0.03 < fit.draws(4000).log_weights.mean() < 0.005
    fit.save(tmp_path)
    loaded = avb_tf.load_posterior(tmp_path)
    np.testing.assert_array_equal(loaded.sample(100, seed=3), fit.sample(100, seed=3))
    assert (loaded.kind, str(loaded.diagnostics())) == ("mixture", str(fit.diagnostics()))


def test_the_density_of_a_mixture_integrates_to_one_and_is_that_of_its_draws():
    near = mixture.Mixture(
        np.array([0.25, 0.75]), np.array([[-1.0], [2.0]]), np.array([[[0.5]], [[1.0]]]), np.inf
    )
    encoder = sampler.MixtureEncoder(near)
    line = np.linspace(-6.0, 8.0, 2001, dtype=np.float32)
    density = np.exp(encoder.log_density(line[:, np.newaxis]))
    assert np.trapezoid(density, line) == pytest.approx(1.0, abs=1e-4)
    noise = tf.random.stateless_normal([4000, 2], [0, 0])
    z = encoder.z(noise).numpy()[:, 0]
    cumulative = np.cumsum(density) * (line[1] - line[0])
    assert stats.kstest(z, lambda x: np.interp(x, line, cumulative)).pvalue > 1e-3
    drawn = encoder(tf.zeros([1, 1]), noise[:, tf.newaxis])
    assert float(drawn.mean[0, 0]) == pytest.approx(1.25)
    exact = 0.25 * (0.25 + 1.0) + 0.75 * (1.0 + 4.0) - 1.25**2
    assert float(drawn.scale_tril[0, 0, 0]) ** 2 == pytest.approx(exact)


# The networks.


def test_the_chart_is_the_identity_at_first_and_its_inverse_and_volume_are_right():
    chart = sampler.Chart(3, 2, 16)
    z = tf.constant(np.random.default_rng(0).normal(size=[5, 3]).astype(np.float32))
    np.testing.assert_allclose(chart(z)[:, :3], z, atol=1e-6)
    rng = np.random.default_rng(1)
    for weight in chart.weights:
        weight.assign(0.3 * rng.normal(size=weight.shape))
    with tf.GradientTape() as tape:
        tape.watch(z)
        u = chart(z)[:, :3]
    jacobian = tape.batch_jacobian(u, z)
    np.testing.assert_allclose(chart(z)[:, 3], np.linalg.slogdet(jacobian)[1], atol=1e-4)
    np.testing.assert_allclose(chart.inverse(u), z, atol=1e-4)


def test_the_encoder_starts_from_a_standard_normal():
    encoder = sampler.GatedEncoder(2, 3, 2, 8)
    noise = tf.random.stateless_normal([50, 1, 5], [0, 0])
    posterior = encoder(tf.zeros([1, 1]), noise)
    np.testing.assert_allclose(posterior.z, noise[..., :2], atol=1e-6)
    np.testing.assert_allclose(posterior.scale_tril[0], np.eye(2), atol=0.02)


def test_a_density_that_is_not_finite_everywhere_is_fitted_where_it_is():
    def log_density(x):  # a half-normal whose density is NaN below 0
        return tf.math.log(x[..., 0]) * 3.0 - x[..., 0] ** 2

    fit = avb_tf.fit_posterior(log_density, shape=[1], **QUICK)
    draws = fit.sample(500).numpy()
    assert np.mean(draws > 0) > 0.9


# inference_gym.


@pytest.mark.parametrize("name", ["Banana", "EightSchools"])
def test_means_of_targets_of_inference_gym_are_its_ground_truth(name):
    from inference_gym import using_tensorflow as gym

    truth = getattr(gym.targets, name)()
    model = gym.targets.VectorModel(truth, flatten_sample_transformations={"identity": "identity"})
    fit = avb_tf.fit_posterior(
        model.unnormalized_log_prob,
        shape=model.event_shape,
        bijector=model.default_event_space_bijector,
        **{**QUICK, "steps": 600, "draws": 512, "chart_steps": 2, "chart_share": 0.95},
    )
    draws = fit.sample(1000).numpy()
    known = model.sample_transformations["identity"]
    error = known.ground_truth_standard_deviation / np.sqrt(1000)
    if known.ground_truth_mean_standard_error is not None:  # otherwise the mean is exact
        error = np.hypot(error, known.ground_truth_mean_standard_error)
    # Four errors: after 600 steps a fit is not exact in its tails.
    assert np.all(np.abs(draws.mean(0) - known.ground_truth_mean) < 4.0 * error)
