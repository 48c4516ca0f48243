import contextlib

import numpy as np
import pandas
import pytest
import tensorflow as tf
from scipy import stats
from tensorflow_probability import bijectors as tfb
from tensorflow_probability import distributions as tfd

import avb_tf
from avb_tf import UserError
from avb_tf.posteriors import hmc, models, start
from avb_tf.posteriors.functions import value_and_gradient
from avb_tf.posteriors.target import first_line

QUICK = {"steps": 50, "verbose": False, "draws": 256, "adversary_steps": 1, "blocks": 1}
QUICK |= {"chart_steps": 0}  # tracing the chart takes longer than training it
COUNTS = np.array([3, 5, 4, 8, 2], np.float32)


def poisson(scale=1.0, dtype=np.float32):
    """Returns a Gamma(2, 1) prior on the rate of five counts: the posterior is Gamma(24, 6)."""
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


def test_the_jacobian_of_a_constrained_parameter():
    # The density of the log rate is the rate times the density of the rate.
    target = models.make(poisson(), {"n": COUNTS})
    u = np.linspace(-1.0, 3.0, 9, dtype=np.float32)[:, np.newaxis]
    rate = target.constrain(u)["rate"].numpy()
    evidence = (
        stats.gamma.logpdf(rate, 2.0)
        + stats.poisson.logpmf(COUNTS, rate[:, np.newaxis]).sum(-1)
        - stats.gamma.logpdf(rate, 24.0, scale=1.0 / 6.0)
    )
    with tf.GradientTape() as tape:
        x = tf.constant(u)
        tape.watch(x)
        y = target.constrain(x)["rate"]
    volume = np.log(tape.gradient(y, x).numpy()[:, 0])
    expected = stats.gamma.logpdf(rate, 24.0, scale=1.0 / 6.0) + evidence + volume
    np.testing.assert_allclose(target.log_density(u), expected, rtol=1e-4)
    np.testing.assert_allclose(target.unconstrain({"rate": rate}), u, atol=1e-5)


def test_a_float64_model_gives_float64_draws_of_the_right_distribution():
    fit = avb_tf.fit_posterior(poisson(dtype=np.float64), {"n": COUNTS.astype(float)}, **QUICK)
    rate = fit.sample(2000)["rate"]
    assert rate.dtype == tf.float64
    assert stats.kstest(rate, stats.gamma(24.0, scale=1.0 / 6.0).cdf).statistic < 0.06


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


def unstacked(b):
    first, second = tf.unstack(b)
    return -0.5 * first**2 - 0.5 * (second - first**2) ** 2


def tensordot(b):  # with a batch this would mix draws and features
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    return -tf.reduce_sum((tf.tensordot(x, b, 1) - 1.0) ** 2) - tf.reduce_sum(b**2)


def scanned(b):  # Euler steps of y' = -b y
    y = tf.scan(lambda y, _: y - 0.1 * b[0] * y, tf.range(4), initializer=tf.constant(1.0))
    return -tf.reduce_sum((y - 0.5) ** 2) - tf.reduce_sum(b**2)


ONE_DRAW = {
    "indexing": (lambda b: -0.5 * b[0] ** 2 - 0.5 * (b[1] - b[0] ** 2) ** 2, 2),
    "unstack": (unstacked, 2),
    "gather": (lambda b: -tf.reduce_sum(tf.gather(b, [0, 1, 1]) ** 2), 2),
    "tensordot": (tensordot, 3),
    "scan": (scanned, 1),
    "strided": (lambda b: -tf.reduce_sum((b[1:] - b[:-1]) ** 2) - b[0] ** 4, 4),
    "solve": (lambda b: -tf.reduce_sum(
        tf.linalg.solve(tf.eye(2) + tf.linalg.diag(b**2), b[:, tf.newaxis]) ** 2), 2),
    "foldl": (lambda b: tf.foldl(lambda total, x: total - x**2, b, 0.0), 3),
}  # fmt: skip
BATCHES = {
    "sum over axis 1": (lambda x: -0.5 * tf.reduce_sum(x**2, axis=1) - x[:, 0] ** 4, 2),
    "einsum": (lambda x: -tf.einsum("ni,ij,nj->n", x, np.eye(2, dtype=np.float32), x), 2),
    "columns": (lambda x: -(x[:, 0] ** 2) - (x[:, 1] - x[:, 0]) ** 2, 2),
    "matmul": (lambda x: -tf.reduce_sum(tf.matmul(x, tf.eye(3)) ** 2, 1), 3),
}
BROADCAST = {"broadcast": (lambda x: -tf.reduce_sum(x**2, -1) + tf.sin(x[..., 0]), 3)}


@pytest.mark.parametrize("name", [*ONE_DRAW, *BATCHES, *BROADCAST])
def test_a_density_of_one_draw_of_a_batch_or_of_both(name):
    log_density, size = (ONE_DRAW | BATCHES | BROADCAST)[name]
    target = models.make(log_density, shape=[size])
    u = np.random.default_rng(0).normal(size=[5, size]).astype(np.float32)
    density, gradient = hmc.scores(target.log_density, target.dim, target.dtype)(u)
    singles = [log_density(tf.constant(one[np.newaxis]))[0] for one in u] if name in BATCHES else [
        log_density(tf.constant(one)) for one in u]  # fmt: skip
    np.testing.assert_allclose(density, singles, rtol=1e-5)
    step = 1e-2 * np.eye(size)[0]
    scores = hmc.scores(target.log_density, target.dim, target.dtype)
    numerical = (scores(u + step)[0] - scores(u - step)[0]) / 2e-2
    np.testing.assert_allclose(gradient[:, 0], numerical, rtol=2e-2, atol=5e-3)


def failing(b):
    """A scan whose body raises while it is traced."""
    return tf.reduce_sum(tf.scan(lambda total, x: total + tf.ones([2, 3]) @ x, b, b[0]))


@pytest.mark.parametrize("log_density", [scanned, failing])
def test_a_scan_that_raises_breaks_no_strategy(log_density):
    """TensorFlow's scan left a caching device behind, and every later strategy failed."""
    with contextlib.suppress(UserError):
        models.make(log_density, shape=[1])
    assert tf.compat.v1.get_variable_scope().caching_device is None
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    assert strategy.run(lambda: tf.constant(1.0)).numpy() == 1.0


@pytest.mark.parametrize("name", ["indexing", "scan", "columns", "broadcast"])
def test_a_density_is_traced_once_for_all_parts_of_a_fit(name):
    log_density, size = (ONE_DRAW | BATCHES | BROADCAST)[name]
    calls = []

    def counted(x):
        calls.append(x)
        return log_density(x)

    target = models.make(counted, shape=[size])
    before = len(calls)
    scores = hmc.scores(target.log_density, target.dim, target.dtype)
    for count in (1, 4, 7):
        scores(np.zeros([count, size]))
        assert target.log_density(tf.zeros([count, size])).shape == (count,)
    assert len(calls) == before


def test_the_gradient_of_a_density_is_derived_once_and_never_its_second():
    """A tape within a tape, as in training, would derive the gradient's gradient, which is slow."""
    derived = []

    @tf.custom_gradient
    def square(x):
        def gradient(upstream):
            derived.append(x)
            return 2.0 * upstream * x

        return x**2, gradient

    target = models.make(lambda x: -tf.reduce_sum(square(x), -1), shape=[3])
    before = len(derived)

    @tf.function(autograph=False)
    def trained(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            density, gradient = value_and_gradient(target.log_density, x)
            loss = tf.reduce_sum(density) + tf.reduce_sum(tf.stop_gradient(gradient))
        return gradient, tape.gradient(loss, x)

    x = tf.constant([[1.0, -2.0, 0.5]])
    for slope in trained(x):
        np.testing.assert_allclose(slope, -2.0 * x)
    assert len(derived) == before


def test_a_density_by_indexing_is_fitted():
    log_density, size = ONE_DRAW["indexing"]
    draws = avb_tf.fit_posterior(log_density, shape=[size], **QUICK).sample(4000).numpy()
    assert draws[:, 0].std() == pytest.approx(1.0, abs=0.2)  # x0 is N(0, 1)
    assert draws[:, 1].mean() == pytest.approx(1.0, abs=0.5)  # x1 given x0 is N(x0^2, 1)


# Minibatches.


def slopes(data):
    """Returns the pinned joint of a regression through the origin with unit noise."""
    joint = tfd.JointDistributionNamed(
        {
            "slope": tfd.Normal(0.0, 10.0),
            "y": lambda slope: tfd.Independent(
                tfd.Normal(slope[..., tf.newaxis] * data["x"], 1.0), 1
            ),
        }
    )
    return joint.experimental_pin(y=data["y"])


def test_the_density_by_minibatches_is_unbiased():
    rng = np.random.default_rng(0)
    data = {name: rng.normal(size=3).astype(np.float32) for name in "xy"}
    target = models.make(slopes, data, batch_size=1)
    estimate = target.estimator(0)
    u = np.array([[0.3], [-1.0]], np.float32)
    seen = np.unique(np.round([estimate(u) for _ in range(50)], 3), axis=0)
    # With one row the estimate takes three values equally often: prior + 3 times a likelihood.
    slope = u[:, 0]
    prior = stats.norm.logpdf(slope, scale=10.0)
    rows = stats.norm.logpdf(data["y"][:, np.newaxis], slope * data["x"][:, np.newaxis])
    np.testing.assert_allclose(
        seen[np.argsort(seen[:, 0])], (prior + 3.0 * rows)[np.argsort(rows[:, 0])], atol=1e-3
    )
    np.testing.assert_allclose(target.log_density(u), np.mean(prior + 3.0 * rows, 0), rtol=1e-5)


def test_minibatches_recover_a_conjugate_posterior():
    rng = np.random.default_rng(0)
    x = rng.normal(size=1000).astype(np.float32)
    data = {"x": x, "y": (2.0 * x + rng.normal(size=1000)).astype(np.float32)}
    fit = avb_tf.fit_posterior(slopes, data, batch_size=100, **QUICK)
    precision = 0.01 + np.sum(np.square(data["x"], dtype=np.float64))
    mean, sd = np.sum(data["x"] * data["y"], dtype=np.float64) / precision, precision**-0.5
    draws = fit.sample(4000)["slope"].numpy()
    assert draws.mean() == pytest.approx(mean, abs=0.2 * sd)
    assert draws.std() == pytest.approx(sd, rel=0.15)


def test_minibatches_of_what_has_no_rows():
    joint = slopes({"x": np.ones(2, np.float32), "y": np.ones(2, np.float32)})
    refused("a function from rows", joint, {"y": np.ones(2)}, batch_size=1)
    refused("as many of each", slopes, {"x": np.ones(2), "y": np.ones(3)}, batch_size=1)
    refused("as many of each", slopes, {"x": 1.0, "y": np.ones(3)}, batch_size=1)
    refused("pinned on the rows", lambda data: joint.distribution, {"y": [1.0]}, batch_size=1)

    def local(data):
        joint = tfd.JointDistributionNamed(
            {
                "z": tfd.Sample(tfd.Normal(0.0, 1.0), len(data["y"])),
                "y": lambda z: tfd.Independent(tfd.Normal(z, 1.0), 1),
            }
        )
        return joint.experimental_pin(y=data["y"])

    refused("that all rows share", local, {"y": np.ones(3, np.float32)}, batch_size=1)


# Bad input gives one line.


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


def test_a_density_whose_operations_fail_far_out_is_refused_in_one_line():
    def log_density(x):  # the matrix is singular where tanh(x) rounds to 1
        matrix = tf.eye(2) + tf.tanh(x)[..., tf.newaxis, tf.newaxis] * (1.0 - tf.eye(2))
        return -0.01 * x**2 - 1e-3 * tf.linalg.trace(tf.linalg.inv(matrix))

    with pytest.raises(UserError, match="the log density fails at some parameters") as refused:
        avb_tf.fit_posterior(log_density, shape=[], **QUICK)
    assert "Input is not invertible" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_improper_posterior_that_runs_away():
    refused("runs away", lambda x: tf.reduce_sum(0.0 * x, -1), shape=[2])
    refused("runs away", lambda x: -(x[..., 0] ** 2) + 0.0 * x[..., 1], shape=[2])
    for one_sided in (
        lambda x: x[..., 0],  # a scale without a prior, parametrised by an exponential
        lambda x: -tf.nn.softplus(-x[..., 0]),
        lambda x: -tf.exp(x[..., 0]),
    ):
        refused("runs away", one_sided, shape=[1])


def test_more_dimensions_than_are_taken():
    refused("has 2001 dimensions; expected 2000", lambda x: -tf.reduce_sum(x**2, -1), shape=[2001])


def test_heavy_tails_do_not_run_away():
    cauchy = tfd.Cauchy(0.0, 1.0)
    target = models.make(lambda x: tf.reduce_sum(cauchy.log_prob(x), -1), shape=[3])
    assert np.isfinite(start.find(target, seed=0).mean).all()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"wdith": 3}, "unknown setting 'wdith'"),
        ({"draws": 0}, "draws is 0; expected a whole number of at least 1"),
        ({"blocks": True}, "blocks is True; expected a whole number"),
        ({"chart_steps": 1.5}, "chart_steps is 1.5; expected a whole number of at least 0"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0; expected a number of at least 0.0 and below 1"),
        ({"annealing": float("nan")}, "annealing is nan"),
        ({"learning_rate": float("inf")}, "learning_rate is inf; expected a number of at least"),
        ({"width": "64"}, "width is '64'"),
    ],
)
def test_settings_out_of_range(setting, message):
    refused(message, lambda x: -(x[..., 0] ** 2), shape=[1], **setting)


def test_a_density_that_tensorflow_cannot_follow():
    refused("expected TensorFlow's operations", lambda x: stats.norm.logpdf(x).sum(-1), shape=[2])
    refused("has no gradient", lambda x: tf.zeros(tf.shape(x)[:-1]), shape=[2])


def test_what_is_observed_of_a_joint_is_told_by_name():
    refused("of type ndarray; expected a dict", poisson(), COUNTS)
    refused("nothing is observed", poisson(), {})


def test_observed_values_that_are_no_data():
    joint = tfd.JointDistributionNamed(
        {"m": tfd.Normal(0.0, 1.0), "y": lambda m: tfd.Sample(tfd.Normal(m, 1.0), 20)}
    )
    y = np.zeros(20, np.float32)
    y[[3, 7]] = np.nan
    refused(r"observed 'y' is NaN at \[3\] and 2 of 20", joint, {"y": y})
    refused("all parts are observed, m, y", joint, {"y": np.zeros(20), "m": 0.0})
    refused(r"observed 'y' has shape \(\); expected \(20,\)", joint, {"y": 1.0})
    refused(r"observed 'y' has shape \(19,\)", joint, {"y": np.zeros(19, np.float32)})
    refused(r"observed 'y' has shape \(1, 1\)", joint, {"y": np.zeros([1, 1], np.float32)})


def test_what_tfp_raises_is_told_in_one_line():
    def failing(m):
        raise RuntimeError("a model's own message")

    joint = tfd.JointDistributionNamed({"m": tfd.Normal(0.0, 1.0), "y": failing})
    refused("RuntimeError: a model's own message", joint, {"y": 1.0})


def test_a_matrix_normal_that_tfp_takes_one_draw_at_a_time():
    eye = tf.linalg.LinearOperatorIdentity(2)
    joint = tfd.JointDistributionNamed(
        {
            "m": tfd.MatrixNormalLinearOperator(tf.zeros([2, 2]), eye, eye),
            "y": lambda m: tfd.Sample(tfd.Normal(tf.reduce_sum(m, [-1, -2]), 1.0), 3),
        }
    )
    target = models.make(joint, {"y": np.zeros(3, np.float32)})
    u = np.random.default_rng(0).normal(size=[5, 4]).astype(np.float32)
    density = hmc.scores(target.log_density, target.dim, target.dtype)(u)[0]
    expected = stats.norm.logpdf(u).sum(1) + 3 * stats.norm.logpdf(u.sum(1))
    np.testing.assert_allclose(density, expected, rtol=1e-5)


def test_a_joint_within_a_joint():
    inner = tfd.JointDistributionSequential([tfd.Normal(0.0, 1.0), tfd.Normal(0.0, 1.0)])
    outer = tfd.JointDistributionNamed({"a": inner, "y": lambda a: tfd.Normal(a[0] + a[1], 1.0)})
    refused("a joint within a joint", outer, {"y": 1.0})


def test_minibatches_of_rows_in_another_precision_and_of_a_pin_that_is_no_row():
    data = {"x": np.ones(3), "y": np.ones(3)}  # float64; the model computes in float32
    refused("found dtypes {'x': 'float64'", slopes, data, batch_size=1)

    def calibrated(rows):
        joint = tfd.JointDistributionNamed(
            {
                "b": tfd.Normal(0.0, 1.0),
                "c": lambda b: tfd.Normal(b, 1.0),
                "y": lambda b: tfd.Sample(tfd.Normal(b, 1.0), len(rows["y"])),
            }
        )
        return joint.experimental_pin(y=rows["y"], c=0.5)

    refused("'c' is pinned to", calibrated, {"y": np.ones(3, np.float32)}, batch_size=1)


def test_a_shape_may_be_a_number_of_any_integer_type():
    for shape in (2, [np.int64(2)]):
        target = models.make(lambda x: -tf.reduce_sum(x**2, -1), shape=shape)
        assert target.dim == 2
        assert target.constrain(tf.zeros([5, 2])).shape == (5, 2)


def test_parameters_of_a_sequential_joint_keep_their_names():
    joint = tfd.JointDistributionSequential(
        [
            tfd.HalfNormal(1.0, name="tau"),
            tfd.Normal(0.0, 1.0, name="mu"),
            lambda mu, tau: tfd.Normal(mu, tau, name="y"),
        ]
    )
    assert models.make(joint, {"y": 1.0}).names == ["tau", "mu"]


@pytest.mark.parametrize(
    ("effort", "told"),
    [
        ({"steps": 0}, "steps is 0; expected a whole number of at least 1"),
        ({"steps": 10.5}, "steps is 10.5; expected a whole number"),
        ({"steps": True}, "steps is True; expected a whole number"),
        ({"seconds": 0.0}, "seconds is 0.0; expected a number of at least 0.001"),
        ({"seconds": -1}, "seconds is -1; expected a number"),
        ({"seconds": float("nan")}, "seconds is nan; expected a number"),
        ({"seconds": float("inf")}, "seconds is inf; expected a number"),
        ({"seconds": "60"}, "seconds is '60'; expected a number"),
        ({"seed": -1}, "seed is -1; expected a whole number of at least 0"),
        ({"seed": 2**40}, "seed is 1099511627776; expected a whole number"),
        ({"seed": None}, "seed is None; expected a whole number"),
        ({"seed": 1.5}, "seed is 1.5; expected a whole number"),
    ],
)
def test_an_effort_or_a_seed_that_is_no_such_number(effort, told):
    refused(told, lambda x: -tf.reduce_sum(x**2, -1), shape=[1], **effort)


@pytest.mark.parametrize(
    "observed", [["a"] * 5, [1j] * 5, None, np.array(["2026-01-01"] * 5, "datetime64[D]")]
)
def test_observed_values_that_are_no_real_numbers(observed):
    refused("observed 'n' is of type .*; expected real numbers", poisson(), {"n": observed})


def test_a_column_of_pandas_is_observed_unless_values_are_missing():
    column = pandas.Series([3, 5, 4, 8, 2], dtype="Int64")
    target = models.make(poisson(), {"n": column})
    np.testing.assert_array_equal(target.observed["n"], COUNTS)
    column[1] = pandas.NA
    refused(r"observed 'n' is NaN at .1. and 1 of 5 values are", poisson(), {"n": column})


def test_no_parameters_and_a_density_that_is_random():
    refused("the parameters have no entries", lambda x: -tf.reduce_sum(x**2, -1), shape=[0])
    refused(
        "other values than one by one",
        lambda x: -tf.reduce_sum(x**2, -1) + tf.random.normal([]), shape=[2],
    )  # fmt: skip


def test_a_density_that_reads_variables_such_as_an_emulator(tmp_path):
    """Its weights are fixed: they get no gradient, and a saved fit does not follow them."""
    import keras

    keras.utils.set_random_seed(0)
    network = keras.Sequential([keras.layers.Dense(4, activation="tanh"), keras.layers.Dense(1)])
    network(tf.zeros([1, 2]))
    offset = tf.Variable(0.5)

    def log_density(x):  # a batch alone, which a Keras model needs
        return -0.5 * tf.reduce_sum((x - offset) ** 2, -1) - tf.squeeze(network(x), -1) ** 2

    fit = avb_tf.fit_posterior(log_density, shape=[2], **QUICK)
    drawn = fit.draws(5)
    u = tf.constant(drawn.u, tf.float32)
    np.testing.assert_allclose(fit.target.log_density(u), log_density(u), rtol=1e-4, atol=1e-4)
    with tf.GradientTape() as tape:
        tape.watch(u)
        density = fit.target.log_density(u)
    by_u, by_offset = tape.gradient(density, [u, offset])
    assert by_offset is None
    np.testing.assert_allclose(by_u, value_and_gradient(log_density, u)[1], rtol=1e-4, atol=1e-4)
    fit.save(tmp_path / "fit")
    offset.assign(100.0)
    loaded = avb_tf.load_posterior(tmp_path / "fit")
    np.testing.assert_allclose(loaded.draws(5).log_density, drawn.log_density, rtol=1e-5)


def test_keras_names_the_cause_in_a_later_line():
    error = ValueError("Exception encountered when calling Dense.call().\n\nInput 0 is too small.")
    assert first_line(error) == "Input 0 is too small."
    assert first_line(ValueError("")) == "no message"
