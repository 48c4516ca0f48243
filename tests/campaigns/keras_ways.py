"""Compares ways of using a Keras model between AVB and a plain Keras model.

    .venv/bin/python -m tests.campaigns.keras_ways

For each way the table shows the outcome for both models: "works", or the error. AVB is "as Keras"
if both work or both fail, "better" if only AVB works, "refused" if AVB says in one line why not,
and "worse" otherwise. The exit status is 1 if any way is "worse".
"""

import contextlib
import copy
import io
import json
import pickle
import sys
import tempfile
import warnings
from pathlib import Path

import keras
import numpy as np
import scipy.sparse
import tensorflow as tf

import avb_tf
from avb_tf import tables
from avb_tf.errors import UserError

X = np.random.default_rng(0).integers(0, 2, (24, 6)).astype(np.float32)
FOLDER = Path(tempfile.mkdtemp())


def ours():
    model = avb_tf.build(
        "avb_ac", (6,), latent_dim=2, width=8, depth=1, bases=2, basis_width=4, adversary_width=8,
        adversary_draws=3,
    )  # fmt: skip
    model.compile()
    return model


@keras.saving.register_keras_serializable("campaigns")
class Plain(keras.Model):
    """An autoencoder whose labels are its inputs."""

    def __init__(self, regularizer=None, **kwargs):
        super().__init__(**kwargs)
        self.inner = keras.layers.Dense(2, kernel_regularizer=regularizer)
        self.outer = keras.layers.Dense(6, "sigmoid")
        self(np.zeros([1, 6]))  # makes all weights

    def call(self, x):
        return self.outer(self.inner(x))

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return super().compute_loss(x, x, y_pred, sample_weight, training)


def plain():
    model = Plain()
    model.compile("adam", "mse")
    return model


def is_ours(model):
    return isinstance(model, avb_tf.AVB)


def compiled(model, *args, **kwargs):
    model.compile(*args, **kwargs, **({} if is_ours(model) else {"loss": "mse"}))
    return model


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return X[8 * index : 8 * index + 8], X[8 * index : 8 * index + 8]


def fitted(model, x=X, **kwargs):
    history = model.fit(x, **{"epochs": 1, "verbose": 0, **kwargs}).history
    assert all(np.isfinite(v).all() for v in history.values()), history
    return model


def dataset(*parts):
    return tf.data.Dataset.from_tensor_slices(parts if len(parts) > 1 else parts[0]).batch(8)


def frame():
    import pandas

    return pandas.DataFrame(X)


def through(name, **kwargs):
    def use(model):
        callback = getattr(keras.callbacks, name)(**kwargs)
        fitted(model, epochs=2, validation_data=(X, X), callbacks=[callback])

    return use


def saved(name):
    def use(model):
        fitted(model).save(FOLDER / name)
        loaded = keras.models.load_model(FOLDER / name)
        np.testing.assert_allclose(loaded(X), model(X), rtol=1e-5)
        fitted(loaded)

    return use


def loaded_without_compiling(model):
    fitted(model).save(FOLDER / "plain.keras")
    loaded = keras.models.load_model(FOLDER / "plain.keras", compile=False)
    fitted(compiled(loaded))


def through_json(model):
    fitted(compiled(keras.models.model_from_json(model.to_json())))


def weights_of_a_file(model):
    fitted(model).save_weights(FOLDER / "w.weights.h5")
    before = [w.numpy() for w in model.weights]
    fitted(model)
    model.load_weights(FOLDER / "w.weights.h5")
    for a, b in zip(before, model.weights, strict=True):
        np.testing.assert_array_equal(a, b.numpy())


def get_and_set_weights(model):
    model.set_weights([0.5 * w for w in model.get_weights()])
    fitted(model)


def pickled(model):
    fitted(pickle.loads(pickle.dumps(model)))


def deep_copied(model):
    fitted(copy.deepcopy(model))


def cloned(model):
    fitted(compiled(keras.models.clone_model(model)))


def from_its_config(model):
    type(model).from_config(json.loads(json.dumps(model.get_config())))


def in_a_functional_model(model):
    inputs = keras.Input((6,))
    outer = keras.Model(inputs, keras.layers.Dense(1)(model(inputs)))
    assert outer.predict(X, verbose=0).shape == (24, 1)


def in_a_sequential_model(model):
    outer = keras.Sequential([keras.Input((6,)), keras.layers.Identity(), model])
    assert outer.predict(X, verbose=0).shape == (24, 6)


def summarised(model):
    lines = []
    model.summary(print_fn=lambda line, **_: lines.append(line), expand_nested=True)
    assert any("params" in line for line in lines)


def plotted(model):
    keras.utils.plot_model(model, FOLDER / "model.png")


def subclassed(model):
    class Sub(type(model)):
        def train_step(self, data):
            return super().train_step(data)

    model.__class__ = Sub
    fitted(model)


def frozen(model):
    layer = model.encoder if is_ours(model) else model.inner
    layer.trainable = False
    before = [w.numpy() for w in layer.weights]
    fitted(compiled(model))
    for a, b in zip(before, layer.weights, strict=True):
        np.testing.assert_array_equal(a, b.numpy())


def all_frozen(model):
    weights = model.trainable_variables
    model.trainable = False
    before = [w.numpy() for w in weights]
    fitted(compiled(model))
    for a, b in zip(before, weights, strict=True):
        np.testing.assert_array_equal(a, b.numpy())


def on_batches(model):
    for batch in dataset(X):
        logs = model.train_on_batch(batch.numpy(), batch.numpy(), return_dict=True)
        assert np.isfinite(logs["loss"])


def own_loop(model):
    optimizer = keras.optimizers.Adam()
    for x in dataset(X):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x, training=True) - x) ** 2)
        pairs = zip(
            tape.gradient(loss, model.trainable_variables), model.trainable_variables, strict=True
        )
        optimizer.apply_gradients([pair for pair in pairs if pair[0] is not None])


def tested_on_batches(model):
    assert np.isfinite(model.test_on_batch(X, X, return_dict=True)["loss"])
    assert model.predict_on_batch(X).shape == X.shape


def called(model):
    assert model(tf.constant(X)).shape == X.shape


def within_a_function(model):
    assert tf.function(model)(tf.constant(X)).shape == X.shape


def evaluated_streams(model):
    assert np.isfinite(model.evaluate(dataset(X), verbose=0)).all()
    assert model.predict(dataset(X), verbose=0).shape == X.shape
    model.evaluate(X, sample_weight=np.ones(24), verbose=0)


def evaluated(model):
    values = model.evaluate(X, X, verbose=0)
    logs = model.evaluate(X, X, verbose=0, return_dict=True)
    values = values if isinstance(values, list) else [values]
    assert dict(zip(model.metrics_names, values, strict=True)).keys() <= logs.keys()


def compiled_with(*args, batch_size=8, **kwargs):
    return lambda model: fitted(compiled(model, *args, **kwargs), batch_size=batch_size)


def compiled_by(name, **kwargs):
    """With a Keras optimizer, made for each model anew."""
    return lambda model: fitted(compiled(model, getattr(keras.optimizers, name)(**kwargs)))


def with_a_schedule(model):
    schedule = keras.optimizers.schedules.ExponentialDecay(1e-3, 10, 0.9)
    fitted(compiled(model, keras.optimizers.Adam(schedule)))


def swapped_averages(model):
    compiled(model, keras.optimizers.Adam(use_ema=True))
    through("SwapEMAWeights", swap_on_epoch=True)(model)


def accumulated(model):
    """Two steps of half a batch each change no weight after the first."""
    compiled(model, keras.optimizers.SGD(0.1, gradient_accumulation_steps=2))
    layer = model.decoder if is_ours(model) else model.outer
    before = layer.get_weights()
    model.train_on_batch(X[:12])
    for a, b in zip(before, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    model.train_on_batch(X[12:])
    assert any((a != b).any() for a, b in zip(before, layer.get_weights(), strict=True))


def regularized(make):
    """A heavy penalty on a kernel shrinks it."""
    penalty = keras.regularizers.L2(1e3)
    if make is plain:
        model = Plain(penalty)
        layer = model.inner
    else:
        layer = keras.layers.Dense(8, kernel_regularizer=penalty)
        encoder = avb_tf.encoders.GaussianEncoder(keras.Sequential([layer]), 2)
        model = avb_tf.AVB((6,), encoder, avb_tf.networks.DenseDecoder((6,), 1, 8, 1))
    before = np.abs(layer.kernel.numpy()).sum()
    fitted(compiled(model, keras.optimizers.Adam(0.01)), epochs=30)
    assert np.abs(layer.kernel.numpy()).sum() < 0.8 * before


def stopped(model):
    def stop(epoch, logs):
        model.stop_training = True

    history = model.fit(
        X, epochs=3, verbose=0, callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=stop)]
    )
    assert len(history.history["loss"]) == 1


def with_a_bar(verbose):
    def use(model):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            fitted(model, verbose=verbose)
        assert "loss" in printed.getvalue()

    return use


def parts(model):
    assert model.count_params() == sum(w.size for w in model.get_weights())
    assert model.get_layer(index=0) is model.layers[0]
    model.reset_metrics()


def after_clearing(model):
    keras.backend.clear_session()
    fitted(model)


def quantized(model):
    model.quantize("int8")
    assert np.isfinite(model.predict(X, verbose=0)).all()


def with_a_loss(model):
    model.compile(loss="mse")
    fitted(model)


def on_devices(*names):
    def use(make):
        with tf.distribute.MirroredStrategy(names).scope():
            model = make()
        fitted(model, batch_size=8)
        through("ReduceLROnPlateau", patience=1)(model)

    return use


def with_policy(name):
    def use(make):
        before = keras.config.dtype_policy()
        keras.config.set_dtype_policy(name)
        try:
            fitted(make())
        finally:
            keras.config.set_dtype_policy(before)

    return use


def tensorboard(model):
    through("TensorBoard", log_dir=FOLDER / "logs", histogram_freq=1)(model)


def backed_up(model):
    through("BackupAndRestore", backup_dir=FOLDER / type(model).__name__)(model)


def exported(model):
    model.export(FOLDER / f"export_{type(model).__name__}")


# Name -> function that takes a compiled model; in OF_MAKERS, the function that makes the model.
WAYS = {
    "fit, array": fitted,
    "fit, list": lambda m: fitted(m, X.tolist()),
    "fit, data frame": lambda m: fitted(m, frame()),
    "fit, tensor": lambda m: fitted(m, tf.constant(X)),
    "fit, tf.data": lambda m: fitted(m, dataset(X)),
    "fit, tf.data of pairs": lambda m: fitted(m, dataset(X, X)),
    "fit, PyDataset": lambda m: fitted(m, Batches()),
    "fit, generator": lambda m: fitted(m, ((X[i : i + 8], X[i : i + 8]) for i in (0, 8, 16))),
    "fit, validation_split": lambda m: fitted(m, validation_split=0.25),
    "fit, validation_data": lambda m: fitted(m, validation_data=(X, X)),
    "fit, sample_weight": lambda m: fitted(m, sample_weight=np.ones(24)),
    "fit, class_weight": lambda m: fitted(m, y=np.zeros(24), class_weight={0: 1.0}),
    "fit, bytes": lambda m: fitted(m, (255 * X).astype(np.uint8)),
    "fit, sparse matrix": lambda m: fitted(m, scipy.sparse.csr_matrix(X)),
    "fit, float64": lambda m: fitted(m, X.astype(np.float64)),
    "fit, validation_freq": lambda m: fitted(
        m, epochs=2, validation_data=dataset(X), validation_freq=2, validation_steps=2
    ),
    "fit, verbose=1": with_a_bar(1),
    "fit, verbose=2": with_a_bar(2),
    "fit, stop_training": stopped,
    "fit, initial_epoch": lambda m: fitted(m, epochs=3, initial_epoch=1),
    "fit, steps_per_epoch": lambda m: fitted(m, dataset(X).repeat(), steps_per_epoch=2),
    "fit, NaN": lambda m: fitted(m, X * np.nan),
    "fit, another shape": lambda m: fitted(m, X[:, :4]),
    "fit again": lambda m: fitted(fitted(m)),
    "fit after clear_session": after_clearing,
    "EarlyStopping": through("EarlyStopping", patience=1, restore_best_weights=True),
    "ModelCheckpoint": through("ModelCheckpoint", filepath=FOLDER / "x.keras", save_best_only=True),
    "ReduceLROnPlateau": through("ReduceLROnPlateau", patience=1),
    "LearningRateScheduler": through("LearningRateScheduler", schedule=lambda e, rate: rate / 2),
    "TerminateOnNaN": through("TerminateOnNaN"),
    "CSVLogger": through("CSVLogger", filename=str(FOLDER / "log.csv")),
    "TensorBoard": tensorboard,
    "BackupAndRestore": backed_up,
    "SwapEMAWeights": swapped_averages,
    "evaluate": evaluated,
    "predict": lambda m: np.testing.assert_equal(m.predict(X, verbose=0).shape, X.shape),
    "evaluate, predict, tf.data and weights": evaluated_streams,
    "train_on_batch": on_batches,
    "own loop with GradientTape": own_loop,
    "test_on_batch, predict_on_batch": tested_on_batches,
    "call": called,
    "call in tf.function": within_a_function,
    "save, .keras": saved("model.keras"),
    "save, .h5": saved("model.h5"),
    "load_model, compile=False": loaded_without_compiling,
    "to_json, model_from_json": through_json,
    "save_weights, load_weights": weights_of_a_file,
    "get_weights, set_weights": get_and_set_weights,
    "pickle": pickled,
    "deepcopy": deep_copied,
    "clone_model": cloned,
    "get_config, from_config": from_its_config,
    "functional model around it": in_a_functional_model,
    "sequential model around it": in_a_sequential_model,
    "summary": summarised,
    "plot_model": plotted,
    "subclass": subclassed,
    "count_params, get_layer, reset_metrics": parts,
    "trainable = False of a part": frozen,
    "trainable = False": all_frozen,
    "optimizer by name": compiled_with("adam"),
    "AdamW, clipnorm": compiled_by("AdamW", learning_rate=1e-3, clipnorm=1.0),
    "learning rate schedule": with_a_schedule,
    "gradient_accumulation_steps": accumulated,
    "run_eagerly": compiled_with(run_eagerly=True, batch_size=24),
    "jit_compile": compiled_with(jit_compile=True),
    "steps_per_execution": compiled_with(steps_per_execution=2),
    "quantize": quantized,
    "compile(loss=)": with_a_loss,
    "export": exported,
}  # fmt: skip
OF_MAKERS = {
    "kernel_regularizer": regularized,
    "MirroredStrategy, one device": on_devices("CPU:0"),
    "MirroredStrategy, two devices": on_devices("CPU:0", "CPU:1"),
    "mixed_bfloat16": with_policy("mixed_bfloat16"),
    "mixed_float16": with_policy("mixed_float16"),
    "float64": with_policy("float64"),
    "float16": with_policy("float16"),
    "bfloat16": with_policy("bfloat16"),
}


def outcome(use, argument) -> tuple[str, str]:
    """Returns the outcome, "works", "refused" or "fails", and the message."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            use(argument)
    except UserError as error:
        return "refused", str(error)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return "fails", f"{reason:.70}"
    return "works", "works"


def main() -> int:
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, 2 * [tf.config.LogicalDeviceConfiguration()])
    rows, worse = [], 0
    for name, use in {**WAYS, **OF_MAKERS}.items():
        made = name in OF_MAKERS
        own, message = outcome(use, ours if made else ours())
        others, other_message = outcome(use, plain if made else plain())
        verdict = {
            ("works", "works"): "as Keras",
            ("works", "fails"): "better",
            ("fails", "fails"): "as Keras",
        }.get((own, others), "refused" if own == "refused" else "worse")
        worse += verdict == "worse"
        rows.append((name, other_message, f"{message:.110}", verdict))
        print(*rows[-1], sep=" | ", flush=True)
    header = ("way", "a plain Keras model", "AVB", "AVB is")
    columns = zip(header, *rows, strict=True)
    print(tables.aligned([[cell.replace("|", "/") for cell in column] for column in columns]))
    print(f"{len(rows)} ways, {worse} worse")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
