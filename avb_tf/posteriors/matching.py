"""Gaussians matched to a density by its scores, the gradients of the log density."""

import time

import numpy as np

from avb_tf.posteriors import hmc

UPDATES = 100
_FAR = 1e12  # standard deviation at which a Gaussian counts as divergent


def match(
    scores: hmc.Scores,
    mean: np.ndarray,
    covariance: np.ndarray,
    rng: np.random.Generator,
    updates: int = UPDATES,
    deadline: float = np.inf,
) -> tuple[np.ndarray, np.ndarray] | None:
    """Fits a Gaussian whose score is close to the density's.

    If the density is finite at fewer than half of the draws, the first Gaussian shrinks towards its
    mean, and an update is repeated with a smaller step. The updates have a closed form and are
    affine invariant. Source: "Batch and match" (Cai, Modi, Pillaud-Vivien, Margossian, Gower, Blei
    and Saul, 2024).

    Args:
      scores: function from u [n, dim] to the log density [n] and its gradient [n, dim].
      mean: mean of the first Gaussian, [dim].
      covariance: covariance of the first Gaussian, [dim, dim].
      rng: source of random numbers.
      updates: largest number of updates.
      deadline: value of `time.monotonic` after which no further update begins.
    Returns:
      The mean [dim] and the symmetric root of the covariance [dim, dim]; or None if the density is
      not finite at the draws or the Gaussian diverges.
    """
    dim = len(mean)
    count = max(128, 4 * dim)
    before, damping = None, 1.0
    for step in range(updates):
        if time.monotonic() > deadline:
            break
        u = mean + rng.normal(size=[count, dim]) @ hmc.root(covariance)
        density, score = scores(u)
        finite = np.isfinite(density) & np.isfinite(score).all(1)
        if finite.mean() < 0.5:
            if before is None:
                covariance = covariance / 4.0
            else:
                mean, covariance = before
                damping *= 4.0
            continue
        before = mean, covariance
        u, score = u[finite], score[finite]
        rate = count * dim / (damping * (1.0 + step))  # of the proximal step; it decays
        shrink = rate / (1.0 + rate)
        u_mean, score_mean = u.mean(0), score.mean(0)
        pull = rate * _covariance(score) + shrink * np.outer(score_mean, score_mean)
        spread = covariance + rate * _covariance(u)
        spread += shrink * np.outer(mean - u_mean, mean - u_mean)
        covariance = _solve(spread, pull)
        mean = (mean + rate * (covariance @ score_mean + u_mean)) / (1.0 + rate)
        if not np.abs(covariance).max() < _FAR**2:
            return None
    return None if before is None else (mean, hmc.root(covariance))


def _covariance(x):
    return np.atleast_2d(np.cov(x.T, bias=True))


def _solve(spread, pull):
    """Returns the positive definite solution S of S pull S + S = spread."""
    root = hmc.root(spread)
    inner = root @ pull @ root
    values, vectors = np.linalg.eigh(0.5 * (inner + inner.T))
    middle = (vectors * (2.0 / (1.0 + np.sqrt(1.0 + 4.0 * np.maximum(values, 0.0))))) @ vectors.T
    solution = root @ middle @ root
    return 0.5 * (solution + solution.T)
