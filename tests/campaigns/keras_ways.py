"""Compares ways of using a Keras model between AVB and a plain Keras model.

    .venv/bin/python -m tests.campaigns.keras_ways

For each way the table shows the outcome for both models: "works", or the error. AVB is "as Keras"
if both work or both fail, "better" if only AVB works, "refused" if AVB says in one line why not,
and "worse" otherwise. The exit status is 1 if any way is "worse".
"""

import copy
import json
import pickle
import sys
import tempfile
import warnings
from pathlib import Path

import keras
import numpy as np
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


class Plain(keras.Model):
    """An autoencoder whose labels are its inputs."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner, self.outer = keras.layers.Dense(2), keras.layers.Dense(6, "sigmoid")
        self.build((None, 6))

    def call(self, x):
        return self.outer(self.inner(x))

    def train_step(self, data):
        x, _, weights = keras.utils.unpack_x_y_sample_weight(data)
        return super().train_step((x, x, weights))

    def test_step(self, data):
        x, _, weights = keras.utils.unpack_x_y_sample_weight(data)
        return super().test_step((x, x, weights))


def plain():
    model = Plain()
    model.compile("adam", "mse")
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


def saved(name, load=True):
    def use(model):
        fitted(model).save(FOLDER / name)
        if load:
            loaded = keras.models.load_model(FOLDER / name, custom_objects={"Plain": Plain})
            np.testing.assert_allclose(loaded.predict(X, verbose=0), model.predict(X, verbose=0))
            fitted(loaded)

    return use


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
    clone = keras.models.clone_model(model)
    clone.compile(**({} if isinstance(model, avb_tf.AVB) else {"loss": "mse"}))
    fitted(clone)


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
    layer = model.encoder if isinstance(model, avb_tf.AVB) else model.inner
    layer.trainable = False
    model.compile(**({} if isinstance(model, avb_tf.AVB) else {"loss": "mse"}))
    before = [w.numpy() for w in layer.weights]
    fitted(model)
    for a, b in zip(before, layer.weights, strict=True):
        np.testing.assert_array_equal(a, b.numpy())


def own_loop(model):
    for batch in dataset(X):
        logs = model.train_on_batch(batch.numpy(), batch.numpy(), return_dict=True)
        assert np.isfinite(logs["loss"])


def tested_on_batches(model):
    assert np.isfinite(model.test_on_batch(X, X, return_dict=True)["loss"])
    assert model.predict_on_batch(X).shape == X.shape


def called(model):
    assert model(tf.constant(X)).shape == X.shape


def within_a_function(model):
    assert tf.function(model)(tf.constant(X)).shape == X.shape


def evaluated(model):
    values = model.evaluate(X, X, verbose=0)
    logs = model.evaluate(X, X, verbose=0, return_dict=True)
    values = values if isinstance(values, list) else [values]
    assert dict(zip(model.metrics_names, values, strict=True)).keys() <= logs.keys()


def another_optimizer(model):
    model.compile(
        keras.optimizers.AdamW(1e-3, clipnorm=1.0),
        **({} if isinstance(model, avb_tf.AVB) else {"loss": "mse"}),
    )
    fitted(model)


def eagerly(model):
    model.compile(run_eagerly=True, **({} if isinstance(model, avb_tf.AVB) else {"loss": "mse"}))
    fitted(model, batch_size=24)


def several_steps_a_call(model):
    model.compile(
        steps_per_execution=2, **({} if isinstance(model, avb_tf.AVB) else {"loss": "mse"})
    )
    fitted(model, batch_size=8)


def with_a_loss(model):
    model.compile(loss="mse")
    fitted(model)


def in_a_strategy(make):
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        model = make()
    fitted(model)


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
    "fit, class_weight": lambda m: fitted(m, class_weight={0: 1.0}),
    "fit, initial_epoch": lambda m: fitted(m, epochs=3, initial_epoch=1),
    "fit, steps_per_epoch": lambda m: fitted(m, dataset(X).repeat(), steps_per_epoch=2),
    "fit, NaN": lambda m: fitted(m, X * np.nan),
    "fit, another shape": lambda m: fitted(m, X[:, :4]),
    "fit again": lambda m: fitted(fitted(m)),
    "EarlyStopping": through("EarlyStopping", patience=1, restore_best_weights=True),
    "ModelCheckpoint": through("ModelCheckpoint", filepath=FOLDER / "x.keras", save_best_only=True),
    "ReduceLROnPlateau": through("ReduceLROnPlateau", patience=1),
    "LearningRateScheduler": through("LearningRateScheduler", schedule=lambda e, rate: rate / 2),
    "TerminateOnNaN": through("TerminateOnNaN"),
    "CSVLogger": through("CSVLogger", filename=str(FOLDER / "log.csv")),
    "TensorBoard": tensorboard,
    "BackupAndRestore": backed_up,
    "SwapEMAWeights": through("SwapEMAWeights"),
    "evaluate": evaluated,
    "predict": lambda m: np.testing.assert_equal(m.predict(X, verbose=0).shape, X.shape),
    "train_on_batch": own_loop,
    "test_on_batch, predict_on_batch": tested_on_batches,
    "call": called,
    "call in tf.function": within_a_function,
    "save, .keras": saved("model.keras"),
    "save, .h5": saved("model.h5"),
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
    "trainable = False": frozen,
    "another optimizer": another_optimizer,
    "run_eagerly": eagerly,
    "steps_per_execution": several_steps_a_call,
    "compile(loss=)": with_a_loss,
    "export": exported,
}  # fmt: skip
OF_MAKERS = {
    "MirroredStrategy": in_a_strategy,
    "mixed_bfloat16": with_policy("mixed_bfloat16"),
    "mixed_float16": with_policy("mixed_float16"),
    "float64": with_policy("float64"),
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
