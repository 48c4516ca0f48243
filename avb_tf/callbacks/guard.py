"""When `fit` ends: at its last step, on a signal, or where training has left the numbers."""

import contextlib
import math
import signal
import time
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from avb_tf import replicas
from avb_tf.errors import DivergenceError

PREEMPTED = 128 + signal.SIGTERM  # exit status, as a shell has it of a process so ended


# The ELBO of an epoch has exploded where it lies this far below the first: times the sum of the
# first's size and x's dimensions, of which an untrained model loses some nats each.
EXPLODED = 10.0


class Guard(keras.callbacks.Callback):
    """Ends `fit` where training has left the numbers, before a checkpoint holds what is left.

    Args:
      enabled: whether an ELBO that has exploded is an end too, or only one that is no number.
    """

    def __init__(self, enabled: bool = True):
        super().__init__()
        self.enabled = enabled
        self.first = None  # ELBO of a step

    def on_train_batch_end(self, batch, logs=None):
        """Reads the running mean, which one bad step spoils for good where none is skipped."""
        step = int(self.model.step.numpy())
        if (count := int(self.model.skipped_in_a_row.numpy())) >= self.model.patience:
            raise DivergenceError(f"loss or gradient is no number in {count} steps up to {step}")
        elbo = (logs or {})["elbo"]  # NaN too where all steps so far were skipped
        if not math.isfinite(elbo) and int(self.model.means["elbo"].count.numpy()):
            raise DivergenceError(f"elbo is {elbo} at step {step}")
        if self.first is None and not count and math.isfinite(elbo):
            self.first = elbo

    def on_epoch_end(self, epoch, logs=None):
        """Says whether the ELBO has exploded."""
        elbo, size = (logs or {})["elbo"], math.prod(self.model.event_shape)
        if self.enabled and self.first is not None:
            lowest = self.first - EXPLODED * (abs(self.first) + size)
            if elbo < lowest:
                raise DivergenceError(
                    f"elbo is {elbo:.3g} up to step {int(self.model.step.numpy())}, from "
                    f"{self.first:.3g} at first"
                )


class SaveWhenTerminated(keras.callbacks.Callback):
    """On SIGTERM, the notice of most schedulers: saves, and exits with status 143.

    The handler waits for the call of the graph to end, so a call must not take long. The last of
    the callbacks: where an epoch ends, what they do there is done before.

    Args:
      save: writes a checkpoint, on the chief.
      strategy: of the model; its workers leave together.
    """

    def __init__(self, save: Callable[[], Any], strategy: tf.distribute.Strategy):
        super().__init__()
        self.save, self.strategy = save, strategy
        self.asked = False

    @contextlib.contextmanager
    def listening(self):
        """Within, the signal is taken; after it, whoever had it before has it again."""
        before = signal.signal(signal.SIGTERM, self._ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _ask(self, *_):
        self.asked = True

    def on_train_batch_end(self, batch, logs=None):
        """Leaves between two steps."""
        params: Any = self.params  # Keras sets them as `fit` begins
        if batch + 1 < params["steps"] and not self.model.stop_training:
            self._leave_if_asked()

    def on_epoch_end(self, epoch, logs=None):
        """Leaves between two epochs."""
        self._leave_if_asked()

    def _leave_if_asked(self):
        if replicas.sum_over_workers(self.strategy, int(self.asked)):
            self.save()
            raise SystemExit(PREEMPTED)


class Stopwatch(keras.callbacks.Callback):
    """Seconds of the fastest call of the training graph."""

    seconds = math.inf

    def on_train_batch_begin(self, batch, logs=None):
        """Starts."""
        self.began = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        """Stops."""
        self.seconds = min(self.seconds, time.perf_counter() - self.began)


class StopAtStep(keras.callbacks.Callback):
    """Ends training at a step that need not end an epoch."""

    def __init__(self, step: int):
        super().__init__()
        self.step = step

    def on_train_batch_end(self, batch, logs=None):
        """Asks the model, whose count outlives a run that is resumed."""
        if int(self.model.step.numpy()) >= self.step:
            self.model.stop_training = True
