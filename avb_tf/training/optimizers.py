"""Adam with one pass over each weight, and with gradients clipped after the sum over replicas."""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from avb_tf.errors import UserError

_UNSUPPORTED = (
    "amsgrad", "weight_decay", "clipnorm", "clipvalue", "use_ema", "gradient_accumulation_steps",
)  # fmt: skip
LARGE = 2**20  # a weight with at least this many elements is updated by itself


@keras.saving.register_keras_serializable("avb_tf")
class Adam(keras.optimizers.Adam):
    """Keras's Adam with its update fused into one op per weight, or into one for all small weights.

    Keras writes an update as a dozen ops, each of which passes over the weight. For the authors'
    adversary of 27 million weights, these passes cost more than its matrix products. With
    `global_clipnorm`, Keras clips each replica's share; here the sum over replicas is clipped, so
    that a run does not depend on the number of replicas. Gradients must be dense.
    """

    def __init__(
        self,
        learning_rate: float | keras.optimizers.schedules.LearningRateSchedule = 0.001,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
        **kwargs: Any,
    ):
        for name in _UNSUPPORTED:
            if kwargs.get(name):
                raise UserError(
                    f"avb_tf.training.optimizers.Adam got {name}={kwargs[name]}; expected none: "
                    "use global_clipnorm to clip, or keras.optimizers.Adam"
                )
        super().__init__(learning_rate, beta_1, beta_2, epsilon, **kwargs)

    def update_step(
        self, gradient: tf.Tensor, variable: keras.Variable, learning_rate: float | tf.Tensor
    ) -> None:
        """Updates one weight.

        Args:
          gradient: gradient of the weight.
          variable: the weight.
          learning_rate: a scalar.
        Source: Kingma and Ba (2015), Algorithm 1 in the form at the end of Section 2.
        """
        i = self._get_variable_index(variable)
        step = tf.cast(self._iterations.value + 1, variable.dtype)
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=self._momentums[i].value.handle,
            v=self._velocities[i].value.handle,
            beta1_power=tf.cast(self.beta_1, variable.dtype) ** step,
            beta2_power=tf.cast(self.beta_2, variable.dtype) ** step,
            lr=tf.cast(learning_rate, variable.dtype),
            beta1=self.beta_1,
            beta2=self.beta_2,
            epsilon=self.epsilon,
            grad=tf.cast(gradient, variable.dtype),
        )

    def apply_where(self, applied: tf.Tensor, gradients: Sequence[tf.Tensor]) -> None:
        """Takes the step of `apply` without a branch and in few kernels, for XLA.

        A GPU takes longer to launch the update of a small weight than to compute it, so the small
        weights are updated as one vector (`grouped`).

        Args:
          applied: boolean scalar; if it is false, nothing changes.
          gradients: the result of `gathered` for the gradients of the optimizer's weights.
        """
        if self.global_clipnorm:
            norm = tf.linalg.global_norm(gradients)
            scale = tf.minimum(1.0, self.global_clipnorm / norm)
            gradients = [gradient * scale for gradient in gradients]
        step = tf.cast(self._iterations.value + 1, tf.float32)
        correction = tf.sqrt(1.0 - self.beta_2**step) / (1.0 - self.beta_1**step)
        rate = tf.cast(self.learning_rate, tf.float32) * correction
        for gradient, *groups in zip(gradients, *map(grouped, self.states), strict=True):
            before = weights, m, v = [value(group) for group in groups]
            m += (1.0 - self.beta_1) * (gradient - m)
            v += (1.0 - self.beta_2) * (gradient**2 - v)
            after = weights - rate * m / (tf.sqrt(v) + self.epsilon), m, v
            for group, old, new in zip(groups, before, after, strict=True):
                assign(group, tf.where(applied, new, old))
        self._iterations.assign_add(tf.cast(applied, self._iterations.dtype))

    @property
    def states(self) -> list[list[keras.Variable]]:
        """The weights, their first moments and their second moments, in the same order."""
        return [self._trainable_variables, self._momentums, self._velocities]

    def _clip_gradients(self, grads):
        return grads  # clipped in `_all_reduce_sum_gradients`, after the sum over replicas

    def _all_reduce_sum_gradients(self, grads_and_vars):
        grads_and_vars = super()._all_reduce_sum_gradients(grads_and_vars)
        if not self.global_clipnorm:
            return grads_and_vars
        gradients, variables = zip(*grads_and_vars, strict=True)
        norm = tf.linalg.global_norm(gradients)
        clipped = tf.cond(  # mostly there is nothing to clip, and the branch saves a pass
            norm > self.global_clipnorm,
            lambda: [g * (self.global_clipnorm / norm) for g in gradients],
            lambda: list(gradients),
        )
        return list(zip(clipped, variables, strict=True))


def grouped(variables: Sequence[keras.Variable]) -> list[list[keras.Variable]]:
    """Groups variables that are updated together: each large one alone, then all small ones."""
    large = [[v] for v in variables if v.shape.num_elements() >= LARGE]
    small = [v for v in variables if v.shape.num_elements() < LARGE]
    return [*large, small] if small else large


def gathered(tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """Joins tensors of the variables' shapes by the groups of `grouped`.

    Each large tensor stays as it is; the small ones follow as one vector.
    """
    large = [t for t in tensors if t.shape.num_elements() >= LARGE]
    small = [tf.reshape(t, [-1]) for t in tensors if t.shape.num_elements() < LARGE]
    return [*large, tf.concat(small, 0)] if small else large


def value(group: Sequence[keras.Variable]) -> tf.Tensor:
    """Returns the values of a group as one vector; a single variable keeps its shape."""
    if len(group) == 1:
        return tf.convert_to_tensor(group[0].value)
    return tf.concat([tf.reshape(variable.value, [-1]) for variable in group], 0)


def pieces(group: Sequence[keras.Variable], tensor: tf.Tensor) -> list[tf.Tensor]:
    """Splits the result of `value` into the values of the group's variables."""
    if len(group) == 1:
        return [tf.reshape(tensor, group[0].shape)]
    parts = tf.split(tensor, [variable.shape.num_elements() for variable in group])
    return [tf.reshape(part, v.shape) for part, v in zip(parts, group, strict=True)]


def assign(group: Sequence[keras.Variable], tensor: tf.Tensor) -> None:
    """Sets the variables of a group from a tensor in the form that `value` returns."""
    for variable, piece in zip(group, pieces(group, tensor), strict=True):
        variable.assign(piece)
