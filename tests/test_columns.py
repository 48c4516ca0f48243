"""Tests a table's likelihood and the encoder's inputs against numpy and scipy, by column."""

import json

import keras
import numpy as np
import pandas as pd
import pytest
import scipy.special
import scipy.stats
import tensorflow as tf

import avb_tf
from avb_tf import inference
from avb_tf.columns import TableLikelihood, TableTrunk
from avb_tf.data.table import Column, Table
from avb_tf.errors import UserError
from avb_tf.likelihoods import SCALE_FLOOR, log_likelihood
from avb_tf.serving import signatures

NAN = np.nan
# The kinds are not in order, so that the order of groups differs from that of columns.
TABLE = Table(
    (
        Column("age", "gaussian", 50.0, 10.0),
        Column("city", "category", categories=("Oslo", "Paris", "Rome")),
        Column("visits", "poisson", 2.0, 0.7),
        Column("income", "student_t", 3.0, 1e-3),
        Column("days", "exposure", 1.5, 0.5),
        Column("ill", "bernoulli"),
        Column("height", "gaussian", -1.0, 4.0),
        Column("calls", "negative_binomial", 0.5, 1.2),
    ),
    missing=True,
)
LIKELIHOOD = TableLikelihood(TABLE)
X = np.array(
    [
        [62.0, 2.0, 3.0, 3.002, 4.0, 1.0, 0.0, 0.0],
        [NAN, 0.0, NAN, 2.999, 0.5, 0.0, NAN, 7.0],
        [41.0, NAN, 0.0, NAN, 9.0, NAN, 3.5, NAN],
        [NAN, NAN, NAN, NAN, 1.0, NAN, NAN, NAN],
    ],
    np.float32,
)
# The decoder's output, by column: [3, 4, parameters].
RNG = np.random.default_rng(0)
SIZES = {"age": 2, "height": 2, "city": 3, "visits": 1, "income": 3, "ill": 1, "calls": 2}
OUTPUTS = {name: RNG.normal(size=(3, 4, size)).astype(np.float32) for name, size in SIZES.items()}
FLAT = tf.concat(list(OUTPUTS.values()), -1)  # groups in the order of their first column


def scale(raw):
    return SCALE_FLOOR + np.logaddexp(0.0, raw)


def by_hand():
    """Returns {name: (log density [3, 4], mean [3, 4] for the exposures of X)}."""
    o, x = ({k: v.astype(np.float64) for k, v in OUTPUTS.items()}, dict(enumerate(X.T)))
    days = x[4]
    terms = {}
    for name, i, shift, unit in (("age", 0, 50.0, 10.0), ("height", 6, -1.0, 4.0)):
        loc, width = shift + unit * o[name][..., 0], unit * scale(o[name][..., 1])
        terms[name] = scipy.stats.norm.logpdf(x[i], loc, width), loc
    loc = 3.0 + 1e-3 * o["income"][..., 0]
    degrees = 2.0 + np.logaddexp(0.0, o["income"][..., 2])
    width = 1e-3 * scale(o["income"][..., 1])
    terms["income"] = scipy.stats.t.logpdf(x[3], degrees, loc, width), loc
    log_p = scipy.special.log_softmax(o["city"], -1)
    code = np.nan_to_num(x[1]).astype(int)
    terms["city"] = np.where(np.isnan(x[1]), NAN, log_p[:, np.arange(4), code]), None
    rate = 2.0 * days * np.exp(o["visits"][..., 0])
    terms["visits"] = scipy.stats.poisson.logpmf(x[2], rate), rate
    rate = 0.5 * days * np.exp(o["calls"][..., 0])
    failures = np.exp(-o["calls"][..., 1])
    terms["calls"] = scipy.stats.nbinom.logpmf(x[7], failures, failures / (failures + rate)), rate
    p = scipy.special.expit(o["ill"][..., 0])
    terms["ill"] = scipy.stats.bernoulli.logpmf(np.nan_to_num(x[5]), p), p
    terms["ill"] = np.where(np.isnan(x[5]), NAN, terms["ill"][0]), p
    return terms


def test_the_log_density_is_the_sum_over_the_columns_that_are_there():
    expected = sum(np.nan_to_num(log_p) for log_p, _ in by_hand().values())
    actual = log_likelihood(LIKELIHOOD, FLAT, tf.constant(X))
    np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=1e-3)
    np.testing.assert_array_equal(actual[:, 3], 0.0)


def test_a_missing_value_has_no_gradient_and_makes_none_nan():
    with tf.GradientTape() as tape:
        tape.watch(FLAT)
        value = tf.reduce_sum(log_likelihood(LIKELIHOOD, FLAT, tf.constant(X)))
    gradient = tape.gradient(value, FLAT).numpy()
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[:, 3], 0.0)
    np.testing.assert_array_equal(gradient[:, 1, :4], 0.0)  # age and height
    assert (gradient[:, 0] != 0.0).all()


def test_means_are_in_the_users_units_and_have_the_exposures_of_x():
    hand = {name: mean for name, (_, mean) in by_hand().items()}
    probabilities = scipy.special.softmax(OUTPUTS["city"], -1)
    mean = np.asarray(LIKELIHOOD.mean(FLAT))
    assert mean.shape == (3, 4, 8)
    predicted = np.asarray(LIKELIHOOD.predictive_mean(FLAT, tf.constant(X)))
    for i, column in enumerate(TABLE.columns):
        if column.name == "city":
            np.testing.assert_array_equal(mean[..., i], probabilities.argmax(-1))
            np.testing.assert_array_equal(predicted[:, i], probabilities.mean(0).argmax(-1))
        elif column.name == "days":
            np.testing.assert_array_equal(mean[..., i], 1.0)
            np.testing.assert_array_equal(predicted[:, i], X[:, i])
        else:
            exposure = X[:, 4] if column.name in ("visits", "calls") else 1.0
            expected = hand[column.name]
            np.testing.assert_allclose(mean[..., i], expected / exposure, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(predicted[:, i], expected.mean(0), rtol=1e-4, atol=1e-5)


def test_samples_have_the_mean_and_suit_the_columns():
    outputs = tf.repeat(FLAT[:1, :1], 20_000, axis=1)
    x = LIKELIHOOD.distribution(outputs).sample((0, 1))
    assert x.shape == (1, 20_000, 8)
    assert LIKELIHOOD.valid(x[0])
    x, mean = np.asarray(x[0], np.float64), np.asarray(LIKELIHOOD.mean(outputs))[0, 0]
    error = x.std(0) / np.sqrt(len(x))
    ordered = [i for i, c in enumerate(TABLE.columns) if c.kind != "category"]
    assert (np.abs(x.mean(0) - mean)[ordered] <= 5 * error[ordered] + 1e-6).all()
    shares = np.bincount(x[:, 1].astype(int), minlength=3) / len(x)
    expected = scipy.special.softmax(OUTPUTS["city"][0, 0])
    assert (np.abs(shares - expected) < 5 * np.sqrt(expected / len(x))).all()


def test_an_encoder_reads_standard_numbers_and_flags_for_what_is_missing():
    read = TableTrunk(TABLE, 1, 0)(tf.constant(X)).numpy()
    # age, height, their flags; city, flag; visits, flag; income, flag; days; ill, flag; calls, flag
    expected = [1.2, 0.25, 0, 0, 0, 0, 1, 0, np.log(4 / 3) / 0.7, 0]
    expected += [np.arcsinh(2.0), 0, (np.log(4) - 1.5) / 0.5, 1, 0, -np.log(1.5) / 1.2, 0]
    np.testing.assert_allclose(read[0], expected, atol=1e-3)
    nothing = [0, 0, 1, 1, 0, 0, 0, 1, 0, 1, 0, 1, -3, 0, 1, 0, 1]
    np.testing.assert_allclose(read[3], nothing, atol=1e-6)
    assert np.isfinite(read).all()


def test_the_features_of_a_trunk_may_end_with_its_inputs():
    inputs = TableTrunk(TABLE, width=4, depth=0, linear=True)(X)
    features = TableTrunk(TABLE, width=4, depth=2, linear=True)(X)
    assert features.shape == (4, 4 + inputs.shape[1])
    np.testing.assert_array_equal(features[:, 4:], inputs)


def test_training_hides_known_values_but_no_exposure():
    chosen = np.random.default_rng(0).random(X.shape) < 0.5
    hidden = LIKELIHOOD.hidden(tf.constant(X), tf.constant(chosen)).numpy()
    chosen[:, 4] = False  # days
    np.testing.assert_array_equal(hidden, np.where(chosen, NAN, X))


def test_each_step_hides_other_values(monkeypatch):
    table = Table((Column("a", "gaussian"), Column("b", "gaussian")), missing=True)
    model = avb_tf.build("vae", table, latent_dim=1, width=4, depth=1, hide=0.3)
    model.compile(run_eagerly=True)
    seen, x = [], np.ones([5000, 2], np.float32)
    parameters = type(model.encoder).parameters
    monkeypatch.setattr(
        type(model.encoder), "parameters",
        lambda self, x, training=False: seen.append(x.numpy()) or parameters(self, x, training),
    )  # fmt: skip
    model.fit(x, batch_size=5000, epochs=2, verbose=0)
    first, second = (np.isnan(rows) for rows in seen)
    assert abs(first.mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / x.size)
    assert abs(second.mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / x.size)
    assert abs((first & second).mean() - 0.09) < 5 * np.sqrt(0.09 * 0.91 / x.size)
    seen.clear()
    model.evaluate(x, batch_size=5000, verbose=0)
    model.reconstruct(x)
    assert not np.isnan(seen).any()


NOTHING = Table((Column("a", "gaussian"),))


@pytest.mark.parametrize(
    ("shape", "hide", "message"),
    [
        (TABLE, -0.1, "hide is -0.1; expected 0 or more, and less than 1"),
        (TABLE, 1.0, "hide is 1.0; expected 0 or more, and less than 1"),
        (TABLE, NAN, "hide is nan; expected 0 or more"),
        (NOTHING, 0.2, "hide is 0.2, but the table has no missing values; expected 0, or"),
        ((6,), 0.2, "hide is 0.2, but x is no table; expected 0, or a table"),
    ],
)
def test_a_share_that_cannot_be_hidden_is_refused(shape, hide, message):
    with pytest.raises(UserError, match=message):
        avb_tf.build("vae", shape, hide=hide)


# Imputation by importance sampling, beside the conditional mean of a factor analysis.


@pytest.mark.parametrize("method", ["vae", "avb_ac"])
def test_imputed_values_are_conditional_means(method):
    random = np.random.default_rng(1)
    loadings, noise = random.normal(size=[2, 4]), np.array([0.3, 0.5, 0.8, 0.4])
    shift, unit = np.array([1.0, -2.0, 0.0, 30.0]), np.array([1.0, 2.0, 0.5, 10.0])
    table = Table(
        tuple(Column(str(i), "gaussian", shift[i], unit[i]) for i in range(4)), missing=True
    )
    model = avb_tf.build(method, table, latent_dim=2, width=3, depth=1, ema_decay=0.0)
    for layer in (model.encoder.mean, model.encoder.log_scale):  # q is the prior
        layer.set_weights([np.zeros_like(weight) for weight in layer.get_weights()])
    raw = np.log(np.expm1(noise - SCALE_FLOOR))  # the scale is SCALE_FLOOR + softplus(raw)
    kernel = np.zeros([3 + 2, 4, 2])
    kernel[3:, :, 0] = loadings
    model.decoder.head.set_weights([kernel.reshape(5, 8), np.stack([np.zeros(4), raw], -1).ravel()])
    x = random.normal(size=[5, 2]) @ loadings + noise * random.normal(size=[5, 4])
    absent = np.array([[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1], [1, 1, 0, 1], [1, 1, 1, 1]]) > 0
    rows = np.where(absent, NAN, shift + unit * x).astype(np.float32)
    imputed = np.asarray(model.reconstruct(rows, samples=40_000))
    covariance = loadings.T @ loadings + np.diag(noise**2)
    for row, hidden, values in zip(x, absent, imputed, strict=True):
        known = ~hidden
        part = covariance[np.ix_(known, known)]
        expected = covariance[np.ix_(hidden, known)] @ np.linalg.solve(part, row[known])
        # Of 40,000 draws at least 1,000 are effective, of a variable with a scale of 1 at most.
        np.testing.assert_allclose(((values - shift) / unit)[hidden], expected, atol=0.1)


def test_a_unit_of_measurement_changes_the_density_by_its_log_alone():
    metres, x = Column("height", "gaussian", 1.7, 0.1), np.array([[1.65], [1.9]], np.float32)
    inches = Column("height", "gaussian", 170.0, 10.0)
    outputs = RNG.normal(size=(2, 2)).astype(np.float32)
    values = [
        log_likelihood(TableLikelihood(Table((column,))), outputs, tf.constant(rows)).numpy()
        for column, rows in ((metres, x), (inches, 100 * x))
    ]
    np.testing.assert_allclose(values[0] - values[1], np.log(100.0), rtol=1e-4)


BAD = {
    "infinite": (0, np.inf), "a code too high": (1, 3.0), "half a code": (1, 0.5),
    "negative count": (2, -1.0), "half a count": (7, 0.5), "no zero or one": (5, 2.0),
    "negative exposure": (4, -1.0), "an exposure of 0": (4, 0.0), "no exposure": (4, NAN),
}  # fmt: skip


@pytest.mark.parametrize(("column", "value"), BAD.values(), ids=BAD)
def test_arrays_and_graphs_refuse_the_same_values(column, value):
    assert LIKELIHOOD.valid(tf.constant(X))
    np.testing.assert_array_equal(TABLE.array(X), X)
    x = X.copy()
    x[0, column] = value
    assert not LIKELIHOOD.valid(tf.constant(x))
    with pytest.raises(UserError, match=f"column '{TABLE.columns[column].name}' has .* in row 0"):
        TABLE.array(x)


def test_values_may_be_missing_only_where_the_table_says_so():
    full = Table(TABLE.columns)
    assert not TableLikelihood(full).valid(tf.constant(X))
    assert TableLikelihood(full).valid(tf.constant(X[:1]))
    with pytest.raises(UserError, match=r"column 'age' has no value in row 1.*missing=True"):
        full.array(X)


# The model.


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    made = avb_tf.build(
        "avb_ac", TABLE, latent_dim=2, width=8, depth=1, bases=2, basis_width=4,
        adversary_width=8, condition="x",
    )  # fmt: skip
    made.compile(run_eagerly=True)
    return made


def test_a_model_trains_on_frames_and_arrays_with_missing_values(model):
    frame = TABLE.frame(X)
    history = model.fit(frame, epochs=2, batch_size=4, verbose=0, validation_data=frame).history
    assert np.isfinite(history["elbo"]).all()
    assert int(model.skipped.numpy()) == 0
    array = model.evaluate(X, verbose=0)
    assert np.isfinite(array).all()
    np.testing.assert_allclose(model.predict(X, verbose=0), model.reconstruct(X), rtol=1e-5)
    assert model.evaluate(tf.data.Dataset.from_tensors(X), verbose=0) == pytest.approx(array)
    shuffled = frame[frame.columns[::-1]]
    np.testing.assert_array_equal(model.encode(shuffled), model.encode(X))


def test_what_is_wrong_in_a_frame_is_one_line(model):
    frame = TABLE.frame(X)
    for wrong, message in (
        (frame.assign(city="Bergen"), "'city' has 'Bergen' in row 0.*categories 'Oslo', 'Paris'"),
        (frame.drop(columns="city"), "add 'city'"),
        (frame.assign(other=1.0), "unknown column 'other'"),
        (frame.assign(visits=-1), "'visits' has -1 in row 0.*a count"),
        (frame.assign(age="old"), "'age' has 'old' in row 0"),
    ):
        for use in (model.fit, model.encode, model.reconstruct):
            with pytest.raises(UserError, match=message) as error:
                use(wrong)
            assert "\n" not in str(error.value)


def test_reconstructions_fill_a_frame_in_its_own_units(model):
    frame = TABLE.frame(X, index=[3, 5, 7, 9])
    filled = frame.fillna(model.reconstruct(frame, samples=3))
    assert not filled.isna().to_numpy().any()
    assert set(filled["city"]) <= {"Oslo", "Paris", "Rome"}
    assert list(filled.index) == [3, 5, 7, 9]
    pd.testing.assert_series_equal(filled["age"][[3, 7]], frame["age"][[3, 7]])
    array = np.asarray(model.reconstruct(X, samples=3))
    for name in ("age", "visits"):
        i = list(frame.columns).index(name)
        absent = frame[name].isna().to_numpy()
        np.testing.assert_allclose(filled[name][absent], array[absent, i], rtol=1e-6)


def test_reconstructions_need_a_draw(model):
    with pytest.raises(UserError, match="samples is 0; expected 1 or more"):
        model.reconstruct(X, samples=0)


def test_reconstructions_of_many_rows_come_in_parts(model, monkeypatch):
    many = np.tile(X, [5, 1])[:18]
    monkeypatch.setattr(inference, "_NUMBERS", 3 * 256 * 4)  # four rows
    sizes, decoder = [], model.averaged_decoder
    monkeypatch.setattr(
        model, "averaged_decoder", lambda z: sizes.append(z.shape.as_list()) or decoder(z)
    )
    means = model.reconstruct(many, samples=3)
    assert sizes == [[3, 4, 2]] * 4 + [[3, 2, 2]]
    assert means.shape == many.shape
    np.testing.assert_allclose(means[:4], model.reconstruct(X, samples=3), rtol=1e-5)
    assert (np.asarray(means[:4]) != np.asarray(means[4:8])).any()  # other draws


def test_a_frame_whose_columns_have_numbers_for_names_is_filled():
    frame = pd.DataFrame(np.random.default_rng(0).normal(size=[8, 3])).mask(np.eye(8, 3) > 0)
    table = Table.of(frame, missing=True)
    model = avb_tf.build("vae", table, latent_dim=1, width=4, depth=1, ema_decay=0.0)
    assert not frame.fillna(model.reconstruct(frame)).isna().to_numpy().any()
    assert list(model.reconstruct(frame[[2, 0, 1]]).columns) == [0, 1, 2]


def test_a_file_keeps_the_table(tmp_path):
    model = avb_tf.build("vae", TABLE, latent_dim=1, width=4, depth=1, ema_decay=0.0)
    model.save(tmp_path / "model.keras")
    loaded = avb_tf.load_model(tmp_path / "model.keras")
    assert loaded.table == model.table == TABLE
    assert Table.from_config(json.loads(json.dumps(TABLE.get_config()))) == TABLE
    np.testing.assert_allclose(loaded.reconstruct(X), model.reconstruct(X), rtol=1e-6)


def test_served_signatures_take_missing_values_and_refuse_others(model):
    served = signatures.of_model(model, importance_samples=32, max_batch=8)
    assert not any(name.endswith("_uint8") for name in served)
    encode = served["serving_default"]
    answer = encode(tf.constant(X))["reconstruction"].numpy()
    assert np.isfinite(answer).all()
    np.testing.assert_allclose(
        encode(tf.constant(X[1:2]))["reconstruction"], answer[1:2], rtol=1e-4
    )
    with pytest.raises(tf.errors.InvalidArgumentError, match="columns cannot have"):
        encode(tf.constant(X * np.float32(1.5)))


def test_a_table_and_its_likelihood_go_together():
    with pytest.raises(UserError, match="likelihood is 'table' with no table"):
        avb_tf.build("vae", (3,), likelihood="table")
    with pytest.raises(UserError, match="likelihood is 'poisson' with a table"):
        avb_tf.build("vae", TABLE, likelihood="poisson")
    with pytest.raises(UserError, match="authors' networks for images"):
        avb_tf.build("avb_ac_paper", TABLE)
