"""Short chains of Hamiltonian Monte Carlo from a mixture, which jump between its components."""

import time
from typing import NamedTuple

import numpy as np

from avb_tf import diagnostics
from avb_tf.errors import UserError
from avb_tf.posteriors import cost, evidence, hmc, mixture
from avb_tf.posteriors.evidence import Evidence
from avb_tf.posteriors.mixture import Mixture

CHAINS = 64, 256  # fewest chains, of densities that take long, and their usual number
ROUNDS = 5  # warm-up rounds; the covariance is estimated again from all chains after each
TRANSITIONS = 6, 16  # fewest and most transitions in a round, and states kept of each chain
LEAPFROGS = 6  # leapfrog steps in a transition
MOST_LEAPFROGS = 24  # of chains that have not mixed
LENGTH = 2.0  # of a trajectory, in standard deviations
THINNED = 2, 16  # fewest and most transitions of the exact round from one kept state to the next
# R-hat up to which chains visit all regions in the right proportions, and up to which they are good
# enough to leave the time to the networks.
MIXED, USABLE = 1.05, 1.1
EVEN = 1.02  # R-hat up to which the proportions are as good as those of independent draws
ATTEMPTS = 8  # most times that all rounds run, if the chains do not mix
NOT_FINITE = (
    "the log density is not finite wherever the fit started; expected a finite number near 0 in "
    "unconstrained space: check the model at a plausible value of its parameters"
)


class Sampled(NamedTuple):
    """States of chains from an exact round, a mixture close to their density, and the evidence."""

    states: np.ndarray  # [chains, kept, dim]
    mixture: Mixture
    log_evidence: Evidence
    log_normaliser: float  # nats: the log evidence, or a rough estimate if it is unknown
    # Share of the states where a mixture fitted to the other half of the chains has less than a
    # tenth of the density: the share of the posterior that a mixture misses though chains visit it.
    uncovered: float
    divergence: float  # KL(posterior || such a mixture with the likeliest tails) in nats
    excess: float  # nats by which the density exceeds the mixture, as covariances are estimated


def weighed(
    scores: hmc.Scores, proposal: Mixture, rng: np.random.Generator, count: int
) -> np.ndarray:
    """Returns draws of a mixture, [count, dim], resampled by their importance weights.

    The weight of a draw is p over the density of the whole mixture (the balance heuristic of Veach
    and Guibas, 1995). A mode therefore counts by its mass and not by the number of components on
    it, and components far from the posterior do not count. If the effective sample size is too
    small, the weights are flattened.

    Args:
      scores: function from u [n, dim] to the log density [n] and its gradient [n, dim].
      proposal: the mixture.
      rng: source of random numbers.
      count: number of draws.
    Raises:
      UserError: the density is not finite at any draw.
    """
    u = proposal.draw(16 * count, rng)
    log_weights = scores(u)[0] - proposal.log_density(u)
    usable = np.isfinite(log_weights)
    u, log_weights = u[usable], log_weights[usable]
    if not len(u):
        raise UserError(NOT_FINITE)
    while diagnostics.effective_sample_size(log_weights) < min(count, len(u)) / 4:
        log_weights = 0.5 * log_weights
    weights = np.exp(log_weights - log_weights.max())
    return u[rng.choice(len(u), count, p=weights / weights.sum())]


def around(draws: np.ndarray, rng: np.random.Generator) -> Mixture:
    """Returns a mixture with components at some of the draws, half as wide as all draws."""
    count = min(8, mixture.largest(draws.shape[1]))
    means = draws[rng.choice(len(draws), count, replace=False)]
    root = 0.5 * mixture.lower(np.cov(draws.T))
    return Mixture(np.full(count, 1.0 / count), means, np.stack([root] * count))


def sampled(
    scores: hmc.Scores,
    draws: np.ndarray,
    proposal: Mixture,
    rng: np.random.Generator,
    deadline: float = np.inf,
    last: float = np.inf,
    patience: float = np.inf,
) -> Sampled:
    """Runs short adaptive chains, and an exact round without adaptation at their end.

    If the chains have not mixed, both are repeated from where they ended, with the leapfrog steps
    that their step sizes need, and with twice as many transitions from one kept state to the next.

    Args:
      scores: function from u [n, dim] to the log density [n] and its gradient [n, dim].
      draws: initial states, [chains, dim].
      proposal: a mixture near the posterior, for jumps between its components.
      rng: source of random numbers.
      deadline: value of `time.monotonic` at which the exact round should end.
      last: value of `time.monotonic` after which chains of nearly the right proportions are not
        continued.
      patience: value of `time.monotonic` after which no chains are continued.
    """
    step_size: float | np.ndarray = 0.3
    jumps = _components(draws, proposal, rng)
    plan, leapfrogs = _planned(scores, draws, deadline), LEAPFROGS
    thinned, most = THINNED
    for _ in range(ATTEMPTS):
        warm, jumps = _adapted(scores, draws, step_size, jumps, plan, leapfrogs, rng)
        root = hmc.root(np.cov(warm.states[::4].reshape(-1, draws.shape[1]).T))
        kept = hmc.run_chains(
            scores, warm.states[-1], root, plan.transitions * thinned, leapfrogs, warm.step_size,
            rng, jumps=jumps,
        )  # fmt: skip
        draws, step_size = kept.states[-1], warm.step_size
        states = np.swapaxes(kept.states[thinned - 1 :: thinned], 0, 1)
        density = kept.log_density[thinned - 1 :: thinned].T
        r_hat = diagnostics.largest_r_hat(states)
        leapfrogs = int(np.clip(LENGTH / np.median(step_size), LEAPFROGS, MOST_LEAPFROGS))
        thinned = min(2 * thinned, most)
        end = time.monotonic() + plan.seconds(1 + thinned, leapfrogs)
        if r_hat < MIXED or end > (last if r_hat < USABLE else patience):
            break
    return _described(scores, states, density, proposal, jumps, r_hat, rng)


def warmed(
    scores: hmc.Scores,
    draws: np.ndarray,
    proposal: Mixture,
    rng: np.random.Generator,
    deadline: float = np.inf,
) -> np.ndarray:
    """Returns states of adaptive chains, [n, dim], which have roughly the posterior's tails.

    Args:
      scores: function from u [n, dim] to the log density [n] and its gradient [n, dim].
      draws: initial states, [chains, dim].
      proposal: a mixture near the posterior, for jumps between its components.
      rng: source of random numbers.
      deadline: value of `time.monotonic` after which no further round begins.
    """
    jumps = _components(draws, proposal, rng)
    plan = _planned(scores, draws, deadline)
    warm, _ = _adapted(scores, draws, 0.3, jumps, plan, LEAPFROGS, rng)
    return warm.states.reshape(-1, draws.shape[1])


def _adapted(scores, draws, step_size, jumps, plan, leapfrogs, rng):
    """Runs adaptive rounds; returns the chains of the last and the mixture fitted to them."""
    for _ in range(ROUNDS):
        draws = _typical(scores, draws, rng)
        root = hmc.root(np.cov(draws.T))
        chains = hmc.run_chains(
            scores, draws, root, plan.transitions, leapfrogs, step_size, rng, adapt=True,
            jumps=jumps,
        )  # fmt: skip
        draws, step_size = chains.states[-1], chains.step_size
        jumps = mixture.fitted(chains.states[::4].reshape(-1, draws.shape[1]), jumps)
        if time.monotonic() > plan.rounds_end:
            break
    return chains, jumps


class _Plan(NamedTuple):
    """Chains for which the time suffices."""

    transitions: int  # in a round
    cost: float  # seconds of an evaluation at all chains
    rounds_end: float  # value of `time.monotonic` after which no further adaptive round begins

    def seconds(self, rounds, leapfrogs):
        """Returns the seconds that rounds take."""
        return rounds * self.transitions * (leapfrogs + 1) * self.cost


def _planned(scores, draws, deadline) -> _Plan:
    """Returns the plan of the adaptive rounds and of the exact one, which ends at the deadline."""
    each = cost.seconds_of(scores, draws)
    one = _Plan(1, each, deadline)
    affordable = (deadline - time.monotonic()) / one.seconds(ROUNDS + THINNED[0], LEAPFROGS)
    plan = one._replace(transitions=int(np.clip(affordable, *TRANSITIONS)))
    return plan._replace(rounds_end=deadline - plan.seconds(THINNED[0], LEAPFROGS))


def _described(scores, states, density, proposal, jumps, r_hat, rng) -> Sampled:
    """Describes the states by a mixture, the evidence, and what the mixture misses.

    The evidence is the mean of two bridges. For each, the mixture is fitted to one half of the
    chains and compared with the states of the other half. Chains that have not mixed visit their
    regions in wrong proportions. R-hat - 1 is about the relative error of such a proportion, so it
    is part of the standard error: with an R-hat of 1.04 the evidence of a funnel was off by 0.067.
    """
    chains, kept, dim = states.shape
    flat = states.reshape(-1, dim)
    halves = np.split(flat, 2)
    pair, near = _closest(flat, halves, proposal, jumps)
    estimates, held_out, closest = [], [], []
    for one, half, at_half in zip(pair, halves[::-1], np.split(density, 2)[::-1], strict=True):
        x = one.draw(len(half), rng)
        at_states = at_half - one.log_density(half).reshape(at_half.shape)
        estimates.append(evidence.bridge(scores(x)[0] - one.log_density(x), at_states))
        held_out.append(at_states)
        likely = mixture.with_likely_tails(one, half)
        closest.append(at_half.mean() - likely.log_density(half).mean())
    log_evidence = evidence.average(estimates)
    log_normaliser = log_evidence.value
    if not np.isfinite(log_evidence.standard_error):
        log_normaliser = float(np.median(density.ravel() - near.log_density(flat)))
    # The divergence of a Gaussian from one with the moments of n draws is d (d + 3) / (4 n) nats on
    # average. One state in four counts as independent of the others.
    excess = dim * (dim + 3.0) / (chains * kept)
    uncovered = np.mean(np.stack(held_out) - log_normaliser > np.log(10.0) + excess)
    divergence = np.mean(closest) - log_normaliser
    if r_hat > EVEN:
        log_evidence = evidence.with_error(log_evidence, r_hat - 1.0)
    return Sampled(
        states, near, log_evidence, log_normaliser, float(uncovered), float(divergence), excess
    )


def _closest(flat, halves, proposal, jumps):
    """Returns the mixture closest to the states, as two fitted to half of them and as one to all.

    The mixture of the jumps is a better description of several modes, and a single component of one
    mode. The Gaussians of the proposal, which Newton's method has found, are better still if the
    posterior is Gaussian and has many dimensions: they have no sampling error.
    """
    found = mixture.weighted(proposal, flat)
    found = found._replace(degrees=mixture.degrees(flat.shape[1]))
    pairs: list[tuple[Mixture | None, list[Mixture]]] = [(None, [found, found])]
    pairs += [(one, [mixture.fitted(h, one) for h in halves]) for one in (jumps, jumps.merged())]

    def held_out(pair):
        return sum(one.log_density(h).mean() for one, h in zip(pair, halves[::-1], strict=True))

    initial, pair = max(pairs, key=lambda candidate: held_out(candidate[1]))
    return pair, found if initial is None else mixture.fitted(flat, initial)


def _components(draws, proposal, rng) -> Mixture:
    """Returns the components of a proposal that have draws, and more at the draws themselves."""
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
    """Returns draws [n, dim], with those of very low density replaced by copies of others."""
    density = scores(draws)[0]
    low, middle, high = np.quantile(density[np.isfinite(density)], [0.25, 0.5, 0.75])
    typical = np.flatnonzero(density > middle - 10.0 - 6.0 * (high - low))
    rows = np.arange(len(draws))
    lost = ~np.isin(rows, typical)
    rows[lost] = rng.choice(typical, lost.sum())
    return draws[rows]
