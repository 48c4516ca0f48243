"""The contrast r(z|x): what the adversary compares q(z|x) with.

A choice is a function from a `Posterior` to a TFP distribution of batch [batch], event [latent].
The moments carry gradient. T is then a function of z whitened by r, whose scale no move of the
encoder's mean and covariance can change, and by E_q[grad T] = 0 (paper, Proposition 2) in whitened
coordinates the gradient of the bound stays right.
"""

from typing import Any

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


def compare(posterior: Posterior, choice):
    """(q, r) where T compares the two, r by `choice` of `CONTRASTS`.

    An adaptive r goes through q's flow with it, if q has one, so that T may be had before the flow:
    there r is a Gaussian. The prior stands after it.
    """
    before = posterior.base is not None and choice is not prior_contrast
    q = posterior.base if before else posterior
    return q, choice(q)


def divergence(r, p, after_flow: Posterior | None = None):
    """E_q[log r(z|x) - log p(z)] in nats, [batch], without a draw where q has no flow.

    Both logs are quadratic in z and r has those of q's moments that its own quadratic form sees,
    so the expectation under q is the one under r: KL(r || p), in closed form. Without p, which
    then counts as 1, it is minus the entropy of r.

    An r that goes through a flow is a Gaussian before it, so that the first log stays in closed
    form but for the flow's volume; that and the second are means over the draws `after_flow`.
    """
    if after_flow is not None:
        log_p = 0.0 if p is None else p.log_prob(after_flow.z)
        volume: Any = after_flow.log_volume
        return -r.entropy() - tf.reduce_mean(log_p + volume, 0)
    return -r.entropy() if p is None else tfd.kl_divergence(r, p)
