"""Batches of a split as tf.data datasets.

Each batch is a function of the step alone, so a resumed run sees the same batches.
"""

from typing import Any

import numpy as np
import tensorflow as tf

from avb_tf.data.source import Split

_AHEAD = 4  # batches to prefetch
_BLOCK = 4096  # examples to order in one op, in whole epochs: one op per tiny epoch is slow


def training_batches(
    split: Split,
    batch_size: int,
    seed: int,
    first_step: int,
    last_step: int | None = None,
    *,
    shuffle: bool = True,
    context: tf.distribute.InputContext | None = None,
) -> "tf.data.Dataset[Any]":
    """Returns the batches of steps first_step, ..., last_step - 1: float32 [batch_size, *event].

    Each epoch visits each example once. A batch may continue into the next epoch.

    Args:
      split: the examples.
      batch_size: examples in a batch, over all replicas.
      seed: seed of the orders.
      first_step: step of the first batch.
      last_step: step after the last batch; by default the stream is endless.
      shuffle: whether each epoch has its own random order; if False, every epoch has the order of
        the data.
      context: the worker's context if several replicas share each batch. The dataset then holds
        this worker's part, as one element [batch_size / replicas, *event] for each of its replicas.
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
) -> "tf.data.Dataset[Any]":
    """Returns an endless dataset of the indices in `training_batches`: int64 [batch_size].

    Args:
      size: number of examples.
      batch_size: examples in a batch, over all replicas.
      seed: seed of the orders.
      first_step: step of the first batch.
      shuffle: as in `training_batches`.
      context: as in `training_batches`; the elements are then [batch_size / replicas].
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
) -> "tf.data.Dataset[Any]":
    """Returns all examples in order: float32 [batch_size, *event]; the last batch may be smaller.

    Args:
      split: the examples.
      batch_size: examples in a batch.
      binary: whether to replace x by a draw from Bernoulli(x). The draw depends only on the seed
        and the index of the example, so every batch size and every evaluation gives the same x.
      seed: seed of these draws.
    """

    def example(index: tf.Tensor) -> tf.Tensor:
        x = split.read(index[tf.newaxis])[0]
        return _binarise(x, seed, index) if binary else x

    indices = tf.data.Dataset.range(split.size)
    single = indices.map(example, num_parallel_calls=tf.data.AUTOTUNE)
    return untuned(single.batch(batch_size).prefetch(_AHEAD))


def untuned(dataset: "tf.data.Dataset[Any]") -> "tf.data.Dataset[Any]":
    """Returns the dataset without tf.data's autotuning.

    The longer the autotuning thread has run, the longer it sleeps, and the end of an iterator waits
    for it. That wait takes up to ten seconds at the end of a `fit` that lasts a minute.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


def examples(split: Split, count: int, binary: bool, seed: int = 0) -> np.ndarray:
    """Returns the first examples of `evaluation_batches`, [count, *event].

    Args:
      split: the examples.
      count: most examples to return; fewer if the split has fewer.
      binary: as in `evaluation_batches`.
      seed: as in `evaluation_batches`.
    """
    batches = evaluation_batches(split, count, binary, seed)
    return batches.take(1).get_single_element().numpy()


def _binarise(x: tf.Tensor, seed: int, index: tf.Tensor) -> tf.Tensor:
    uniform = tf.random.stateless_uniform(
        tf.shape(x), tf.stack([tf.constant(seed, tf.int64), index])
    )
    return tf.cast(uniform < x, tf.float32)
