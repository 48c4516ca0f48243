"""Adam as training uses it: one pass over each weight, clipped after replicas have been summed."""

import keras
import tensorflow as tf


@keras.saving.register_keras_serializable("avb_tf")
class Adam(keras.optimizers.Adam):
    """Keras's Adam, its update fused into one op per weight.

    Keras writes an update as a dozen ops, each a pass over the weight: for the authors' adversary
    of 27 million weights they cost more than its products. With `global_clipnorm`, Keras clips
    each replica's share; here the sum over replicas is clipped, so that a run does not depend on
    how many there are. Dense gradients only.

    Attributes:
      selects: whether clipping multiplies always, by 1 where there is nothing to clip. Without XLA
        a condition saves a pass over all gradients; within a program for a GPU the host would wait
        for the device at it, and the product is part of the update.
    """

    selects = False

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

    def _clip_gradients(self, grads):
        return grads  # not yet summed

    def _all_reduce_sum_gradients(self, grads_and_vars):
        grads_and_vars = super()._all_reduce_sum_gradients(grads_and_vars)
        if not self.global_clipnorm:
            return grads_and_vars
        gradients, variables = zip(*grads_and_vars, strict=True)
        norm = tf.linalg.global_norm(gradients)

        def scaled(scale):
            return [g * scale for g in gradients]

        if self.selects:
            clipped = scaled(tf.minimum(1.0, self.global_clipnorm / norm))
        else:
            clipped = tf.cond(
                norm > self.global_clipnorm,
                lambda: scaled(self.global_clipnorm / norm),
                lambda: list(gradients),
            )
        return list(zip(clipped, variables, strict=True))
