"""Shows how far a run is, in one line of a terminal."""

import datetime
import sys
import time
from typing import Any, TextIO

import keras

PERIOD = 0.5  # seconds between updates of a terminal's line


class Progress(keras.callbacks.Callback):
    """One line about the whole run: the bound first, then the step and the time left.

        elbo -98.31  val -99.02  adversary 0.57  step 4,000/20,000  0:03:12 left

    A terminal's line is rewritten; a file gets a line each epoch. The time left excludes the first
    call of the training graph, which compiles it.

    Args:
      last: the last step of the run.
      stream: where to write; standard output by default.
    """

    def __init__(self, last: int, stream: TextIO | None = None):
        super().__init__()
        self.last, self.stream = last, stream or sys.stdout
        self.interactive = self.stream.isatty()
        self.validation: float | None = None
        self.shown, self.width = 0.0, 0

    def on_train_begin(self, logs: dict[str, Any] | None = None):
        """Says that the first call compiles; the clock starts after it."""
        self.began: tuple[float, int] | None = None
        if not self.shown:  # a later `fit` of the run has its graphs
            self._write(f"compiling  step {self._step:,}/{self.last:,}")

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None):
        """Starts the clock after the first call; updates a terminal."""
        now = time.monotonic()
        if self.began is None:
            self.began = now, self._step
        if self.interactive and now - self.shown > PERIOD:
            self._show(logs or {})

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None):
        """Shows the means over the epoch, and the ELBO of the validation examples."""
        self.validation = (logs or {}).get("val_elbo", self.validation)
        self._show(logs or {})

    def on_train_end(self, logs: dict[str, Any] | None = None):
        """Leaves the last state of the line on the terminal."""
        if self.interactive and self.width:
            self.stream.write("\n")
            self.width = 0

    @property
    def _step(self) -> int:
        return int(self.model.step.numpy())

    def _show(self, logs: dict[str, Any]):
        self._write(line(logs, self.validation, self._step, self.last, self._left()))

    def _write(self, text: str):
        if self.interactive:
            self.stream.write(f"\r{text:<{self.width}}")
            self.width = len(text)
        else:
            self.stream.write(f"{text}\n")
        self.stream.flush()
        self.shown = time.monotonic()

    def _left(self) -> float | None:
        """Seconds that the rest takes at the present pace, once it is known."""
        if self.began is None or self._step == self.began[1]:
            return None
        pace = (time.monotonic() - self.began[0]) / (self._step - self.began[1])
        return (self.last - self._step) * pace


def line(
    logs: dict[str, Any], validation: float | None, step: int, last: int, left: float | None
) -> str:
    """The text, which fits 80 columns up to a million steps.

    Args:
      logs: means over the epoch so far.
      validation: ELBO of the validation examples, in nats.
      step: that has been taken.
      last: step of the run.
      left: seconds; None if unknown.
    """

    def nats(value):
        return f"{value:.{2 if abs(value) < 1000 else 1}f}"

    parts = []
    if "elbo" in logs:
        parts.append(f"elbo {nats(logs['elbo'])}")
    if validation is not None:
        parts.append(f"val {nats(validation)}")
    if "adversary_accuracy" in logs:
        parts.append(f"adversary {logs['adversary_accuracy']:.2f}")
    parts.append(f"step {step:,}/{last:,}")
    if left is not None and step < last:
        parts.append(f"{datetime.timedelta(seconds=round(left))} left")
    return "  ".join(parts)
