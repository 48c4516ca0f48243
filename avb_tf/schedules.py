"""Learning rates as functions of the step."""

import keras
import tensorflow as tf


@keras.saving.register_keras_serializable("avb_tf")
class DelayedCosine(keras.optimizers.schedules.LearningRateSchedule):
    """Zero for `delay` steps, then half a cosine from `start` to `final * start` at `steps`.

    With a delay the adversary learns on a frozen encoder first. `final` 1 keeps the rate. Each of
    the `rollbacks` (an integer variable) so far multiplies the rate by `factor`.
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

    def __call__(self, step):
        """The rate at `step`, a scalar."""
        step = tf.cast(step, tf.float32)
        progress = tf.clip_by_value((step - self.delay) / max(1, self.steps - self.delay), 0.0, 1.0)
        cosine = 0.5 * (1.0 + tf.cos(3.141592653589793 * progress))
        rate = self.start * (self.final + (1.0 - self.final) * cosine)
        if self.rollbacks is not None:
            rate *= self.factor ** tf.cast(self.rollbacks.value, tf.float32)
        return tf.where(step < self.delay, 0.0, rate)

    def get_config(self):
        """The constructor's arguments, the rollbacks so far in `start`."""
        config = {k: getattr(self, k) for k in ("start", "steps", "final", "delay")}
        if self.rollbacks is not None:
            config["start"] *= self.factor ** int(self.rollbacks.numpy())
        return config
