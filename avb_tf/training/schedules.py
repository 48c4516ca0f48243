"""Learning-rate schedules."""

from typing import Any

import keras
import tensorflow as tf


@keras.saving.register_keras_serializable("avb_tf")
class DelayedCosine(keras.optimizers.schedules.LearningRateSchedule):
    """Learning rate of 0 for `delay` steps, then a half cosine from `start` to `final * start`.

        rate = DelayedCosine(1e-3, steps=10_000, final=0.02)

    Args:
      start: learning rate after the delay.
      steps: step at which the rate reaches `final * start`.
      final: share of `start` that remains at the end; 1 keeps the rate constant.
      delay: steps at a rate of 0, in which the adversary learns while the encoder is fixed.
      factor: factor by which each rollback multiplies the rate.
      rollbacks: integer variable, the number of rollbacks so far, or None.
    """

    def __init__(
        self,
        start: float,
        steps: int,
        final: float = 0.0,
        delay: int = 0,
        factor: float = 1.0,
        rollbacks: keras.Variable | None = None,
    ):
        super().__init__()
        self.start, self.steps, self.final, self.delay = start, steps, final, delay
        self.factor, self.rollbacks = factor, rollbacks

    def __call__(self, step: Any) -> tf.Tensor:
        """Returns the learning rate at `step`, a scalar."""
        step = tf.cast(step, tf.float32)
        progress = tf.clip_by_value((step - self.delay) / max(1, self.steps - self.delay), 0.0, 1.0)
        cosine = 0.5 * (1.0 + tf.cos(3.141592653589793 * progress))
        rate = self.start * (self.final + (1.0 - self.final) * cosine)
        if self.rollbacks is not None:
            rate *= self.factor ** tf.cast(self.rollbacks.value, tf.float32)
        return tf.where(step < self.delay, 0.0, rate)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments; the rollbacks so far are included in `start`."""
        config = {k: getattr(self, k) for k in ("start", "steps", "final", "delay")}
        if self.rollbacks is not None:
            config["start"] *= self.factor ** int(self.rollbacks.numpy())
        return config
