"""Importance-weighted bounds on log p(x) (Burda, Grosse and Salakhutdinov, 2016)."""

import numpy as np
import tensorflow as tf

from avb_tf import proposal
from avb_tf.likelihood_estimation import joint
from avb_tf.model import AVB

_CHUNK = 2**23  # numbers in the tensor of all E[x|z] that one call computes


class ImportanceSampler:
    """Sampler of log weights log p(x, z) - log q'(z|x), z ~ q'(z|x), in one compiled graph.

        sampler = ImportanceSampler(model)
        bounds(sampler.log_weights(x, draws=5000), samples=5000)  # [batch], nats

    The proposal q' is the model's own q(z|x) if the encoder gives a `log_prob`. It is the density
    of q or the substitute of an auxiliary encoder, and both satisfy
    E_q[p(x, z) / exp(log_prob)] = p(x). Otherwise q' is a widened Gaussian with q's moments
    (`proposal.widened_gaussian`).

    Args:
      model: any `AVB`. Its weights may change afterwards, but its parts must not.
    """

    def __init__(self, model: AVB):
        self.model = model
        one, noise = tf.zeros([1, *model.event_shape]), tf.zeros([1, 1, model.encoder.noise_dim])
        self.exact = model.averaged_encoder(one, noise).log_prob is not None
        self._moments = tf.function(self._widened, reduce_retracing=True)
        self._draw = tf.function(self._draw_exact if self.exact else self._draw_gaussian)

    @property
    def proposal(self) -> str:
        """Description of q'."""
        return "q" if self.exact else proposal.DESCRIPTION

    def log_weights(self, x: np.ndarray | tf.Tensor, draws: int, seed: int = 0) -> np.ndarray:
        """Returns log weights in nats of independent draws, [draws, batch].

        Args:
          x: [batch, *event].
          draws: number of draws for each x.
          seed: the same seed gives the same draws.
        """
        x = tf.convert_to_tensor(x, tf.float32)
        per_call = max(1, _CHUNK // (len(x) * int(np.prod(self.model.event_shape))))
        per_call = min(per_call, draws)
        calls = -(-draws // per_call)
        moments = () if self.exact else self._moments(x)
        log_weights = [
            self._draw(x, tf.constant(per_call), tf.constant([seed, i]), *moments).numpy()
            for i in range(calls)
        ]
        return np.concatenate(log_weights)[:draws]

    def _widened(self, x):
        gaussian = proposal.widened_gaussian(self.model.averaged_encoder, x)
        return gaussian.loc, gaussian.scale.to_dense()

    def _draw_exact(self, x, draws, seed):
        noise = self._noise(x, draws, self.model.encoder.noise_dim, seed)
        posterior = self.model.averaged_encoder(x, noise)
        return joint.log_joint(self.model, x, posterior.z) - posterior.log_prob

    def _draw_gaussian(self, x, draws, seed, mean, scale_tril):
        w = self._noise(x, draws, self.model.encoder.latent_dim, seed)
        z = mean + tf.einsum("bij,sbj->sbi", scale_tril, w)
        volume = tf.reduce_sum(tf.math.log(tf.linalg.diag_part(scale_tril)), -1)
        return joint.log_joint(self.model, x, z) - self.model.prior.log_prob(w) + volume

    def _noise(self, x, draws, width, seed):
        return tf.random.stateless_normal([draws, tf.shape(x)[0], width], seed)


def bounds(log_weights: np.ndarray, samples: int) -> np.ndarray:
    """Returns the bound with `samples` importance samples in nats, [batch].

    It is the mean of the bounds of all groups of `samples` draws.

    Args:
      log_weights: [draws, batch]; the number of draws must be a multiple of `samples`.
      samples: number of importance samples in the bound.
    """
    groups = log_weights.reshape(-1, samples, log_weights.shape[-1])
    return np.mean(np.logaddexp.reduce(groups.astype(np.float64), 1), 0) - np.log(samples)
