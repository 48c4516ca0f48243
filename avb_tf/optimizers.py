"""Adam as training uses it: one pass over each weight, clipped after replicas have been summed."""

from collections.abc import Sequence

import keras
import tensorflow as tf


@keras.saving.register_keras_serializable("avb_tf")
class Adam(keras.optimizers.Adam):
    """Keras's Adam, its update fused into one op per weight, or into one for all of them.

    Keras writes an update as a dozen ops, each a pass over the weight: for the authors' adversary
    of 27 million weights they cost more than its products. With `global_clipnorm`, Keras clips
    each replica's share; here the sum over replicas is clipped, so that a run does not depend on
    how many there are. Dense gradients only.
    """

    def update_step(self, gradient, variable, learning_rate):
        """Kingma and Ba (2015), Algorithm 1 in the form at the end of its Section 2."""
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

    def apply_where(self, applied, gradient, variables: Sequence[keras.Variable]) -> None:
        """The same step for all weights as one vector, without a condition; for XLA.

        Where `applied` is false nothing changes. On a GPU an update of a small weight lasts as
        long as the start of its kernel, and XLA makes a few kernels of all of this.

        Args:
          applied: boolean scalar.
          gradient: vector of all gradients, `flat` of those of `variables`.
          variables: float32, those that the optimizer was built with, in their order.
        """
        if self.global_clipnorm:
            gradient *= tf.minimum(1.0, self.global_clipnorm / tf.norm(gradient))
        step = tf.cast(self._iterations.value + 1, tf.float32)
        correction = tf.sqrt(1.0 - self.beta_2**step) / (1.0 - self.beta_1**step)
        rate = tf.cast(self.learning_rate, tf.float32) * correction
        before = [values(group) for group in (variables, self._momentums, self._velocities)]
        weights, m, v = before
        m += (1.0 - self.beta_1) * (gradient - m)
        v += (1.0 - self.beta_2) * (gradient**2 - v)
        after = weights - rate * m / (tf.sqrt(v) + self.epsilon), m, v
        groups = variables, self._momentums, self._velocities
        for group, old, new in zip(groups, before, after, strict=True):
            assign(group, tf.where(applied, new, old))
        self._iterations.assign_add(tf.cast(applied, self._iterations.dtype))

    @property
    def moments(self) -> list[list[keras.Variable]]:
        """First and second moments, each in the order of the weights."""
        return [self._momentums, self._velocities]

    def _clip_gradients(self, grads):
        return grads  # not yet summed

    def _all_reduce_sum_gradients(self, grads_and_vars):
        grads_and_vars = super()._all_reduce_sum_gradients(grads_and_vars)
        if not self.global_clipnorm:
            return grads_and_vars
        gradients, variables = zip(*grads_and_vars, strict=True)
        norm = tf.linalg.global_norm(gradients)
        clipped = tf.cond(  # mostly there is nothing to clip, and a pass over all is saved
            norm > self.global_clipnorm,
            lambda: [g * (self.global_clipnorm / norm) for g in gradients],
            lambda: list(gradients),
        )
        return list(zip(clipped, variables, strict=True))


def flat(tensors: Sequence[tf.Tensor]) -> tf.Tensor:
    """All elements of the tensors, in a vector."""
    return tf.concat([tf.reshape(tensor, [-1]) for tensor in tensors], 0)


def pieces(vector: tf.Tensor, shapes: Sequence[tf.TensorShape]) -> list[tf.Tensor]:
    """The tensors of these shapes that `flat` made a vector of."""
    parts = tf.split(vector, [shape.num_elements() for shape in shapes])
    return [tf.reshape(part, shape) for part, shape in zip(parts, shapes, strict=True)]


def values(variables: Sequence[keras.Variable]) -> tf.Tensor:
    """The values of the variables as a vector."""
    return flat([variable.value for variable in variables])


def assign(variables: Sequence[keras.Variable], vector: tf.Tensor) -> None:
    """Sets the variables to what the vector holds for them."""
    shapes = [variable.shape for variable in variables]
    for variable, value in zip(variables, pieces(vector, shapes), strict=True):
        variable.assign(value)
