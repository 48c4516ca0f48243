"""Callbacks that every `fit` adds to the user's own."""

from typing import Any

import keras
from absl import logging


class Rates(keras.callbacks.Callback):
    """Keeps the ratio of the two learning rates constant when another callback changes one.

    Keras's ReduceLROnPlateau and LearningRateScheduler know only the optimizer of encoder and
    decoder. The adversary's learning rate has to change by the same factor; otherwise the adversary
    falls behind or runs ahead. This callback is the last, so that it sees the rate that the others
    have set.
    """

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Records both learning rates at the start."""
        pair = (self.model.optimizer, self.model.adversary_optimizer)
        self.start = [rate_of(optimizer) for optimizer in pair]

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Scales the adversary's learning rate by the change of the other rate."""
        primal, dual = self.start
        rate = rate_of(self.model.optimizer)
        if primal and dual and rate is not None:  # there is an adversary and no schedule
            self.model.adversary_optimizer.learning_rate = dual / primal * rate

    on_epoch_end = on_epoch_begin


def rate_of(optimizer: Any) -> float | None:
    """Returns the learning rate, or None if there is no optimizer or it follows a schedule."""
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)  # unwraps a LossScaleOptimizer
    if optimizer is None:
        return None
    schedule = keras.optimizers.schedules.LearningRateSchedule
    if isinstance(optimizer._learning_rate, schedule):
        return None
    return float(keras.ops.convert_to_numpy(optimizer.learning_rate))  # mirrored on replicas


class Skipped(keras.callbacks.Callback):
    """Warns about skipped steps, at most once per `fit`."""

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Records how many steps were skipped before."""
        self.before, self.warned = int(self.model.skipped.numpy()), False

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Warns after the first epoch with skipped steps, with their number."""
        skipped = int(self.model.skipped.numpy())
        if skipped > self.before and not self.warned:
            self.warned = True
            advice = "look for NaN in x, or lower the learning rate"
            if isinstance(self.model.optimizer, keras.optimizers.LossScaleOptimizer):
                advice = f"a few are normal, as float16 has to find its loss scale; else {advice}"
            logging.warning(
                "%d of the steps up to %d skipped, as their loss or gradient is not finite; %d in "
                "all, counted by model.skipped; %s",
                skipped - self.before, int(self.model.step.numpy()), skipped, advice,
            )  # fmt: skip
