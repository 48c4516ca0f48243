"""Learning-rate schedules."""

from typing import Any

import keras
import tensorflow as tf


@keras.saving.register_keras_serializable("avb_tf")
class DelayedCosine(keras.optimizers.schedules.LearningRateSchedule):
    """Zero for `delay` steps, then half a cosine from `start` to `final * start` at `steps`.

        rate = DelayedCosine(1e-3, steps=10_000, final=0.02)

    Args:
      start: rate after the delay.
      steps: step at which the rate reaches `final * start`.
      final: share of `start` that remains at the end; 1: a constant rate.
      delay: steps at a rate of zero, in which the adversary learns on a frozen encoder.
      factor: multiplies the rate for each rollback.
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
        """The rate at `step`, a scalar."""
        step = tf.cast(step, tf.float32)
        progress = tf.clip_by_value((step - self.delay) / max(1, self.steps - self.delay), 0.0, 1.0)
        cosine = 0.5 * (1.0 + tf.cos(3.141592653589793 * progress))
        rate = self.start * (self.final + (1.0 - self.final) * cosine)
        if self.rollbacks is not None:
            rate *= self.factor ** tf.cast(self.rollbacks.value, tf.float32)
        return tf.where(step < self.delay, 0.0, rate)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments; the rollbacks so far are included in `start`."""
        config = {k: getattr(self, k) for k in ("start", "steps", "final", "delay")}
        if self.rollbacks is not None:
            config["start"] *= self.factor ** int(self.rollbacks.numpy())
        return config
