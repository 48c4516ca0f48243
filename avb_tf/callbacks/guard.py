"""Ends `fit`: at its last step, on SIGTERM, or when training diverges."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from avb_tf import files, replicas
from avb_tf.errors import DivergenceError
from avb_tf.training import termination

# Training has diverged when the ELBO drops by more than this factor times the sum of the first
# ELBO's magnitude and the number of dimensions of x. The sum includes the dimensions because an
# untrained model loses a few nats in each.
EXPLODED = 10.0


class Guard(keras.callbacks.Callback):
    """Ends `fit` when training diverges, before the diverged weights reach a checkpoint.

    Args:
      enabled: whether a finite ELBO that has dropped far below the first one ends training, too.
        An ELBO that is not finite always does.
      file: stores the ELBO of the run's first step for processes that resume the run, because such
        a process may start from weights that have exploded. None: each process uses its own.
    """

    def __init__(self, enabled: bool = True, file: Path | None = None):
        super().__init__()
        self.enabled, self.file = enabled, file
        self.first = None  # ELBO of the first step

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Raises DivergenceError if the running mean of the ELBO is not finite.

        A non-finite step that is not skipped makes that mean non-finite.
        """
        step = int(self.model.step.numpy())
        if (count := int(self.model.skipped_in_a_row.numpy())) >= self.model.patience:
            raise DivergenceError(f"loss or gradient is not finite in {count} steps up to {step}")
        elbo = (logs or {})["elbo"]  # NaN as well if every step so far was skipped
        if not math.isfinite(elbo) and int(self.model.means["elbo"].count.numpy()):
            raise DivergenceError(f"elbo is {elbo} at step {step}")
        if self.first is None and not count and math.isfinite(elbo):
            self.first = elbo if self.file is None else _kept(self.file, elbo)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Raises DivergenceError if the ELBO has dropped too far below the first one."""
        elbo, size = (logs or {})["elbo"], math.prod(self.model.event_shape)
        if self.enabled and self.first is not None:
            lowest = self.first - EXPLODED * (abs(self.first) + size)
            if elbo < lowest:
                raise DivergenceError(
                    f"elbo is {elbo:.3g} up to step {int(self.model.step.numpy())}, from "
                    f"{self.first:.3g} at the first step"
                )


def _kept(file: Path, elbo: float) -> float:
    """The number in the file; if it is missing or damaged it is written anew."""
    try:
        return float(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        if replicas.is_chief():
            files.write_atomically(file, json.dumps(elbo))
        return elbo


class SaveWhenTerminated(keras.callbacks.Callback):
    """Saves a checkpoint on SIGTERM, which most schedulers send, and exits with status 143.

    It acts inside `termination.listening`, and waits for the current graph call to end, so a call
    must be short. This callback must come last, so that the others have finished an epoch before
    the process exits.

    Args:
      save: writes a checkpoint on the chief, and does nothing on other workers.
      strategy: the model's strategy; all its workers exit together.
    """

    def __init__(self, save: Callable[[], Any], strategy: tf.distribute.Strategy):
        super().__init__()
        self.save, self.strategy = save, strategy

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Exits between two steps if SIGTERM has arrived."""
        params: Any = self.params  # set by Keras when `fit` begins
        if batch + 1 < params["steps"] and not self.model.stop_training:
            self._leave_if_asked()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Exits between two epochs if SIGTERM has arrived."""
        self._leave_if_asked()

    def _leave_if_asked(self):
        if replicas.sum_over_workers(self.strategy, int(termination.asked())):
            self.save()
            raise SystemExit(termination.STATUS)


class Stopwatch(keras.callbacks.Callback):
    """Measures the fastest call of the training graph, in seconds."""

    seconds = math.inf

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Starts the clock."""
        self.began = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Keeps the shortest time so far."""
        self.seconds = min(self.seconds, time.perf_counter() - self.began)


class StopAtStep(keras.callbacks.Callback):
    """Ends training at a step, even in the middle of an epoch."""

    def __init__(self, step: int):
        super().__init__()
        self.step = step

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Reads the model's own step count, which a resumed run continues."""
        if int(self.model.step.numpy()) >= self.step:
            self.model.stop_training = True
