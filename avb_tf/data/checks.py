"""Checks the x and the weights that users pass to the model's methods."""

import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from avb_tf.data.arrays import check_values
from avb_tf.data.source import Split, decoded
from avb_tf.data.table import Table
from avb_tf.errors import UserError


def is_array(x: Any) -> bool:
    """Returns whether x is an array, or a list or data frame that can become one."""
    return hasattr(x, "__array__") or isinstance(x, (list, tuple, dict))


def examples(
    x: Any,
    event_shape: Sequence[int],
    place: str = "x",
    support: str = "unit",
    table: Table | None = None,
) -> np.ndarray:
    """Returns x as an array after checking that it fits the model.

    The array is float32, except with support "unit", where it keeps its type.

    Args:
      x: [n, *event], where a single channel may be missing; with support "unit" uint8 of 0..255 or
        float in [0, 1]. For a table: rows [n, columns], or a pandas data frame.
      event_shape: shape of one example of the model.
      place: name of x in error messages.
      support: kind of values in x, as in `Likelihood.support`.
      table: the columns of x if it is a table, or None.
    Raises:
      UserError: x has another shape, type or range, or holds NaN.
    """
    if isinstance(x, tf.Tensor) and x.dtype.is_floating:
        x = tf.cast(x, tf.float32)  # NumPy has no bfloat16
    if table is not None:
        return table.array(x, place)
    try:
        x = np.asarray(x)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{place} is not an array ({error!s:.100}); {_expected(event_shape)}"
        ) from error
    check_shape(x.shape, event_shape, place)
    check_values(place, x, support)
    return x if support == "unit" else x.astype(np.float32)


def check_shape(shape: Sequence[int | None], event_shape: Sequence[int], place: str = "x") -> None:
    """Checks that `shape` is [n, *event].

    Args:
      shape: shape of x.
      event_shape: shape of one example; if its last size is 1, `shape` may lack that size.
      place: name of x in error messages.
    Raises:
      UserError: the shape is another one.
    """
    event = tuple(event_shape)
    allowed = [event, event[:-1]] if event[-1:] == (1,) else [event]
    if len(shape) == 0 or tuple(shape[1:]) not in allowed:
        raise UserError(f"{place} has shape {tuple(shape)}; {_expected(event)}; reshape it")


def _expected(event_shape) -> str:
    return f"expected an array of shape {('n', *event_shape)}".replace("'", "")


def weights(sample_weight: Any, size: int) -> np.ndarray:
    """Returns the weights of `size` examples as float32 [size].

    Raises:
      UserError: they are not finite numbers of at least 0, one for each example.
    """
    array = np.asarray(sample_weight)
    numeric = np.issubdtype(array.dtype, np.number) or array.dtype == bool
    if array.shape != (size,) or not numeric:
        raise UserError(
            f"sample_weight is of type {array.dtype} and shape {array.shape}; expected a number "
            f"for each example, shape ({size},)"
        )
    if not np.isfinite(array).all() or (array < 0).any():
        raise UserError(
            f"sample_weight runs from {array.min()} to {array.max()}; expected finite weights of "
            "at least 0"
        )
    return array.astype(np.float32)


def as_examples(x: Any, event_shape: Sequence[int], unit: bool = True) -> tf.Tensor:
    """Returns x as float32 [batch, *event], and adds a single channel if it is missing.

    Args:
      x: [batch, *event], or without a single channel.
      event_shape: shape of one example.
      unit: whether x is in [0, 1], so that bytes are divided by 255. Otherwise bytes are converted
        to float32 unchanged.
    Raises:
      UserError: x has another shape.
    """
    x = tf.convert_to_tensor(x)
    x = decoded(x) if unit else tf.cast(x, tf.float32)
    missing = event_shape[-1:] == (1,) and x.shape.rank == len(event_shape)
    x = x[..., tf.newaxis] if missing else x
    if x.shape.rank is not None:
        check_shape(x.shape.as_list(), event_shape)
    return x


def inputs(x: Any, check: Callable[[Any], Any]) -> Any:
    """Returns x in a form that Keras's methods accept, after `check` has passed it.

    `check` sees all of an array, and only the first batch of a stream.

    Raises:
      UserError: `check` refuses x.
    """
    if is_array(x):
        return check(x)
    first = None
    if isinstance(x, Split):
        first = x.read(tf.zeros([1], tf.int64))
    elif isinstance(x, tf.data.Dataset):
        first = next(iter(x.take(1)), None)
    elif isinstance(x, keras.utils.PyDataset):
        first = x[0]
    elif inspect.isgenerator(x):
        first = next(x, None)
        if first is not None:
            batches = itertools.chain([first], x)
            x = (batch for batch in batches)  # Keras accepts generators, but not `itertools.chain`
    if first is not None:
        check(keras.utils.unpack_x_y_sample_weight(first)[0])
    return x
