"""Callbacks that every `fit` adds to the user's own."""

import keras
from absl import logging


class Rates(keras.callbacks.Callback):
    """Keeps the ratio of the two learning rates where a callback sets one.

    Keras's ReduceLROnPlateau and LearningRateScheduler know one optimizer, of encoder and decoder.
    The adversary's has to move along, or it would fall behind or run ahead. The last of the
    callbacks, so that it sees what the others have set.
    """

    def on_train_begin(self, logs=None):
        """Notes both rates."""
        pair = (self.model.optimizer, self.model.adversary_optimizer)
        self.start = [rate_of(optimizer) for optimizer in pair]

    def on_epoch_begin(self, epoch, logs=None):
        """Follows what was set at this epoch's begin."""
        primal, dual = self.start
        rate = rate_of(self.model.optimizer)
        if primal and dual and rate is not None:  # no schedule, not 0, and there is an adversary
            self.model.adversary_optimizer.learning_rate = dual / primal * rate

    on_epoch_end = on_epoch_begin


def rate_of(optimizer) -> float | None:
    """The learning rate, or None where there is no optimizer or it follows a schedule."""
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)  # of a LossScaleOptimizer
    if optimizer is None:
        return None
    schedule = keras.optimizers.schedules.LearningRateSchedule
    if isinstance(optimizer._learning_rate, schedule):
        return None
    return float(keras.ops.convert_to_numpy(optimizer.learning_rate))  # mirrored on replicas


class Skipped(keras.callbacks.Callback):
    """Warns of skipped steps, once in a `fit`."""

    def on_train_begin(self, logs=None):
        """Counts from here on."""
        self.before, self.warned = int(self.model.skipped.numpy()), False

    def on_epoch_end(self, epoch, logs=None):
        """Says how many were skipped in the first epoch that has some."""
        skipped = int(self.model.skipped.numpy())
        if skipped > self.before and not self.warned:
            self.warned = True
            logging.warning(
                "%d of the steps up to %d skipped, as their loss or gradient is not finite; %d in "
                "all, counted by model.skipped; look for NaN in x, or lower the learning rate",
                skipped - self.before, int(self.model.step.numpy()), skipped,
            )  # fmt: skip
