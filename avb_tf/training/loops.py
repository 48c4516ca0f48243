"""The graphs that `fit` and `evaluate` call: several steps each, under any strategy and compiler.

They replace Keras's graphs for two reasons. Keras reduces the logs over replicas, which fails for
scalars with several workers. And the loop in Keras's graphs fails with several replicas.
"""

import inspect
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from avb_tf.training.optimizers import pieces, value

Step = Callable[[Any], object]  # takes a batch and is called in each replica
Logs = dict[str, tf.Tensor]


def of_stream(model: Any, step: Step) -> Callable[[Any], Logs]:
    """Returns a function that takes an iterator over batches and runs several steps.

    Each call runs `model.steps_per_execution` steps, or as many as the epoch has left.

    Args:
      model: a `training.Trained`.
      step: the training step.
    """
    on_replica = _on_replica(model, step)

    def run(iterator, count):
        for _ in tf.range(count):
            on_replica(next(iterator))
        return model.get_metrics_result()

    return _called_with_count(model, run, model.training_calls)


def of_resident(model: Any, step: Step) -> Callable[[Any], Logs]:
    """Returns a function that runs several steps on examples that stay on the device.

    The function takes an iterator over `model.resident.calls`.

    Args:
      model: a `training.Trained` with `resident` examples.
      step: the training step.
    """
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


def of_finite(model: Any, step: Step) -> Callable[[Any], Logs]:
    """Returns a function like that of `of_stream`, for steps that do not change weights.

    The data may end within a call.

    Args:
      model: a `training.Trained`.
      step: the test step.
    """
    traced = step if model.run_eagerly else tf.function(step, autograph=False)

    def on_replica(batch):
        model.distribute_strategy.run(traced, (batch,))

    def run(iterator, count):
        on_replica(next(iterator))  # Keras catches the error at the end of the data
        for _ in tf.range(count - 1):
            batch = iterator.get_next_as_optional()
            if not batch.has_value():
                break
            on_replica(batch.get_value())
        return model.get_metrics_result()

    return _called_with_count(model, run, model.test_calls)


class Calls:
    """Counter of the steps of each call of a graph, so that an epoch does not exceed its steps."""

    def __init__(self):
        self.begin(None)

    def begin(self, steps_per_epoch: int | None) -> None:
        """Sets the steps of each following epoch; None if the end of the data ends the epoch."""
        self.steps_per_epoch = self.left = steps_per_epoch

    def next(self, most: int) -> int:
        """Returns the steps of the next call: `most`, or fewer if the epoch ends before."""
        if self.left is None:
            return most
        count = min(most, self.left)
        self.left = self.left - count or self.steps_per_epoch
        return count


def _called_with_count(model, run, calls: Calls):
    if not model.run_eagerly:
        run = tf.function(run, reduce_retracing=True)

    def call(iterator):
        if inspect.isgenerator(iterator):  # `train_on_batch` passes a generator of one batch
            batch: Any = next(iterator)
            x, _, weights = batch
            iterator, count = _single(model, x, weights), 1
        else:
            count = calls.next(model.steps_per_execution)
        return run(iterator, tf.constant(count))  # as a tensor, so that one graph serves all counts

    return call


def _single(model, x, weights) -> Any:
    """Returns an iterator over one batch, split into the replicas' shares."""
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
    """Compiles `step(i, *data)` for all i < count into one program of XLA.

    A step of a small network on a GPU takes as long as the launches of its kernels, and most
    kernels would update one weight or take the norm of one gradient. The loop therefore carries the
    model's state in few buffers: all small weights of an optimizer as one vector, and likewise
    their moments and their averages. The weights in a step are slices of these vectors
    (`optimizers.Adam.apply_where`).

    Args:
      model: a `training.Trained`.
      step: takes the index of the step and the data.
      stride: number of steps after which the host reads `count` again; it must divide `count`.
    """
    groups = model.state_groups()

    def one(i, state, data):
        with keras.StatelessScope(_values(groups, state)):
            step(i, *data)
            return [value(group) for group in groups]

    @tf.function(autograph=False, jit_compile=True)
    def program(count, *data):
        def several(i, state):
            _, state = tf.while_loop(  # its length is known, so the host need not wait for it
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
    """Returns pairs (variable, its value in `state`) for the variables of all groups."""
    return [
        pair
        for group, tensor in zip(groups, state, strict=True)
        for pair in zip(group, pieces(group, tensor), strict=True)
    ]
