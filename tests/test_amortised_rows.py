"""Amortised posteriors of data sets of any number of rows, beside closed forms."""

import functools
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from scipy import special, stats
from tensorflow_probability import distributions as tfd

import avb_tf
from avb_tf import UserError
from avb_tf.amortised import calibration, rows, sources
from avb_tf.amortised.trunks import DeepSet
from avb_tf.serving.check import check as serve_check
from avb_tf.serving.saved_model import RunError, SavedModel

TINY = {
    "verbose": False,
    "width": 16,
    "trunk_width": 32,
    "depth": 1,
    "trunk_depth": 1,
    "components": 2,
    "batch_size": 128,
    "whitening_share": 0.35,
    "learning_rate": 4e-3,
}
NOISE, LARGEST = 1.5, 12


def normal():
    """mu ~ N(0, 1), and rows y ~ N(mu, NOISE): the posterior is a Gaussian."""
    return tfd.JointDistributionNamed(
        {"mu": tfd.Normal(0.0, 1.0), "y": lambda mu: tfd.Normal(mu, NOISE)}
    )


def exact(y):
    """Posterior of `normal`."""
    precision = 1.0 + len(y) / NOISE**2
    return stats.norm(y.sum() / NOISE**2 / precision, precision**-0.5)


def log_evidence(y):
    count = len(y)
    covariance = NOISE**2 * np.eye(count) + np.ones([count, count])
    return stats.multivariate_normal.logpdf(y, np.zeros(count), covariance)


def data(count):
    return np.random.default_rng(count).normal(0.7, NOISE, count).astype(np.float32)


@pytest.fixture(scope="module")
def fit():
    return avb_tf.fit_amortised(normal(), "y", rows=(1, LARGEST), steps=1000, **TINY)


@pytest.mark.parametrize("count", [1, 2, 7, LARGEST])
def test_mean_and_sd_follow_the_number_of_rows(fit, count):
    y = data(count)
    truth, draws = exact(y), fit.sample(y, 20_000)["mu"].numpy()
    assert abs(draws.mean() - truth.mean()) < 0.2 * truth.std()
    assert draws.std() == pytest.approx(truth.std(), rel=0.15)
    mu = truth.rvs(2000, random_state=0).astype(np.float32)
    kl = np.mean(truth.logpdf(mu) - fit.log_prob({"mu": mu}, y))
    assert -0.01 < kl < 0.05


def test_rows_in_any_order_have_the_same_posterior(fit):
    y = data(9)
    for order in (np.argsort(y), np.arange(9)[::-1]):
        a, b = (fit.sample(z, 50, seed=1)["mu"] for z in (y, y[order]))
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        a, b = (fit.log_prob({"mu": np.float32([0.3])}, z) for z in (y, y[order]))
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_verdict_evidence_and_surprise_are_those_of_their_number(fit):
    y = data(6)
    posterior = fit.posterior(y)
    assert posterior.verdict.verdict == "trust"
    evidence = posterior.evidence
    assert abs(evidence.value - log_evidence(y)) < 5.0 * evidence.standard_error + 1e-3
    assert fit.surprise([*y[1:], 12.0]).flagged
    assert fit.surprise(0.1 * data(LARGEST)).flagged  # too little noise
    rng = np.random.default_rng(0)
    own = rng.normal(size=[30, 1]) + NOISE * rng.normal(size=[30, 5])
    assert sum(fit.surprise(y).flagged for y in own) <= 6  # of 30 at a rate of 1/20


def test_calibration_over_all_sizes_and_over_one(fit):
    for count in (None, 4):
        check = fit.check(pairs=300, rows=count)
        assert min(check.p_values.values()) > 1e-3
        assert calibration.deviation(check.ranks_of_outcomes[:, 0], check.draws) < 0.12
    assert fit.to_arviz(data(3), draws=5).observed_data["y"].shape == (3,)


def test_a_loaded_fit_takes_any_number_of_rows(fit, tmp_path):
    fit.save(tmp_path)
    loaded = avb_tf.AmortisedFit.load(tmp_path)
    for count in (2, 11):
        y = {"y": data(count)}
        a, b = (f.sample(y, 50)["mu"] for f in (fit, loaded))
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        row, u = fit.simulation.flat(y)[0], np.float32([[0.3], [-2.0]])
        a, b = (f.simulation.log_density(u, row) for f in (fit, loaded))
        np.testing.assert_allclose(a, b, rtol=1e-5)
    u, y, _ = (np.asarray(part) for part in loaded.simulation.simulate(500, tf.constant([0, 1])))
    noise = (y - u)[np.isfinite(y)] / NOISE
    assert stats.kstest(noise, stats.norm.cdf).pvalue > 1e-3


EXPORTED = """
import sys
import numpy as np, tensorflow as tf

signatures = tf.saved_model.load(sys.argv[1]).signatures
given = {k: tf.constant(v) for k, v in np.load(sys.argv[2]).items()}
y, mu, seed = (given[k] for k in ("y", "mu", "seed"))
answer = signatures["sample_seeded"](y=y, seed=seed) | signatures["log_prob"](y=y, mu=mu)
assert "avb_tf" not in sys.modules
np.savez(sys.argv[3], **{k: v.numpy() for k, v in answer.items()})
"""


SIZES = (2, 7, LARGEST)


def request():
    """Absent rows are NaN."""
    y = np.full([3, LARGEST], np.nan, np.float32)
    for i, count in enumerate(SIZES):
        y[i, :count] = data(count)
    return {"y": y, "mu": np.float32([0.3, -0.2, 1.0]), "seed": np.array([5, 6, 5])}


@pytest.fixture(scope="module")
def exported(fit, tmp_path_factory):
    return fit.export(tmp_path_factory.mktemp("export"), draws=2000, name="normal")


def test_an_export_answers_like_the_fit(fit, exported):
    served, given = SavedModel(exported), request()
    mu, seeded = given.pop("mu"), served.run("sample_seeded", given)["mu"]
    density = served.run("log_prob", {"y": given["y"], "mu": mu})["log_prob"]
    for i, count in enumerate(SIZES):
        own = fit.log_prob({"mu": mu[i : i + 1]}, data(count))
        np.testing.assert_allclose(density[i], own[0], rtol=1e-4, atol=1e-4)
        drawn = fit.sample(data(count), 2000)["mu"]
        assert stats.ks_2samp(seeded[i], drawn).pvalue > 1e-3
    alone = served.run("sample_seeded", {name: value[1:2] for name, value in given.items()})
    np.testing.assert_allclose(alone["mu"][0], seeded[1], rtol=1e-5, atol=1e-5)
    assert "3 signatures" in serve_check(exported.parent, 1)
    given["y"][1] = np.nan
    with pytest.raises(RunError, match="fewer rows than 1"):
        served.run("sample", {"y": given["y"]})
    given["y"][1, 0] = np.inf
    with pytest.raises(RunError, match="neither finite nor all NaN"):
        served.run("sample", {"y": given["y"]})


def test_a_process_without_this_package_serves_an_export(exported, tmp_path):
    given = request()
    np.savez(tmp_path / "request.npz", **given)
    files = [tmp_path / "request.npz", tmp_path / "answer.npz"]
    command = [sys.executable, "-I", "-c", EXPORTED, exported, *files]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    answer, served = np.load(files[1]), SavedModel(exported)
    for name, signature in {"mu": "sample_seeded", "log_prob": "log_prob"}.items():
        inputs = {k: given[k] for k in served.signatures[signature].inputs}
        np.testing.assert_allclose(
            answer[name], served.run(signature, inputs)[name], rtol=1e-5, atol=1e-5
        )


def test_padded_sets_have_the_features_of_their_rows():
    layer = DeepSet(8, 1)
    y = np.random.default_rng(0).normal(size=[3, 6, 2]).astype(np.float32)
    padded = y.copy()
    sizes = (6, 2, 1)
    for i, size in enumerate(sizes):
        padded[i, size:] = np.nan
    together = layer(tf.constant(padded)).numpy()
    for i, size in enumerate(sizes):
        alone = layer(tf.constant(y[i : i + 1, :size])).numpy()
        np.testing.assert_allclose(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)


def test_the_attention_to_rows_is_a_softmax_and_survives_rows_far_out():
    layer = DeepSet(8, 1)
    y = np.random.default_rng(0).normal(size=[2, 5, 1]).astype(np.float32)
    seen = {}
    layer.whole = lambda x: seen.setdefault("x", x.numpy())
    layer(tf.constant(y))
    hidden = tf.nn.silu(layer.each(tf.reshape(y, [-1, 1]))).numpy().reshape(2, 5, 8)
    scores = layer.scores(hidden).numpy()
    weights = special.softmax(scores, 1)
    expected = np.einsum("nrq,nrh->nqh", weights, hidden)
    features = seen["x"]
    np.testing.assert_allclose(features[:, 16:48].reshape(2, 4, 8), expected, rtol=1e-4, atol=1e-5)
    far = DeepSet(8, 1)(tf.constant([[[1e4], [-1e4], [0.0]]]))
    assert np.isfinite(far).all()


# The source of pairs.


def regression(auto_batched):
    """Each row has a covariate of its own, which depends on no parameter."""

    def model():
        slope = yield tfd.JointDistributionCoroutine.Root(tfd.Normal(0.0, 1.0, name="slope"))
        x = yield tfd.JointDistributionCoroutine.Root(tfd.Sample(tfd.Normal(2.0, 1.0), 2, name="x"))
        first = x[0] if auto_batched else x[..., 0]
        yield tfd.Normal(slope * first, 0.1, name="y")

    kind = (
        tfd.JointDistributionCoroutineAutoBatched
        if auto_batched
        else tfd.JointDistributionCoroutine
    )
    return kind(model)


@pytest.mark.parametrize("auto_batched", [False, True])
def test_rows_are_independent_given_the_parameters(auto_batched):
    one = sources.of_joint(regression(auto_batched), ("x", "y"))
    sets = rows.of(one, 2, 5)
    u, y, _ = (np.asarray(part) for part in sets.simulate(1000, tf.constant([0, 5])))
    y = y.reshape(1000, 5, 3)
    sizes = np.isfinite(y).all(-1).sum(1)
    assert set(sizes) == {2, 3, 4, 5}
    expected = np.log([3 / 2, 4 / 3, 5 / 4, 6 / 5]) / np.log(6 / 2)
    for size, share in zip((2, 3, 4, 5), expected, strict=True):
        assert abs(np.mean(sizes == size) - share) < 4.0 * np.sqrt(share * (1 - share) / 1000)
    noise = (y[:, :2, 2] - u * y[:, :2, 0]) / 0.1
    assert stats.kstest(noise.ravel(), stats.norm.cdf).pvalue > 1e-3
    for values in (noise, y[:, :2, 0]):
        assert abs(np.corrcoef(values.T)[0, 1]) < 4.0 / np.sqrt(1000)


def test_the_density_of_a_set_is_the_prior_and_its_rows(fit):
    source, y = fit.simulation, data(6)
    mu = np.array([[0.2], [-1.3]], np.float32)
    expected = stats.norm.logpdf(mu[:, 0]) + stats.norm.logpdf(y, mu, NOISE).sum(1)
    np.testing.assert_allclose(source.log_density(mu, source.flat(y)[0]), expected, rtol=1e-5)


def test_a_simulator_of_numpy_gives_rows_and_summaries_take_any_order():
    def simulate(parameters, seed):
        rng = np.random.default_rng(np.asarray(seed))
        mean = np.asarray(parameters)
        return {"y": mean + rng.normal(size=mean.shape), "n": rng.poisson(2.0, mean.shape)}

    one = sources.of_simulator(simulate, tfd.Normal(0.0, 1.0), ("y", "n"))
    sets = rows.of(one, 2, 4)
    _, simulated, _ = sets.simulate(100, tf.constant([0, 5]))
    sizes = np.isfinite(np.reshape(simulated, [100, 4, 2])).all(-1).sum(1)
    assert set(sizes) == {2, 3, 4}
    y = {"y": np.array([0.5, 1.0, -1.0]), "n": np.array([1, 0, 2])}
    turned = {name: value[::-1] for name, value in y.items()}
    flat = [sets.flat(one) for one in (y, turned)]
    np.testing.assert_array_equal(flat[0], [[0.5, 1.0, 1.0, 0.0, -1.0, 2.0]])
    np.testing.assert_allclose(*map(sets.summary, flat))
    with pytest.raises(UserError, match="expected as many of each"):
        sets.flat({"y": np.zeros(3), "n": np.zeros(2)})


# Mistakes.


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (np.zeros(LARGEST + 1), f"has {LARGEST + 1} rows; expected 1 to {LARGEST}"),
        (np.zeros(0), "has 0 rows"),
        (np.zeros([3, 1]), r"has shape \(3, 1\); expected \[rows\]"),
        (np.float32(1.0), r"has shape \(\); expected \[rows\]"),
        ([1.0, np.nan], r"is nan at \[1\]"),
    ],
)
@pytest.mark.parametrize("call", ["sample", "log_prob", "posterior", "surprise"])
def test_data_sets_that_the_fit_is_not_for(fit, call, y, message):
    calls = {
        "sample": lambda: fit.sample(y, 3),
        "log_prob": lambda: fit.log_prob({"mu": np.zeros(3)}, y),
        "posterior": lambda: fit.posterior(y),
        "surprise": lambda: fit.surprise(y),
    }
    with pytest.raises(UserError, match=message):
        calls[call]()


def test_calibration_of_sizes_that_the_fit_is_not_for(fit):
    with pytest.raises(UserError, match="has 0 rows"):
        fit.check(rows=0)


def downstream():
    """The parameter depends on what is observed."""
    return tfd.JointDistributionNamed(
        {"y": tfd.Normal(0.0, 1.0), "mu": lambda y: tfd.Normal(y, 1.0)}
    )


def one_noise_for_all(parameters, seed):
    return parameters + tf.random.stateless_normal([], seed)


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (normal, {"rows": (0, 3)}, "expected the smallest and largest"),
        (normal, {"rows": (5, 3)}, "expected the smallest and largest"),
        (normal, {"rows": 3}, "expected the smallest and largest"),
        (normal, {"rows": (1, 2.5)}, "expected the smallest and largest"),
        (downstream, {}, "a parameter's distribution depends on observed parts"),
        (
            lambda: one_noise_for_all,
            {"prior": tfd.Normal(0.0, 1.0)},
            "are all equal",
        ),
    ],
)
def test_models_whose_rows_cannot_be_taken(model, changes, message):
    call = functools.partial(avb_tf.fit_amortised, **{"rows": (1, 3), "steps": 1, **TINY})
    with pytest.raises(UserError, match=message):
        call(model(), "y", **changes)


# Data sets of a fixed number of draws from one distribution.


def plane(y):
    """Joint of a mean [2] and the part `y`, a function of it."""
    mean = tfd.Sample(tfd.Normal(0.0, 1.0), 2)
    return tfd.JointDistributionNamed({"mean": mean, "y": y})


def of_mean(mean):
    return tfd.Independent(tfd.Normal(mean, 1.0), 1)


@tfd.JointDistributionCoroutineAutoBatched
def auto_batched_sample():
    mu = yield tfd.Normal(0.0, 1.0, name="mu")
    yield tfd.Sample(tfd.Normal(mu, 1.0), [5, 3], name="y")


ROWS = {
    "vectors": (plane(lambda mean: tfd.Sample(of_mean(mean), 4)), 2),
    "numbers in a matrix": (auto_batched_sample, 1),
    "one vector": (plane(of_mean), None),
    "too many": (plane(lambda mean: tfd.Sample(of_mean(mean), 501)), None),
    "a walk": (
        plane(lambda mean: tfd.Sample(tfd.MultivariateNormalDiag(tf.cumsum(mean, -1)), 4)),
        2,
    ),
    "parameters that depend on the data": (
        tfd.JointDistributionNamed({
            "y": tfd.Sample(tfd.Normal(0.0, 1.0), 3),
            "mean": lambda y: tfd.Normal(y[..., 0], 1.0),
        }),
        None,
    ),
    "draws in each column": (
        plane(lambda mean: tfd.Independent(tfd.Sample(tfd.Normal(mean, 1.0), 4), 1)), None
    ),
}  # fmt: skip


@pytest.mark.parametrize(("joint", "row"), ROWS.values(), ids=ROWS)
def test_a_sample_is_a_set_of_rows(joint, row):
    assert sources.of_joint(joint, ("y",)).row == row


def test_several_observed_parts_are_no_set_of_rows():
    parts = {"mu": tfd.Normal(0.0, 1.0)}
    parts |= {n: lambda mu: tfd.Sample(tfd.Normal(mu, 1.0), 3) for n in ("a", "b")}
    assert sources.of_joint(tfd.JointDistributionNamed(parts), ("a", "b")).row is None


def test_a_fit_of_a_sample_does_not_depend_on_the_order(tmp_path):
    joint = tfd.JointDistributionNamed(
        {"mu": tfd.Normal(0.0, 1.0), "y": lambda mu: tfd.Sample(tfd.Normal(mu, NOISE), 6)}
    )
    fit = avb_tf.fit_amortised(joint, steps=500, **TINY)
    fit.save(tmp_path / "fit")
    y = data(6)
    truth = exact(y)
    u = {"mu": truth.ppf(np.linspace(0.1, 0.9, 9)).astype(np.float32)}
    log_q = fit.log_prob(u, y)
    np.testing.assert_allclose(fit.log_prob(u, y[::-1]), log_q, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(log_q, truth.logpdf(u["mu"]), atol=0.25)
    loaded = avb_tf.AmortisedFit.load(tmp_path / "fit")
    np.testing.assert_allclose(loaded.log_prob(u, y), log_q, rtol=1e-5, atol=1e-5)
