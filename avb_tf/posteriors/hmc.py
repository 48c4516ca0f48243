"""Hamiltonian Monte Carlo for many short parallel chains, whitened by what they know together.

In numpy around one compiled function of the density and its gradient: TFP's kernels in a graph
take half a minute to trace, more than these chains take to run.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from avb_tf.posteriors.mixture import Mixture
from avb_tf.posteriors.target import value_and_gradient

Scores = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


class Chains(NamedTuple):
    """States of parallel chains."""

    states: np.ndarray  # [transitions, chains, dim]
    log_density: np.ndarray  # [transitions, chains]
    acceptance: np.ndarray  # [transitions, chains]
    step_size: np.ndarray  # [chains, 1]


def scores(log_density, dtype) -> Scores:
    """x [n, dim] -> log density [n] and its gradient [n, dim], in float64."""

    @tf.function(autograph=False, reduce_retracing=True)
    def function(x):
        return value_and_gradient(log_density, x)

    def evaluate(x):
        with np.errstate(over="ignore"):  # far away, where the density is not finite
            x = np.asarray(x, dtype.as_numpy_dtype)
        density, gradient = function(tf.constant(x))
        return np.asarray(density, np.float64), np.asarray(gradient, np.float64)

    return evaluate


def run_chains(
    scores: Scores,
    x: np.ndarray,
    root: np.ndarray,
    transitions: int,
    leapfrogs: int,
    step_size: float | np.ndarray,
    rng: np.random.Generator,
    adapt: bool = False,
    jumps: Mixture | None = None,
) -> Chains:
    """Transitions of all chains at once.

    Args:
      scores: x [n, dim] -> log density and gradient.
      x: [chains, dim], where they start, of finite density.
      root: symmetric [dim, dim], x @ inverse(root) has unit covariance, roughly; or [dim], its
        diagonal.
      transitions: of each chain.
      leapfrogs: of each transition.
      step_size: in whitened coordinates, one for all or [chains, 1].
      rng: of all draws.
      adapt: moves each chain's step size towards an acceptance of 3/4; the chains are then not
        exact.
      jumps: proposals that do not depend on the state, one after each transition: chains move
        between modes, so that each has as many as its mass.
    """

    def whitened(v):
        return v * root if root.ndim == 1 else v @ root

    density, score = scores(x)
    proposed = None if jumps is None else jumps.log_density(x)
    step_size = np.broadcast_to(step_size, [len(x), 1]).copy()
    history = []
    for _ in range(transitions):
        step = step_size * rng.uniform(0.7, 1.3)  # of random length, so that no chain orbits
        momentum = rng.normal(size=x.shape)
        energy = density - 0.5 * (momentum**2).sum(-1)
        new_x, new_density, new_score = x, density, score
        with np.errstate(all="ignore"):  # a divergent trajectory is one that is not accepted
            for _ in range(leapfrogs):
                momentum = momentum + 0.5 * step * whitened(new_score)
                new_x = new_x + step * whitened(momentum)
                new_density, new_score = scores(new_x)
                momentum = momentum + 0.5 * step * whitened(new_score)
            gain = new_density - 0.5 * (momentum**2).sum(-1) - energy
            acceptance = np.exp(np.minimum(np.nan_to_num(gain, nan=-np.inf), 0.0))
        accepted = rng.random(len(x)) < acceptance
        x = np.where(accepted[:, np.newaxis], new_x, x)
        density = np.where(accepted, new_density, density)
        score = np.where(accepted[:, np.newaxis], new_score, score)
        if adapt:  # up to a trajectory of length 2: beyond a quarter turn chains come back
            step_size *= np.where(acceptance > 0.75, 1.1, 1.0 / 1.2)[:, np.newaxis]
            step_size = np.minimum(step_size, 2.0 / leapfrogs)
        if jumps is not None and proposed is not None:
            proposed = np.where(accepted, jumps.log_density(x), proposed)
            x, density, score, proposed = _jump(scores, jumps, (x, density, score, proposed), rng)
        history.append((x, density, acceptance))
    states, densities, acceptance = map(np.stack, zip(*history, strict=True))
    return Chains(states, densities, acceptance, step_size)


def _jump(scores, jumps, state, rng):
    """An independent proposal for each chain, accepted by Metropolis and Hastings' rule."""
    x, density, _, proposed = state
    new_x = jumps.draw(len(x), rng)
    new = (new_x, *scores(new_x), jumps.log_density(new_x))
    with np.errstate(all="ignore"):
        gain = np.nan_to_num(new[1] - density + proposed - new[3], nan=-np.inf)
        accepted = rng.random(len(x)) < np.exp(np.minimum(gain, 0.0))
    return tuple(
        np.where(accepted[:, np.newaxis] if old.ndim == 2 else accepted, fresh, old)
        for fresh, old in zip(new, state, strict=True)
    )


def root(covariance):
    """The symmetric square root, of a matrix that rounding may have left indefinite."""
    values, vectors = np.linalg.eigh(np.atleast_2d(covariance))
    return (vectors * np.sqrt(np.maximum(values, 1e-15 * values[-1]))) @ vectors.T
