"""Whether the training bound can be trusted: checked while training."""

from pathlib import Path

import keras
import tensorflow as tf
from absl import logging

from avb_tf import proposal
from avb_tf.likelihood_estimation import joint

# Where T tells the contrast from q(z|x) this well, q and r hardly overlap: the ratio of their
# densities is beyond what an adversary can learn from draws, and T falls short of it.
SATURATED_LOSS = 0.2  # of 2 log 2 = 1.386 nats
SATURATED_ACCURACY = 0.97
ELBO_DRAWS = 64
_SEED = 0

_SATURATED = (
    "The adversary saturates: loss {loss:.3f} nats, accuracy {accuracy:.3f} up to step {step}. "
    "It tells q(z|x) from the contrast so well that T falls short of the true log ratio, and the "
    "ELBO is too high by what is missing. Use adaptive contrast with the full covariance "
    "(--config=...:avb_ac, or config.model.contrast=full), and if it is in use already lower "
    "config.optimizer.learning_rate."
)
_GAP = (
    "The ELBO {elbo:.1f} is {gap:.1f} nats above an importance-weighted bound on log p(x) of the "
    "same {count} examples at step {step}: the adversary does not know the posterior, and the "
    "ELBO is not a bound. Let the adversary hold: more config.model.adversary_steps or "
    "config.model.adversary_draws, a higher config.optimizer.adversary_learning_rate, or adaptive "
    "contrast (--config=...:avb_ac). Trust the estimates of --mode=evaluate alone."
)


class Monitor(keras.callbacks.Callback):
    """Compares the bound with one that needs no adversary, and warns once if the two disagree.

    Adds to the logs, for the callbacks after it:

    - `val_importance_bound`: a lower bound on the mean log p(x) in nats, by importance samples from
      a Gaussian with q(z|x)'s moments, widened. Coarser than what evaluation does, and cheap.
    - `val_elbo_minus_importance_bound`: the bound as it is trained, of the same examples, less the
      one above; well above 0 only where the adversary is wrong.

    Args:
      x: [batch, *event], always the same.
      samples: for each x.
      largest_gap: of the ELBO over the other bound, in nats, without a warning.
      directory: of the TensorBoard logs that take the warnings.
    """

    def __init__(self, x, samples: int, largest_gap: float, directory: Path):
        super().__init__()
        self.x, self.samples = tf.convert_to_tensor(x, tf.float32), samples
        self.largest_gap, self.directory = largest_gap, directory
        self.warned: set[str] = set()
        self._bounds = tf.function(self._bounds_of_model)

    def on_epoch_end(self, epoch, logs):
        """Both bounds, by the averaged networks."""
        elbo, importance = (float(bound) for bound in self._bounds())
        gap = elbo - importance
        logs |= {"val_importance_bound": importance, "val_elbo_minus_importance_bound": gap}
        loss, accuracy = logs.get("adversary_loss"), logs.get("adversary_accuracy")
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
        elbo = tf.reduce_mean(model.terms(x, noise).elbo)
        gaussian = proposal.widened_gaussian(model.averaged_encoder, x)
        z = gaussian.sample(self.samples, seed=[_SEED, 1])
        log_weights = joint.log_joint(model, x, z) - gaussian.log_prob(z)
        each = tf.reduce_logsumexp(log_weights, 0) - tf.math.log(float(self.samples))
        return elbo, tf.reduce_mean(each)

    def _warn(self, kind, text):
        if kind in self.warned:
            return
        self.warned.add(kind)
        logging.warning(text)
        writer = tf.summary.create_file_writer(str(self.directory))
        with writer.as_default(self._step()):
            tf.summary.text("warning", text)
        writer.close()
