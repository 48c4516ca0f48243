import json

import arviz
import numpy as np
import pytest
import tensorflow as tf
from scipy import stats
from tensorflow_probability import bijectors as tfb
from tensorflow_probability import distributions as tfd

import avb_tf
from avb_tf import UserError
from avb_tf.posteriors import comparison, hmc, result, sampler, start, target

QUICK = {"steps": 50, "verbose": False, "draws": 256, "adversary_steps": 1, "chart_width": 16}
COUNTS = np.array([3, 5, 4, 8, 2], np.float32)


def gaussian():
    """(joint, observed) of a correlated Gaussian prior and five noisy observations of the mean."""
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
    return avb_tf.fit_posterior(joint, observed, **QUICK)


def poisson(scale=1.0, dtype=np.float32):
    """Gamma(2, 1) prior on a rate and five counts: the posterior is Gamma(24, 6)."""
    return tfd.JointDistributionNamed(
        {
            "rate": tfd.Gamma(dtype(2.0), dtype(1.0)),
            "n": lambda rate: tfd.Sample(tfd.Poisson(rate * dtype(scale)), 5),
        }
    )


def refused(match, *arguments, **settings):
    with pytest.raises(UserError, match=match) as caught:
        avb_tf.fit_posterior(*arguments, **{**QUICK, **settings})
    assert "\n" not in str(caught.value)


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


def test_a_conjugate_gaussian_is_trusted(gaussian_fit):
    found = gaussian_fit.diagnostics()
    assert found.verdict == "trust"
    assert str(found).startswith("trust: ")
    assert found.pareto_k < 0.7
    assert found.distance < 0.05
    assert abs(found.kl) < 0.01
    assert found.adversary_accuracy == pytest.approx(0.5, abs=0.03)


def test_the_jacobian_of_a_constrained_parameter():
    # Gamma-Poisson: the density of log rate is rate times that of rate.
    goal = target.make(poisson(), {"n": COUNTS})
    u = np.linspace(-1.0, 3.0, 9, dtype=np.float32)[:, np.newaxis]
    rate = goal.constrain(u)["rate"].numpy()
    evidence = (
        stats.gamma.logpdf(rate, 2.0)
        + stats.poisson.logpmf(COUNTS, rate[:, np.newaxis]).sum(-1)
        - stats.gamma.logpdf(rate, 24.0, scale=1.0 / 6.0)
    )
    with tf.GradientTape() as tape:
        x = tf.constant(u)
        tape.watch(x)
        y = goal.constrain(x)["rate"]
    volume = np.log(tape.gradient(y, x).numpy()[:, 0])
    expected = stats.gamma.logpdf(rate, 24.0, scale=1.0 / 6.0) + evidence + volume
    np.testing.assert_allclose(goal.log_density(u), expected, rtol=1e-4)
    np.testing.assert_allclose(goal.unconstrain({"rate": rate}), u, atol=1e-5)


def test_a_float64_model_gives_float64_draws_of_the_right_distribution():
    fit = avb_tf.fit_posterior(poisson(dtype=np.float64), {"n": COUNTS.astype(float)}, **QUICK)
    rate = fit.sample(2000)["rate"]
    assert rate.dtype == tf.float64
    assert stats.kstest(rate, stats.gamma(24.0, scale=1.0 / 6.0).cdf).statistic < 0.06


def test_scales_from_a_thousandth_to_a_thousand_are_absorbed():
    mean, sd = np.array([1e3, -2.0, 0.0]), np.array([1e-3, 1.0, 1e3])
    precision = tf.constant(1.0 / sd)

    def log_density(x):
        return -0.5 * tf.reduce_sum(((x - mean) * precision) ** 2, -1)

    # 32 chains at least: within a few standard errors of the moments, from 10^6 sds away.
    found = start.find(target.make(log_density, shape=[3], dtype="float64"))
    np.testing.assert_allclose((found.mean - mean) / sd, 0.0, atol=0.7)
    np.testing.assert_allclose(np.linalg.norm(found.scale_tril, axis=1) / sd, 1.0, atol=0.4)


def test_the_start_knows_a_nearly_singular_correlation_and_both_modes():
    covariance = np.array([[1.0, 0.998], [0.998, 1.0]])
    precision = tf.constant(np.linalg.inv(covariance), tf.float32)
    goal = target.make(lambda x: -0.5 * tf.einsum("...i,ij,...j->...", x, precision, x), shape=[2])
    found = start.find(goal)
    correlation = np.corrcoef(found.scale_tril @ found.scale_tril.T)
    assert correlation.shape == (2, 2)
    whitened = np.linalg.solve(found.scale_tril, np.linalg.cholesky(covariance))
    np.testing.assert_allclose(np.linalg.svd(whitened)[1], 1.0, atol=0.3)
    two = tfd.MixtureSameFamily(tfd.Categorical([0.0, 0.0]), tfd.Normal([-3.0, 3.0], 0.7))
    found = start.find(target.make(lambda x: two.log_prob(x[..., 0]), shape=[1]))
    x = found.mean + found.scale_tril[0, 0] * found.z[:, 0]
    assert 0.1 < np.mean(x > 0) < 0.9  # eight starts, each in one of them


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


def test_a_density_of_several_parameters_by_name_with_bijectors():
    fit = avb_tf.fit_posterior(
        lambda rate, x: -rate - 0.5 * tf.reduce_sum(x**2, -1),
        shape={"x": [2], "rate": []},
        bijector={"rate": tfb.Exp()},
        **QUICK,
    )
    draws = fit.sample(4000)
    assert draws["rate"].numpy().mean() == pytest.approx(1.0, abs=0.3)  # Exponential(1)
    assert draws["x"].shape == (4000, 2)


def test_a_model_written_for_single_draws_is_mapped_over_them():
    x = np.arange(12, dtype=np.float32).reshape(4, 3)

    def log_density(beta):  # tf.tensordot would mix the batch into the features
        return -tf.reduce_sum((tf.tensordot(x, beta, 1) - 1.0) ** 2) - tf.reduce_sum(beta**2)

    goal = target.make(log_density, shape=[3])
    u = np.random.default_rng(0).normal(size=[5, 3]).astype(np.float32)
    np.testing.assert_allclose(goal.log_density(u), [log_density(one) for one in u], rtol=1e-5)


# What a fit can do.


def test_a_saved_fit_comes_back_without_the_model_and_without_pickle(gaussian_fit, tmp_path):
    gaussian_fit.save(tmp_path / "fit")
    loaded = avb_tf.load_posterior(tmp_path / "fit")
    np.testing.assert_array_equal(loaded.sample(5)["mu"], gaussian_fit.sample(5)["mu"])
    assert loaded.log_evidence == gaussian_fit.log_evidence
    assert loaded.refine(10, chains=50).u.shape == (50, 2)
    kinds = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert kinds <= {".json", ".h5", ".pb", ".index", ".data-00000-of-00001"}
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
    found = gaussian_fit.refine(60, chains=400)
    assert found.u.shape == (400, 2)
    assert found.r_hat.max() < 1.1
    assert found.effective_sample_size.min() > 1000
    reference = gaussian_fit.unconstrained(400, 3)
    assert comparison.sliced_wasserstein(found.u, reference) < 0.2


def test_chains_of_hmc_reach_a_gaussian_from_afar():
    scores = hmc.scores(lambda x: -0.5 * tf.reduce_sum((x - 3.0) ** 2, -1), tf.float32)
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


# The verdict.


@pytest.mark.parametrize(
    ("scale", "verdict"), [(1.0, "trust"), (0.7, "use with refinement"), (0.25, "do not trust")]
)
def test_the_verdict_on_a_gaussian_of_the_wrong_scale(scale, verdict):
    z = scale * np.random.default_rng(0).normal(size=[4000, 4])
    log_weights = stats.norm.logpdf(z).sum(-1) - stats.norm.logpdf(z, scale=scale).sum(-1)
    found = result.diagnose(log_weights, 0.5)
    assert found.verdict == verdict
    if scale == 0.7:  # the weights measure the distance that a closed form gives
        radii = np.random.default_rng(1).normal(size=[100_000, 4])
        p, q = (stats.norm.logpdf(radii * 1.0, scale=s).sum(-1) for s in (1.0, scale))
        exact = np.maximum(0.0, 1.0 - np.exp(q - p)).mean()
        assert found.distance == pytest.approx(exact, abs=0.03)


def test_a_fit_that_was_given_no_time_is_not_trusted():
    def log_density(x):  # a ring, sharper than any Gaussian
        return -4.0 * (tf.reduce_sum(x**2, -1) - 4.0) ** 2

    fit = avb_tf.fit_posterior(log_density, shape=[2], **QUICK)
    assert fit.diagnostics().verdict != "trust"


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


# Bad input, one line each.


def test_a_density_without_a_shape():
    refused("without `shape`", lambda x: x)


def test_an_observed_name_that_does_not_exist():
    refused("'z' is no part of the joint; expected some of", poisson(), {"z": COUNTS})


def test_a_discrete_parameter():
    joint = tfd.JointDistributionNamed({"k": tfd.Poisson(3.0), "y": lambda k: tfd.Normal(k, 1.0)})
    mixed = tfd.JointDistributionNamed(
        {"k": tfd.Categorical([0.0, 0.0]), "y": lambda k: tfd.Normal(tf.cast(k, tf.float32), 1.0)}
    )
    refused("parameter 'k' is of type int32", mixed, {"y": 1.0})
    refused("no default bijector", joint, {"y": 1.0})  # TFP's Poisson counts in floats


def test_a_joint_without_a_default_bijector():
    class Odd(tfd.Normal):
        def _default_event_space_bijector(self):
            return None

    joint = tfd.JointDistributionNamed({"x": Odd(0.0, 1.0), "y": lambda x: tfd.Normal(x, 1.0)})
    refused("no default bijector", joint, {"y": 1.0})


def test_a_density_of_the_wrong_shape():
    refused(r"has shape \(2,\); expected one number", lambda x: -(x**2), shape=[2])


def test_several_data_sets_at_once():
    joint = tfd.JointDistributionNamed(
        {"x": tfd.Normal(tf.zeros(4), 1.0), "y": lambda x: tfd.Normal(x, 1.0)}
    )
    refused(r"several data sets one after the other", joint, {"y": np.ones(4, np.float32)})


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_density_that_is_finite_nowhere(value):
    refused("not finite", lambda x: tf.reduce_sum(x, -1) * 0.0 + value, shape=[2])


def test_an_improper_posterior_that_runs_away():
    refused("runs away", lambda x: tf.reduce_sum(0.0 * x, -1), shape=[2])
    refused("runs away", lambda x: -(x[..., 0] ** 2) + 0.0 * x[..., 1], shape=[2])


def test_an_unknown_setting_and_no_steps():
    refused("unknown setting 'wdith'", lambda x: -(x[..., 0] ** 2), shape=[1], wdith=3)
    refused("expected numbers above 0", lambda x: -(x[..., 0] ** 2), shape=[1], steps=0)


def test_a_density_that_is_not_finite_everywhere_is_fitted_where_it_is():
    def log_density(x):  # a half-normal whose density is NaN below 0
        return tf.math.log(x[..., 0]) * 3.0 - x[..., 0] ** 2

    fit = avb_tf.fit_posterior(log_density, shape=[1], **QUICK)
    draws = fit.sample(500).numpy()
    assert np.mean(draws > 0) > 0.9


# inference_gym.


def test_a_target_of_inference_gym_in_five_lines():
    from inference_gym import using_tensorflow as gym

    banana = gym.targets.VectorModel(
        gym.targets.Banana(), flatten_sample_transformations={"identity": "identity"}
    )
    fit = avb_tf.fit_posterior(
        banana.unnormalized_log_prob,
        shape=banana.event_shape,
        bijector=banana.default_event_space_bijector,
        **QUICK,
    )
    assert fit.sample(10).shape == (10, 2)


# Measures.


def test_the_measures_between_halves_of_the_same_draws_and_of_shifted_ones():
    x = np.random.default_rng(0).normal(size=[1200, 2])
    same, apart = comparison.compare(x[:600], x[600:]), comparison.compare(x[:600] + 2.0, x[600:])
    assert 0.44 < same["c2st"] < 0.56
    assert same["sliced_wasserstein"] < 0.15
    assert abs(same["mmd2"]) < 0.01
    assert apart["sliced_wasserstein"] == pytest.approx(2.0, abs=0.2)
    # Two Gaussians 2 sqrt(2) apart: the best classifier is right at Phi(sqrt 2).
    assert apart["c2st"] == pytest.approx(stats.norm.cdf(np.sqrt(2.0)), abs=0.03)
    table = comparison.table({"fit": same, "other": apart})
    assert len(table.splitlines()) == 4
    assert json.dumps(same)
