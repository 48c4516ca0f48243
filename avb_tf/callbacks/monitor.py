"""Checks during training whether the training bound can be trusted."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from avb_tf import proposal, results
from avb_tf.likelihood_estimation import joint

# Beyond these values q and r hardly overlap. An adversary cannot learn the density ratio of such a
# pair from draws, so T underestimates it.
SATURATED_LOSS = 0.2  # nats; the loss at T = 0 is 2 log 2 = 1.386
SATURATED_ACCURACY = 0.97
ELBO_DRAWS = 64
_SEED = 0

_SATURATED = (
    "The adversary saturates: loss {loss:.3f} nats, accuracy {accuracy:.3f} up to step {step}. "
    "It separates q(z|x) from the contrast so well that T underestimates the true log ratio, which "
    "makes the ELBO too high. Use adaptive contrast with the full covariance "
    "(--config=...:avb_ac, or config.model.contrast=full); if it is already in use, lower "
    "config.optimizer.learning_rate."
)
_GAP = (
    "The ELBO {elbo:.1f} is {gap:.1f} nats above an importance-weighted bound on log p(x) of the "
    "same {count} examples at step {step}: the adversary lags behind the posterior, so the ELBO "
    "is not a bound. Strengthen the adversary: raise config.model.adversary_steps, "
    "config.model.adversary_draws or config.optimizer.adversary_learning_rate, or use adaptive "
    "contrast (--config=...:avb_ac). Trust only the estimates of --mode=evaluate."
)


class Monitor(keras.callbacks.Callback):
    """Compares the ELBO with a bound that needs no adversary, and warns once if they disagree.

    Adds these values to the logs, for the callbacks that follow. Each is a mean over the same
    examples `x`, in nats:

    - `val_monitored_elbo`: the ELBO. (`val_elbo` is the mean over all validation examples.)
    - `val_importance_bound`: a lower bound on log p(x), by importance sampling from a widened
      Gaussian with the moments of q(z|x). It is cheaper and coarser than the evaluation's bound.
    - `val_elbo_minus_importance_bound`: their difference, which is well above 0 only if the
      adversary is wrong. The values with `_lower` and `_upper` appended lie two standard errors,
      over the examples, below and above it.

    Args:
      x: [batch, *event], held-out examples, the same at every check.
      samples: importance samples for each x.
      largest_gap: nats by which the ELBO may exceed the other bound without a warning.
      directory: TensorBoard log directory for the warnings.
    """

    def __init__(
        self, x: np.ndarray | tf.Tensor, samples: int, largest_gap: float, directory: Path
    ):
        super().__init__()
        self.x, self.samples = tf.convert_to_tensor(x, tf.float32), samples
        self.largest_gap, self.directory = largest_gap, directory
        self.warned: set[str] = set()
        self._bounds = tf.function(self._bounds_of_model)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any]) -> None:
        """Computes both bounds with the averaged networks, and warns if they disagree."""
        elbo, importance = (bound.numpy() for bound in self._bounds())
        gap, error = float(np.mean(elbo - importance)), results.standard_error(elbo - importance)
        elbo, importance = float(elbo.mean()), float(importance.mean())
        logs |= {
            "val_monitored_elbo": elbo,
            "val_importance_bound": importance,
            "val_elbo_minus_importance_bound": gap,
            "val_elbo_minus_importance_bound_lower": gap - 2.0 * error,
            "val_elbo_minus_importance_bound_upper": gap + 2.0 * error,
        }
        loss, accuracy = logs.get("adversary_loss"), logs.get("adversary_accuracy", 0.0)
        if loss is not None and (loss < SATURATED_LOSS or accuracy > SATURATED_ACCURACY):
            self._warn(
                "saturated", _SATURATED.format(loss=loss, accuracy=accuracy, step=self._step())
            )
        if gap > self.largest_gap:
            count = len(self.x)
            self._warn("gap", _GAP.format(elbo=elbo, gap=gap, count=count, step=self._step()))

    def _step(self):
        return int(self.model.step.numpy())

    def _bounds_of_model(self):
        model, x = self.model, self.x
        shape = [ELBO_DRAWS, len(x), model.encoder.noise_dim]
        noise = tf.random.stateless_normal(shape, [_SEED, 0])
        elbo = tf.reduce_mean(model.terms(x, noise).elbo, 0)
        gaussian = proposal.widened_gaussian(model.averaged_encoder, x)
        z = gaussian.sample(self.samples, seed=[_SEED, 1])
        log_weights = joint.log_joint(model, x, z) - gaussian.log_prob(z)
        return elbo, tf.reduce_logsumexp(log_weights, 0) - tf.math.log(float(self.samples))

    def _warn(self, kind, text):
        if kind in self.warned:
            return
        self.warned.add(kind)
        logging.warning(text)
        writer = tf.summary.create_file_writer(str(self.directory))
        with writer.as_default(self._step()):
            tf.summary.text("warning", text)
        writer.close()
