"""Short chains of Hamiltonian Monte Carlo from a mixture, which jump between its components."""

import time
from typing import NamedTuple

import numpy as np

from avb_tf import diagnostics
from avb_tf.errors import UserError
from avb_tf.posteriors import evidence, hmc, mixture
from avb_tf.posteriors.evidence import Estimate
from avb_tf.posteriors.mixture import Mixture

CHAINS = 256
ROUNDS = 5  # of the chains, with the covariance of all taken anew after each
TRANSITIONS = 16  # in a round
LEAPFROGS = 6  # in a transition
KEPT = 16  # states of each chain, of the exact round at the end
THINNED = 2  # transitions from one kept state to the next
NOT_FINITE = (
    "the log density is not finite wherever the fit started; expected a finite number near 0 in "
    "unconstrained space: check the model at a plausible value of its parameters"
)


class Sampled(NamedTuple):
    """States of chains after an exact round, and what their density is like."""

    states: np.ndarray  # [chains, kept, dim]
    mixture: Mixture
    log_evidence: Estimate
    log_normaliser: float  # the evidence, roughly, where that is unknown


def weighed(scores, proposal: Mixture, rng) -> np.ndarray:
    """Draws [CHAINS, dim] of a mixture, resampled in proportion to the posterior.

    A draw's weight is p over the density of all components together (the balance heuristic of
    Veach and Guibas, 1995): a mode counts by its mass, not by how many components are on it, and a
    component that went astray does not count. Where too few draws would carry the weight it is
    flattened.

    Raises:
      UserError: the density is finite at no draw.
    """
    u = proposal.draw(16 * CHAINS, rng)
    log_weights = scores(u)[0] - proposal.log_density(u)
    usable = np.isfinite(log_weights)
    u, log_weights = u[usable], log_weights[usable]
    if not len(u):
        raise UserError(NOT_FINITE)
    while diagnostics.effective_sample_size(log_weights) < min(CHAINS, len(u)) / 4:
        log_weights = 0.5 * log_weights
    weights = np.exp(log_weights - log_weights.max())
    return u[rng.choice(len(u), CHAINS, p=weights / weights.sum())]


def around(draws, rng) -> Mixture:
    """Components at some of the draws, half as wide as all together."""
    count = min(8, mixture.largest(draws.shape[1]))
    means = draws[rng.choice(len(draws), count, replace=False)]
    root = 0.5 * mixture.lower(np.cov(draws.T))
    return Mixture(np.full(count, 1.0 / count), means, np.stack([root] * count))


def sampled(scores, draws, proposal: Mixture, rng, deadline: float) -> Sampled:
    """Short chains from draws [CHAINS, dim], and an exact round at their end."""
    step_size: float | np.ndarray = 0.3
    jumps = _components(draws, proposal, rng)
    for _ in range(ROUNDS):
        draws = _typical(scores, draws, rng)
        root = hmc.root(np.cov(draws.T))
        chains = hmc.run_chains(
            scores, draws, root, TRANSITIONS, LEAPFROGS, step_size, rng, adapt=True, jumps=jumps
        )
        draws, step_size = chains.states[-1], chains.step_size
        jumps = mixture.fitted(chains.states[::4].reshape(-1, draws.shape[1]), jumps)
        if time.monotonic() > deadline:
            break
    root = hmc.root(np.cov(chains.states[::4].reshape(-1, draws.shape[1]).T))
    kept = hmc.run_chains(
        scores, draws, root, KEPT * THINNED, LEAPFROGS, step_size, rng, jumps=jumps
    )
    states = np.swapaxes(kept.states[THINNED - 1 :: THINNED], 0, 1)
    density = kept.log_density[THINNED - 1 :: THINNED].T
    return Sampled(states, *_described(scores, states, density, jumps, rng))


def _described(scores, states, density, jumps, rng):
    """A mixture near the chains' states, and the evidence by bridges from halves of the chains."""
    dim, half = states.shape[-1], len(states) // 2
    estimates = []
    for fitted, other in ((slice(half), slice(half, None)), (slice(half, None), slice(half))):
        near = mixture.fitted(states[fitted].reshape(-1, dim), jumps)
        x = near.draw(half * states.shape[1], rng)
        at_states = density[other] - near.log_density(states[other].reshape(-1, dim)).reshape(
            density[other].shape
        )
        estimates.append(evidence.bridge(scores(x)[0] - near.log_density(x), at_states))
    log_evidence = evidence.average(estimates)
    near = mixture.fitted(states.reshape(-1, dim), jumps)
    roughly = np.median(density.ravel() - near.log_density(states.reshape(-1, dim)))
    known = np.isfinite(log_evidence.standard_error)
    return near, log_evidence, float(log_evidence.value if known else roughly)


def _components(draws, proposal, rng) -> Mixture:
    """The components of a proposal that have draws, and some more for the shape."""
    joint = proposal.log_densities(draws)
    mass = np.exp(joint - np.logaddexp.reduce(joint)).mean(1)
    more = around(draws, rng)
    count = max(1, mixture.largest(draws.shape[1]) - len(more.weights))
    kept = [k for k in np.argsort(-mass)[:count] if mass[k] > 1e-3]
    return mixture.fitted(
        draws,
        Mixture(
            np.concatenate([mass[kept], 0.1 * more.weights]) / (mass[kept].sum() + 0.1),
            np.concatenate([proposal.means[kept], more.means]),
            np.concatenate([proposal.roots[kept], more.roots]),
        ),
    )


def _typical(scores, draws, rng):
    """Draws [n, dim] with those that have lost their way put in the place of others."""
    density = scores(draws)[0]
    low, middle, high = np.quantile(density[np.isfinite(density)], [0.25, 0.5, 0.75])
    typical = np.flatnonzero(density > middle - 10.0 - 6.0 * (high - low))
    rows = np.arange(len(draws))
    lost = ~np.isin(rows, typical)
    rows[lost] = rng.choice(typical, lost.sum())
    return draws[rows]
