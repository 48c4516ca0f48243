"""The contrast r(z|x): what the adversary compares q(z|x) with.

A choice is a function from a `Posterior` to a TFP distribution of batch [batch], event [latent].
The moments carry gradient. T is then a function of z whitened by r, whose scale no move of the
encoder's mean and covariance can change, and by E_q[grad T] = 0 (paper, Proposition 2) in whitened
coordinates the gradient of the bound stays right.
"""

import tensorflow as tf
from tensorflow_probability import distributions as tfd

from avb_tf.encoders import Posterior


def prior(latent_dim: int):
    """p(z): the standard normal, batch [], event [latent]."""
    return tfd.MultivariateNormalDiag(tf.zeros(latent_dim), tf.ones(latent_dim))


def prior_contrast(posterior: Posterior):
    """r(z|x) = p(z): plain AVB (paper, Section 3.1)."""
    zeros = tf.zeros_like(posterior.mean)
    return tfd.MultivariateNormalDiag(zeros, tf.ones_like(zeros))


def diagonal_contrast(posterior: Posterior):
    """A Gaussian with q's mean and variances: adaptive contrast (paper, Section 4)."""
    variance = tf.reduce_sum(posterior.scale_tril**2, -1)
    return tfd.MultivariateNormalDiag(posterior.mean, tf.sqrt(variance))


def full_contrast(posterior: Posterior):
    """A Gaussian with q's mean and covariance, so that T has only q's shape to learn."""
    return tfd.MultivariateNormalTriL(posterior.mean, posterior.scale_tril)


CONTRASTS = {"prior": prior_contrast, "diagonal": diagonal_contrast, "full": full_contrast}


def whiten(z, r):
    """z in the coordinates where r is standard normal, [samples, batch, latent] likewise."""
    columns = tf.transpose(z - r.loc, [1, 2, 0])  # solve takes the samples as right-hand sides
    return tf.transpose(r.scale.solve(columns), [2, 0, 1])


def divergence(r, p):
    """E_q[log r(z|x) - log p(z)] in nats, [batch], without a draw.

    Both logs are quadratic in z and r has those of q's moments that its own quadratic form sees,
    so the expectation under q is the one under r: KL(r || p), in closed form. Without p, which
    then counts as 1, it is minus the entropy of r.
    """
    return -r.entropy() if p is None else tfd.kl_divergence(r, p)


def carried_divergence(r, p, z, log_volume):
    """E_q[log r(z|x) - log p(z)] in nats, [batch], for an r that went through q's flow.

    r is the Gaussian before it, with q's moments there: log r(z|x) = log r(z_base|x) - log_volume,
    the first in closed form as in `divergence`, the rest over the draws z [samples, batch, latent]
    and log_volume = log |dz / dz_base| [samples, batch].
    """
    log_p = 0.0 if p is None else p.log_prob(z)
    return -r.entropy() - tf.reduce_mean(log_p + log_volume, 0)
