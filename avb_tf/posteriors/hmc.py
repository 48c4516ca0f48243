"""Hamiltonian Monte Carlo for many short parallel chains, whitened by their common covariance.

The chains run in numpy and call one compiled function for the density and its gradient. TFP's
kernels take half a minute to trace in a graph, which is longer than these chains take to run.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from avb_tf.posteriors.cost import ROWS
from avb_tf.posteriors.functions import value_and_gradient
from avb_tf.posteriors.mixture import Mixture
from avb_tf.posteriors.target import LogDensity, Target

Scores = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


class ChainStates(NamedTuple):
    """States of parallel chains after each transition."""

    states: np.ndarray  # [transitions, chains, dim]
    log_density: np.ndarray  # [transitions, chains]
    acceptance: np.ndarray  # [transitions, chains]
    step_size: np.ndarray  # [chains, 1]


def scores(log_density: LogDensity, dim: int, dtype: tf.DType, rows: int = ROWS[1]) -> Scores:
    """Returns the function from x [n, dim] to the log density [n] and its gradient [n, dim].

    The result is in float64; `log_density` is evaluated in `dtype`, at most `rows` draws at once.
    Where it is not finite, the result is minus infinity.
    """

    @tf.function(input_signature=[tf.TensorSpec([None, dim], dtype)], autograph=False)
    def function(x):
        return value_and_gradient(log_density, x)

    return _in_float64(function, dtype, rows)


def of_target(target: Target) -> Scores:
    """Returns `scores` of a target's own log density, whose graph has been traced before."""
    return _in_float64(target.log_density_and_gradient, target.dtype, target.cost.rows)


def _in_float64(function, dtype, rows):
    """Returns the function from x to arrays in float64; `function` is evaluated in `dtype`."""

    def evaluate(x):
        with np.errstate(over="ignore"):  # x overflows far out, where the density is not finite
            x = np.asarray(x, dtype.as_numpy_dtype)
        parts = [function(tf.constant(x[i : i + rows])) for i in range(0, max(1, len(x)), rows)]
        density, gradient = (
            np.concatenate(part, dtype=np.float64) for part in zip(*parts, strict=True)
        )
        return np.where(np.isfinite(density), density, -np.inf), gradient

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
    told: Callable[[], None] | None = None,
) -> ChainStates:
    """Runs transitions of all chains in parallel.

    Args:
      scores: function from x [n, dim] to the log density [n] and its gradient [n, dim].
      x: initial states, [chains, dim]; their density must be finite.
      root: symmetric square root of a rough covariance, [dim, dim], or its diagonal, [dim]; chains
        move in the whitened coordinates x @ inverse(root).
      transitions: number of transitions of each chain.
      leapfrogs: number of leapfrog steps in each transition.
      step_size: step size in whitened coordinates, a number for all chains or [chains, 1].
      rng: source of random numbers.
      adapt: whether to move each chain's step size towards an acceptance rate of 3/4; the chains
        do not sample the density exactly while they adapt.
      jumps: mixture for independent proposals, one after each transition, or None. The proposals
        do not depend on the state, so chains jump between modes, and each mode gets a share of the
        chains equal to its mass.
      told: called after each transition, to show the progress.
    """

    def whitened(v):
        return v * root if root.ndim == 1 else v @ root

    density, score = scores(x)
    proposed = None if jumps is None else jumps.log_density(x)
    step_size = np.broadcast_to(step_size, [len(x), 1]).copy()
    history = []
    for _ in range(transitions):
        step = step_size * rng.uniform(0.7, 1.3)  # random, so that no trajectory is periodic
        momentum = rng.normal(size=x.shape)
        energy = density - 0.5 * (momentum**2).sum(-1)
        new_x, new_density, new_score = x, density, score
        with np.errstate(all="ignore"):  # a divergent trajectory overflows and is rejected
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
        if adapt:  # trajectories are at most 2 long: after a quarter turn they turn back
            step_size *= np.where(acceptance > 0.75, 1.1, 1.0 / 1.2)[:, np.newaxis]
            step_size = np.minimum(step_size, 2.0 / leapfrogs)
        if jumps is not None and proposed is not None:
            proposed = np.where(accepted, jumps.log_density(x), proposed)
            x, density, score, proposed = _jump(scores, jumps, (x, density, score, proposed), rng)
        history.append((x, density, acceptance))
        if told is not None:
            told()
    states, densities, acceptance = map(np.stack, zip(*history, strict=True))
    return ChainStates(states, densities, acceptance, step_size)


def _jump(scores, jumps, state, rng):
    """Makes one independent Metropolis-Hastings proposal for each chain."""
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


def root(covariance: np.ndarray) -> np.ndarray:
    """Returns the symmetric square root of a matrix that rounding may have made indefinite."""
    values, vectors = np.linalg.eigh(np.atleast_2d(covariance))
    return (vectors * np.sqrt(np.maximum(values, 1e-15 * values[-1]))) @ vectors.T
