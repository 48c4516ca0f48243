"""Where the modes of a posterior are: optimisation from many places, and a wide look around.

Newton's method needs no tuning, since its steps do not depend on the units of the parameters: a
posterior ten thousand times narrower than its prior is found as any other.
"""

import time
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from scipy import special

from avb_tf.posteriors import mixture
from avb_tf.posteriors.mixture import Mixture

WIDTHS = (0.5, 2.0, 5.0, 15.0, 50.0)  # standard deviations around 0 of the first points
_POINTS = 4096  # first points in all
_ROWS = 4096  # evaluations of the gradient in an iteration, which limit the starts
_ITERATIONS = 30
_LENGTHS = np.array([1.0, 0.3, 0.1, 0.02, 1e-3, 1e-5])  # of Newton's step
_CLIMBS = np.array([10.0, 1.0, 0.1, 1e-2, 1e-3])  # lengths of a step along the gradient
_MODES = 60
_MASS_DRAWS = 256  # for the mass of a mode
_LOOK = 2**15  # points in a batch of the wide look
_SEEN = 64  # points of a look, those that exceed the mixture most
_COMPARED = 256  # of them with the mixture, the densest for their distance
REACH = 12.0  # standard deviations of its widest points, roughly


class Modes(NamedTuple):
    """Local maxima, the one of the largest mass by Laplace's approximation first."""

    x: np.ndarray  # [modes, dim]
    roots: np.ndarray  # [modes, dim, dim], symmetric, of the covariances there
    log_mass: np.ndarray  # [modes], in nats


def first_points(log_density, prior: np.ndarray, dim: int, rng, count: int) -> np.ndarray:
    """Starts of the optimisation, [at most count, dim]: 0, the best of many points, and others.

    The points are of several widths around 0 and the prior's draws. The best are taken at several
    temperatures: the cold ones are near the highest modes, the hot ones anywhere.
    """
    each = _POINTS // len(WIDTHS)
    wide = [width * rng.normal(size=[each, dim]) for width in WIDTHS]
    points = np.concatenate([*wide, prior])
    density = log_density(points)
    usable = np.isfinite(density)
    points, density = points[usable], density[usable]
    if not len(points):
        return np.zeros([1, dim])
    share = max(1, (count - 1) // 4)
    rows = []
    for temperature in (1.0, 10.0, 100.0, np.inf):
        # Gumbel noise: draws without replacement in proportion to density^(1 / temperature).
        rows += list(np.argsort(-density / temperature - rng.gumbel(size=len(density)))[:share])
    return np.concatenate([np.zeros([1, dim]), points[list(dict.fromkeys(rows))]])


def starts(dim: int) -> int:
    """How many places to optimise from."""
    return int(np.clip(_ROWS // dim, 8, 256))


def climb(scores, x: np.ndarray, deadline: float = np.inf) -> np.ndarray:
    """Newton's method from all of x [n, dim] at once, to local maxima, [n, dim].

    The step is along the Newton direction, with the curvature's absolute values, or along the
    gradient, whichever length of either is highest.
    """
    density, score = scores(x)
    usable = np.isfinite(density) & np.isfinite(score).all(1)
    x, density, score = x[usable], density[usable], score[usable]
    size = np.full(x.shape, 1e-2)  # of the difference for the Hessian, by coordinate
    active = np.ones(len(x), bool)
    for _ in range(_ITERATIONS):
        if not active.any() or time.monotonic() > deadline:
            break
        roots = _roots(_hessians(scores, x[active], score[active], size[active]))
        newton = np.einsum("nij,nkj,nk->ni", roots, roots, score[active])
        deviations = np.linalg.norm(roots, axis=2)
        size[active] = np.clip(0.1 * deviations, 1e-6, 1e3)
        norm = np.linalg.norm(score[active], axis=1, keepdims=True)
        ascent = score[active] / np.maximum(norm, 1e-300)
        moves = np.concatenate(
            [_LENGTHS[:, np.newaxis, np.newaxis] * newton,
             _CLIMBS[:, np.newaxis, np.newaxis] * ascent]
        )  # fmt: skip
        trials = x[active] + moves
        flat_density, flat_score = scores(trials.reshape(-1, x.shape[1]))
        bad = ~np.isfinite(flat_density) | ~np.isfinite(flat_score).all(1)
        trial_density = np.where(bad, -np.inf, flat_density).reshape(len(moves), -1)
        best = trial_density.argmax(0)
        rows = np.arange(len(best))
        gain = trial_density[best, rows] - density[active]
        better = gain > 0
        where = np.flatnonzero(active)
        moved = where[better]
        x[moved] = trials[best, rows][better]
        density[moved] = trial_density[best, rows][better]
        score[moved] = flat_score.reshape(trials.shape)[best, rows][better]
        active[where[gain < 1e-3]] = False
    return x


def _hessians(scores, x, score, size):
    """Of the log density at x [n, dim], [n, dim, dim], by differences of the gradient."""
    count, dim = x.shape
    moved = x[:, np.newaxis] + size[:, :, np.newaxis] * np.eye(dim)
    other = scores(moved.reshape(-1, dim))[1].reshape(count, dim, dim)
    hessian = (other - score[:, np.newaxis]) / size[:, :, np.newaxis]
    hessian = np.nan_to_num(0.5 * (hessian + np.swapaxes(hessian, 1, 2)), posinf=0.0, neginf=0.0)
    return np.clip(hessian, -1e30, 1e30)


def _roots(hessians):
    """R with R R^T the inverse of the absolute curvature, [n, dim, dim].

    Scaled by the diagonal first, or rounding would take the units of parameters for a flat
    direction.
    """
    diagonal = np.abs(np.einsum("nii->ni", hessians))
    largest = np.maximum(diagonal.max(1, keepdims=True), 1e-12)
    units = 1.0 / np.sqrt(np.maximum(diagonal, 1e-14 * largest))
    values, vectors = np.linalg.eigh(-units[:, :, np.newaxis] * hessians * units[:, np.newaxis])
    values = np.abs(values)
    values = np.maximum(values, 1e-8 * values.max(1, keepdims=True) + 1e-12)
    return units[:, :, np.newaxis] * vectors / np.sqrt(values)[:, np.newaxis]


def modes(scores, x: np.ndarray) -> Modes:
    """The distinct ones among local maxima x [n, dim], with Laplace's approximation at each.

    Two are one mode if the second is within half a standard deviation a dimension of the first.
    """
    density, score = scores(x)
    dim = x.shape[1]
    kept: list[int] = []
    roots, masses, precisions = [], [], []
    for i in np.argsort(-density):
        away = [x[i] - x[j] for j in kept]
        if any(d @ p @ d < 0.25 * dim for d, p in zip(away, precisions, strict=True)):
            continue
        precision, root = _laplace(scores, x[i], score[i])
        volume = np.linalg.slogdet(root)[1] + 0.5 * dim * np.log(2.0 * np.pi)
        kept.append(int(i))
        roots.append(root)
        precisions.append(precision)
        masses.append(density[i] + volume)
        if len(kept) == 4 * _MODES:
            break
    order = np.argsort(masses)[::-1][:_MODES]
    return Modes(
        np.stack([x[kept[k]] for k in order]),
        np.stack([roots[k] for k in order]),
        np.array(masses)[order],
    )


def _laplace(scores, x, score):
    """Precision and root of the covariance at a mode, by two rounds of differences."""
    size = np.full([1, len(x)], 1e-2)
    for _ in range(2):
        root = _roots(_hessians(scores, x[np.newaxis], score[np.newaxis], size))[0]
        size = np.clip(0.3 * np.linalg.norm(root, axis=1), 1e-7, 1e3)[np.newaxis]
    inverse = np.linalg.inv(root)
    values, vectors = np.linalg.eigh(root @ root.T)
    return inverse.T @ inverse, (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


def masses(scores, modes: Modes, log_normaliser: float, rng) -> np.ndarray:
    """The share of the posterior at each mode, [modes], by importance sampling.

    Laplace's approximation is far off at a pole, such as the neck of a hierarchical model.

    Args:
      scores: as of `climb`.
      modes: as `modes` returns them.
      log_normaliser: of the log density, in nats.
      rng: of the draws.
    """
    shares = []
    for mode, root in zip(modes.x, modes.roots, strict=True):
        near = mixture.of_gaussians([(mode, root)], mixture.DEGREES)
        x = near.draw(_MASS_DRAWS, rng)
        log_weights = scores(x)[0] - near.log_density(x) - log_normaliser
        shares.append(np.exp(np.minimum(np.nan_to_num(log_weights, nan=-np.inf), 50.0)).mean())
    return np.array(shares)


class Look(NamedTuple):
    """What a wide look saw.

    Attributes:
      x: [n, dim], points that exceed the mixture, those that do most first.
      points: that were looked at.
      lacking: share of the posterior where the mixture has less than a tenth of its density, from
        below: each batch counts its densest points alone.
      where: [n, dim], draws of that share.
    """

    x: np.ndarray
    points: int
    lacking: float
    where: np.ndarray


def look(log_density, dtype, known: Mixture, deadline: float, most: int, seed: int) -> Look:
    """Points around a mixture where the density is higher than it says.

    A mode of less than a thousandth of the space shows in no gradient: only points that fall on it
    do. They are drawn, compared and forgotten in one graph.

    Args:
      log_density: [n, dim] -> [n], normalised by `known`'s estimate of the evidence.
      dtype: of its argument.
      known: a mixture near what is known of the posterior.
      deadline: of `time.monotonic`.
      most: points, at most.
      seed: of the points.
    """
    dim = known.means.shape[1]
    mean = known.weights @ known.means
    spread = known.means - mean
    covariance = np.einsum("k,kij->ij", known.weights, known.roots @ np.swapaxes(known.roots, 1, 2))
    covariance += np.einsum("k,ki,kj->ij", known.weights, spread, spread)
    root = np.linalg.cholesky(covariance + 1e-12 * np.trace(covariance) * np.eye(dim) / dim)
    inverses = np.linalg.inv(known.roots)
    log_scales = np.log(known.weights) + np.linalg.slogdet(inverses)[1] + known.log_peak
    white = inverses.reshape(-1, dim).T  # x @ white, less its value at the means, is standardised
    offsets = np.einsum("kij,kj->ki", inverses, known.means)

    widest = max(2.0, REACH / np.sqrt(dim))

    @tf.function(autograph=False)
    def batch(seed):
        noise = tf.random.stateless_normal([_LOOK, dim], seed)
        noise *= tf.random.stateless_uniform([_LOOK, 1], seed + 1, 1.0, widest)
        x = tf.constant(mean, dtype) + tf.matmul(tf.cast(noise, dtype), tf.constant(root.T, dtype))
        density = tf.cast(log_density(x), dtype)
        density = tf.where(tf.math.is_finite(density), density, -np.inf)
        # Only the densest points for their distance are worth a look at all components.
        distance = tf.cast(tf.math.log1p(0.5 * tf.reduce_sum(noise**2, -1)), dtype)
        rows = tf.math.top_k(density + 0.5 * (dim + 3.0) * distance, _COMPARED, sorted=False)[1]
        x, density = tf.gather(x, rows), tf.gather(density, rows)
        y = tf.reshape(tf.matmul(x, tf.constant(white, dtype)), [_COMPARED, -1, dim])
        squares = tf.reduce_sum((y - tf.constant(offsets, dtype)) ** 2, -1)
        kernels = tf.math.log1p(squares / (known.degrees - 2.0))
        kernels = tf.constant(log_scales, dtype) - 0.5 * (known.degrees + dim) * kernels
        excess = density - tf.reduce_logsumexp(kernels, -1)
        radius = tf.norm(tf.gather(noise, rows), axis=-1)
        return x, excess, density, radius

    log_wide = _log_wide(dim, widest)
    volume = np.linalg.slogdet(root)[1]
    seen, weights, where, points = [], [], [], 0
    while points < most and time.monotonic() < deadline:
        parts = batch(tf.constant([seed, points // _LOOK], tf.int32))
        x, excess, density, radius = (np.asarray(part, np.float64) for part in parts)
        points += _LOOK
        row = excess.argmax()
        if excess[row] > np.log(3.0):
            seen.append((excess[row], x[row]))
        unseen = excess > np.log(10.0)
        weights.append(np.exp(density[unseen] - log_wide(radius[unseen]) + volume))
        where.append(x[unseen])
    seen.sort(key=lambda pair: -pair[0])
    highest = np.reshape([x for _, x in seen[:_SEEN]], [-1, dim])
    mass = np.concatenate([[0.0], *weights])
    lacking = mass.sum() / max(1, points)
    draws = np.zeros([0, dim])
    # A share that rests on a few points is no more than a place to look at.
    if lacking > 0 and mass.sum() ** 2 / (mass**2).sum() > 20.0:
        rng = np.random.default_rng(seed)
        rows = rng.choice(len(mass) - 1, _SEEN, p=mass[1:] / mass.sum())
        draws = np.concatenate(where)[rows]
    return Look(highest, points, float(lacking / (1.0 + lacking)), draws)


def _log_wide(dim, widest):
    """Log density by radius of the look's points, in standard coordinates, as a function."""
    radii = np.linspace(0.0, 10.0 * widest * np.sqrt(dim), 4000)
    widths = np.linspace(1.0, widest, 400)
    each = -0.5 * (radii[:, np.newaxis] / widths) ** 2 - dim * np.log(widths)
    table = special.logsumexp(each, axis=1) - np.log(len(widths))
    table -= 0.5 * dim * np.log(2.0 * np.pi)
    return lambda radius: np.interp(radius, radii, table)
