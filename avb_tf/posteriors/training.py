"""The training of a fit: as many steps as the time allows, with decaying learning rates."""

import time
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from avb_tf.data import pipeline
from avb_tf.errors import UserError
from avb_tf.model import AVB
from avb_tf.training import optimizers

CHUNK = 25  # most steps between readings of the clock


class Clock:
    """The progress of a fit, by steps and by seconds, with its progress bar.

        clock = Clock(steps=None, seconds=60.0, began=time.monotonic(), verbose=False)
        clock.progress()  # in [0, 1]

    Args:
      steps: number of training steps, or None.
      seconds: seconds that the whole fit may take, or None.
      began: value of `time.monotonic` when the fit began.
      verbose: whether to show the progress bar.
    """

    def __init__(self, steps: int | None, seconds: float | None, began: float, verbose: bool):
        self.steps, self.seconds, self.began = steps, seconds, began
        self.step = 0
        self.training_ends = seconds or 0.0  # seconds after which only the verdict remains
        self.training_began = 0.0
        self.traced = 0.0  # seconds that the first steps of the last training took, with tracing
        self.bar = keras.utils.Progbar(
            100, verbose=int(verbose), unit_name="percent", stateful_metrics=["elbo"]
        )

    def elapsed(self) -> float:
        """Returns the seconds since the fit began."""
        return time.monotonic() - self.began

    def left(self) -> float:
        """Returns the seconds of training that are left; infinity without a limit."""
        return self.training_ends - self.elapsed() if self.seconds else np.inf

    def start_training(self, reserve: float) -> None:
        """Sets the time of training: from now until `reserve` seconds before the end of the fit."""
        self.training_began = self.elapsed()
        self.training_ends = max(0.0, (self.seconds or 0.0) - reserve)

    def progress(self) -> float:
        """Returns the share of the training that is over, in [0, 1]."""
        by_steps = self.step / self.steps if self.steps else 0.0
        span = max(1e-9, self.training_ends - self.training_began)
        by_time = (self.elapsed() - self.training_began) / span if self.seconds else 0.0
        return float(np.clip(max(by_steps, by_time), 0.0, 1.0))


def train(
    model: AVB,
    settings: dict[str, Any],
    clock: Clock,
    until: float,
    rate: float,
    emerged: tf.Variable | None = None,
) -> dict[str, list[float]]:
    """Trains until a share of the whole training is over.

    Args:
      model: model to train.
      settings: settings of the fit.
      clock: clock of the fit.
      until: share of the whole training at which this training ends, in [0, 1].
      rate: highest learning rate of the primal step.
      emerged: variable for the weight of the posterior in the annealed target, which rises from 0
        to 1, or None.
    Returns:
      The bound's terms during training, by name.
    Raises:
      UserError: the bound or its gradient is no longer finite.
    """
    # In many dimensions 25 steps may take longer than the whole fit should.
    clip, chunk = settings["clip_norm"], max(1, min(CHUNK, 1000 // model.encoder.latent_dim))
    model.compile(
        optimizers.Adam(0.0, global_clipnorm=clip),
        optimizers.Adam(0.0, global_clipnorm=clip),
        steps_per_execution=chunk,
    )
    x = pipeline.untuned(tf.data.Dataset.from_tensors(tf.zeros([1, 1])).repeat())
    pace = _Pace(settings, clock, until, rate, emerged)
    endless = {"epochs": 10**6, "steps_per_epoch": chunk, "shuffle": False, "verbose": 0}
    return model.fit(x, callbacks=[pace], **endless).history


class _Pace(keras.callbacks.Callback):
    """Sets the learning rates, ends the training in time, and stops it if it diverges."""

    def __init__(self, settings, clock, until, rate, emerged):
        super().__init__()
        self.settings, self.clock, self.until, self.rate = settings, clock, until, rate
        self.emerged = emerged
        self.since = clock.progress()
        self.began, self.first = clock.elapsed(), True

    def on_epoch_begin(self, epoch, logs=None):
        """Sets the rates along half a cosine.

        The adversary's rate falls only to a tenth, so that it follows the encoder until the end.
        """
        share = (self.clock.progress() - self.since) / max(1e-9, self.until - self.since)
        cosine = 0.5 * (1.0 + np.cos(np.pi * min(1.0, share)))
        rate = self.rate * (0.01 + 0.99 * cosine)
        if self.model.adversary is not None:
            highest = self.settings["adversary_learning_rate"]
            self.model.adversary_optimizer.learning_rate = highest * (0.1 + 0.9 * cosine)
            rate *= share >= self.settings["adversary_warmup"]
        if self.emerged is not None:
            self.emerged.assign(min(1.0, share / max(1e-9, self.settings["annealing"])))
        self.model.optimizer.learning_rate = rate

    def on_epoch_end(self, epoch, logs: Any = None):
        """Updates the progress, and stops at the end of the training.

        Raises:
          UserError: 25 steps in a row were skipped, as the bound or its gradient is not finite.
        """
        parameters: Any = self.params
        self.clock.step += parameters["steps"]
        if (skipped := int(self.model.skipped_in_a_row.numpy())) >= CHUNK:
            since = self.clock.step - skipped
            raise UserError(
                f"the bound or its gradient has not been finite since step {since}; expected "
                "finite ones: check the model's density far from its mode, or lower learning_rate"
            )
        if self.first:
            self.clock.traced, self.first = self.clock.elapsed() - self.began, False
        self.clock.bar.update(int(100 * self.clock.progress()), [("elbo", logs["elbo"])])
        self.model.stop_training = self.clock.progress() >= self.until
