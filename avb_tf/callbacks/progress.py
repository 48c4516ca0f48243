"""Shows the progress of a run in one line of a terminal."""

import datetime
import sys
import time
from typing import Any, TextIO

import keras

PERIOD = 0.5  # seconds between updates of a terminal's line


class Progress(keras.callbacks.Callback):
    """Shows one line about the whole run: the bound first, then the step and the time left.

        elbo -98.31  val -99.02  adversary 0.57  step 4,000/20,000  0:03:12 left

    On a terminal the line is rewritten in place; a file gets one line per epoch. The time left is
    estimated without the first call of the training graph, because that call compiles it.

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

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Announces that the first call compiles; the clock starts after that call."""
        self.began: tuple[float, int] | None = None
        if not self.shown:  # a later `fit` of the same run reuses the compiled graphs
            self._write(f"compiling  step {self._step:,}/{self.last:,}")

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Starts the clock after the first call, and updates the line on a terminal."""
        now = time.monotonic()
        if self.began is None:
            self.began = now, self._step
        if self.interactive and now - self.shown > PERIOD:
            self._show(logs or {})

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Shows the means over the epoch and the ELBO of the validation examples."""
        self.validation = (logs or {}).get("val_elbo", self.validation)
        self._show(logs or {})

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
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
        """Returns the seconds left at the present pace, or None before the pace is known."""
        if self.began is None or self._step == self.began[1]:
            return None
        pace = (time.monotonic() - self.began[0]) / (self._step - self.began[1])
        return (self.last - self._step) * pace


def line(
    logs: dict[str, Any], validation: float | None, step: int, last: int, left: float | None
) -> str:
    """Returns the text of the line, which fits 80 columns up to a million steps.

    Args:
      logs: means over the epoch so far.
      validation: ELBO of the validation examples in nats, or None before the first validation.
      step: number of steps taken so far.
      last: the last step of the run.
      left: seconds left, or None if unknown.
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
