"""Batches of a split as tf.data, a function of the step alone: a resumed run sees the same ones."""

import numpy as np
import tensorflow as tf

from avb_tf.data.source import Split

_AHEAD = 4  # batches that are ready before they are asked for
_BLOCK = 4096  # examples ordered in one go, in whole epochs: an op per epoch of 4 would be slow


def training_batches(
    split: Split,
    batch_size: int,
    seed: int,
    first_step: int,
    last_step: int | None = None,
    *,
    shuffle: bool = True,
    context: tf.distribute.InputContext | None = None,
) -> tf.data.Dataset:
    """Batches of the steps first_step, ..., last_step - 1: float32 [batch_size, *event].

    Each epoch visits each example once, in its own order; batches run on across epochs.

    Args:
      seed: of the orders.
      last_step: None for batches without an end.
      shuffle: whether each epoch has an order of its own, or all have that of the data.
      context: where several replicas share each batch: this worker's part of it, in one element
        [batch_size / replicas, *event] for each of its replicas.
    """
    indices = training_indices(
        split.size, batch_size, seed, first_step, shuffle=shuffle, context=context
    )
    if last_step is not None:
        context = context or tf.distribute.InputContext()
        local = context.num_replicas_in_sync // context.num_input_pipelines
        indices = indices.take(local * (last_step - first_step))
    return untuned(indices.map(split.read, num_parallel_calls=tf.data.AUTOTUNE).prefetch(_AHEAD))


def training_indices(
    size: int,
    batch_size: int,
    seed: int,
    first_step: int,
    *,
    shuffle: bool = True,
    context: tf.distribute.InputContext | None = None,
) -> tf.data.Dataset:
    """Indices of the examples in `training_batches`, without an end: int64 [batch_size].

    Args:
      size: number of examples.
      context: as of `training_batches`; the elements are then [batch_size / replicas].
    """
    context = context or tf.distribute.InputContext()
    own = batch_size // context.num_input_pipelines
    first = own * context.input_pipeline_id
    epochs = -(-_BLOCK // size)
    first_block, offset = divmod(first_step * batch_size, epochs * size)

    def order(block: tf.Tensor) -> tf.Tensor:
        if not shuffle:
            return tf.tile(tf.range(size), [epochs])
        seeds = tf.stack([tf.constant(seed, tf.int64), block])
        keys = tf.random.stateless_uniform([epochs, size], seeds)
        return tf.reshape(tf.argsort(keys), [-1])  # a permutation for each epoch

    def ordered(block: tf.Tensor) -> tf.Tensor:
        return tf.cast(order(block)[tf.where(block == first_block, offset, 0) :], tf.int64)

    blocks = tf.data.Dataset.range(first_block, tf.int64.max).map(ordered)
    indices = blocks.rebatch(batch_size, drop_remainder=True)
    if context.num_replicas_in_sync > 1:
        share = batch_size // context.num_replicas_in_sync
        indices = indices.map(lambda whole: whole[first : first + own])
        indices = indices.rebatch(share, drop_remainder=True)
    return indices


def evaluation_batches(
    split: Split, batch_size: int, binary: bool, seed: int = 0
) -> tf.data.Dataset:
    """All examples in order: float32 [batch_size, *event], the last batch perhaps smaller.

    Args:
      binary: whether to draw x from Bernoulli(x), once for each example by (seed, index), so that
        every batch size and every evaluation gives the same x.
    """

    def example(index: tf.Tensor) -> tf.Tensor:
        x = split.read(index[tf.newaxis])[0]
        return _binarise(x, seed, index) if binary else x

    indices = tf.data.Dataset.range(split.size)
    single = indices.map(example, num_parallel_calls=tf.data.AUTOTUNE)
    return untuned(single.batch(batch_size).prefetch(_AHEAD))


def untuned(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """The dataset without tf.data's tuning of itself.

    The tuning thread sleeps the longer the longer it has run, and the end of an iterator waits
    for it: up to ten seconds at the end of a `fit` of a minute.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


def examples(split: Split, count: int, binary: bool, seed: int = 0) -> np.ndarray:
    """The first `count` examples of `evaluation_batches`, or all there are: [count, *event]."""
    batches = evaluation_batches(split, count, binary, seed)
    return batches.take(1).get_single_element().numpy()


def _binarise(x: tf.Tensor, seed: int, index: tf.Tensor) -> tf.Tensor:
    uniform = tf.random.stateless_uniform(
        tf.shape(x), tf.stack([tf.constant(seed, tf.int64), index])
    )
    return tf.cast(uniform < x, tf.float32)
