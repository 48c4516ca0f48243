"""Tests the monitor's bounds on a model with a closed form, and when it warns."""

import linear_gaussian
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import avb_tf
from avb_tf import results
from avb_tf.callbacks.monitor import ELBO_DRAWS, Monitor
from avb_tf.commands import evaluate, train
from configs import mnist

WARM = {"adversary_loss": 1.3, "adversary_accuracy": 0.55}
SATURATED = {"adversary_loss": 0.1, "adversary_accuracy": 0.99}


def monitor(model, x, directory, samples=256, largest_gap=3.0):
    callback = Monitor(x, samples, largest_gap, directory)
    callback.set_model(model)
    return callback


def logged(monitor, **logs):
    logs = dict(logs)
    monitor.on_epoch_end(0, logs)
    return logs


def texts(directory):
    events = EventAccumulator(str(directory)).Reload()
    return [e.tensor_proto.string_val[0].decode() for e in events.Tensors("warning")]


def messages(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "absl"]


def test_its_bounds_on_a_linear_gaussian_model(monkeypatch, tmp_path):
    model, evidence = linear_gaussian.make(monkeypatch)
    x = evidence.rvs(64, random_state=1).astype(np.float32)
    log_p = evidence.logpdf(x).mean()
    weight, scale = linear_gaussian.WEIGHT.astype(np.float64), linear_gaussian.SCALE
    precision = np.eye(2) + weight.T @ weight / scale**2
    kernel = weight @ np.linalg.inv(precision) / scale**2
    model.encoder.mean.set_weights([kernel, np.array([0.3, 0.0])])  # slightly wrong
    model.encoder.log_scale.set_weights([np.zeros((3, 2)), np.full(2, -0.7)])

    coarse, fine = (logged(monitor(model, x, tmp_path, samples)) for samples in (4, 4096))
    assert coarse["val_importance_bound"] < fine["val_importance_bound"]
    assert abs(fine["val_importance_bound"] - log_p) < 0.02
    covariance = (
        np.exp(-0.7) + 1e-3
    ) ** 2 * precision  # q's covariance in coordinates that whiten the posterior
    kl = 0.5 * (
        np.trace(covariance) - 2 - np.linalg.slogdet(covariance)[1] + 0.3**2 * precision[0, 0]
    )
    gap = fine["val_importance_bound"] - log_p + fine["val_elbo_minus_importance_bound"]
    assert abs(gap + kl) < 0.02 + 5 / np.sqrt(64 * ELBO_DRAWS)


def test_the_difference_of_the_bounds_has_an_interval_over_the_same_examples(monkeypatch, tmp_path):
    model, evidence = linear_gaussian.make(monkeypatch)
    x = evidence.rvs(240, random_state=1).astype(np.float32)
    every = [logged(monitor(model, x[i : i + 20], tmp_path, 64)) for i in range(0, 240, 20)]
    name = "val_elbo_minus_importance_bound"
    for logs in every:
        middle = (logs[f"{name}_lower"] + logs[f"{name}_upper"]) / 2
        assert logs[name] == pytest.approx(middle, rel=1e-5)
        assert logs["val_monitored_elbo"] - logs["val_importance_bound"] == pytest.approx(
            logs[name], rel=1e-4
        )
    errors = [(logs[f"{name}_upper"] - logs[name]) / 2 for logs in every]
    spread = np.std([logs[name] for logs in every], ddof=1)
    # The standard deviation over 12 sets of 20 examples has a relative error of 0.21.
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(spread, rel=0.5)


@pytest.mark.parametrize("method", ["vae", "avb_ac", "avb_flow", "iaf"])
def test_no_warning_if_the_two_bounds_agree(method, tmp_path, caplog):
    model = avb_tf.build(method, (6,), latent_dim=2, width=16, adversary_width=16)
    x = np.eye(6, dtype=np.float32)
    logs = logged(monitor(model, x, tmp_path), **(WARM if model.adversary else {}))
    assert logs["val_elbo_minus_importance_bound"] < 0.5
    assert not messages(caplog)
    assert not list(tmp_path.iterdir())


def test_it_warns_of_a_saturated_adversary_once(tmp_path, caplog):
    model = avb_tf.build("avb_ac", (6,), latent_dim=2, width=16)
    callback = monitor(model, np.eye(6, dtype=np.float32), tmp_path)
    logged(callback, **WARM)
    assert not messages(caplog)
    for _ in range(2):
        logged(callback, **SATURATED)
    [text] = texts(tmp_path)
    assert messages(caplog) == [text]
    assert "loss 0.100" in text
    assert "contrast=full" in text


def test_it_warns_of_an_elbo_that_is_too_high(tmp_path, caplog):
    model = avb_tf.build("avb_ac", (6,), latent_dim=2, width=16)
    x = np.eye(6, dtype=np.float32)
    before = logged(monitor(model, x, tmp_path), **WARM)["val_elbo_minus_importance_bound"]
    model.adversary.head.bias.assign([-10.0])  # T, and therefore the KL, is 10 nats too low
    callback = monitor(model, x, tmp_path)
    after = [logged(callback, **WARM)["val_elbo_minus_importance_bound"] for _ in range(2)]
    np.testing.assert_allclose(after, before + 10.0, rtol=1e-4)
    [text] = texts(tmp_path)
    assert "nats above" in text
    assert len(messages(caplog)) == 1
    logged(monitor(model, x, tmp_path, largest_gap=12.0), **WARM)
    assert len(messages(caplog)) == 1


def test_it_warns_of_prior_contrast_on_mnist(small_mnist, tmp_path, caplog):
    """The paper's Algorithm 1 on MNIST reports a bound far above log p(x)."""
    config = mnist.get_config("avb")
    config.data.path, config.steps = str(small_mnist), 400
    config.log_every = config.checkpoint_every = 200
    config.figures_every = 0
    config.eval.update(examples=20, subset=20, repeats=1, simulated=0, gap=0)
    config.eval.ais.update(temperatures=50, chains=8, leapfrog_steps=5)
    model = train.train(config, tmp_path)
    [warning] = [text for text in messages(caplog) if "importance-weighted" in text]
    assert warning in texts(tmp_path / "logs" / "validation")
    gaps = model.history.history["val_elbo_minus_importance_bound"]
    assert gaps[-1] > config.monitor.largest_gap

    evaluate.evaluate(config, tmp_path)
    by_name = results.read(tmp_path / results.FILE)["estimates"]
    elbo, ais = (by_name[name]["mean"] for name in ("elbo_adversary", "log_likelihood_ais"))
    assert elbo > ais + config.monitor.largest_gap
