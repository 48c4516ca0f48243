"""The graphs that `fit` and `evaluate` call: several steps each, under any strategy and compiler.

Keras's own reduce the logs over replicas, which fails for scalars with several workers, and loop in
a way that fails for several replicas.
"""

import inspect
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from avb_tf.optimizers import pieces, value

Step = Callable[[Any], object]  # takes a batch, in a replica
Logs = dict[str, tf.Tensor]


def of_stream(model, step: Step) -> Callable[[Any], Logs]:
    """Function of an iterator over batches, `model.steps_per_execution` of them at a time."""
    on_replica = _on_replica(model, step)

    def run(iterator, count):
        for _ in tf.range(count):
            on_replica(next(iterator))
        return model.get_metrics_result()

    return _called_with_count(model, run, model.training_calls)


def of_resident(model, step: Step) -> Callable[[Any], Logs]:
    """Function of an iterator over `model.resident.calls`, whose batches are on the device."""
    strategy, read = model.distribute_strategy, model.resident.read

    def indexed(i, rows, indices):
        step(read(rows, indices, i))

    if model.loop_is_compiled:
        loop: Any = _program(model, indexed, model.resident.stride)
    else:
        if not model.run_eagerly:
            indexed = tf.function(indexed, autograph=False, jit_compile=model.jit_compile)

        def one_by_one(count, rows, indices):
            for i in tf.range(count):
                strategy.run(indexed, (i, rows, indices))

        loop = one_by_one

    def run(iterator, rows):
        indices, counts = next(iterator)
        loop(strategy.experimental_local_results(counts)[0], rows, indices)
        return model.get_metrics_result()

    if not model.run_eagerly:
        run = tf.function(run, reduce_retracing=True)
    return lambda iterator: run(iterator, model.resident.rows)


def of_finite(model, step: Step) -> Callable[[Any], Logs]:
    """As `of_stream`, for steps that change no weight; the data may end within a call."""
    traced = step if model.run_eagerly else tf.function(step, autograph=False)

    def on_replica(batch):
        model.distribute_strategy.run(traced, (batch,))

    def run(iterator, count):
        on_replica(next(iterator))  # where there is none left, Keras catches the error
        for _ in tf.range(count - 1):
            batch = iterator.get_next_as_optional()
            if not batch.has_value():
                break
            on_replica(batch.get_value())
        return model.get_metrics_result()

    return _called_with_count(model, run, model.test_calls)


class Calls:
    """How many steps each call of a graph takes, so that an epoch has no more than it should."""

    def __init__(self):
        self.begin(None)

    def begin(self, steps_per_epoch: int | None) -> None:
        """From here on an epoch has so many steps; None where the data tell."""
        self.steps_per_epoch = self.left = steps_per_epoch

    def next(self, most: int) -> int:
        """Steps of the next call, `most` unless the epoch ends before."""
        if self.left is None:
            return most
        count = min(most, self.left)
        self.left = self.left - count or self.steps_per_epoch
        return count


def _called_with_count(model, run, calls: Calls):
    if not model.run_eagerly:
        run = tf.function(run, reduce_retracing=True)

    def call(iterator):
        if inspect.isgenerator(iterator):  # of `train_on_batch`
            batch: Any = next(iterator)
            x, _, weights = batch
            iterator, count = _single(model, x, weights), 1
        else:
            count = calls.next(model.steps_per_execution)
        return run(iterator, tf.constant(count))  # a tensor: another count is no other graph

    return call


def _single(model, x, weights) -> Any:
    """Iterator over the one batch, in shares of the replicas."""
    tensors = (x,) if weights is None else (x, weights)
    batch = tf.data.Dataset.from_tensor_slices(tensors).batch(len(x))
    batch = batch.map(lambda x, *weights: (x, None, *weights))
    return iter(model.distribute_strategy.experimental_distribute_dataset(batch))


def _on_replica(model, step):
    if model.loop_is_compiled:
        program = _program(model, lambda _, batch: step(batch))
        return lambda batch: program(1, batch)
    if not model.run_eagerly:
        step = tf.function(step, autograph=False, jit_compile=model.jit_compile)
    return lambda batch: model.distribute_strategy.run(step, (batch,))


def _program(model, step, stride=1):
    """`step(i, *data)` for i < count as one program of XLA, the model's state in few buffers.

    A step of a small network on a GPU lasts as long as the starts of its kernels, most of which
    would update a weight or take the norm of its gradient. So the state goes through the loop in
    groups: all small weights of an optimizer as one vector, likewise their moments and averages.
    The weights in a step are slices of these (`optimizers.Adam.apply_where`).

    Args:
      stride: divides `count`, which the program reads on the host once in so many steps.
    """
    groups = model.state_groups()

    def one(i, state, data):
        with keras.StatelessScope(_values(groups, state)):
            step(i, *data)
            return [value(group) for group in groups]

    @tf.function(autograph=False, jit_compile=True)
    def program(count, *data):
        def several(i, state):
            _, state = tf.while_loop(  # of known length, so that the host need not wait for it
                lambda j, _: j < stride,
                lambda j, state: [j + 1, one(i + j, state, data)],
                [tf.constant(0), state],
            )
            return [i + stride, state]

        state = [value(group) for group in groups]
        _, state = tf.while_loop(lambda i, _: i < count, several, [tf.constant(0), state])
        for variable, tensor in _values(groups, state):
            variable.assign(tensor)

    return program


def _values(groups, state) -> list[tuple[keras.Variable, tf.Tensor]]:
    """The variables of all groups, with their values in `state`."""
    return [
        pair
        for group, tensor in zip(groups, state, strict=True)
        for pair in zip(group, pieces(group, tensor), strict=True)
    ]
