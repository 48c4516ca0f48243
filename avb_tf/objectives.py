"""The one formula: pure functions of tensors, per example and in nats.

    elbo(x) = E_q[log p(x|z)] - E_q[log r(z|x) - log p(z)] - E_q[T(x, z)]

with T = log q(z|x) - log r(z|x), learned or exact.
"""

from typing import NamedTuple

import tensorflow as tf

from avb_tf import contrast
from avb_tf.encoders import Posterior


class Terms(NamedTuple):
    """Terms of the bound, in nats."""

    log_likelihood: tf.Tensor  # [samples, batch], log p(x|z) at z ~ q(z|x)
    contrast_kl: tf.Tensor  # [batch], E_q[log r(z|x) - log p(z)]
    t: tf.Tensor  # [samples, batch], log q(z|x) - log r(z|x), learned or exact

    @property
    def kl(self):
        """[samples, batch], whose mean over samples estimates KL(q(z|x) || p(z))."""
        return self.contrast_kl + self.t

    @property
    def elbo(self):
        """[samples, batch], whose mean over samples estimates the bound on log p(x)."""
        return self.log_likelihood - self.kl


def mean(values, weights=None):
    """Mean of `values` [..., batch], those of an example `weights` [batch] times."""
    return tf.reduce_mean(values if weights is None else weights * values)


def adversary_loss(t_posterior, t_contrast):
    """Logistic loss, whose minimiser is T = log q(z|x) - log r(z|x) (paper, Proposition 1).

    Args:
      t_posterior: [...], T(x, z) at z ~ q(z|x).
      t_contrast: [...], T(x, z) at z ~ r(z|x).
    Returns:
      [...], 2 log 2 where T = 0.
    """
    return tf.nn.softplus(-t_posterior) + tf.nn.softplus(t_contrast)


def adversary_accuracy(t_posterior, t_contrast):
    """Share of samples [...] that the sign of T tells apart: 1/2 where q = r, 1 if saturated."""
    right = tf.cast(t_posterior > 0, tf.float32) + tf.cast(t_contrast < 0, tf.float32)
    # At T = 0, the start of some adversaries, neither side is told apart.
    ties = tf.cast(t_posterior == 0, tf.float32) + tf.cast(t_contrast == 0, tf.float32)
    return 0.5 * (right + 0.5 * ties)


def exact_t(posterior: Posterior, r):
    """T = log q(z|x) - log r(z|x), [samples, batch], of an encoder whose density is known."""
    return posterior.log_prob - r.log_prob(posterior.z)


def description(posterior: Posterior, r):
    """What tells q(.|x) from r(.|x) in r's coordinates, [batch, latent * (1 + bases)].

    Where z = mean + columns @ v(noise), the whitened z is distributed as its whitened mean and
    columns say, and x matters through nothing else. An adversary that reads them, and not x,
    needs to learn no encoder of its own and follows this one at once when it moves.
    """
    mean = contrast.whiten(posterior.mean[tf.newaxis], r)[0]
    columns = r.scale.solve(posterior.columns)
    flat = tf.reshape(columns, [-1, columns.shape[1] * columns.shape[2]])
    return tf.stop_gradient(tf.concat([mean, flat], -1))
