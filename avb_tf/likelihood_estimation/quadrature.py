"""Exact values for models with two latents, by integration over z on a grid."""

import numpy as np
import tensorflow as tf

from avb_tf.errors import UserError
from avb_tf.likelihoods import pairwise_log_likelihood
from avb_tf.model import AVB

HALF_WIDTH = 6.0  # of the grid over z; the prior's mass beyond it is 4e-9
_CHUNK = 2**24  # numbers in the largest intermediate tensor


def log_likelihood(model: AVB, x: np.ndarray, grid: int = 400) -> np.ndarray:
    """Returns log p(x) in nats, [batch], by the midpoint rule on grid x grid points of z.

    Args:
      model: an `AVB` with latent_dim 2.
      x: [batch, *event].
      grid: points along each side. The error is negligible if their distance, 12 / grid, is well
        below the width of the posteriors. To see the error, compare two sizes.
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


def posterior_on_grid(
    model: AVB,
    x: np.ndarray,
    mean: np.ndarray,
    scale: np.ndarray,
    log_evidence: float,
    cells: int,
    half_width: float = 5.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns log p(z|x) of one x at the cell centres of a grid over w, z = mean + scale @ w.

    Args:
      model: an `AVB` with latent_dim 2.
      x: [*event].
      mean: [2], centre of the grid.
      scale: [2, 2], matrix of the coordinates.
      log_evidence: log p(x) in nats.
      cells: cells along each side.
      half_width: half the width of the grid in w.
    Returns:
      (z [cells, cells, 2], log p(z|x) [cells, cells] in nats).
    """
    w, _ = _grid(cells, half_width)
    z = (mean + w @ np.transpose(scale)).astype(np.float32)
    log_joint = _log_joint(model, x[np.newaxis], tf.constant(z))[0]
    return z.reshape(cells, cells, 2), np.reshape(log_joint, [cells, cells]) - log_evidence


def _grid(cells: int, half_width: float):
    """Returns the centres of cells x cells squares, [cells^2, 2], and the area of one square."""
    width = 2.0 * half_width / cells
    side = -half_width + width * (np.arange(cells) + 0.5)
    first, second = np.meshgrid(side, side, indexing="ij")
    return np.stack([first, second], -1).reshape(-1, 2).astype(np.float32), width**2


def _log_joint(model, x, z):
    """Returns log p(x_i, z_j) in nats, [batch, points]."""
    outputs = model.averaged_decoder(z)
    return pairwise_log_likelihood(model.likelihood, outputs, x) + model.prior.log_prob(z)
