"""The contrast r(z|x), the distribution that the adversary compares q(z|x) with.

Each contrast is a function from a `Posterior` to a TFP distribution with batch [batch] and event
[latent]. The moments carry gradients: T reads z whitened by r, whose scale does not depend on the
encoder's mean and covariance. The gradient of the bound stays unbiased, because E_q[grad T] = 0
(paper, Proposition 2) also holds in whitened coordinates.
"""

from collections.abc import Callable
from typing import Any

import tensorflow as tf
from tensorflow_probability import distributions as tfd

from avb_tf.encoders import Posterior


def prior(latent_dim: int) -> tfd.Distribution:
    """Returns p(z), the standard normal, batch [], event [latent]."""
    return tfd.MultivariateNormalDiag(tf.zeros(latent_dim), tf.ones(latent_dim))


def prior_contrast(posterior: Posterior) -> tfd.Distribution:
    """Returns r(z|x) = p(z), the contrast of plain AVB (paper, Section 3.1)."""
    zeros = tf.zeros_like(posterior.mean)
    return tfd.MultivariateNormalDiag(zeros, tf.ones_like(zeros))


def diagonal_contrast(posterior: Posterior) -> tfd.Distribution:
    """Returns a Gaussian with q's mean and variances: adaptive contrast (paper, Section 4)."""
    variance = tf.reduce_sum(posterior.scale_tril**2, -1)
    return tfd.MultivariateNormalDiag(posterior.mean, tf.sqrt(variance))


def full_contrast(posterior: Posterior) -> tfd.Distribution:
    """Returns a Gaussian with q's mean and covariance, so that T only has to learn q's shape."""
    return tfd.MultivariateNormalTriL(posterior.mean, posterior.scale_tril)


CONTRASTS: dict[str, Callable[[Posterior], tfd.Distribution]] = {
    "prior": prior_contrast,
    "diagonal": diagonal_contrast,
    "full": full_contrast,
}


def whiten(z: tf.Tensor, r: tfd.Distribution) -> tf.Tensor:
    """Returns z in the coordinates where r is standard normal, [samples, batch, latent].

    Args:
      z: [samples, batch, latent].
      r: a Gaussian with batch [batch] and event [latent].
    """
    # `solve` takes all samples of an example as right-hand sides of one system.
    columns = tf.transpose(z - r.loc, [1, 2, 0])
    return tf.transpose(r.scale.solve(columns), [2, 0, 1])


def compare(
    posterior: Posterior, contrast: Callable[[Posterior], tfd.Distribution]
) -> tuple[Posterior, tfd.Distribution]:
    """Returns q and r in the coordinates where T compares them.

    If q has a flow, an adaptive r passes through the same flow. The flow does not change
    log q - log r, so T compares the two before it, where r is a Gaussian. If r is the prior, T
    compares the two after the flow.

    Args:
      posterior: draws and moments of q(z|x).
      contrast: a function in `CONTRASTS`.
    """
    q = posterior
    if posterior.base is not None and contrast is not prior_contrast:
        q = posterior.base
    return q, contrast(q)


def divergence(
    r: tfd.Distribution, p: tfd.Distribution | None, after_flow: Posterior | None = None
) -> tf.Tensor:
    """Returns E_q[log r(z|x) - log p(z)] in nats, [batch].

    Without a flow the value is exact. Both logs are quadratic in z, and r shares the moments of q
    that they depend on. The expectation under q therefore equals the one under r: KL(r || p).

    With a flow, r is the Gaussian before the flow. The entropy of r is still in closed form; the
    flow's log volume and log p(z) are averaged over the draws of q after the flow.

    Args:
      r: a Gaussian with batch [batch] and event [latent].
      p: the prior; None leaves log p(z) out.
      after_flow: q after its flow, or None if q has no flow.
    """
    if after_flow is not None:
        log_p = 0.0 if p is None else p.log_prob(after_flow.z)
        volume: Any = after_flow.log_volume
        return -r.entropy() - tf.reduce_mean(log_p + volume, 0)
    return -r.entropy() if p is None else tfd.kl_divergence(r, p)
