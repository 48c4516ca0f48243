"""Entropy of a density of which only draws are known."""

import functools

import numpy as np
import scipy.spatial
from scipy.special import digamma, gammaln

_NEIGHBOURS = 10


def entropy(z) -> float:
    """In nats, from draws [draws, n]: Kozachenko and Leonenko (1987), whitened by their moments.

    Unlike a smoothed density on a grid it does not leak over sharp edges. Its bias is small for
    two dimensions and grows with their number.
    """
    scale = np.linalg.cholesky(np.cov(z.T) + 1e-12 * np.eye(z.shape[1]))
    return _of_whitened(np.linalg.solve(scale, (z - z.mean(0)).T).T) + _log_volume(scale)


def entropy_beside_gaussian(z) -> float:
    """As `entropy`, less the error that it makes on as many draws of a Gaussian.

    For densities near a Gaussian the bias goes. Of one with many sharp walls it stays: a cube of
    eight dimensions reads 1.2 nats too high from 3000 draws.
    """
    count, n = z.shape
    return entropy(z) - _error_of_gaussian(count, n)


@functools.cache
def _error_of_gaussian(count: int, n: int) -> float:
    exact = 0.5 * n * np.log(2.0 * np.pi * np.e)
    generator = np.random.default_rng(0)
    repeats = max(1, 20_000 // count)
    found = [entropy(generator.standard_normal((count, n))) for _ in range(repeats)]
    return float(np.mean(found) - exact)


def _of_whitened(z) -> float:
    count, n = z.shape
    distances, _ = scipy.spatial.KDTree(z).query(z, [_NEIGHBOURS + 1])  # itself first
    log_ball = 0.5 * n * np.log(np.pi) - gammaln(0.5 * n + 1.0)
    return digamma(count) - digamma(_NEIGHBOURS) + log_ball + n * np.mean(np.log(distances))


def _log_volume(scale) -> float:
    return float(np.log(np.diag(scale)).sum())
