"""The training of a fit: as many steps as its time allows, with rates that fall over it."""

import time
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from avb_tf import optimizers
from avb_tf.data import pipeline
from avb_tf.errors import UserError
from avb_tf.model import AVB

CHUNK = 25  # steps between looks at the clock


class Clock:
    """How much of a fit is over, by steps and by seconds, with its progress bar.

        clock = Clock(steps=None, seconds=60.0, began=time.monotonic(), verbose=False)
        clock.progress()  # in [0, 1]

    Args:
      steps: of training, or None.
      seconds: of the whole fit, or None.
      began: when the fit did, by `time.monotonic`.
      verbose: shows the bar.
    """

    def __init__(self, steps: int | None, seconds: float | None, began: float, verbose: bool):
        self.steps, self.seconds, self.began = steps, seconds, began
        self.step = 0
        self.training_ends = seconds or 0.0  # seconds after which only the verdict is left
        self.training_began = 0.0
        self.traced = 0.0  # seconds until the first steps of the last training were over
        self.bar = keras.utils.Progbar(
            100, verbose=int(verbose), unit_name="percent", stateful_metrics=["elbo"]
        )

    def elapsed(self) -> float:
        """Seconds since the fit began."""
        return time.monotonic() - self.began

    def left(self) -> float:
        """Seconds of training that are left; infinity without a limit."""
        return self.training_ends - self.elapsed() if self.seconds else np.inf

    def start_training(self, reserve: float) -> None:
        """From here to `reserve` seconds before the end."""
        self.training_began = self.elapsed()
        self.training_ends = max(0.0, (self.seconds or 0.0) - reserve)

    def progress(self) -> float:
        """Of the training, in [0, 1]."""
        by_steps = self.step / self.steps if self.steps else 0.0
        span = max(1e-9, self.training_ends - self.training_began)
        by_time = (self.elapsed() - self.training_began) / span if self.seconds else 0.0
        return float(np.clip(max(by_steps, by_time), 0.0, 1.0))


def train(
    model: AVB, settings: dict[str, Any], clock: Clock, until: float, rate: float, emerged=None
) -> dict[str, list[float]]:
    """Trains until a share of the whole training is over.

    Args:
      model: to be trained.
      settings: of the fit.
      clock: of the fit.
      until: the share of the training after which it ends, in [0, 1].
      rate: the highest learning rate of the primal step.
      emerged: variable of how far the posterior has emerged from N(0, I), or None.
    Returns:
      The terms of the bound as they went, by name.
    Raises:
      UserError: the bound is not finite any more.
    """
    clip = settings["clip_norm"]
    model.compile(
        optimizers.Adam(0.0, global_clipnorm=clip),
        optimizers.Adam(0.0, global_clipnorm=clip),
        steps_per_execution=CHUNK,
    )
    x = pipeline.untuned(tf.data.Dataset.from_tensors(tf.zeros([1, 1])).repeat())
    pace = _Pace(settings, clock, until, rate, emerged)
    endless = {"epochs": 10**6, "steps_per_epoch": CHUNK, "shuffle": False, "verbose": 0}
    return model.fit(x, callbacks=[pace], **endless).history


class _Pace(keras.callbacks.Callback):
    """Learning rates by the share of this training that is over, its end, and a watch over it."""

    def __init__(self, settings, clock, until, rate, emerged):
        super().__init__()
        self.settings, self.clock, self.until, self.rate = settings, clock, until, rate
        self.emerged = emerged
        self.since = clock.progress()
        self.began, self.first = clock.elapsed(), True

    def on_epoch_begin(self, epoch, logs=None):
        """Half a cosine; the adversary keeps moving until the encoder rests."""
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
        """Stops at the end, and where the bound is lost."""
        if int(self.model.skipped_in_a_row.numpy()) >= CHUNK:
            raise UserError(
                f"the bound or its gradient is not finite since step {self.clock.step}; expected "
                "finite ones: check the model's density far from its mode, or lower learning_rate"
            )
        if self.first:
            self.clock.traced, self.first = self.clock.elapsed() - self.began, False
        self.clock.step += CHUNK
        self.clock.bar.update(int(100 * self.clock.progress()), [("elbo", logs["elbo"])])
        self.model.stop_training = self.clock.progress() >= self.until
