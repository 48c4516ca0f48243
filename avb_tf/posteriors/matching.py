"""Gaussians matched to a density by its scores."""

import time

import numpy as np

from avb_tf.posteriors import hmc

UPDATES = 100
_FAR = 1e12  # standard deviations of a Gaussian that has run away


def match(scores, mean, covariance, rng, updates=UPDATES, deadline=np.inf):
    """A Gaussian whose score is close to the density's: (mean, root of its covariance), or None.

    Batch and match (Cai, Modi, Pillaud-Vivien, Margossian, Gower, Blei and Saul, 2024), whose
    updates are in closed form and affine invariant. Where the density is finite at too few of the
    draws the Gaussian shrinks towards its mean first.

    Args:
      scores: u [n, dim] -> log density and gradient.
      mean: [dim], of the first Gaussian.
      covariance: [dim, dim], of the first.
      rng: of all draws.
      updates: at most.
      deadline: of `time.monotonic`, after which there are no more.
    Returns:
      None where the density is not finite at its draws, or the Gaussian runs away.
    """
    dim = len(mean)
    count = max(128, 4 * dim)
    matched = False
    for step in range(updates):
        if time.monotonic() > deadline:
            break
        u = mean + rng.normal(size=[count, dim]) @ hmc.root(covariance)
        density, score = scores(u)
        finite = np.isfinite(density) & np.isfinite(score).all(1)
        if finite.mean() < 0.5:
            covariance = covariance / 4.0
            continue
        u, score = u[finite], score[finite]
        rate = count * dim / (1.0 + step)  # of the proximal step; it falls as the steps go
        shrink = rate / (1.0 + rate)
        u_mean, score_mean = u.mean(0), score.mean(0)
        pull = rate * _covariance(score) + shrink * np.outer(score_mean, score_mean)
        spread = covariance + rate * _covariance(u)
        spread += shrink * np.outer(mean - u_mean, mean - u_mean)
        covariance = _solve(spread, pull)
        mean = (mean + rate * (covariance @ score_mean + u_mean)) / (1.0 + rate)
        if not np.abs(covariance).max() < _FAR**2:
            return None
        matched = True
    return (mean, hmc.root(covariance)) if matched else None


def _covariance(x):
    return np.atleast_2d(np.cov(x.T, bias=True))


def _solve(spread, pull):
    """The positive definite S with S pull S + S = spread."""
    root = hmc.root(spread)
    inner = root @ pull @ root
    values, vectors = np.linalg.eigh(0.5 * (inner + inner.T))
    middle = (vectors * (2.0 / (1.0 + np.sqrt(1.0 + 4.0 * np.maximum(values, 0.0))))) @ vectors.T
    solution = root @ middle @ root
    return 0.5 * (solution + solution.T)
