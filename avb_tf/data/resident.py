"""Examples that stay on the device, where each step gathers its batch by indices from the host."""

from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from avb_tf.data import pipeline
from avb_tf.data.source import Split, gather

MEGABYTES = 4096  # largest stored size of examples that are kept on the device
CAPACITY = 100  # steps for which the indices of a call have room, unless a call has more
STRIDE = 10  # steps between checks for the end of a compiled loop, if it divides every call


class Resident(NamedTuple):
    """The examples of a run on its devices, and the batches of its steps as indices into them."""

    rows: Any  # as in `source.Stored`, a copy for each replica
    decode: Callable[[Any], Any]  # as in `source.Stored`
    stride: int  # divides the number of steps of each call
    # Dataset with an element for each call: (indices int64 [capacity, batch / replicas], number of
    # steps), for each replica of a strategy.
    calls: Any

    def read(self, rows: Any, indices: tf.Tensor, step: tf.Tensor) -> Any:
        """Returns the batch [batch / replicas, *event] of one step of a call.

        Args:
          rows: this replica's copy of the rows.
          indices: the call's indices, int64 [capacity, batch / replicas].
          step: number of the step in the call, from 0.
        """
        return self.decode(gather(rows, tf.gather(indices, step)))


def traced(resident: Resident | None, compiled: bool) -> tuple[Any, ...]:
    """Returns the fields that are constants of the graph that reads the examples.

    Only a compiled loop has a stride.
    """
    if resident is None:
        return ()
    return (resident.decode, resident.stride) if compiled else (resident.decode,)


def fits(split: Split, megabytes: float = MEGABYTES) -> bool:
    """Returns whether the examples are in memory and take at most `megabytes`."""
    if split.stored is None:
        return False
    tensors = tf.nest.flatten(split.stored.rows)
    return sum(t.shape.num_elements() * t.dtype.size for t in tensors) <= megabytes * 2**20


def put(
    split: Split,
    strategy: tf.distribute.Strategy,
    batch_size: int,
    seed: int,
    first_step: int,
    shuffle: bool,
    steps_per_epoch: int,
    steps_per_call: int,
) -> Resident:
    """Copies the examples to each device of `strategy`; bytes stay bytes.

    The batches are those of `pipeline.training_batches`. A call takes `steps_per_call` of them, or
    as many as are left in its epoch.

    Args:
      split: the examples, which must be in memory (`fits`).
      strategy: the model's strategy.
      batch_size: examples in a batch, over all replicas.
      seed: seed of the orders.
      first_step: step of the first batch.
      shuffle: whether each epoch has its own random order.
      steps_per_epoch: steps in an epoch of `fit`.
      steps_per_call: steps in a call of the training graph.
    """
    stored: Any = split.stored
    capacity = max(CAPACITY, steps_per_call)

    def identity(rows):
        return tf.nest.map_structure(tf.identity, rows)

    def copy(context):
        if context.num_replicas_in_sync == 1:
            return identity(stored.rows)
        devices = strategy.extended.worker_devices
        with tf.device(devices[context.replica_id_in_sync_group % len(devices)]):
            return identity(stored.rows)

    def calls(context):
        indices = pipeline.training_indices(
            split.size, batch_size, seed, first_step, shuffle=shuffle, context=context
        )
        spec: Any = indices.element_spec
        local = context.num_replicas_in_sync // context.num_input_pipelines

        def call(steps):  # [n, local, share] -> [local, capacity, share], [local]
            count = tf.shape(steps)[0]
            padded = tf.pad(steps, [[0, capacity - count], [0, 0], [0, 0]])
            padded = tf.ensure_shape(padded, [capacity, local, spec.shape[0]])
            return tf.transpose(padded, [1, 0, 2]), tf.repeat(count, local)

        epochs = indices.batch(local).batch(steps_per_epoch, drop_remainder=True)
        steps = epochs.flat_map(
            lambda epoch: tf.data.Dataset.from_tensor_slices(epoch).batch(steps_per_call)
        )
        return pipeline.untuned(steps.map(call).unbatch().prefetch(local))

    rows = strategy.experimental_distribute_values_from_function(copy)
    strided = steps_per_epoch % STRIDE == steps_per_call % STRIDE == 0
    return Resident(
        rows,
        stored.decode,
        STRIDE if strided else 1,
        strategy.distribute_datasets_from_function(calls),
    )
