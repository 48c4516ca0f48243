"""Where a fit starts: mean and covariance of the posterior, roughly.

A fit learns shape; location, scale and correlation it is given. They come from two quick stages
that need no tuning since neither depends on the units of the parameters: several Gaussians are
matched to the density's scores (batch and match), which takes them to where the mass is, and short
chains of Hamiltonian Monte Carlo from all of them together, weighed so that each mode counts by its
mass, spread over what a Gaussian misses.
"""

from typing import NamedTuple

import numpy as np

from avb_tf import diagnostics
from avb_tf.errors import UserError
from avb_tf.posteriors import hmc
from avb_tf.posteriors.target import Target

STARTS = 8  # Gaussians, so that one mode is not taken for all
MATCHES = 100  # updates of each
CHAINS = 256
LARGEST = 200  # dimensions
ROUNDS = 5  # of the chains, with the covariance of all taken anew after each
TRANSITIONS = 16  # in a round
LEAPFROGS = 6  # in a transition
KEPT = 4  # states of each chain, from the last round
# A variance that is so many times as large after a round as before it, in most rounds, grows
# without an end. Of the proper posteriors tried none had more than 4 times after the first round,
# Cauchy's and Neal's among them; improper ones had 20 and more.
GROWTH = 10.0
_RUNS_AWAY = (
    "the fit runs away: the log density does not fall as parameters grow; expected a proper "
    "posterior: look for a parameter without a prior"
)
_FAR = 1e12  # standard deviations beyond which a density is not taken for a proper one


class Start(NamedTuple):
    """u = mean + scale_tril @ z standardises the posterior."""

    mean: np.ndarray  # [dim]
    scale_tril: np.ndarray  # [dim, dim]
    z: np.ndarray  # [states, dim], the chains' last few states, standardised


def find(target: Target, seed: int = 0) -> Start:
    """Rough moments of the posterior.

    Raises:
      UserError: a density that is finite nowhere near, or that has no maximum to be found, or of
        more than `LARGEST` dimensions.
    """
    if target.dim > LARGEST:
        raise UserError(
            f"the posterior has {target.dim} dimensions; expected {LARGEST} at most, of which "
            f"{CHAINS} chains can tell a covariance: integrate some parameters out"
        )
    rng = np.random.default_rng(seed)
    scores = hmc.scores(target.log_density, target.dtype)
    found = [
        _match(scores, 3.0 * rng.normal(size=target.dim) * (i > 0), rng) for i in range(STARTS)
    ]
    gaussians = list(filter(None, found))
    draws = _weighed(scores, gaussians, rng) if gaussians else []
    if not len(draws):
        raise UserError(
            "the log density is not finite wherever the fit started; expected a finite number "
            "near 0 in unconstrained space: check the model at a plausible value of its parameters"
        )
    draws = _move(scores, draws, rng)
    mean, scale_tril = draws.mean(0), np.linalg.qr(hmc.root(np.cov(draws.T)))[1].T
    return Start(mean, scale_tril, np.linalg.solve(scale_tril, (draws - mean).T).T)


def _match(scores, mean, rng):
    """A Gaussian whose score is close to the density's: (mean, root of its covariance), or None.

    Batch and match (Cai, Modi, Pillaud-Vivien, Margossian, Gower, Blei and Saul, 2024), whose
    updates are in closed form and affine invariant. Where the density is finite at too few of the
    draws the Gaussian shrinks towards its mean first.
    """
    dim = len(mean)
    count = max(128, 4 * dim)
    covariance = np.eye(dim)
    matched = False
    for step in range(MATCHES):
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
            raise UserError(_RUNS_AWAY)
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


def _weighed(scores, gaussians, rng):
    """Draws [CHAINS, dim] from several Gaussians, resampled in proportion to the posterior.

    A draw's weight is p over the density of all Gaussians together (the balance heuristic of Veach
    and Guibas, 1995): a mode counts by its mass, not by how many matches found it, and a match that
    went astray does not count. Where too few draws would carry the weight it is flattened. None
    are returned where the density is finite at none.
    """
    count, dim = 4 * CHAINS // len(gaussians), len(gaussians[0][0])
    u = np.concatenate([mean + rng.normal(size=[count, dim]) @ root for mean, root in gaussians])
    log_q = np.logaddexp.reduce(
        [
            -0.5 * (np.linalg.solve(root, (u - mean).T) ** 2).sum(0) - np.linalg.slogdet(root)[1]
            for mean, root in gaussians
        ]
    )
    log_weights = scores(u)[0] - log_q
    finite = np.isfinite(log_weights)
    u, log_weights = u[finite], log_weights[finite]
    if not len(u):
        return u
    while diagnostics.effective_sample_size(log_weights) < min(CHAINS, len(u)) / 4:
        log_weights = 0.5 * log_weights
    weights = np.exp(log_weights - log_weights.max())
    return u[rng.choice(len(u), CHAINS, p=weights / weights.sum())]


def _move(scores, draws, rng):
    """States [KEPT n, dim] of short chains from draws [n, dim], the last round's.

    Whitened anew in each round by the moments of all.
    """
    step_size, grown = 0.3, 0
    for _ in range(ROUNDS):
        density = scores(draws)[0]
        finite = density[np.isfinite(density)]
        low, middle, high = np.quantile(finite, [0.25, 0.5, 0.75])
        typical = density > middle - 10.0 - 6.0 * (high - low)  # others have lost their way
        draws = draws[typical]
        root = hmc.root(np.cov(draws.T))
        chains = hmc.run_chains(
            scores, draws, root, TRANSITIONS, LEAPFROGS, step_size, rng, adapt=True
        )
        draws, step_size = chains.states[-1], chains.step_size
        whitened = np.linalg.lstsq(root, draws.T, rcond=None)[0]
        grown += np.linalg.eigvalsh(np.atleast_2d(np.cov(whitened)))[-1] > GROWTH
    if grown > ROUNDS / 2:
        raise UserError(_RUNS_AWAY)
    return chains.states[:: -TRANSITIONS // KEPT].reshape(-1, draws.shape[1])
