"""Exact numbers for two latents: integrals over z on a grid."""

import numpy as np
import tensorflow as tf

from avb_tf.errors import UserError
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
        below the width of the posteriors. Compare two sizes to see the error.
    Raises:
      UserError: the model does not have two latents.
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
