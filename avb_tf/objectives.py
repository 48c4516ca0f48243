"""The formula of the bound as pure functions of tensors, per example and in nats.

    elbo(x) = E_q[log p(x|z)] - E_q[log r(z|x) - log p(z)] - E_q[T(x, z)]

with T = log q(z|x) - log r(z|x), learned or exact.
"""

from typing import NamedTuple

import tensorflow as tf
from tensorflow_probability import distributions as tfd

from avb_tf import contrast
from avb_tf.encoders import Posterior


class Terms(NamedTuple):
    """Terms of the bound, in nats.

    Attributes:
      log_likelihood: [samples, batch], log p(x|z) at z ~ q(z|x).
      contrast_kl: [batch], E_q[log r(z|x) - log p(z)].
      t: [samples, batch], log q(z|x) - log r(z|x), learned or exact.
    """

    log_likelihood: tf.Tensor
    contrast_kl: tf.Tensor
    t: tf.Tensor

    @property
    def kl(self) -> tf.Tensor:
        """KL terms [samples, batch], whose mean over samples estimates KL(q(z|x) || p(z))."""
        return self.contrast_kl + self.t

    @property
    def elbo(self) -> tf.Tensor:
        """ELBO terms [samples, batch], whose mean over samples estimates the bound on log p(x)."""
        return self.log_likelihood - self.kl


def mean(values: tf.Tensor, weights: tf.Tensor | None = None) -> tf.Tensor:
    """Returns the mean of `values` [..., batch], multiplied by `weights` [batch] if given.

    As in Keras, the weighted sum is divided by the number of values, not by the sum of weights.
    """
    return tf.reduce_mean(values if weights is None else weights * values)


def adversary_loss(t_posterior: tf.Tensor, t_contrast: tf.Tensor) -> tf.Tensor:
    """Returns the logistic loss, minimised by T = log q(z|x) - log r(z|x) (paper, Proposition 1).

    Args:
      t_posterior: [...], T(x, z) at z ~ q(z|x).
      t_contrast: [...], T(x, z) at z ~ r(z|x).
    Returns:
      [...] in nats; 2 log 2 if T = 0.
    """
    return tf.nn.softplus(-t_posterior) + tf.nn.softplus(t_contrast)


def adversary_accuracy(t_posterior: tf.Tensor, t_contrast: tf.Tensor) -> tf.Tensor:
    """Returns the share of samples, [...], that T's sign classifies correctly; 1/2 if q = r.

    Args:
      t_posterior: [...], T(x, z) at z ~ q(z|x).
      t_contrast: [...], T(x, z) at z ~ r(z|x).
    """
    right = tf.cast(t_posterior > 0, tf.float32) + tf.cast(t_contrast < 0, tf.float32)
    # T = 0, the value at which some adversaries start, counts as half right.
    ties = tf.cast(t_posterior == 0, tf.float32) + tf.cast(t_contrast == 0, tf.float32)
    return 0.5 * (right + 0.5 * ties)


def exact_t(posterior: Posterior, r: tfd.Distribution) -> tf.Tensor:
    """Returns T = log q(z|x) - log r(z|x), [samples, batch], of a posterior with known density."""
    return posterior.log_prob - r.log_prob(posterior.z)


def description(posterior: Posterior, r: tfd.Distribution) -> tf.Tensor:
    """Returns the whitened mean and columns of q(z|x), [batch, latent * (1 + bases)].

    If z = mean + columns @ v(noise), then the distribution of the whitened z depends on x only
    through its whitened mean and columns. An adversary that reads these instead of x does not
    have to learn an encoder of its own, and it follows every change of the encoder at once.

    Args:
      posterior: a posterior with `columns`.
      r: a Gaussian with batch [batch] and event [latent].
    """
    mean = contrast.whiten(posterior.mean[tf.newaxis], r)[0]
    columns = r.scale.solve(posterior.columns)
    flat = tf.reshape(columns, [-1, columns.shape[1] * columns.shape[2]])
    return tf.stop_gradient(tf.concat([mean, flat], -1))
