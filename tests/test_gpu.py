"""Tests that need a GPU: `make test-gpu`."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import avb_tf
from avb_tf.likelihood_estimation import ais
from avb_tf.settings.methods import METHODS

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not tf.config.list_physical_devices("GPU"), reason="TensorFlow sees no GPU here"
    ),
]
SMALL = {
    "latent_dim": 2, "width": 32, "depth": 1, "bases": 4, "basis_width": 16, "adversary_width": 32,
    "products": 16, "flow_width": 16,
}  # fmt: skip
X = (np.random.default_rng(0).random((512, 8)) < np.linspace(0.1, 0.9, 8)).astype(np.float32)


def model_of(method="avb_ac"):
    keras.utils.set_random_seed(0)
    return avb_tf.build(method, X.shape[1:], **SMALL)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_there(method):
    model = model_of(method)
    model.compile(steps_per_execution=20)
    assert model.loop_is_compiled
    history = model.fit(X, batch_size=64, steps_per_epoch=20, epochs=5, verbose=0).history
    assert int(model.step.numpy()) == 100
    assert history["log_likelihood"][-1] > history["log_likelihood"][0]
    devices = {variable.value.device.rpartition(":")[0][-3:] for variable in model.weights}
    assert devices == {"GPU"}


def test_the_number_of_steps_in_a_call_changes_no_result():
    results = []
    for count in (1, 20):
        model = model_of()
        model.compile(steps_per_execution=count)
        model.fit(X, batch_size=64, steps_per_epoch=40, verbose=0)
        results.append([keras.ops.convert_to_numpy(w) for w in model.weights])
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


def test_a_stream_trains_there_too():
    model = model_of()
    model.compile()
    stream = tf.data.Dataset.from_tensor_slices(X).repeat().batch(64)
    model.fit(stream, steps_per_epoch=10, verbose=0)
    assert int(model.step.numpy()) == 10


def test_a_trained_model_is_evaluated_there(tmp_path):
    model = model_of()
    model.compile(steps_per_execution=20)
    model.fit(X, batch_size=64, steps_per_epoch=100, verbose=0)
    bound = model.evaluate(X, batch_size=64, verbose=0, return_dict=True)["elbo"]
    annealed = ais.AnnealedSampler(model, 50, chains=16).forward(X[:64])
    assert np.isfinite(bound)
    assert np.isfinite(np.asarray(annealed[0])).all()
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(again.decode(np.zeros([1, 2])), model.decode(np.zeros([1, 2])))


def test_a_posterior_is_fitted_there():
    def density(u):
        return -0.5 * tf.reduce_sum((u - 1.0) ** 2, -1)

    fit = avb_tf.fit_posterior(density, shape=[2], steps=500, verbose=False)
    draws = np.asarray(fit.sample(4000))
    np.testing.assert_allclose(draws.mean(0), 1.0, atol=0.2)
    np.testing.assert_allclose(draws.std(0), 1.0, atol=0.2)


def command(workdir, *flags):
    return [
        sys.executable, "main.py", "--config=configs/digits.py:avb_ac", f"--workdir={workdir}",
        "--config.steps=400", "--config.log_every=50", "--config.checkpoint_every=50", *flags,
    ]  # fmt: skip


def test_a_killed_run_ends_level_with_an_undisturbed_one(tmp_path, monkeypatch):
    monkeypatch.setenv("TF_DETERMINISTIC_OPS", "1")
    quiet = {"cwd": ROOT, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(command(tmp_path / "whole"), check=True, **quiet)
    killed = subprocess.Popen(command(tmp_path / "killed"), **quiet)
    while not (tmp_path / "killed" / "checkpoints" / "step_000000100.keras").exists():
        assert killed.poll() is None
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    subprocess.run(command(tmp_path / "killed"), check=True, **quiet)
    files = [max((tmp_path / run / "checkpoints").glob("*.keras")) for run in ("whole", "killed")]
    whole, resumed = (keras.models.load_model(file) for file in files)
    for one, other in zip(whole.weights, resumed.weights, strict=True):
        np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=1e-6, atol=1e-7)


def test_two_logical_gpus_train_as_one(tmp_path):
    outs = []
    for name in ("one", "mirrored"):
        outs.append(tmp_path / f"{name}.npz")
        subprocess.run(
            [sys.executable, "-m", "tests.replicated", str(outs[-1]), name, "5", "avb_ac", "20"],
            cwd=ROOT, check=True,
        )  # fmt: skip
    one, two = map(np.load, outs)
    for name in one.files:
        np.testing.assert_allclose(one[name], two[name], rtol=1e-2, atol=1e-3, err_msg=name)


@pytest.mark.parametrize("tf32", [True, False])
def test_float32_products_are_what_the_setting_says(tf32):
    a = np.random.default_rng(0).normal(size=(256, 256)).astype(np.float32)
    before = tf.config.experimental.tensor_float_32_execution_enabled()
    tf.config.experimental.enable_tensor_float_32_execution(tf32)
    try:
        product = tf.linalg.matmul(a, a).numpy()
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(before)
    error = np.abs(product - a.astype(np.float64) @ a.astype(np.float64)).max()
    assert (error > 1e-3) == tf32, error
