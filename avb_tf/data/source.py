"""What every source returns, and what several sources share."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from avb_tf.errors import UserError


class Stored(NamedTuple):
    """Examples in memory, as they are stored, and what makes a batch of them."""

    rows: Any  # [size, ...], in the host's memory; with weights, a pair of x and weights [size]
    decode: Callable[[Any], Any]  # rows [n, ...] -> x float32 [n, *event], or (x, None, weights)


@dataclass(frozen=True)
class Split:
    """Examples that are read by their index."""

    size: int
    # int64 [n] -> float32 [n, *event] in [0, 1], pure TF; with weights (x, None, float32 [n])
    read: Callable[[tf.Tensor], Any]
    labels: np.ndarray | None = None  # int64 [size]
    stored: Stored | None = None  # where the examples are in memory


@dataclass(frozen=True)
class Source:
    """A data set in its three splits."""

    name: str
    event_shape: tuple[int, ...]
    train: Split
    validation: Split
    test: Split


def data_path(path: str) -> str:
    """Returns `path`, or where it is empty the folder named by AVB_TF_DATA_DIR, or ''."""
    return path or os.environ.get("AVB_TF_DATA_DIR", "")


def array_split(
    x: np.ndarray, labels: np.ndarray | None = None, weights: np.ndarray | None = None
) -> Split:
    """Split of an array in memory, where uint8 stays uint8 until it is read.

    Args:
      x: [size, *event], uint8 of 0..255 or float in [0, 1].
      labels: integer [size].
      weights: of the examples in training, float32 [size].
    """
    with tf.device("CPU:0"):  # tf.data reads it there; on a GPU every batch would be copied back
        rows = tf.constant(x if x.dtype == np.uint8 else x.astype(np.float32))
        rows = rows if weights is None else (rows, tf.constant(weights))
    decode = decoded if weights is None else _decoded_and_weighted

    def read(indices: tf.Tensor) -> Any:
        return decode(gather(rows, indices))

    labels = None if labels is None else labels.astype(np.int64)
    return Split(len(x), read, labels, Stored(rows, decode))


def gather(rows: Any, indices: tf.Tensor) -> Any:
    """The rows at `indices`, of each tensor."""
    return tf.nest.map_structure(lambda tensor: tf.gather(tensor, indices), rows)


def _decoded_and_weighted(rows: tuple[tf.Tensor, tf.Tensor]) -> tuple[tf.Tensor, None, tf.Tensor]:
    x, weights = rows
    return decoded(x), None, weights


def decoded(rows: tf.Tensor) -> tf.Tensor:
    """float32 in [0, 1] of rows that are so already, or bytes of 0..255."""
    return tf.cast(rows, tf.float32) / (255.0 if rows.dtype == tf.uint8 else 1.0)


def cut(size: int, held_out: int, seed: int, place: str) -> list[np.ndarray]:
    """Shuffles range(size) and cuts `held_out` tenths, of at least one example each, off it.

    Args:
      place: where the examples came from, for the message.

    Returns:
      1 + held_out disjoint index arrays, the remainder for training first.

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
