"""Where a fit starts: rough draws of the posterior, and coordinates in which it is standard.

A fit learns shape; location, scale, correlation, modes and tails it is given. They come from stages
that need no tuning, since none depends on the units of the parameters:

 1. Newton's method from many points, and Gaussians matched to the density's scores (`search`,
    `matching`);
 2. draws of all Gaussians, weighed so that each mode counts by its mass;
 3. heavy tails are made Gaussian, coordinate by coordinate (`tails`), and an improper posterior is
    refused;
 4. short chains of Hamiltonian Monte Carlo, which jump between modes (`hmc`, `mixture`);
 5. a wide look for modes that no gradient points to; with what it sees, 2 to 4 are done again;
 6. the evidence, by a bridge from the mixture to the chains (`evidence`).
"""

import time
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from avb_tf import diagnostics
from avb_tf.errors import UserError
from avb_tf.posteriors import evidence, hmc, large, matching, mixture, search
from avb_tf.posteriors import tails as tailing
from avb_tf.posteriors.evidence import Estimate
from avb_tf.posteriors.mixture import Mixture
from avb_tf.posteriors.tails import Tails
from avb_tf.posteriors.target import Target

MATCHES = 3  # Gaussians from around 0, beside those from the modes
CHAINS = 256
LARGEST = 200  # dimensions of a covariance in full
LARGEST_OF_ALL = 2000  # dimensions
ROUNDS = 5  # of the chains, with the covariance of all taken anew after each
TRANSITIONS = 16  # in a round
LEAPFROGS = 6  # in a transition
KEPT = 16  # states of each chain, of the exact round at the end
THINNED = 2  # transitions from one kept state to the next
AGAIN = 2  # times that the chains run with what a look saw, at most
LACKING = 0.03  # share of the posterior that the chains may lack
LOOK_SHARE = 0.6  # of the start's seconds, spent on the wide look
LARGE_SECONDS = 120.0  # of a start above LARGEST dimensions, where no seconds are given
LOOK_POINTS = 2**13  # of the wide look for each step of training, where no seconds are given
LOOK_SECONDS = 0.02  # that it may take for each of them
_RUNS_AWAY = (
    "the fit runs away: the log density does not fall as parameters grow; expected a proper "
    "posterior: look for a parameter without a prior"
)
_NOT_FINITE = (
    "the log density is not finite wherever the fit started; expected a finite number near 0 in "
    "unconstrained space: check the model at a plausible value of its parameters"
)


class Start(NamedTuple):
    """Coordinates in which a posterior is standard, and chains that have been in its modes.

        u, volume = start.place(z)  # parameters before the constraint, and log |du / dz|

    u = tails(mean + scale @ z) has z of mean 0 and covariance I. The scale is a triangle up to
    `LARGEST` dimensions; above, it is diagonal, after a stretch along a few directions.
    """

    mean: np.ndarray  # [dim]
    scale_tril: np.ndarray  # [dim, dim], lower triangular; or [dim], a diagonal
    z: np.ndarray  # [chains * kept, dim], the chains' states standardised, chain after chain
    tails: Tails
    chains: int
    log_evidence: Estimate = evidence.UNKNOWN
    points: int = 0  # that were looked at for further modes
    directions: np.ndarray = np.zeros([0, 0])  # [dim, rank], orthonormal
    stretch: np.ndarray = np.zeros(0)  # [rank], standard deviations along them, before the scale
    lacking: float = 0.0  # share of the posterior that was seen, and that the chains lack

    @property
    def deviations(self) -> np.ndarray:
        """Standard deviations of v before the tails, [dim]."""
        if self.scale_tril.ndim == 2:
            return np.linalg.norm(self.scale_tril, axis=1)
        return self.scale_tril * np.sqrt(1.0 + self.directions**2 @ (self.stretch**2 - 1.0))

    def place(self, z, dtype):
        """u and log |du / dz| in nats for z [n, dim], by TensorFlow in `dtype`.

        In the model's precision: far from 0 float32 has few digits left.
        """
        mean, factor = (tf.constant(v, dtype) for v in (self.mean, self.scale_tril))
        z = tf.cast(z, dtype)
        if self.scale_tril.ndim == 2:
            v = mean + tf.linalg.matvec(factor, z)
            volume = np.log(np.abs(np.diag(self.scale_tril))).sum()
        else:
            directions = tf.constant(self.directions, dtype)
            along = tf.matmul(z, directions) * tf.constant(self.stretch - 1.0, dtype)
            v = mean + factor * (z + tf.matmul(along, directions, transpose_b=True))
            volume = np.log(self.scale_tril).sum() + np.log(self.stretch).sum()
        u, of_tails = self.tails.forward(v)
        return u, of_tails + float(volume)

    def save(self, path) -> None:
        """Writes a `.npz` file, for `load`; nothing in it is pickled."""
        np.savez(
            path,
            mean=self.mean,
            scale_tril=self.scale_tril,
            z=self.z.astype(np.float32),
            directions=self.directions,
            stretch=self.stretch,
            tails=np.vstack([self.tails.location, self.tails.scale, self.tails.weight]),
            numbers=[self.chains, *self.log_evidence, self.points, self.lacking],
        )


def load(path) -> Start:
    """A start as `Start.save` wrote it."""
    with np.load(path, allow_pickle=False) as file:
        location, scale, *weight = file["tails"]
        chains, value, error, points, lacking = file["numbers"].tolist()
        return Start(
            file["mean"],
            file["scale_tril"],
            file["z"].astype(np.float64),
            Tails(location, scale, np.stack(weight)),
            int(chains),
            Estimate(value, error),
            int(points),
            file["directions"],
            file["stretch"],
            lacking,
        )


def of_record(record: dict) -> Start:
    """A start as versions before `Start.save` wrote it into JSON, with 4 states of each chain."""
    mean, scale_tril, z = (np.array(record[name]) for name in ("mean", "scale_tril", "z"))
    z = np.swapaxes(z.reshape(4, -1, len(mean)), 0, 1).reshape(-1, len(mean))
    return Start(mean, scale_tril, z, tailing.light(len(mean)), len(z) // 4)


class Sampled(NamedTuple):
    """States of chains after an exact round, and what their density is like."""

    states: np.ndarray  # [chains, kept, dim]
    mixture: Mixture
    log_evidence: Estimate
    log_normaliser: float  # the evidence, roughly, where that is unknown


def find(
    target: Target, seed: int = 0, seconds: float | None = None, steps: int = 50
) -> Start:
    """Rough draws of the posterior, in `seconds`, or else at the expense of `steps` of training.

    Raises:
      UserError: a density that is finite nowhere near, or does not fall as parameters grow, or is
        of more than `LARGEST_OF_ALL` dimensions.
    """
    if target.dim > LARGEST_OF_ALL:
        raise UserError(
            f"the posterior has {target.dim} dimensions; expected {LARGEST_OF_ALL} at most: "
            "integrate some parameters out"
        )
    if target.dim > LARGEST:
        return _find_large(target, seed, seconds)
    rng = np.random.default_rng(seed)
    began = time.monotonic()

    def by(share):
        return began + share * seconds if seconds else np.inf

    scores = hmc.scores(target.log_density, target.dtype)
    gaussians = _gaussians(target, scores, rng, by(0.2))
    draws = _weighed(scores, gaussians, rng)
    tails = _tails(scores, draws, gaussians, rng)
    log_density = of_tails(target, tails)
    moved = hmc.scores(log_density, target.dtype) if tails.heavy.any() else scores
    sampled = _sampled(moved, tails.inverse(draws), _moved(gaussians, tails), rng, by(0.3))
    if tails.heavy.any():
        tails, draws = _estimated(tails, sampled, target.dtype, rng)
        log_density = of_tails(target, tails)
        moved = hmc.scores(log_density, target.dtype)
        sampled = _sampled(moved, draws, _around(draws, rng), rng, by(0.4))
    look = search.look(
        lambda v: log_density(v) - tf.cast(sampled.log_normaliser, target.dtype),
        target.dtype,
        sampled.mixture,
        time.monotonic() + (LOOK_SHARE * seconds if seconds else LOOK_SECONDS * steps),
        2**62 if seconds else LOOK_POINTS * steps,
        seed,
    )
    lacking = 0.0
    for _ in range(AGAIN):
        wider, lacking = _wider(moved, look, sampled, rng)
        if wider is None:
            break
        sampled = _sampled(moved, _weighed(moved, wider, rng), wider, rng, by(1.2))
        lacking = _wider(moved, look, sampled, rng)[1]
    states = sampled.states.reshape(-1, target.dim)
    mean, scale_tril = states.mean(0), mixture.lower(np.cov(states.T))
    z = np.linalg.solve(scale_tril, (states - mean).T).T
    chains = len(sampled.states)
    return Start(
        mean, scale_tril, z, tails, chains, sampled.log_evidence, look.points, lacking=lacking
    )


def _find_large(target, seed, seconds) -> Start:
    """The start where a covariance in full is out of reach; modes are sought from 0 and the prior.

    The evidence is unknown: no mixture of known density comes close enough.
    """
    rng = np.random.default_rng(seed)
    scores = hmc.scores(target.log_density, target.dtype)
    points = np.concatenate([np.zeros([1, target.dim]), target.prior_draws(2, seed)])
    deadline = time.monotonic() + (seconds or LARGE_SECONDS)
    states = large.states(scores, target.dim, points, rng, deadline)
    flat = states.reshape(-1, target.dim)
    mean, scale = flat.mean(0), flat.std(0)
    z = (flat - mean) / scale
    directions, stretch = large.directions(z)
    scale = scale / np.sqrt(1.0 + directions**2 @ (stretch**2 - 1.0))
    z = (flat - mean) / scale
    z += (z @ directions * (1.0 / stretch - 1.0)) @ directions.T
    tails = tailing.light(target.dim)
    return Start(mean, scale, z, tails, len(states), directions=directions, stretch=stretch)


def _gaussians(target, scores, rng, deadline) -> Mixture:
    """Gaussians at the modes, and matched to the density from there and from around 0.

    Raises:
      UserError: there is none, for the density is finite nowhere near.
    """
    dim, count = target.dim, search.starts(target.dim)
    prior = target.prior_draws(1024, int(rng.integers(2**31)))
    points = search.first_points(lambda x: scores(x)[0], prior, dim, rng, count)
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
    if not gaussians:
        raise UserError(_NOT_FINITE)
    return mixture.of_gaussians(gaussians)


def _weighed(scores, proposal: Mixture, rng) -> np.ndarray:
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
        raise UserError(_NOT_FINITE)
    while diagnostics.effective_sample_size(log_weights) < min(CHAINS, len(u)) / 4:
        log_weights = 0.5 * log_weights
    weights = np.exp(log_weights - log_weights.max())
    return u[rng.choice(len(u), CHAINS, p=weights / weights.sum())]


def _tails(scores, draws, gaussians, rng) -> Tails:
    """How heavy the density is far out along each coordinate.

    Raises:
      UserError: its integral diverges there, or along what the draws vary in most.
    """
    density = scores(draws)[0]
    x = draws[density.argmax()]
    scale = np.subtract(*np.quantile(draws, [0.84, 0.16], axis=0)) / 2.0
    scale = np.maximum(scale, 1e-12 * (1.0 + np.abs(x)))
    slopes = tailing.slopes(lambda u: scores(u)[0], x, np.diag(scale))
    noise = rng.normal(size=[8, len(x)])
    # Around a pole the draws' scales say nothing of where the density falls.
    if all(_diverges(scores, x, s, gaussians, noise) for s in (scale, np.maximum(scale, 1.0))):
        raise UserError(_RUNS_AWAY)
    return tailing.of_slopes(slopes, np.median(draws, 0), scale)


def _diverges(scores, x, scale, gaussians, noise) -> bool:
    """Whether the integral does: along a coordinate, a flat direction that is none, or in a cone."""
    length = np.linalg.norm(scale)
    flat = np.stack([np.linalg.svd(root)[0][:, 0] * length for root in gaussians.roots])
    lines = (np.diag(scale), 1), (flat, 1), (noise * scale, len(x))
    return any(
        tailing.improper(tailing.slopes(lambda u: scores(u)[0], x, directions), dim).any()
        for directions, dim in lines
    )


def of_tails(target, tails):
    """The target's log density as a function of v, u = tails(v)."""

    def log_density(v):
        u, volume = tails.forward(v)
        return target.log_density(u) + volume

    return log_density if tails.heavy.any() else target.log_density


def _moved(proposal: Mixture, tails: Tails) -> Mixture:
    """The components of a mixture of u, at their means in v."""
    if not tails.heavy.any():
        return proposal
    step = 1e-3 * tails.scale
    slope = (tails.inverse(proposal.means + step) - tails.inverse(proposal.means - step)) / (
        2.0 * step
    )
    roots = slope[:, :, np.newaxis] * proposal.roots
    return proposal._replace(means=tails.inverse(proposal.means), roots=roots)


def _estimated(tails, sampled, dtype, rng):
    """Tails as heavy as those of the chains' states, and draws in their coordinates."""
    v = sampled.states.reshape(-1, sampled.states.shape[-1])
    u = np.asarray(tails.forward(tf.constant(v, dtype))[0], np.float64)
    estimate = tailing.estimated(u)
    weight = np.where(tails.heavy, np.maximum(estimate.weight, tails.weight), 0.0)
    tails = tailing.of_weights(weight, estimate.location, estimate.scale)
    draws = tails.inverse(u)
    return tails, draws[rng.choice(len(draws), CHAINS)]


def _around(draws, rng) -> Mixture:
    """Components at some of the draws, half as wide as all together."""
    count = min(8, mixture.largest(draws.shape[1]))
    means = draws[rng.choice(len(draws), count, replace=False)]
    root = 0.5 * mixture.lower(np.cov(draws.T))
    return Mixture(np.full(count, 1.0 / count), means, np.stack([root] * count))


def _sampled(scores, draws, proposal: Mixture, rng, deadline) -> Sampled:
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
    more = _around(draws, rng)
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


def _wider(scores, look, sampled, rng) -> tuple[Mixture | None, float]:
    """The mixture with what a look saw beside it, if anything; and the share that it lacks.

    New modes are those that Newton's method reaches from the points seen. What is no mode of its
    own, such as tails around a pole, becomes a component as wide as its draws.
    """
    known = sampled.mixture
    means, roots, lacking = [], [], 0.0
    if len(look.x):
        modes = search.modes(scores, search.climb(scores, look.x))
        excess = scores(modes.x)[0] - sampled.log_normaliser - known.log_density(modes.x)
        mass = np.exp(np.minimum(modes.log_mass - sampled.log_normaliser, 50.0))
        fresh = (excess > np.log(3.0)) & (mass > 1e-3)
        means += list(modes.x[fresh])
        roots += [mixture.lower(root @ root) for root in modes.roots[fresh]]
        lacking = mass[fresh].sum() / (1.0 + mass[fresh].sum())
    if len(look.where) and look.lacking > LACKING:
        density = scores(look.where)[0] - sampled.log_normaliser
        unseen = look.where[density - known.log_density(look.where) > np.log(10.0)]
        share = look.lacking * len(unseen) / len(look.where)
        if share > LACKING:
            lacking = max(lacking, share)
            means.append(unseen.mean(0))
            spread = np.cov(unseen.T) if len(unseen) > 1 else np.zeros([unseen.shape[1]] * 2)
            small = 1e-6 * np.eye(unseen.shape[1]) * (1.0 + np.trace(np.atleast_2d(spread)))
            roots.append(mixture.lower(np.atleast_2d(spread) + small))
    if not means:
        return None, lacking
    weights = np.full(len(roots), 0.5 / len(roots))
    return Mixture(
        np.concatenate([0.5 * known.weights, weights]),
        np.concatenate([known.means, means]),
        np.concatenate([known.roots, roots]),
    ), float(lacking)
