"""The start of a fit: rough draws of the posterior, and coordinates in which it is standard.

The start provides location, scale, correlation, modes and tails, so that the fit has to learn only
the shape. The stages need no tuning, since none depends on the units of the parameters:

 1. Newton's method from many points, and Gaussians matched to the density's scores (`search`,
    `matching`);
 2. draws of all Gaussians, weighted so that each mode counts by its mass;
 3. a transform that makes heavy tails Gaussian, coordinate by coordinate (`tails`); an improper
    posterior is refused;
 4. short chains of Hamiltonian Monte Carlo, which jump between modes (`hmc`, `mixture`);
 5. a wide random search for modes that no gradient points to; if it finds any, stages 2 and 4 run
    again with them;
 6. the evidence, by a bridge between a mixture and the chains (`evidence`).
"""

import time
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from avb_tf.errors import UserError
from avb_tf.posteriors import hmc, large, matching, mixture, sampling, search
from avb_tf.posteriors import tails as tailing
from avb_tf.posteriors.coordinates import Start
from avb_tf.posteriors.mixture import Mixture
from avb_tf.posteriors.sampling import Sampled
from avb_tf.posteriors.tails import Tails
from avb_tf.posteriors.target import LogDensity, Target

MATCHES = 3  # Gaussians matched from around 0, in addition to those matched from the modes
LARGEST = 200  # most dimensions for a full covariance
LARGEST_OF_ALL = 2000  # most dimensions of a posterior
AGAIN = 2  # most times that the chains run again with the findings of the wide search
LACKING = 0.03  # share of the posterior that the chains may lack
FEWEST = 4  # findings of the wide search from which Newton's method starts, however slow
NEW = 1e-3  # share of the posterior from which a mode that the chains lack is added
WARM_SHARE = 0.3  # share of the start's seconds for chains that show the tails
# Shares of the start's seconds for chains that have not quite mixed, and of all seconds for chains
# that are of no use yet.
PATIENCE = 0.7, 0.5
LOOK_SHARE, LEAST_LOOK_SHARE = 0.6, 0.1  # shares of the start's seconds for the wide search
EVALUATIONS = 3000  # of the density at all chains, that a fit with networks needs
NO_NETWORK = 0.03  # nats of divergence up to which a mixture of the modes found needs no network
LARGE_SECONDS = 120.0  # of a start above LARGEST dimensions, if no seconds are given
LARGE_SHARE = 0.8  # share of the seconds of such a start otherwise; its verdict has the rest
LOOK_POINTS = 2**13  # points of the wide search per training step, if no seconds are given
LOOK_SECONDS = 0.02  # most seconds of the wide search per training step, likewise
LONGER = 4  # times as many points, if the modes found need no network
_RUNS_AWAY = (
    "the fit runs away: the log density does not fall as parameters grow; expected a proper "
    "posterior: look for a parameter without a prior"
)


class Limits(NamedTuple):
    """Seconds that a start may take."""

    seconds: float  # if networks are trained after it
    spare: float  # by which its search may go on if the modes found need no network
    alone: float  # if the density is too slow to train networks


def find(target: Target, seed: int = 0, limits: Limits | None = None, steps: int = 50) -> Start:
    """Finds rough draws of the posterior and coordinates in which it is standard.

    Some densities take a tenth of a second, however few the draws: those with a scan over hundreds
    of rows, such as of a time series. Networks would have too few steps, and the start takes all.

    Args:
      target: the posterior.
      seed: seed of all random numbers.
      limits: time that the start may take, or None.
      steps: number of training steps, which sets the effort of the search without limits.
    Raises:
      UserError: the density is not finite at any point tried, or does not fall as parameters grow,
        or the posterior has more than `LARGEST_OF_ALL` dimensions.
    """
    if target.dim > LARGEST_OF_ALL:
        raise UserError(
            f"the posterior has {target.dim} dimensions; expected {LARGEST_OF_ALL} at most: "
            "integrate some parameters out"
        )
    limits = limits or Limits(0.0, 0.0, 0.0)
    if target.dim > LARGEST:
        return _find_large(target, seed, LARGE_SHARE * limits.alone)
    rng = np.random.default_rng(seed)
    budget = _budget(target, limits)
    tails, sampled = _sampled(target, rng, budget)
    scores = scores_in(target, tails)
    close, now = sampled.divergence < NO_NETWORK, time.monotonic()
    if seconds := budget.seconds:  # at least a little, however long the chains took
        share = max(LEAST_LOOK_SHARE * seconds, min(LOOK_SHARE * seconds, budget.by(0.9) - now))
        until, most = now + share + budget.spare * close, 2**62
    else:
        until, most = now + LOOK_SECONDS * steps, LOOK_POINTS * steps * (LONGER if close else 1)
    look = _looked(target, tails, sampled, until, most, seed)
    lacking, end = 0.0, budget.by(1.0)
    for _ in range(AGAIN):
        wider, lacking = _wider(scores, look, sampled, rng, budget, target.cost)
        if wider is None or time.monotonic() > end + budget.spare:
            break
        draws = sampling.weighed(scores, wider, rng, budget.chains)
        sampled = sampling.sampled(scores, draws, wider, rng, end, end, end)
    else:
        lacking = _wider(scores, look, sampled, rng, budget, target.cost)[1]
    return _standardised(sampled, tails, look.points, lacking)


class _Budget(NamedTuple):
    """What a start may spend; times are values of `time.monotonic`."""

    began: float
    seconds: float  # 0 without a limit
    spare: float  # seconds by which the wide search may go on if the modes need no network
    chained: float  # share of the seconds at which the chains should end
    last: float  # time at which chains that have not quite mixed should end
    patience: float  # time at which chains that are of no use yet should end
    chains: int
    points: int  # points from which Newton's starts are chosen

    def by(self, share):
        """Returns the time at which a share of the seconds is over."""
        return self.began + share * self.seconds if self.seconds else np.inf


def _budget(target, limits) -> _Budget:
    """Returns what the start may spend, given what an evaluation costs."""
    usual, points = sampling.CHAINS[1], search.POINTS[1]
    now, late = time.monotonic(), np.inf
    budget = _Budget(now, limits.seconds, limits.spare, 0.4, late, late, usual, points)
    cost = target.cost
    if EVALUATIONS * cost.of(usual) > limits.alone > 0.0:
        # Fewer draws save time only if they, and not the call, take it. A covariance needs as many
        # chains as there are dimensions.
        few = max(cost.call / (cost.each + 1e-9), target.dim)
        budget = budget._replace(
            seconds=limits.alone,
            spare=0.0,
            chained=0.8,
            chains=2 * round(np.clip(few, *sampling.CHAINS) / 2.0),  # two halves are compared
            points=int(np.clip(few * points / usual, *search.POINTS)),
        )
    last = budget.by(max(PATIENCE[0], budget.chained))
    # Without chains that have mixed, no fit can be trusted.
    return budget._replace(last=last, patience=max(last, now + PATIENCE[1] * limits.alone))


def _standardised(sampled, tails, points, lacking) -> Start:
    """Returns the coordinates in which the chains' states have mean 0 and covariance I."""
    states = sampled.states.reshape(-1, sampled.states.shape[-1])
    mean, scale_tril = states.mean(0), mixture.lower(np.cov(states.T))
    z = np.linalg.solve(scale_tril, (states - mean).T).T
    return Start(
        mean, scale_tril, z, tails, len(sampled.states), sampled.log_evidence, points,
        lacking=lacking, mixture=mixture.weighted(sampled.mixture, states),
    )  # fmt: skip


def _sampled(target, rng, budget) -> tuple[Tails, Sampled]:
    """Returns the tails and the chains in their coordinates.

    Where the density has tails that no Gaussian has, the tails of short chains decide: they are
    heavier than the density's along a line if coordinates depend on each other, and if the
    posterior does not reach an exponential tail, they are light.
    """
    scores = hmc.of_target(target)
    proposal = _gaussians(target, scores, rng, budget)
    draws = sampling.weighed(scores, proposal, rng, budget.chains)
    tails, exponential = _tails(scores, draws, proposal, rng)
    draws, proposal = tails.inverse(draws), _moved(proposal, tails)
    if tails.heavy.any() or exponential.any():
        moved = scores_in(target, tails)
        v = sampling.warmed(moved, draws, proposal, rng, budget.by(WARM_SHARE))
        u = np.asarray(tails.forward(tf.constant(v, target.dtype))[0], np.float64)
        if not np.isfinite(u).all():  # the chains move on a plateau
            raise UserError(_RUNS_AWAY)
        estimate = tailing.estimated(u, tails.heavy, exponential)
        draws = estimate.inverse(u)[rng.choice(len(u), budget.chains)]
        if tails.heavy.any() or estimate.heavy.any():
            tails, proposal = estimate, sampling.around(draws, rng)
    times = budget.by(budget.chained), budget.last, budget.patience
    return tails, sampling.sampled(scores_in(target, tails), draws, proposal, rng, *times)


def scores_in(target: Target, tails: Tails) -> hmc.Scores:
    """Returns the scores of v, where u = tails(v)."""
    if tails.heavy.any():
        return hmc.scores(of_tails(target, tails), target.dim, target.dtype, target.cost.rows)
    return hmc.of_target(target)


def _looked(target, tails, sampled, until, most, seed) -> search.Look:
    """Searches widely around the chains' mixture."""
    log_density = of_tails(target, tails)
    states = sampled.states.reshape(-1, sampled.states.shape[-1])
    return search.look(
        lambda v: log_density(v) - tf.cast(sampled.log_normaliser, target.dtype),
        target.dtype,
        mixture.with_likely_tails(sampled.mixture, states),
        sampled.excess,
        until,
        most,
        target.cost.rows,
        seed,
    )


def _find_large(target, seed, seconds) -> Start:
    """Finds the start of a posterior that is too large for a full covariance.

    The chains start from a Gaussian that is fitted from 0 and from the prior's draws. The evidence
    is unknown, because no mixture of known density comes close enough.
    """
    rng = np.random.default_rng(seed)
    scores = hmc.of_target(target)
    points = np.concatenate([np.zeros([1, target.dim]), target.prior_draws(2, seed)])
    deadline = time.monotonic() + (seconds or LARGE_SECONDS)
    states = large.states(scores, target.dim, points, rng, deadline)
    flat = states.reshape(-1, target.dim)
    mean, scale, directions, stretch = large.fitted(flat, scores(flat)[1])
    z = (flat - mean) / scale
    z += (z @ directions * (1.0 / stretch - 1.0)) @ directions.T
    tails = tailing.light(target.dim)
    return Start(mean, scale, z, tails, len(states), directions=directions, stretch=stretch)


def _gaussians(target, scores, rng, budget) -> Mixture:
    """Returns Gaussians at the modes, and others matched to the density from modes and around 0.

    Raises:
      UserError: there are none, because the density is not finite at any point tried.
    """
    dim, deadline = target.dim, budget.by(0.2)
    prior = target.prior_draws(budget.points // 4, int(rng.integers(2**31)))
    began = time.monotonic()
    points, inside = search.first_points(
        lambda x: scores(x)[0], prior, dim, rng, search.starts(dim), budget.points
    )
    now = time.monotonic()
    each = (now - began) / (budget.points + len(prior))
    affordable = search.affordable(each, deadline - now, dim)
    if affordable < len(points):
        points = points[np.linspace(0, len(points) - 1, affordable).astype(int)]
    maxima = search.climb(scores, points, deadline)
    gaussians = []
    if len(maxima):
        modes = search.modes(scores, maxima)
        gaussians = list(zip(modes.x, modes.roots, strict=True))
    firsts = [(3.0 * rng.normal(size=dim) * (i > 0), np.eye(dim)) for i in range(MATCHES)]
    for mean, root in [*gaussians[:2], *firsts]:
        matched = matching.match(scores, mean, root @ root, rng, deadline=deadline)
        if matched is not None:
            gaussians.append(matched)
    if len(inside) > dim:
        # At the edge of the support, where a maximum may lie, curvature and scores mean little.
        gaussians.append((inside.mean(0), hmc.root(np.atleast_2d(np.cov(inside.T)))))
    if not gaussians:
        raise UserError(sampling.NOT_FINITE)
    return mixture.of_gaussians(gaussians)


def _tails(scores, draws, gaussians, rng) -> tuple[Tails, np.ndarray]:
    """Returns tails as heavy as the density's far out, and which of them are exponential, [2, dim].

    Raises:
      UserError: the density's integral diverges along a coordinate, along the direction in which a
        Gaussian is widest, or in a cone.
    """
    density = scores(draws)[0]
    x = draws[density.argmax()]
    scale = np.subtract(*np.quantile(draws, [0.84, 0.16], axis=0)) / 2.0
    scale = np.maximum(scale, 1e-12 * (1.0 + np.abs(x)))
    profile = tailing.profile(lambda u: scores(u)[0], x, np.diag(scale))
    noise = rng.normal(size=[8, len(x)])
    # Around a pole, the draws' scales do not show where the density falls.
    if all(_diverges(scores, x, s, gaussians, noise) for s in (scale, np.maximum(scale, 1.0))):
        raise UserError(_RUNS_AWAY)
    return tailing.of_profile(profile, np.median(draws, 0), scale), tailing.exponential(profile)


def _diverges(scores, x, scale, gaussians, noise) -> bool:
    """Returns whether the density's integral diverges along a line or in a cone.

    The lines are the coordinates and the direction in which each Gaussian is widest.
    """
    length = np.linalg.norm(scale)
    flat = np.stack([np.linalg.svd(root)[0][:, 0] * length for root in gaussians.roots])
    lines = (np.diag(scale), 1), (flat, 1), (noise * scale, len(x))
    return any(
        tailing.improper(tailing.profile(lambda u: scores(u)[0], x, directions), dim).any()
        for directions, dim in lines
    )


def of_tails(target: Target, tails: Tails) -> LogDensity:
    """Returns the target's log density as a function of v, where u = tails(v)."""

    def log_density(v):
        u, volume = tails.forward(v)
        return target.log_density(u) + volume

    return log_density if tails.heavy.any() else target.log_density


def _moved(proposal: Mixture, tails: Tails) -> Mixture:
    """Returns a mixture of u in the coordinates v, with each component linearised at its mean."""
    if not tails.heavy.any():
        return proposal
    means = tails.inverse(proposal.means)
    roots = proposal.roots / tails.slope(means)[:, :, np.newaxis]
    return proposal._replace(means=means, roots=roots)


def _wider(scores, look, sampled, rng, budget, cost) -> tuple[Mixture | None, float]:
    """Returns the mixture with added components, and the share of the posterior that it lacked.

    Newton's method leads from the points that the wide search found to new modes. A region without
    a mode of its own, such as the tails around a pole, becomes a component as wide as the draws
    from it. The mixture is None if there is nothing to add.
    """
    known = sampled.mixture
    means, roots, lacking = [], [], 0.0
    if len(look.x):
        # The search may go on beyond the start's time. Its findings are then not dropped, unless
        # the density is so slow that the climbs would take long.
        deadline = budget.by(1.0)
        left = max(deadline - time.monotonic(), budget.seconds * LEAST_LOOK_SHARE)
        count = search.affordable(cost.each, left, look.x.shape[1], FEWEST)
        modes = search.modes(scores, search.climb(scores, look.x[:count], deadline))
        mass = search.unseen(
            scores, modes, sampled.log_normaliser, rng, known.log_density, sampled.excess
        )
        fresh = mass > max(NEW, sampled.uncovered)
        means += list(modes.x[fresh])
        roots += [mixture.lower(root @ root) for root in modes.roots[fresh]]
        lacking = mass.sum() / (1.0 + mass.sum()) - sampled.uncovered
    if len(look.where) and look.lacking > LACKING:
        density = scores(look.where)[0] - sampled.log_normaliser
        excess = density - known.log_density(look.where)
        where = look.where[excess > np.log(10.0) + sampled.excess]
        share = look.lacking * len(where) / len(look.where) - sampled.uncovered
        if share > LACKING:
            lacking = max(lacking, share)
            means.append(where.mean(0))
            spread = np.cov(where.T) if len(where) > 1 else np.zeros([where.shape[1]] * 2)
            small = 1e-6 * np.eye(where.shape[1]) * (1.0 + np.trace(np.atleast_2d(spread)))
            roots.append(mixture.lower(np.atleast_2d(spread) + small))
    if not means:
        return None, max(0.0, float(lacking))
    weights = np.full(len(roots), 0.5 / len(roots))
    wider = known._replace(
        weights=np.concatenate([0.5 * known.weights, weights]),
        means=np.concatenate([known.means, means]),
        roots=np.concatenate([known.roots, roots]),
    )
    return wider, max(0.0, float(lacking))
