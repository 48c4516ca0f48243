"""The networks of y: residual blocks, and deep sets for rows whose order does not matter."""

import functools

import keras
import tensorflow as tf

_QUERIES = 4  # of the attention to the rows of a set


class Residual(keras.layers.Layer):
    """Features of y by residual blocks on a linear layer, [n, features] -> [n, width].

    Args:
      width: units of each layer.
      depth: number of residual blocks.
    """

    def __init__(self, width: int, depth: int):
        super().__init__()
        dense = keras.layers.Dense
        self.first = dense(width)
        self.inner = [dense(width, activation="silu") for _ in range(depth)]
        self.outer = [dense(width, kernel_initializer="zeros") for _ in range(depth)]

    def call(self, y: tf.Tensor) -> tf.Tensor:
        """Returns features of y, [n, features] -> [n, width]."""
        hidden = self.first(y)
        for inner, outer in zip(self.inner, self.outer, strict=True):
            hidden += outer(inner(hidden))
        return hidden


class DeepSet(keras.layers.Layer):
    """Features of a set of rows, independent of their order, [n, rows, features] -> [n, width].

    A small residual network reads each row. A second one reads the mean of its outputs, their
    maximum, weighted means, and the logarithm of the number of rows. The weights are a softmax over
    the rows: attention by learned queries.

    Args:
      width: units of each layer of the second network; the first has half as many.
      depth: number of residual blocks of the second network; the first has one.
    Source: Zaheer et al. (2017); for the attention, Lee et al. (2019).
    """

    def __init__(self, width: int, depth: int):
        super().__init__()
        # Most of a step's time goes to the network of the rows, of which there are many.
        self.each, self.whole = Residual(max(8, width // 2), 1), Residual(width, depth)
        self.scores = keras.layers.Dense(_QUERIES)

    def call(self, y: tf.Tensor) -> tf.Tensor:
        """Returns features [n, width] for y [n, rows, features]; rows of NaN are left out."""
        present = tf.reduce_all(tf.math.is_finite(y), -1)
        owner, sets = tf.where(present)[:, 0], tf.shape(y)[0]
        add, largest = (
            functools.partial(of_segments, segment_ids=owner, num_segments=sets)
            for of_segments in (tf.math.unsorted_segment_sum, tf.math.unsorted_segment_max)
        )
        hidden = tf.nn.silu(self.each(tf.boolean_mask(y, present)))
        scores = self.scores(hidden)
        weights = tf.exp(scores - tf.gather(tf.stop_gradient(largest(scores)), owner))
        seen = add(weights[:, :, tf.newaxis] * hidden[:, tf.newaxis])
        seen /= add(weights)[:, :, tf.newaxis]
        count = tf.reduce_sum(tf.cast(present, tf.float32), 1, keepdims=True)
        parts = [
            add(hidden) / count,
            largest(hidden),
            tf.reshape(seen, [sets, _QUERIES * hidden.shape[-1]]),
            tf.math.log(count),
        ]
        return self.whole(tf.concat(parts, -1))
