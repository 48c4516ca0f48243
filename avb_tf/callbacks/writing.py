"""Writes checkpoints, scalars and figures during training."""

import contextlib
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from avb_tf import checkpoints, figures
from avb_tf.figures import model as model_figures

# Logged once more as "Bound/...": TensorBoard sorts capitals first, and so opens on the bound and
# on its paired difference from another bound. That bound itself is of fewer examples than the ELBO.
BOUND = ("elbo", "elbo_minus_importance_bound")


@contextlib.contextmanager
def logged() -> Generator[None]:
    """Turns TensorFlow's errors about unwritable logs into an OSError inside the block.

    TensorFlow raises a different error type for each cause.

    Raises:
      OSError: TensorBoard's files cannot be written.
    """
    try:
        yield
    except tf.errors.OpError as error:
        if not any(words in error.message for words in ("Failed to flush", "SummaryFileWriter")):
            raise
        reason = error.message.splitlines()[0].rpartition("}} ")[2]
        raise OSError(f"cannot write logs ({reason:.300})") from error


class Checkpoints(keras.callbacks.Callback):
    """Saves checkpoints during training.

    Args:
      workdir: the run's directory.
      every: steps between checkpoints, a multiple of the steps per epoch.
      keep: number of the newest checkpoints to keep.
      last: the last step of training, which always gets a checkpoint.
    """

    def __init__(self, workdir: Path, every: int, keep: int, last: int):
        super().__init__()
        self.workdir, self.every, self.keep, self.last = workdir, every, keep, last

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Saves if due: `every` is a multiple of an epoch, which is config.log_every steps."""
        if _is_due(self.model, self.every, self.last):
            self.save()

    def save(self) -> None:
        """Writes a checkpoint now."""
        checkpoints.save(self.model, self.workdir, self.keep)


class Scalars(keras.callbacks.Callback):
    """Writes TensorBoard scalars against the step, training and validation on the same charts.

    Args:
      directory: directory of the TensorBoard logs.
    """

    def __init__(self, directory: Path):
        super().__init__()
        self.writers = {
            name: tf.summary.create_file_writer(str(directory / name))
            for name in ("train", "validation")
        }

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Starts the clock."""
        self.began, self.first = time.perf_counter(), int(self.model.step.numpy())

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Writes the means over the epoch; Keras prefixes those of validation with `val_`."""
        step = int(self.model.step.numpy())
        seconds = time.perf_counter() - self.began
        values = dict(logs or {}, steps_per_second=(step - self.first) / seconds)
        values["skipped_steps"] = int(self.model.skipped.numpy())
        for name, value in values.items():
            side = "validation" if name.startswith("val_") else "train"
            tag = name.removeprefix("val_")
            with self.writers[side].as_default(step):
                tf.summary.scalar(tag, value)
                if tag in BOUND:
                    tf.summary.scalar(f"Bound/{tag}", value)
        for writer in self.writers.values():
            writer.flush()  # so that the logs survive if the process is killed


class Figures(keras.callbacks.Callback):
    """Draws figures of held-out examples: PNG files in the workdir and images in TensorBoard.

    Args:
      workdir: the run's directory.
      every: steps between figures, a multiple of the steps per epoch; 0 draws only at `last`.
      last: the last step of training.
      x: [count, *event], held-out examples.
      labels: [count] or None.
    """

    def __init__(
        self, workdir: Path, every: int, last: int, x: np.ndarray, labels: np.ndarray | None = None
    ):
        super().__init__()
        self.workdir, self.every, self.last, self.x, self.labels = workdir, every, last, x, labels
        self.writer = tf.summary.create_file_writer(str(workdir / "logs" / "validation"))

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Draws the figures if they are due."""
        if _is_due(self.model, self.every, self.last):
            self.draw()

    def draw(self) -> None:
        """Draws all figures at the current step."""
        drawn = model_figures.of_model(self.model, self.x, self.labels)
        paths = figures.save(drawn, self.workdir / "figures")
        with self.writer.as_default(int(self.model.step.numpy())):
            for name, path in zip(drawn, paths, strict=True):
                tf.summary.image(name, tf.io.decode_png(path.read_bytes(), 3)[tf.newaxis])
        self.writer.flush()


def _is_due(model, every: int, last: int) -> bool:
    step = int(model.step.numpy())
    return step >= last or bool(every and step % every == 0)
