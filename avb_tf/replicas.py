"""Everything that depends on the number of devices: the strategy, a batch's shares, its noise.

A run is the same on any number of devices: its examples, their noise and the update are functions
of the step, regardless of which replica computes which share.
"""

import contextlib
import functools
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.eager import context

from avb_tf.errors import UserError, WorkerLostError

# What TensorFlow raises where a worker does not answer; the others have further causes, and are
# meant where they speak of what workers do together.
_LOST = (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.DeadlineExceededError)
_MAYBE_LOST = (
    tf.errors.CancelledError,
    tf.errors.FailedPreconditionError,
    tf.errors.InternalError,
)
_TOGETHER = re.compile("collective|coordination|heartbeat|peer|rpc|/job:", re.IGNORECASE)


class _Cluster(NamedTuple):
    """What TF_CONFIG says."""

    tasks: dict[str, list[str]]  # chief and worker -> addresses
    kind: str  # of this task
    index: int

    @property
    def size(self) -> int:
        """Of all tasks together."""
        return sum(map(len, self.tasks.values()))


def strategy(name: str, worker_timeout: float = 600.0) -> tf.distribute.Strategy:
    """The strategy that config.strategy names.

    auto takes several workers where TF_CONFIG names them, else a TPU, else all GPUs, else what
    there is. Several workers have to be asked for before TensorFlow is used for anything else.

    Args:
      name: a value of config.strategy.
      worker_timeout: seconds in which all workers must have started.
    Raises:
      UserError: TF_CONFIG or the machine is not what the name needs.
      WorkerLostError: a worker did not start in time.
    """
    cluster = _cluster()
    several = cluster is not None and cluster.size > 1
    if name == "auto":
        gpus = len(tf.config.list_physical_devices("GPU"))
        candidates = (several, "multi_worker"), (_has_tpu(), "tpu"), (gpus > 1, "mirrored")
        name = next((name for there, name in candidates if there), "one")
    elif several and name != "multi_worker":
        raise UserError(
            f"config.strategy is '{name}', and TF_CONFIG names {cluster.size} tasks; expected "
            "'multi_worker' or 'auto'; or unset TF_CONFIG to train on this machine alone"
        )
    if name == "multi_worker":
        return _multi_worker(cluster, worker_timeout)
    if name == "tpu":
        return _tpu()
    if name == "mirrored":
        return _mirrored()
    return tf.distribute.get_strategy()


def _mirrored() -> tf.distribute.MirroredStrategy:
    gpus = tf.config.list_logical_devices("GPU")
    devices = [device.name for device in gpus or tf.config.list_logical_devices("CPU")]
    # NCCL, the default for GPUs, refuses logical devices that share one.
    shared = len(gpus) > len(tf.config.list_physical_devices("GPU"))
    reduction = tf.distribute.ReductionToOneDevice() if shared else None
    return tf.distribute.MirroredStrategy(devices, reduction)


def _cluster() -> _Cluster | None:
    text = os.environ.get("TF_CONFIG", "").strip()
    if not text:
        return None
    expected = (
        'expected {"cluster": {"worker": ["host:port", ...]}, "task": {"type": "worker", '
        '"index": 0}}; mend it, or unset it to train on this machine alone'
    )
    try:
        config = json.loads(text)
        tasks, task = config.get("cluster", {}), dict(config.get("task", {}))
        addresses = [address for group in tasks.values() for address in group]
        whole = all(isinstance(group, list) and group for group in tasks.values()) and all(
            isinstance(address, str) and address.rpartition(":")[2].isdecimal()
            for address in addresses
        )
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"TF_CONFIG is {text:.60}, which is no such JSON; {expected}") from error
    if not tasks:
        return None
    if not whole:
        raise UserError(f"TF_CONFIG has the cluster {tasks!s:.60}; {expected}")
    if twice := {address for address in addresses if addresses.count(address) > 1}:
        raise UserError(f"TF_CONFIG names {sorted(twice)[0]} twice; {expected}")
    if unknown := sorted(set(tasks) - {"chief", "worker"}):
        raise UserError(f"TF_CONFIG has tasks of type '{unknown[0]}'; {expected}")
    if len(tasks.get("chief", [])) > 1:
        raise UserError(f"TF_CONFIG names {len(tasks['chief'])} chiefs; {expected}")
    kind, index = str(task.get("type")), task.get("index")
    if type(index) is not int or kind not in tasks or not 0 <= index < len(tasks[kind]):
        raise UserError(f"TF_CONFIG has the task {task!s:.60}, not in its cluster; {expected}")
    return _Cluster(tasks, kind, index)


def _multi_worker(cluster: _Cluster | None, timeout: float) -> tf.distribute.Strategy:
    if cluster is None:
        raise UserError(
            "config.strategy is 'multi_worker', and TF_CONFIG names no cluster; set it on each "
            "worker, or use 'auto'"
        )
    if is_chief():
        addresses = [address for group in cluster.tasks.values() for address in group]
        addresses.remove(cluster.tasks[cluster.kind][cluster.index])
        _await(addresses, timeout)
    # No public setting changes TensorFlow's hour.
    runtime = context.context()
    runtime.configure_coordination_service = functools.partial(
        runtime.configure_coordination_service, cluster_register_timeout_in_ms=int(1000 * timeout)
    )
    try:
        return tf.distribute.MultiWorkerMirroredStrategy()
    except (tf.errors.UnavailableError, tf.errors.DeadlineExceededError) as error:
        raise _late(timeout, f"{error!s:.150}") from error
    except (tf.errors.OpError, RuntimeError) as error:
        raise UserError(
            f"cannot join the cluster of TF_CONFIG as {cluster.kind} {cluster.index} "
            f"({error!s:.150}); expected a free port of this machine at that place"
        ) from error


def _await(addresses: Iterable[str], timeout: float) -> None:
    """Waits until the other workers listen; TensorFlow's chief would wait for an hour.

    Raises:
      WorkerLostError: one does not within `timeout` seconds.
    """
    end = time.monotonic() + timeout
    for address in addresses:
        host, _, port = address.rpartition(":")
        while True:
            try:
                socket.create_connection((host.strip("[]"), int(port)), 5.0).close()
                break
            except OSError as error:
                if time.monotonic() > end:
                    raise _late(timeout, f"{address}: {error.strerror or error}") from error
                time.sleep(0.1)


def _late(timeout: float, reason: str) -> WorkerLostError:
    return WorkerLostError(
        f"another worker did not start within config.worker_timeout, {timeout:g} seconds ({reason})"
    )


def _has_tpu() -> bool:
    return "TPU_NAME" in os.environ or Path("/dev/accel0").exists()


def _tpu() -> tf.distribute.Strategy:
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(
            tpu=os.environ.get("TPU_NAME", "local")
        )
        tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
    except (tf.errors.OpError, ValueError, RuntimeError, OSError) as error:
        raise UserError(
            f"config.strategy is 'tpu', and no TPU answers ({error!s:.80}); run on a TPU VM, set "
            "TPU_NAME, or use 'auto'"
        ) from error
    return tf.distribute.TPUStrategy(resolver)


def is_chief() -> bool:
    """Whether this process is the one that writes, the first of those that TF_CONFIG names.

    Raises:
      UserError: TF_CONFIG names no such cluster.
    """
    cluster = _cluster()
    return cluster is None or (min(cluster.tasks), 0) == (cluster.kind, cluster.index)


def _is_multi_worker(strategy) -> bool:
    return isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)


def sum_over_workers(strategy: tf.distribute.Strategy, value: int) -> int:
    """The sum of what every worker calls this with; each waits for the others."""
    if not _is_multi_worker(strategy):
        return value
    own = len(strategy.extended.worker_devices)
    return int(_sum_over_replicas(strategy, tf.constant(value, tf.int64))) // own


@tf.function
def _sum_over_replicas(strategy, value):
    return strategy.reduce(tf.distribute.ReduceOp.SUM, strategy.run(lambda: value), axis=None)


@contextlib.contextmanager
def explained(strategy: tf.distribute.Strategy):
    """Says so where another worker has gone, which its heartbeats tell within half a minute.

    Raises:
      WorkerLostError: in place of what TensorFlow raises.
    """
    try:
        yield
    except (*_LOST, *_MAYBE_LOST) as error:
        lost = isinstance(error, _LOST) or _TOGETHER.search(str(error))
        if not (lost and _is_multi_worker(strategy)):
            raise
        reason = str(error).partition("Collective ops is aborted by: ")
        raise WorkerLostError(
            f"another worker is gone ({(reason[2] or reason[0])!s:.150})"
        ) from error


def check_batch_size(batch_size: int, strategy: tf.distribute.Strategy) -> None:
    """A batch has to fall into equal shares.

    Raises:
      UserError: it does not.
    """
    count = strategy.num_replicas_in_sync
    if batch_size % count:
        raise UserError(
            f"config.batch_size is {batch_size}, over {count} replicas; expected a multiple of "
            f"{count}; set it to {(batch_size // count + 1) * count}"
        )


def stream_seed(seed: int, step, stream: int):
    """A stateless seed, int32 [2], for one use of randomness in one step.

    A run resumed at `step` (an integer scalar) draws what the uninterrupted one drew.
    """
    # XLA folds int32 only.
    return tf.random.fold_in(tf.constant([seed, stream], tf.int32), tf.cast(step, tf.int32))


def rows(draw: Callable[..., tf.Tensor], shape, seed, axis: int) -> tf.Tensor:
    """This replica's share of the noise `draw(shape, seed)` of the whole batch.

    Each replica draws all of it, a small part of a step's cost, and keeps the rows of its own
    examples: an example's noise is the same however many replicas there are.

    Args:
      draw: such as `tf.random.stateless_normal`.
      shape: of the share.
      seed: of the whole.
      axis: of the examples.
    """
    context = tf.distribute.get_replica_context()  # None outside a replica
    if context is None or context.num_replicas_in_sync == 1:
        return draw(shape, seed)
    whole, begin = list(shape), [0] * len(shape)
    whole[axis] = shape[axis] * context.num_replicas_in_sync
    begin[axis] = shape[axis] * context.replica_id_in_sync_group
    return tf.slice(draw(whole, seed), begin, shape)


def all_finite(*tensors: tf.Tensor) -> tf.Tensor:
    """In a replica: whether there is no inf and no nan in the tensors of any replica, a boolean."""
    # One scalar suffices: any inf or NaN makes the sum non-finite on every replica.
    total = tf.add_n([tf.nn.l2_loss(tf.cast(t, tf.float32)) for t in tensors])
    context = tf.distribute.get_replica_context()
    if context.num_replicas_in_sync > 1:
        total = context.all_reduce(tf.distribute.ReduceOp.SUM, total)
    return tf.math.is_finite(total)


def apply(optimizer, gradients, variables, applied) -> None:
    """In a replica: `optimizer.apply`, where `applied` (the same on all) is true.

    Optimizers let replicas meet, which these may not within a condition; so they meet outside.
    """
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        # It has a condition of its own, by this replica's gradients alone, and learns from it.
        gradients = [tf.where(applied, gradient, np.nan) for gradient in gradients]
        optimizer.apply(gradients, variables)
        return

    def meet(strategy, gradients, applied):
        def step():
            strategy.extended.call_for_each_replica(optimizer.apply, args=(gradients, variables))

        tf.cond(strategy.experimental_local_results(applied)[0], step, lambda: None)

    update(meet, gradients, applied)


def update(function: Callable[..., None], *arguments) -> None:
    """In a replica: calls `function(strategy, *arguments)` once for all of them."""
    tf.distribute.get_replica_context().merge_call(function, args=arguments)


def pooled_moments(mean: tf.Tensor, covariance: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Moments [..., n] and [..., n, n] of all replicas' samples, from those of this one's.

    All have as many samples. Gradients flow to the samples of all.
    """
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return mean, covariance
    whole_mean, within, square = context.all_reduce(
        tf.distribute.ReduceOp.MEAN, [mean, covariance, _outer(mean)]
    )
    return whole_mean, within + square - _outer(whole_mean)


def _outer(x):
    return x[..., :, tf.newaxis] * x[..., tf.newaxis, :]
