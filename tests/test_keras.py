"""Tests the model with Keras's methods: inputs, callbacks, weights, files and on-batch methods."""

import pickle
import subprocess
import sys
import textwrap
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow_probability import distributions as tfd

import avb_tf
from avb_tf import likelihoods
from avb_tf.encoders import GaussianEncoder
from avb_tf.errors import UserError
from avb_tf.networks import DenseDecoder, DenseTrunk

SMALL = {"latent_dim": 2, "width": 8, "depth": 1}
WITH_ADVERSARY = SMALL | {"adversary_width": 8, "adversary_draws": 1}
RANDOM = np.random.default_rng(0)
X = RANDOM.integers(0, 2, (12, 4)).astype(np.float32)
GREY = RANDOM.random((12, 4), np.float32)


def make(method="vae", event_shape=(4,), rates=(1e-3, 3e-3), **changes):
    keras.utils.set_random_seed(0)
    sizes = SMALL if method == "vae" else WITH_ADVERSARY
    model = avb_tf.build(method, event_shape, **{**sizes, **changes})
    model.compile(*map(keras.optimizers.SGD, rates), run_eagerly=True)
    return model


def put(x, value, at=(3, 1)):
    x = x.copy()
    x[at] = value
    return x


# What is wrong with x -> (x, pattern of the message).
WRONG = {
    "intensities of 0..255": (GREY * 255, "x runs from .* to 25.*expected .0, 1.; rescale it"),
    "centred": (2 * GREY - 1, "x runs from -"),
    "infinite": (put(GREY, np.inf), "x runs from .* to inf"),
    "a NaN": (put(GREY, np.nan), "x contains NaN; .* remove or fill them"),
    "integers": (X.astype(int), "x is of type int64; expected uint8, or float"),
    "booleans": (X > 0, "x is of type bool"),
    "binary bytes": (X.astype(np.uint8), "convert x of 0 and 1 to float32"),
    "text": (X.astype(str), "x is of type <U"),
    "too few columns": (X[:, :3], r"x has shape \(\d+, 3\); expected .* \(n, 4\); reshape it"),
    "one example": (X[0], r"x has shape \(4,\)"),
    "no examples": (X[:0], r"x has shape \(0, 4\); expected at least one"),
    "two inputs": ([X, X], r"x has shape \(2, 12, 4\)"),
    "ragged": ([[0.0], [0.0, 1.0]], "x is not an array"),
    "named": ({"x": X}, "x has shape"),
}


@pytest.fixture(scope="module")
def vae():
    return make(likelihood="normal")


@pytest.mark.parametrize(("x", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arrays_are_refused_in_one_line(vae, x, message):
    uses = [vae.fit, vae.evaluate, vae.predict, vae.encode, vae.reconstruct, vae.posterior]
    for use in [*uses, vae.train_on_batch, vae.test_on_batch, vae.predict_on_batch]:
        with pytest.raises(UserError, match=message) as error:
            use(x)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="validation_data"):
        vae.fit(GREY, validation_data=(x,))
    assert int(vae.step.value) == 0


class Batches(keras.utils.PyDataset):
    def __init__(self, x):
        super().__init__()
        self.x = x

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return self.x[4 * index : 4 * index + 4], np.zeros(4)


STREAMS = {
    "dataset": lambda x: tf.data.Dataset.from_tensor_slices(x).batch(4),
    "pairs": lambda x: tf.data.Dataset.from_tensor_slices((x, x[:, 0])).batch(4),
    "sequence": Batches,
    "generator": lambda x: ((x[i : i + 4],) for i in (0, 4, 8)),
}


@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)
def test_streams_are_checked_at_their_first_batch_and_lose_none(vae, stream):
    for bad in ("centred", "a NaN", "integers", "too few columns"):
        x, message = WRONG[bad]
        for use in (vae.fit, vae.evaluate, vae.predict):
            with pytest.raises(UserError, match=message):
                use(stream(x))
    assert len(vae.evaluate(stream(GREY), steps=3, verbose=0)) == len(vae.metrics_names)
    assert vae.means["elbo"].count == 12
    assert vae.predict(stream(GREY), steps=3, verbose=0).shape == (12, 4)


def test_an_unbatched_dataset_is_refused(vae):
    with pytest.raises(UserError, match=r"x has shape \(4,\)"):
        vae.fit(tf.data.Dataset.from_tensor_slices(GREY))


def test_bytes_count_as_on_the_command_line(vae):
    levels = RANDOM.integers(0, 256, (12, 4)).astype(np.uint8)
    for x in (levels, levels / np.float32(255), levels / 255, (levels / 255).tolist()):
        np.testing.assert_allclose(vae.encode(x), vae.encode(levels / 255), rtol=1e-6)
        np.testing.assert_allclose(
            vae.predict(x, verbose=0), vae.predict(levels / 255, verbose=0), rtol=1e-6
        )
        assert vae.test_on_batch(x) == pytest.approx(vae.test_on_batch(levels / 255), rel=1e-5)
        streamed = tf.data.Dataset.from_tensors(x)
        assert vae.evaluate(streamed, verbose=0) == pytest.approx(vae.test_on_batch(x), rel=1e-5)


def test_a_missing_single_channel_is_added():
    model, images = make(event_shape=(3, 3, 1)), RANDOM.random((4, 3, 3), np.float32)
    model.fit(images, batch_size=1, verbose=0)
    assert model.encode(images).shape == (1, 4, 2)
    np.testing.assert_array_equal(model.encode(images), model.encode(images[..., np.newaxis]))
    with pytest.raises(UserError, match=r"\(n, 3, 3, 1\)"):
        model.encode(images[0])
    with pytest.raises(UserError, match=r"\(n, 3, 3, 1\)"):
        model.encode(images.reshape(4, 9))


def test_steps_that_are_skipped_leave_nan_and_one_warning(caplog):
    batches = tf.data.Dataset.from_tensor_slices(put(GREY, np.nan, np.s_[4:, 0])).batch(4)
    some = make()
    with caplog.at_level("WARNING", "absl"):
        history = some.fit(batches, epochs=2, verbose=0).history
        assert np.isfinite(history["elbo"]).all()  # means over the batch that was applied
        assert caplog.text.count("2 of the steps up to 3 skipped") == 1
        assert caplog.text.count("skipped") == 2  # the same line mentions `model.skipped`


def test_where_no_step_counts_the_logs_are_nan_and_training_may_end():
    model = make()
    model.checked = lambda x, place="x": x  # disables the check of the data
    ends = keras.callbacks.TerminateOnNaN()
    history = model.fit(GREY * np.nan, batch_size=4, epochs=3, verbose=0, callbacks=[ends]).history
    assert int(model.step.numpy()) == int(model.skipped.numpy()) == 1
    assert len(history["loss"]) == 1
    assert all(np.isnan(values).all() for values in history.values())


# Callbacks and logs.


def test_names_and_values_of_evaluate_agree():
    model = make("avb_ac", adversary_draws=3)
    values, logs = model.evaluate(X, verbose=0), model.evaluate(X, verbose=0, return_dict=True)
    assert dict(zip(model.metrics_names, values, strict=True)) == pytest.approx(logs)
    assert model.metrics_names[:2] == ["loss", "elbo"]
    assert logs["loss"] == -logs["elbo"] == pytest.approx(logs["kl"] - logs["log_likelihood"])


def test_callbacks_that_watch_the_loss_work(tmp_path):
    model, rates = make("avb_ac", adversary_draws=3, rates=(0.5, 1.0)), []

    class Noted(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            rates.append(float(self.model.adversary_optimizer.learning_rate))

    callbacks = [
        keras.callbacks.EarlyStopping(patience=2, min_delta=1e9),
        keras.callbacks.ModelCheckpoint(tmp_path / "best.keras", save_best_only=True),
        keras.callbacks.ReduceLROnPlateau(factor=0.1, patience=1, min_delta=1e9),
        Noted(),
    ]
    history = model.fit(
        X, batch_size=12, epochs=9, verbose=0, validation_data=(X,), callbacks=callbacks
    ).history
    assert len(history["loss"]) == 3
    assert history["loss"] == pytest.approx([-v for v in history["elbo"]])
    assert rates == pytest.approx([1.0, 1.0, 0.1])
    assert (tmp_path / "best.keras").exists()


def test_a_scheduler_moves_the_adversary_along():
    model = make("avb_ac", adversary_draws=3, rates=(0.1, 0.3))
    halves = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2)
    model.fit(X, batch_size=12, epochs=2, verbose=0, callbacks=halves)
    assert float(model.optimizer.learning_rate) == pytest.approx(0.025)
    assert float(model.adversary_optimizer.learning_rate) == pytest.approx(0.075)


# Sample weights, and arguments that are refused.


@pytest.mark.parametrize("method", ["vae", "avb"])
def test_a_weight_counts_as_so_many_rows(method):
    weights = np.array([2.0, 1.0, 0.0, 3.0], np.float32)
    rows = np.repeat(np.arange(4), weights.astype(int))
    changes = []
    for x, w, index in ((X[:4], weights, np.arange(4)), (X[rows], None, rows)):
        scale = 1.0 if w is None else 4.0 / 6.0  # Keras divides the sum by the rows
        model = make(method, rates=(1e-2 * scale, 1e-2 * scale))
        plain = model._noise
        model._noise = lambda x, stream, dim, plain=plain, index=index: tf.gather(
            plain(tf.zeros([4, 4]), stream, dim), index, axis=1
        )
        if method == "avb":
            model.adversary.head.kernel.assign(0.1 * np.ones([8, 1]))  # T is not 0
        before = [v.numpy() for v in model.trainable_variables]
        logs = model.train_step((x, None, w) if w is not None else (x,))
        after = [v.numpy() for v in model.trainable_variables]
        changes.append(([b - a for a, b in zip(before, after, strict=True)], logs))
    (weighted, logs), (repeated, other) = changes
    for a, b in zip(weighted, repeated, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert any(np.abs(a).max() > 1e-4 for a in weighted)
    for name, value in logs.items():
        assert float(value) == pytest.approx(float(other[name]), abs=1e-5), name


def test_weights_reach_the_step_from_every_input():
    weights = RANDOM.random(12).astype(np.float32)
    batches = tf.data.Dataset.from_tensor_slices((X, X[:, 0], weights)).batch(4)
    runs = [make() for _ in range(3)]
    runs[0].fit(X, sample_weight=weights, batch_size=4, shuffle=False, verbose=0)
    runs[1].fit(batches, verbose=0)
    for i in (0, 4, 8):
        runs[2].train_on_batch(X[i : i + 4], sample_weight=weights[i : i + 4])
    plain = make()
    plain.fit(X, batch_size=4, shuffle=False, verbose=0)
    for other in runs[1:]:
        for a, b in zip(runs[0].weights, other.weights, strict=True):
            np.testing.assert_allclose(a.numpy(), b.numpy(), atol=1e-6)
    pairs = zip(plain.weights, runs[0].weights, strict=True)
    assert any((a.numpy() != b.numpy()).any() for a, b in pairs)


@pytest.mark.parametrize(
    "weights", [np.ones(11), np.ones((12, 1)), -np.ones(12), np.full(12, np.nan), ["a"] * 12]
)
def test_wrong_weights_are_refused(vae, weights):
    for use in (vae.fit, vae.train_on_batch, vae.test_on_batch):
        with pytest.raises(UserError, match="sample_weight"):
            use(GREY, sample_weight=weights)


def test_what_has_no_use_is_refused(vae):
    for use in (vae.fit, vae.train_on_batch):
        with pytest.raises(UserError, match="class_weight has no use"):
            use(GREY, class_weight={0: 1.0})
    for name in ("loss", "metrics", "weighted_metrics", "loss_weights"):
        with pytest.raises(UserError, match=f"compile\\({name}=...\\) has no use"):
            make().compile(**{name: ["mse"]})


@pytest.mark.parametrize("policy", ["float64", "float16", "bfloat16"])
def test_policies_without_float32_are_refused(policy):
    before = keras.config.dtype_policy()
    try:
        keras.config.set_dtype_policy(policy)
        with pytest.raises(UserError, match=f"dtype policy is '{policy}'; .*mixed_bfloat16"):
            make()
    finally:
        keras.config.set_dtype_policy(before)


# Files.


@keras.saving.register_keras_serializable("tests")
def laplace(outputs):
    return tfd.Laplace(tf.sigmoid(outputs[..., 0]), 0.1)


@keras.saving.register_keras_serializable("tests")
def centre(outputs):
    return tf.sigmoid(outputs[..., 0])


def unregistered(outputs):
    return laplace(outputs)


def with_likelihood(distribution):
    encoder = GaussianEncoder(DenseTrunk(8, 1), 2)
    likelihood = likelihoods.Likelihood(1, distribution, centre, False, False)
    return avb_tf.AVB((4,), encoder, DenseDecoder((4,), 1, 8, 1), likelihood=likelihood)


def test_a_likelihood_of_ones_own_is_saved(tmp_path):
    model = with_likelihood(laplace)  # not compiled
    model.save(tmp_path / "model.keras")
    loaded: Any
    for loaded in (
        keras.models.load_model(tmp_path / "model.keras"),
        pickle.loads(pickle.dumps(model)),
        keras.models.clone_model(model),
    ):
        assert loaded.likelihood == model.likelihood
        assert not loaded.compiled
    with pytest.raises(UserError, match="function unregistered is not registered"):
        with_likelihood(unregistered).save(tmp_path / "other.keras")


def test_what_is_frozen_stays_frozen_in_a_file(tmp_path):
    model = make()
    model.encoder.trainable = False
    model.compile(keras.optimizers.Adam(1e-2), run_eagerly=True)
    model.fit(X, batch_size=4, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded: Any
    for loaded in (
        keras.models.load_model(tmp_path / "model.keras"),
        pickle.loads(pickle.dumps(model)),
    ):
        assert not loaded.encoder.trainable_variables
        for a, b in zip(model.optimizer.variables, loaded.optimizer.variables, strict=True):
            np.testing.assert_array_equal(a.numpy(), b.numpy())


@pytest.mark.parametrize("order", ["import avb_tf, keras", "import keras, avb_tf"])
def test_a_fresh_process_loads_a_model_with_keras_alone(order, tmp_path):
    make().save(tmp_path / "model.keras")
    script = f"""
        {order}
        model = keras.models.load_model({str(tmp_path / "model.keras")!r})
        print(type(model) is avb_tf.AVB)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "True\n"


# Calls of the graph.


def test_on_batch_methods_trace_once():
    model = make()
    model.compile(keras.optimizers.SGD(1e-2))
    traces, plain = [], model.train_step
    model.train_step = lambda data: traces.append(1) or plain(data)
    model.fit(X, batch_size=4, verbose=0)  # `fit` has a separate graph
    traces.clear()
    for _ in range(4):
        logs = model.train_on_batch(X, return_dict=True)
    assert len(traces) == 1
    assert int(model.step.value) == 7
    assert logs["loss"] == -logs["elbo"]
    names = dict(zip(model.metrics_names, model.test_on_batch(X), strict=True))
    assert names == pytest.approx(model.test_on_batch(X, return_dict=True))
    assert model.predict_on_batch(X).shape == (12, 4)
    model.fit(X, batch_size=4, verbose=0)
    assert int(model.step.value) == 10


@pytest.mark.parametrize("megabytes", [1, 0])
def test_an_epoch_has_its_steps_whatever_a_call_takes(megabytes):
    x = np.repeat(GREY, 5, 0)  # 15 batches of 4
    model, seen = make(), []
    model.resident_megabytes = megabytes
    model.compile(keras.optimizers.SGD(1e-2), steps_per_execution=4)
    note = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: seen.append(int(model.step.numpy()))
    )
    model.fit(x, batch_size=4, epochs=3, verbose=0, callbacks=[note])
    assert seen == [15, 30, 45]
    endless = tf.data.Dataset.from_tensors(GREY[:4]).repeat()
    model.fit(endless, epochs=2, steps_per_epoch=6, verbose=0, callbacks=[note])
    assert seen[3:] == [51, 57]
    model.evaluate(endless, steps=6, verbose=0)
    assert model.means["elbo"].count == 24


def test_samples_are_new_unless_a_seed_is_given(vae):
    assert np.abs(vae.sample(4) - vae.sample(4)).max() > 1e-4
    np.testing.assert_array_equal(vae.sample(4, seed=3), vae.sample(4, seed=3))
