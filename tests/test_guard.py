"""Tests that steps with a non-finite loss or gradient are skipped and counted."""

import contextlib
import signal

import keras
import numpy as np
import pytest
import tensorflow as tf

import avb_tf
from avb_tf import checkpoints, data, results
from avb_tf import model as avb_model
from avb_tf.callbacks.guard import Guard, SaveWhenTerminated
from avb_tf.commands import train
from avb_tf.data import pipeline
from avb_tf.errors import DivergenceError, UserError
from avb_tf.likelihood_estimation import estimates
from avb_tf.training import termination
from configs import digits

SMALL = {
    "latent_dim": 2, "width": 16, "adversary_width": 16, "bases": 4, "basis_width": 8,
    "products": 8,
}  # fmt: skip


def make(method="avb_ac", **changes):
    keras.utils.set_random_seed(0)
    model = avb_tf.build(method, (6,), **SMALL, **changes)
    model.compile()
    return model


def batch(seed=0):
    x = np.random.default_rng(seed).random((16, 6)) < 0.5
    return x.astype(np.float32)


def state(model):
    optimizers = [o for o in (model.optimizer, model.adversary_optimizer) if o]
    weights = [v for o in optimizers for v in o.variables if v.ndim]
    weights += model.averaged_encoder.weights + model.averaged_decoder.weights
    return [v.numpy().copy() for v in model.primal_variables + model.adversary.weights + weights]


def same(before, after):
    return all((a == b).all() for a, b in zip(before, after, strict=True))


def test_a_step_with_nan_in_it_changes_nothing_and_is_counted():
    model = make(adversary_steps=2)
    step = tf.function(model.train_step)
    step((batch(),))
    spoiled = batch(1)
    spoiled[3, 2] = np.nan
    before = state(model)
    model.reset_metrics()
    for count in (1, 2):
        step((spoiled,))
        assert same(before, state(model))
        assert int(model.skipped.value) == int(model.skipped_in_a_row.value) == count
    step((batch(2),))
    assert not same(before, state(model))
    assert [int(c.value) for c in (model.step, model.skipped, model.skipped_in_a_row)] == [4, 2, 0]
    assert model.means["elbo"].count == 16  # only the applied step counts
    assert np.isfinite(model.means["elbo"].result())
    assert all(np.isfinite(v).all() for v in state(model))


def test_a_streak_of_skipped_steps_inside_a_graph_call_is_detected():
    model = make("vae")
    model.patience = 3
    bad = np.full((16, 6), np.nan, np.float32)
    data = [batch(), bad, bad, batch(), batch(), bad, bad, bad, batch()]
    for name, rows in (("short", data[:4]), ("long", data[4:])):
        model.steps_per_execution = len(rows)
        x = tf.data.Dataset.from_tensor_slices(np.concatenate(rows)).batch(16)
        told = contextlib.nullcontext() if name == "short" else pytest.raises(DivergenceError)
        with told as error:
            model.fit(x, shuffle=False, verbose=0, callbacks=[Guard()])
    assert "in 3 steps up to 9" in str(error.value)


def test_a_non_finite_gradient_of_a_finite_loss_is_detected(monkeypatch):
    plain = avb_model.log_likelihood

    def with_infinite_slope(likelihood, outputs, x):
        return plain(likelihood, outputs, x) + tf.sqrt(0.0 * tf.reduce_sum(outputs))

    monkeypatch.setattr(avb_model, "log_likelihood", with_infinite_slope)
    model = make()
    before = state(model)
    model.train_step((batch(),))
    assert int(model.skipped.value) == 1
    assert same(before, state(model))


def test_without_the_guard_one_bad_step_makes_all_weights_nan():
    model = make()
    model.skip_non_finite = False
    model.train_step((np.full((16, 6), np.nan, np.float32),))
    assert int(model.skipped.value) == 0
    assert not all(np.isfinite(v.numpy()).all() for v in model.primal_variables)


def test_a_non_finite_weight_is_not_saved(tmp_path):
    model = make()
    model.averaged_decoder.weights[0].assign(np.nan * model.averaged_decoder.weights[0])
    with pytest.raises(DivergenceError, match="is not finite at step 0"):
        checkpoints.save(model, tmp_path, keep=1)
    assert not list(tmp_path.rglob("*.keras"))


def tiny(method="vae", **guard):
    config = digits.get_config(method)
    config.model.update(width=16)
    config.steps, config.log_every, config.checkpoint_every = 60, 10, 10
    config.figures_every, config.monitor.samples, config.monitor.examples = 0, 2, 2
    config.guard.update(patience=5, rollbacks=2, **guard)
    return config


def test_a_diverging_run_rolls_back_with_lower_rates_and_finally_stops(tmp_path, monkeypatch):
    """From step 32 on every input is NaN: first until the rates are lowered, then always."""
    config, until = tiny(), {"rollbacks": 1}
    plain = avb_tf.AVB._inputs

    def spoiled(self, data):
        bad = (self.step.value >= 32) & (self.rollbacks.value < until["rollbacks"])
        return plain(self, data) * tf.where(bad, np.nan, 1.0)

    monkeypatch.setattr(avb_tf.AVB, "_inputs", spoiled)
    model = train.train(config, tmp_path / "recovers")
    loaded = checkpoints.load(tmp_path / "recovers")
    assert int(loaded.step.value) == int(model.step.value) == 60
    assert int(loaded.rollbacks.value) == 1
    assert int(model.skipped.value) == 0  # a rollback also restores the count
    # The checkpoint itself records that the second half runs at half the rate.
    whole = config.optimizer.learning_rate
    assert loaded.optimizer._learning_rate.start == pytest.approx(whole / 2)

    until["rollbacks"] = 99
    with pytest.raises(UserError, match=r"diverged: .* \d steps .* after 2 rollbacks"):
        train.train(config, tmp_path / "stops")
    left = checkpoints.load(tmp_path / "stops")
    assert int(left.step.value) == 30
    assert all(np.isfinite(v.numpy()).all() for v in left.weights)


@pytest.mark.parametrize("killed", [False, True])
def test_a_finite_explosion_at_the_end_of_an_epoch_costs_no_good_checkpoint(
    tmp_path, monkeypatch, killed
):
    """After two failures of the newest checkpoint the older one is used, even if one is kept."""
    config, kills = tiny(), [1] if killed else []
    config.steps, config.keep_checkpoints = 40, 1
    save = checkpoints.save

    def explode(model, workdir, keep):
        if int(model.step.value) == 20 and not int(model.rollbacks.value):
            for variable in model.decoder.weights:
                variable.assign(1e6 * variable)
            path = save(model, workdir, keep)
            if kills:
                raise SystemExit(kills.pop())
            return path
        return save(model, workdir, keep)

    monkeypatch.setattr(checkpoints, "save", explode)
    if killed:
        with pytest.raises(SystemExit):
            train.train(config, tmp_path / "run")
    model = train.train(config, tmp_path / "run")
    assert int(model.step.value) == 40
    assert int(model.rollbacks.value) == 2
    assert max(np.abs(v.numpy()).max() for v in model.decoder.weights) < 1e3
    names = {file.name for file in (tmp_path / "run/checkpoints").iterdir()}
    assert "step_000000020.damaged" in names


def test_a_batch_with_nan_every_50_steps_costs_no_more_than_these_steps(
    tmp_path, monkeypatch, caplog
):
    config = tiny("avb_ac")
    config.steps = 200
    config.log_every = config.checkpoint_every = 100
    plain, x = avb_tf.AVB._inputs, data.load(config.data).validation
    x = pipeline.examples(x, x.size, binary=True)

    def spoiled(self, batch):
        loss, bad = plain(self, batch), self.step.value % 50 == 49
        first = tf.range(tf.size(loss)) == 0  # one example of the batch
        return tf.where(tf.reshape(first, tf.shape(loss)) & bad, np.nan, loss)

    bounds = [estimates.bound(train.train(config, tmp_path / "clean"), x)[0].values]
    with monkeypatch.context() as patch, caplog.at_level("WARNING", "absl"):
        patch.setattr(avb_tf.AVB, "_inputs", spoiled)
        model = train.train(config, tmp_path / "spoiled")
    bounds.append(estimates.bound(model, x)[0].values)
    assert int(model.step.value) == 200
    assert int(model.skipped.value) == 4
    assert "2 of the steps up to 200 skipped" in caplog.text
    assert "4 in all" in caplog.text
    clean, spoilt = (bound.mean() for bound in bounds)
    errors = [results.standard_error(bound) for bound in bounds]
    assert spoilt == pytest.approx(clean, abs=2.0 * np.hypot(*errors))


def test_a_finished_run_does_not_wait_for_other_workers(tmp_path, monkeypatch):
    config = tiny()
    config.steps = config.log_every = config.checkpoint_every = 10
    trained = train.train(config, tmp_path)
    monkeypatch.setenv(
        "TF_CONFIG",
        '{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 0}}',
    )
    assert int(train.train(config, tmp_path).step.value) == int(trained.step.value) == 10


def test_an_exploding_elbo_does_not_end_training_without_the_guard():
    model = make()
    for guard in (Guard(enabled=True), Guard(enabled=False)):
        guard.set_model(model)
        guard.on_train_begin()
        guard.on_train_batch_end(0, {"elbo": -5.0})
        told = pytest.raises(DivergenceError) if guard.enabled else contextlib.nullcontext()
        with told:
            guard.on_epoch_end(0, {"elbo": -1e6})


def test_a_learning_rate_of_one_stops_with_an_explanation(tmp_path):
    config = tiny("avb_ac")
    config.optimizer.learning_rate = 1.0
    with pytest.raises(UserError, match=r"training diverged: elbo is -.* after 2 rollbacks"):
        train.train(config, tmp_path)
    left = checkpoints.load(tmp_path)
    assert all(np.isfinite(v.numpy()).all() for v in left.weights)


def test_the_previous_signal_handler_is_restored():
    callback = SaveWhenTerminated(lambda: None, tf.distribute.get_strategy())
    before = signal.getsignal(signal.SIGTERM)
    with termination.listening():
        assert signal.getsignal(signal.SIGTERM) != before
        callback.on_epoch_end(0)  # no signal has arrived
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_in_the_last_step_of_an_epoch_waits_for_its_end():
    saved = []
    callback = SaveWhenTerminated(lambda: saved.append(1), tf.distribute.get_strategy())
    callback.set_params({"steps": 10})
    callback.set_model(make())
    with termination.listening():
        signal.raise_signal(signal.SIGTERM)
        callback.on_train_batch_end(9)
        assert not saved
        for leave in (callback.on_train_batch_end, callback.on_epoch_end):
            with pytest.raises(SystemExit, match="143"):
                leave(8)
    assert len(saved) == 2
    assert not termination.asked()  # a later block begins anew


def test_an_overflow_lowers_the_loss_scale():
    model = make()
    scaled = [keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(1e-3)) for _ in range(2)]
    model.compile(*scaled)
    model.train_step((np.full((16, 6), np.nan, np.float32),))
    for optimizer in scaled:
        assert float(optimizer.dynamic_scale) == 2.0**14
