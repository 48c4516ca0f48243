"""Bounds on the log density of draws that have no known density, after adding Gaussian noise.

Let w be draws of a distribution with mean 0 and covariance I, approximately, and let

    v = sqrt(1 - s^2) w + s u,   u ~ N(0, I).

This map preserves mean and covariance, and it does not change a Gaussian. v has a density for any
distribution of w: the mixture q(v) = E_w[N(v; sqrt(1 - s^2) w, s^2 I)]. Let v be made from w_0, let
w_1..w_K be further independent draws, and let N_k be the density at v of the component of w_k.
Then, in expectation over all draws,

    E log (N_1 + .. + N_K) / K  <=  E log q(v)  <=  E log (N_0 + .. + N_K) / (K + 1).

The left inequality is Jensen's. The gap on the right is a KL divergence: from the distribution of
the unordered draws w_0..w_K given v to that of K + 1 independent draws. Both bounds approach
E log q(v) as K grows (Yin and Zhou, 2018; Molchanov, Kharitonov, Sobolev and Vetrov, 2019).
"""

import math
from typing import NamedTuple

import numpy as np
import scipy.linalg
import scipy.spatial

OVERLAPPING = 200  # components within one noise scale of a point; more tighten the bounds
# With more components than this in at most two dimensions, a search for the near ones is faster
# than the sum over all.
_SEARCHED = 250_000
_RADIUS = 6.5  # distance in noise scales beyond which components are then bounded, not summed
_PAIRS = 2**17  # distances computed at a time; a megabyte of them stays in the cache


class Bounds(NamedTuple):
    """Lower and upper bounds on the same quantity."""

    lower: np.ndarray
    upper: np.ndarray


def noise_scale(components: int, dimensions: int) -> float:
    """Returns s such that a volume s^dimensions at unit density has `OVERLAPPING` components.

    More components allow a smaller s, with which the smoothed distribution is closer to the
    original one.
    """
    return min(0.99, (OVERLAPPING / components) ** (1.0 / dimensions))


def smoothed(w: np.ndarray, noise: np.ndarray, scale: float) -> np.ndarray:
    """Returns v, the draws w with noise added, as in the module's docstring.

    Args:
      w: [draws, n].
      noise: [draws, n], standard normal.
      scale: s, above 0 and below 1.
    """
    return math.sqrt(1.0 - scale**2) * w + scale * noise


def log_density_bounds(
    own: np.ndarray, others: np.ndarray, noise: np.ndarray, scale: float
) -> Bounds:
    """Returns bounds on log q(v) in nats at v = `smoothed(own, noise, scale)`, [draws] each.

    The bounds hold in expectation over the draws, not for each draw.

    Args:
      own: w_0 for each v, [draws, n].
      others: w_1..w_K, [K, n], independent of `own`.
      noise: u for each v, standard normal, [draws, n].
      scale: s, above 0 and below 1.
    """
    v, centres = smoothed(own, noise, scale), math.sqrt(1.0 - scale**2) * others
    log_sum, log_rest = _log_sums(v / scale, centres / scale)
    constant = -v.shape[1] * math.log(scale * math.sqrt(2.0 * math.pi))
    log_own = -0.5 * np.sum(noise**2, -1)
    count = len(others)
    with_own = np.logaddexp(np.logaddexp(log_sum, log_rest), log_own)
    return Bounds(log_sum - math.log(count) + constant, with_own - math.log(count + 1) + constant)


def at_smoothed_points(
    pilot: np.ndarray, own: np.ndarray, others: np.ndarray, noise: np.ndarray
) -> tuple[np.ndarray, Bounds]:
    """Returns points of the smoothed distribution and bounds on its log density at them.

    The draws may have any mean and covariance. The noise is added in coordinates that whiten the
    pilot draws, with the scale `noise_scale`.

    Args:
      pilot: [count, n], draws for the moments, independent of the other draws.
      own: [draws, n], the draws to which noise is added.
      others: [K, n], further draws, independent of `own`.
      noise: [draws, n], standard normal.
    Returns:
      (points [draws, n], `Bounds` of [draws] in nats). The bounds hold in expectation.
    """
    mean, covariance = pilot.mean(0), np.atleast_2d(np.cov(pilot.T))
    floor = 1e-9 * np.trace(covariance) + 1e-12
    scale_tril = np.linalg.cholesky(covariance + floor * np.eye(len(covariance)))
    own, others = (
        scipy.linalg.solve_triangular(scale_tril, (z - mean).T, lower=True).T for z in (own, others)
    )
    scale = noise_scale(len(others), own.shape[1])
    bounds = log_density_bounds(own, others, noise, scale)
    log_volume = np.log(np.diag(scale_tril)).sum()
    points = mean + smoothed(own, noise, scale) @ scale_tril.T
    return points, Bounds(bounds.lower - log_volume, bounds.upper - log_volume)


def _log_sums(points, centres):
    """Returns log sum_k exp(-|point - centre_k|^2 / 2) in two parts.

    Returns:
      (log of the part that is computed [points], upper bound on the log of the rest).
    """
    if points.shape[1] > 2 or len(centres) <= _SEARCHED:
        return _all_pairs(points, centres), -np.inf
    tree = scipy.spatial.KDTree(centres)
    total = np.zeros(len(points))
    for part in np.array_split(np.arange(len(points)), -(-len(points) // 50)):
        near = scipy.spatial.KDTree(points[part]).sparse_distance_matrix(
            tree, _RADIUS, output_type="ndarray"
        )
        total[part] = np.bincount(near["i"], np.exp(-0.5 * near["v"] ** 2), len(part))
    alone = total == 0.0
    with np.errstate(divide="ignore"):
        log_sum = np.log(total)
    log_sum[alone] = _all_pairs(points[alone], centres)
    return log_sum, np.where(alone, -np.inf, math.log(len(centres)) - 0.5 * _RADIUS**2)


def _all_pairs(points, centres):
    log_sum = np.full(len(points), -np.inf)
    for part in np.array_split(centres, -(-len(points) * len(centres) // _PAIRS) or 1):
        exponents = points @ part.T - 0.5 * np.sum(part**2, -1)
        largest = exponents.max(-1)
        exponents -= largest[:, np.newaxis]
        sums = np.exp(exponents, out=exponents).sum(-1)
        log_sum = np.logaddexp(log_sum, largest + np.log(sums))
    return log_sum - 0.5 * np.sum(points**2, -1)
