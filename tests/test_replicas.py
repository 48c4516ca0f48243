"""Tests strategies by name, and equal results on one device, two devices and two workers."""

import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from avb_tf import replicas
from avb_tf.errors import UserError, WorkerLostError
from tests import replicated
from tests.campaigns.faults import free_ports

TWO = {"worker": ["127.0.0.1:1", "127.0.0.1:2"]}


def tf_config(cluster=TWO, kind="worker", index=0):
    return json.dumps({"cluster": cluster, "task": {"type": kind, "index": index}})


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    monkeypatch.delenv("TPU_NAME", raising=False)


# config.strategy, TF_CONFIG -> words that the message must contain.
MISTAKES = [
    ("multi_worker", "", "TF_CONFIG names no cluster"),
    ("multi_worker", "{}", "TF_CONFIG names no cluster"),
    ("tpu", "", "no TPU answers"),
    ("one", tf_config(), "TF_CONFIG names 2 tasks"),
    ("mirrored", tf_config(), "TF_CONFIG names 2 tasks"),
    ("auto", "{", "not JSON of that form"),
    ("auto", "[1]", "not JSON of that form"),
    ("auto", '{"cluster": [1]}', "not JSON of that form"),
    ("auto", '{"cluster": {"worker": 5}}', "not JSON of that form"),
    ("auto", tf_config({"worker": "127.0.0.1:1"}), "has the cluster"),
    ("auto", tf_config({"worker": ["127.0.0.1"]}), "127.0.0.1"),
    ("auto", tf_config({"worker": ["127.0.0.1:x"]}), "127.0.0.1:x"),
    ("auto", tf_config({"worker": ["a:1", "a:1"]}), "a:1 twice"),
    ("auto", tf_config({"worker": ["a:1"], "ps": ["a:2"]}), "'ps'"),
    ("auto", tf_config(kind="chief"), "'chief'"),
    ("auto", tf_config(index=2), "2"),
    ("auto", tf_config(index=-1), "-1"),
    ("auto", tf_config(index="0"), "'0'"),
    ("auto", '{"cluster": {"worker": ["a:1", "a:2"]}}', "the task {}"),
    ("auto", '{"cluster": {"worker": ["a:1"]}, "task": null}', "not JSON of that form"),
    ("auto", '{"cluster": {"worker": ["a:1"]}, "task": "worker"}', "not JSON of that form"),
    ("auto", tf_config(kind=[]), "'type': []"),
    ("auto", tf_config({"worker": ["a:1"], "chief": []}), "'chief': []"),
    ("auto", tf_config({"chief": ["a:1", "b:1"]}, "chief"), "2 chiefs"),
]


@pytest.mark.parametrize(("name", "config", "named"), MISTAKES)
def test_a_mistake_is_named(monkeypatch, name, config, named):
    monkeypatch.setenv("TF_CONFIG", config)
    with pytest.raises(UserError) as error:
        replicas.strategy(name)
    assert named in str(error.value)


@pytest.mark.parametrize("config", ["", " ", "{}", tf_config({"worker": ["a:1"]})])
def test_auto_selects_the_default_strategy_for_one_device(monkeypatch, config):
    monkeypatch.setenv("TF_CONFIG", config)
    strategy = replicas.strategy("auto")
    assert strategy is tf.distribute.get_strategy()
    assert replicas.is_chief()
    assert replicas.sum_over_workers(strategy, 7) == 7


def test_several_gpus_train_as_replicas_on_all_logical_devices(monkeypatch):
    # Only the number of GPUs is faked; the strategy is real and uses this machine's devices.
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["0", "1"])
    strategy = replicas.strategy("auto")
    assert isinstance(strategy, tf.distribute.MirroredStrategy)
    devices = tf.config.list_logical_devices("CPU")
    suffixes = [device.name for device in devices]
    workers = strategy.extended.worker_devices
    assert len(workers) == strategy.num_replicas_in_sync == len(devices)
    assert all(w.endswith(s) for w, s in zip(workers, suffixes, strict=True))
    ones = strategy.run(lambda: tf.constant(1.0))
    assert strategy.reduce(tf.distribute.ReduceOp.SUM, ones, None).numpy() == len(devices)


@pytest.mark.parametrize(
    ("cluster", "kind", "index", "chief"),
    [
        (TWO, "worker", 0, True),
        (TWO, "worker", 1, False),
        ({"chief": ["a:1"], **TWO}, "chief", 0, True),
        ({"chief": ["a:1"], **TWO}, "worker", 0, False),
    ],
)
def test_only_the_chief_writes(monkeypatch, cluster, kind, index, chief):
    monkeypatch.setenv("TF_CONFIG", tf_config(cluster, kind, index))
    assert replicas.is_chief() == chief


def test_a_batch_size_that_replicas_do_not_divide_is_refused():
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    replicas.check_batch_size(7, strategy)
    monkey = type("Three", (), {"num_replicas_in_sync": 3})()
    replicas.check_batch_size(9, monkey)
    with pytest.raises(UserError, match=r"batch_size is 128, over 3 replicas.*set it to 129"):
        replicas.check_batch_size(128, monkey)


def test_only_a_lost_worker_raises_a_worker_lost_error(monkeypatch):
    lost = tf.errors.UnavailableError(None, None, "Collective ops is aborted by: task 1\ndied")
    strategy = tf.distribute.get_strategy()
    with pytest.raises(tf.errors.UnavailableError), replicas.explained(strategy):
        raise lost
    monkeypatch.setattr(replicas, "_is_multi_worker", lambda strategy: True)
    with (
        pytest.raises(WorkerLostError, match="another worker is gone"),
        replicas.explained(strategy),
    ):
        raise lost
    with pytest.raises(tf.errors.ResourceExhaustedError), replicas.explained(strategy):
        raise tf.errors.ResourceExhaustedError(None, None, "memory")
    with pytest.raises(tf.errors.InternalError), replicas.explained(strategy):
        raise tf.errors.InternalError(None, None, "cuBLAS: no memory")
    with pytest.raises(WorkerLostError), replicas.explained(strategy):
        raise tf.errors.InternalError(None, None, "heartbeats of /job:worker/task:1 stopped")


def test_a_missing_worker_is_not_a_users_mistake(monkeypatch):
    def alone():
        raise tf.errors.DeadlineExceededError(None, None, "Barrier timed out")

    monkeypatch.setenv("TF_CONFIG", tf_config())
    monkeypatch.setattr(tf.distribute, "MultiWorkerMirroredStrategy", alone)
    with pytest.raises(WorkerLostError, match="another worker did not start within"):
        replicas.strategy("auto")


@pytest.mark.parametrize("applied", [True, False])
def test_a_loss_scaling_optimizer_follows_the_decision_of_all_replicas(applied):
    """The optimizer's own check covers only the gradients of one replica, which are finite here."""
    weight = keras.Variable([1.0, 2.0])
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(1.0), initial_scale=2.0)
    optimizer.build([weight])
    replicas.apply(optimizer, [tf.constant([2.0, 2.0])], [weight], tf.constant(applied))
    np.testing.assert_array_equal(weight, [0.0, 1.0] if applied else [1.0, 2.0])


def test_the_replicas_noise_adds_up_to_the_whole():
    shape, seed = [2, 3, 4], [0, 1]
    whole = tf.random.stateless_normal([2, 6, 4], seed)

    class Context:
        num_replicas_in_sync = 2

        def __init__(self, replica):
            self.replica_id_in_sync_group = replica

    shares = []
    for replica in range(2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tf.distribute, "get_replica_context", lambda r=replica: Context(r))
            shares.append(replicas.rows(tf.random.stateless_normal, shape, seed, axis=1))
    np.testing.assert_array_equal(np.concatenate(shares, 1), whole)
    assert not np.isin(*shares).any()  # replicas share no value
    np.testing.assert_array_equal(
        replicas.rows(tf.random.stateless_normal, shape, seed, axis=1),
        tf.random.stateless_normal(shape, seed),
    )


@pytest.mark.parametrize(
    ("variant", "steps", "workers"), [("avb_ac", 50, 2), ("avb_ac_paper:conv", 20, 0)]
)
def test_a_run_is_the_same_on_one_device_on_two_and_on_two_workers(
    variant, steps, workers, tmp_path
):
    """Compares weights, averages, optimizers and metrics, with clipping and two dual steps.

    A call of the graph takes 10 steps on one device, 1 on two devices and 10 on the workers. The
    convolutional variant has batch normalisation with moments over the global batch.
    """

    def start(name, strategy, calls, cluster=None, task=0):
        environment = dict(os.environ)
        if cluster:
            environment["TF_CONFIG"] = tf_config({"worker": cluster}, "worker", task)
        out = tmp_path / f"{name}.npz"
        command = [sys.executable, "-m", "tests.replicated", out, strategy, calls, variant, steps]
        process = subprocess.Popen(
            list(map(str, command)), env=environment, stderr=subprocess.PIPE, text=True
        )
        return out, process

    cluster = [f"127.0.0.1:{port}" for port in free_ports(workers)]
    runs = [start("one", "one", 10), start("two", "mirrored", 1)]
    runs += [start(f"worker_{i}", "auto", 10, cluster, i) for i in range(workers)]
    states = []
    for out, process in runs:
        error = process.communicate(timeout=500)[1]
        assert process.returncode == 0, error
        states.append(dict(np.load(out)))
    one, *others = states
    for run in states:
        seen, there = run.pop("count")
        assert seen == there
        assert there % replicated.BATCH  # the last batch is shared unequally
    values = {name.split(" ")[0]: value for name, value in one.items() if name[0] != "m"}
    metrics = {name: value for name, value in one.items() if name.startswith("metric")}
    assert len(values) > 100
    assert len(metrics) == 12
    for other in others:
        for name, value in other.items():
            if name.startswith("metric"):
                np.testing.assert_allclose(value, metrics[name], rtol=1e-5, err_msg=name)
            else:
                expected = values[name.split(" ")[0]]
                np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5, err_msg=name)
