"""Checks on the x and the weights that the model's methods are given, as on those of a file."""

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
    """Whether x is an array, or a list or a data frame that becomes one, or one that has gaps."""
    return hasattr(x, "__array__") or isinstance(x, (list, tuple, dict)) or _has_gaps(x)


def _has_gaps(x) -> bool:
    """Whether x is a sparse matrix of SciPy, or a sparse or ragged tensor."""
    return hasattr(x, "toarray") or isinstance(x, (tf.SparseTensor, tf.RaggedTensor))


def examples(
    x: Any,
    event_shape: Sequence[int],
    place: str = "x",
    support: str = "unit",
    table: Table | None = None,
) -> np.ndarray:
    """The array of x, once it fits the model; float32 unless it is of numbers in [0, 1].

    Args:
      x: [n, *event]; of support "unit" uint8 of 0..255 or float in [0, 1]; a single channel may be
        missing. Of a table rows, or a pandas data frame.
      place: its name, for the message.
      support: what x is, as of a `Likelihood`.
      table: the columns of x, if it is a table.
    Raises:
      UserError: x has another shape, type or range, or holds NaN.
    """
    if isinstance(x, tf.Tensor) and x.dtype.is_floating:
        x = tf.cast(x, tf.float32)  # NumPy has no bfloat16
    if _has_gaps(x):
        raise UserError(
            f"{place} is a {type(x).__name__}; expected a dense array; convert it, as toarray() "
            "and tf.sparse.to_dense do"
        )
    if table is not None:
        return table.array(x, place)
    try:
        x = np.asarray(x)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{place} is no array ({error!s:.100}); {_expected(event_shape)}"
        ) from error
    check_shape(x.shape, event_shape, place)
    check_values(place, x, support)
    return x if support == "unit" else x.astype(np.float32)


def check_shape(shape: Sequence[int | None], event_shape: Sequence[int], place: str = "x") -> None:
    """Checks that `shape` is [n, *event].

    Raises:
      UserError: it is not.
    """
    event = tuple(event_shape)
    allowed = [event, event[:-1]] if event[-1:] == (1,) else [event]
    if len(shape) == 0 or tuple(shape[1:]) not in allowed:
        raise UserError(f"{place} has shape {tuple(shape)}; {_expected(event)}; reshape it")


def _expected(event_shape) -> str:
    return f"expected an array of shape {('n', *event_shape)}".replace("'", "")


def weights(sample_weight: Any, size: int) -> np.ndarray:
    """The weights of `size` examples, float32 [size].

    Raises:
      UserError: they are not numbers of at least 0, one for each example.
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
    """x as float32 [batch, *event]: bytes scaled to [0, 1], a missing single channel added.

    Unless `unit`, bytes are numbers like all others.
    """
    x = tf.convert_to_tensor(x)
    x = decoded(x) if unit else tf.cast(x, tf.float32)
    missing = event_shape[-1:] == (1,) and x.shape.rank == len(event_shape)
    x = x[..., tf.newaxis] if missing else x
    if x.shape.rank is not None:
        check_shape(x.shape.as_list(), event_shape)
    return x


def inputs(x: Any, check: Callable[[Any], Any]) -> Any:
    """x as Keras's methods take it, once `check` has seen it all or, of a stream, its first batch.

    Raises:
      UserError: as `check` does.
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
            x = (batch for batch in batches)  # Keras takes generators alone
    if first is not None:
        check(keras.utils.unpack_x_y_sample_weight(first)[0])
    return x
