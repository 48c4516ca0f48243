"""Functions of tensors: their gradients, functions with a given gradient, and saving."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf


def value_and_gradient(function: Callable[[tf.Tensor], Any], x: tf.Tensor) -> tuple[Any, Any]:
    """Returns `function(x)` and its dense gradient by x, or None if it does not depend on x."""
    with tf.GradientTape() as tape:
        tape.watch(x)
        value = function(x)
    gradient: Any = tape.gradient(value, x)
    # The gradient of indexing is IndexedSlices, which neither numpy nor `tf.where` accept.
    return value, None if gradient is None else tf.convert_to_tensor(gradient)


def with_slope(
    value_and_slope: Callable[[tf.Tensor], tuple[Any, Any]],
) -> Callable[[tf.Tensor], tf.Tensor]:
    """Returns the function x [n, dim] -> value [n] whose gradient is the slope [n, dim].

    Variables that it reads, such as the weights of an emulator, are fixed.
    """

    @tf.custom_gradient
    def valued(x):
        value, slope = value_and_slope(x)

        def of_upstream(upstream, variables=None):
            by_x = upstream[:, tf.newaxis] * slope
            return by_x if variables is None else (by_x, [None] * len(variables))

        return value, of_upstream

    differentiable: Any = valued
    return differentiable


def save_functions(
    functions: Mapping[str, tuple[Callable[..., Any], Sequence[Any]]], path: str | Path
) -> None:
    """Writes functions as a SavedModel, with the variables that they read.

    Args:
      functions: pairs of a function and the `tf.TensorSpec`s of its arguments, by name.
      path: directory of the SavedModel.
    """
    module: Any = tf.Module()
    module.read = []
    for name, (function, signature) in functions.items():
        traced: Any = tf.function(function, signature, autograph=False)
        module.read += traced.get_concrete_function().graph.variables
        setattr(module, name, traced)
    tf.saved_model.save(module, str(path))
