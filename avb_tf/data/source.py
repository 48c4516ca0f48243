"""The types that every source returns, and functions that several sources use."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from avb_tf.data.table import Table
from avb_tf.errors import UserError


class Stored(NamedTuple):
    """Examples in memory in their stored form, and the function that decodes them.

    Attributes:
      rows: [size, ...], in host memory; with weights, the pair of these rows and weights [size].
      decode: rows [n, ...] -> x, float32 [n, *event], or (x, None, weights); TensorFlow
        operations only.
    """

    rows: Any
    decode: Callable[[Any], Any]


@dataclass(frozen=True)
class Split:
    """Examples that are read by index.

    Attributes:
      size: number of examples.
      read: indices, int64 [n] -> x, float32 [n, *event], or (x, None, weights); TensorFlow
        operations only.
      labels: int64 [size], or None.
      stored: the examples in memory, or None if they are read from files.
    """

    size: int
    read: Callable[[tf.Tensor], Any]
    labels: np.ndarray | None = None
    stored: Stored | None = None


@dataclass(frozen=True)
class Source:
    """A data set with its three splits.

    Attributes:
      name: as in config.data.name.
      event_shape: shape of one example, (features,) or (height, width, channels).
      train: examples to train on.
      validation: held-out examples to watch during training.
      test: held-out examples for the final evaluation.
      table: the columns of x, or None if x is not a table.
    """

    name: str
    event_shape: tuple[int, ...]
    train: Split
    validation: Split
    test: Split
    table: Table | None = None


def data_path(path: str) -> str:
    """Returns `path`, or if it is empty the folder named by AVB_TF_DATA_DIR, or else ''."""
    return path or os.environ.get("AVB_TF_DATA_DIR", "")


def array_split(
    x: np.ndarray, labels: np.ndarray | None = None, weights: np.ndarray | None = None
) -> Split:
    """Returns a split of an array in memory; uint8 is converted to float only when it is read.

    Args:
      x: [size, *event], uint8 in 0..255 or float.
      labels: integer [size], or None.
      weights: weights of the examples in training, float32 [size], or None.
    """
    with tf.device("CPU:0"):  # tf.data runs on the CPU: from a GPU each batch would be copied back
        rows = tf.constant(x if x.dtype == np.uint8 else x.astype(np.float32))
        rows = rows if weights is None else (rows, tf.constant(weights))
    decode = decoded if weights is None else _decoded_and_weighted

    def read(indices: tf.Tensor) -> Any:
        return decode(gather(rows, indices))

    labels = None if labels is None else labels.astype(np.int64)
    return Split(len(x), read, labels, Stored(rows, decode))


def gather(rows: Any, indices: tf.Tensor) -> Any:
    """Returns the rows at `indices` of each tensor."""
    return tf.nest.map_structure(lambda tensor: tf.gather(tensor, indices), rows)


def _decoded_and_weighted(rows: tuple[tf.Tensor, tf.Tensor]) -> tuple[tf.Tensor, None, tf.Tensor]:
    x, weights = rows
    return decoded(x), None, weights


def decoded(rows: tf.Tensor) -> tf.Tensor:
    """Returns rows as float32; divides uint8 in 0..255 by 255."""
    return tf.cast(rows, tf.float32) / (255.0 if rows.dtype == tf.uint8 else 1.0)


def cut(size: int, held_out: int, seed: int, place: str) -> list[np.ndarray]:
    """Shuffles range(size) and cuts off `held_out` tenths of at least one example each.

    Args:
      size: number of examples.
      held_out: number of tenths to cut off.
      seed: seed of the shuffle, at least 0.
      place: where the examples came from, for error messages.

    Returns:
      1 + held_out disjoint index arrays; the first is the remainder, for training.

    Raises:
      UserError: there are too few examples, or the seed is negative.
    """
    if size <= held_out:
        raise UserError(
            f"{place}: {size} example(s) to cut into {held_out + 1} splits; "
            f"expected at least {held_out + 1}; add examples"
        )
    if seed < 0:
        raise UserError(f"config.data.seed is {seed}; expected 0 or more")
    tenth = max(1, size // 10)
    order = np.random.default_rng(seed).permutation(size)
    *tenths, rest = np.split(order, tenth * np.arange(1, held_out + 1))
    return [rest, *tenths]
