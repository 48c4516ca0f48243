"""Exact numbers for two latents: integrals over z on a grid."""

import numpy as np
import tensorflow as tf

from avb_tf.errors import UserError
from avb_tf.likelihood_estimation import chunks, joint
from avb_tf.likelihood_estimation.entropy import entropy
from avb_tf.likelihoods import pairwise_log_likelihood
from avb_tf.model import AVB

HALF_WIDTH = 6.0  # of the grid over z; the prior's mass beyond it is 4e-9
_CHUNK = 2**24  # numbers in the largest intermediate tensor


def log_likelihood(model: AVB, x, grid: int = 400) -> np.ndarray:
    """log p(x) in nats, [batch], by the midpoint rule on grid x grid points of z.

    Args:
      model: with latent_dim 2.
      x: [batch, *event].
      grid: points along a side; the error is negligible where their distance, 12 / grid, is well
        below the width of the posteriors. Compare two sizes to know.
    Raises:
      UserError: the model has not two latents.
    """
    if model.encoder.latent_dim != 2:
        raise UserError(
            f"quadrature needs a model with 2 latents, found {model.encoder.latent_dim}"
        )
    points, area = _grid(grid, HALF_WIDTH)
    per_chunk = max(1, _CHUNK // max(len(x), int(np.prod(model.event_shape))))
    total = tf.fill([len(x)], -np.inf)
    for chunk in np.array_split(points, -(-len(points) // per_chunk)):
        joint = tf.reduce_logsumexp(_log_joint(model, x, tf.constant(chunk)), -1)
        total = np.logaddexp(total, joint)
    return np.asarray(total) + np.log(area)


def posterior_on_grid(model: AVB, x, mean, scale, log_evidence: float, cells: int, half_width=5.0):
    """log p(z|x) of one x at the centres of a grid in the coordinates z = mean + scale @ w.

    Args:
      model: with latent_dim 2.
      x: [*event].
      mean, scale: [2] and [2, 2].
      log_evidence: log p(x).
      cells: along each side.
      half_width: of the grid in w.
    Returns:
      (z [cells, cells, 2], log p(z|x) [cells, cells]).
    """
    w, _ = _grid(cells, half_width)
    z = (mean + w @ np.transpose(scale)).astype(np.float32)
    log_joint = _log_joint(model, x[np.newaxis], tf.constant(z))[0]
    return z.reshape(cells, cells, 2), np.reshape(log_joint, [cells, cells]) - log_evidence


def posterior_divergence(
    model: AVB, x, log_evidence, draws: int = 5000, seed: int = 0
) -> np.ndarray:
    """KL(q(z|x) || p(z|x)) in nats, [batch], for a posterior of which only draws are known.

    log p(z|x) = log p(x, z) - log p(x) is exact, its mean is over draws of q, and q's entropy
    comes from a nearest-neighbour estimate of its density at them. The same for every method.

    Args:
      model: with latent_dim 2.
      x: [batch, *event].
      log_evidence: log p(x), [batch], by `log_likelihood`.
      draws: of q for each x.
      seed: of the draws.
    """
    draw = _draws_of_one(model, draws)
    divergences = []
    x = tf.convert_to_tensor(x)
    for i in chunks.tracked(range(len(x)), "posterior"):
        z, log_joint = draw(x[i : i + 1], tf.constant(seed + i))
        log_posterior = log_joint.numpy() - log_evidence[i]
        divergences.append(-entropy(z.numpy().astype(np.float64)) - np.mean(log_posterior))
    return np.array(divergences)


@joint.kept_for_the_last_model
def _draws_of_one(model, draws):
    """x [1, *event], seed -> draws of q [draws, 2] and their log p(x, z) [draws]."""

    @tf.function  # leaves out what of the posterior is not asked for
    def draw(one, seed):
        z = model.encode(one, draws, seed)[:, 0]
        return z, _log_joint(model, one, z)[0]

    return draw


def _grid(cells: int, half_width: float):
    """Centres of cells x cells squares, [cells^2, 2], and the area of one."""
    width = 2.0 * half_width / cells
    side = -half_width + width * (np.arange(cells) + 0.5)
    first, second = np.meshgrid(side, side, indexing="ij")
    return np.stack([first, second], -1).reshape(-1, 2).astype(np.float32), width**2


def _log_joint(model, x, z):
    """log p(x_i, z_j), [batch, points]."""
    outputs = model.averaged_decoder(z)
    return pairwise_log_likelihood(model.likelihood, outputs, x) + model.prior.log_prob(z)
