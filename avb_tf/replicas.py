"""Everything that depends on the number of devices: strategy, shares of a batch and their noise.

A run is the same on any number of devices: its examples, their noise and the update are functions
of the step and do not depend on which replica computes which share.
"""

import contextlib
import functools
import json
import os
import re
import socket
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.eager import context

from avb_tf.errors import UserError, WorkerLostError

# TensorFlow raises the errors in `_LOST` only if a worker does not answer. The errors in
# `_MAYBE_LOST` have other causes too; they mean a lost worker if the message matches `_TOGETHER`.
_LOST = (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.DeadlineExceededError)
_MAYBE_LOST = (
    tf.errors.CancelledError,
    tf.errors.FailedPreconditionError,
    tf.errors.InternalError,
)
_TOGETHER = re.compile("collective|coordination|heartbeat|peer|rpc|/job:", re.IGNORECASE)


class _Cluster(NamedTuple):
    """The cluster and this process's task in it, as TF_CONFIG describes them."""

    tasks: dict[str, list[str]]  # "chief" and "worker" -> addresses
    kind: str  # "chief" or "worker", the type of this task
    index: int  # of this task among those of its type

    @property
    def size(self) -> int:
        """Number of all tasks."""
        return sum(map(len, self.tasks.values()))


def strategy(name: str, worker_timeout: float = 600.0) -> tf.distribute.Strategy:
    """Returns the strategy that config.strategy names.

    "auto" selects "multi_worker" if TF_CONFIG names several tasks, else "tpu" if there is a TPU,
    else "mirrored" if there are several GPUs, else "one". A strategy of several workers must be
    created before TensorFlow is used for anything else.

    Args:
      name: a value of config.strategy.
      worker_timeout: seconds in which all workers must have started.
    Raises:
      UserError: TF_CONFIG or the machine does not fit the name.
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
    # NCCL, the default for GPUs, refuses logical devices that share a GPU.
    shared = len(gpus) > len(tf.config.list_physical_devices("GPU"))
    reduction = tf.distribute.ReductionToOneDevice() if shared else None
    return tf.distribute.MirroredStrategy(devices, reduction)


def _cluster() -> _Cluster | None:
    text = os.environ.get("TF_CONFIG", "").strip()
    if not text:
        return None
    expected = (
        'expected {"cluster": {"worker": ["host:port", ...]}, "task": {"type": "worker", '
        '"index": 0}}; correct it, or unset it to train on this machine alone'
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
        raise UserError(
            f"TF_CONFIG is {text:.60}, which is not JSON of that form; {expected}"
        ) from error
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
    # TensorFlow waits for an hour, and no public setting changes that.
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
    """Returns whether this process is the chief, the first task of TF_CONFIG, which writes files.

    Raises:
      UserError: TF_CONFIG is not valid.
    """
    cluster = _cluster()
    return cluster is None or (min(cluster.tasks), 0) == (cluster.kind, cluster.index)


def _is_multi_worker(strategy) -> bool:
    return isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)


def sum_over_workers(strategy: tf.distribute.Strategy, value: int) -> int:
    """Returns the sum of the workers' values; every worker must call it and waits for the others.

    Args:
      strategy: the strategy of the run.
      value: this worker's value.
    """
    if not _is_multi_worker(strategy):
        return value
    own = len(strategy.extended.worker_devices)
    return int(_sum_over_replicas(strategy, tf.constant(value, tf.int64))) // own


@tf.function
def _sum_over_replicas(strategy, value):
    return strategy.reduce(tf.distribute.ReduceOp.SUM, strategy.run(lambda: value), axis=None)


@contextlib.contextmanager
def explained(strategy: tf.distribute.Strategy) -> Generator[None]:
    """Turns TensorFlow's errors about a lost worker into a `WorkerLostError`.

    TensorFlow notices the loss within half a minute, because the worker's heartbeats stop.

    Raises:
      WorkerLostError: another worker has stopped.
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
    """Checks that a batch can be split into equal shares.

    Args:
      batch_size: examples in a batch over all replicas.
      strategy: the strategy of the run.
    Raises:
      UserError: the batch size is not a multiple of the number of replicas.
    """
    count = strategy.num_replicas_in_sync
    if batch_size % count:
        raise UserError(
            f"config.batch_size is {batch_size}, over {count} replicas; expected a multiple of "
            f"{count}; set it to {(batch_size // count + 1) * count}"
        )


def stream_seed(seed: int, step: int | tf.Tensor | tf.Variable, stream: int) -> tf.Tensor:
    """Returns a stateless seed, int32 [2], for one use of randomness in one step.

    The seed depends only on the arguments, so a resumed run draws the same numbers as an
    uninterrupted one.

    Args:
      seed: seed of the run.
      step: number of the step, an integer scalar.
      stream: number of the use within the step.
    """
    # `fold_in` under XLA supports only int32.
    key = tf.constant([seed, stream], tf.int32)
    folded: Any = tf.random.fold_in(key, tf.cast(step, tf.int32))
    return folded


def rows(
    draw: Callable[..., tf.Tensor], shape: Sequence[int | tf.Tensor], seed: tf.Tensor, axis: int
) -> tf.Tensor:
    """Returns this replica's share of the noise of the whole batch.

    Each replica draws the noise of the whole batch, which is cheap compared with the rest of a
    step, and keeps the rows of its own examples. An example's noise therefore does not depend on
    the number of replicas.

    Args:
      draw: function of (shape, seed), such as `tf.random.stateless_normal`.
      shape: shape of the share.
      seed: seed of the whole batch's noise.
      axis: axis of the examples.
    """
    context = tf.distribute.get_replica_context()  # None outside a replica
    if context is None or context.num_replicas_in_sync == 1:
        return draw(shape, seed)
    whole, begin = list(shape), [0] * len(shape)
    whole[axis] = shape[axis] * context.num_replicas_in_sync
    begin[axis] = shape[axis] * context.replica_id_in_sync_group
    return tf.slice(draw(whole, seed), begin, shape)


def all_finite(*tensors: tf.Tensor) -> tf.Tensor:
    """Returns whether the tensors of all replicas are finite; must be called in a replica."""
    # One scalar suffices: any inf or NaN makes the sum non-finite on every replica.
    total = tf.add_n([tf.nn.l2_loss(tf.cast(t, tf.float32)) for t in tensors])
    context = tf.distribute.get_replica_context()
    if context.num_replicas_in_sync > 1:
        total = context.all_reduce(tf.distribute.ReduceOp.SUM, total)
    return tf.math.is_finite(total)


def apply(
    optimizer: keras.optimizers.Optimizer,
    gradients: Sequence[tf.Tensor],
    variables: Sequence[keras.Variable],
    applied: tf.Tensor,
) -> None:
    """Calls `optimizer.apply` in a replica if `applied` is true.

    Optimizers synchronise the replicas, which a replica cannot do inside a condition. So the
    condition is evaluated once for all replicas together, outside of them (`update`).

    Args:
      optimizer: a Keras optimizer.
      gradients: this replica's gradients.
      variables: the variables of the gradients.
      applied: boolean scalar, the same on all replicas.
    """
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        # It skips steps by itself, but it checks only this replica's gradients, and it adapts its
        # scale to them. NaN gradients on every replica make all replicas skip.
        gradients = [tf.where(applied, gradient, np.nan) for gradient in gradients]
        optimizer.apply(gradients, variables)
        return

    def meet(strategy, gradients, applied):
        def step():
            strategy.extended.call_for_each_replica(optimizer.apply, args=(gradients, variables))

        tf.cond(strategy.experimental_local_results(applied)[0], step, lambda: None)

    update(meet, gradients, applied)


def update(function: Callable[..., None], *arguments: Any) -> None:
    """Calls `function(strategy, *arguments)` once for all replicas; called in each replica."""
    tf.distribute.get_replica_context().merge_call(function, args=arguments)


def pooled_moments(mean: tf.Tensor, covariance: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns mean and covariance of the samples of all replicas, which have equally many samples.

    Gradients flow to the samples of all replicas.

    Args:
      mean: [..., n], mean of this replica's samples.
      covariance: [..., n, n], covariance of this replica's samples.
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
