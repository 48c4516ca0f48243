"""Search for the modes of a posterior: optimisation from many points, and a wide random search.

Newton's method needs no tuning, since its steps do not depend on the units of the parameters. It
finds a posterior ten thousand times narrower than its prior as easily as any other.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from scipy import special

from avb_tf.posteriors import mixture
from avb_tf.posteriors.hmc import Scores
from avb_tf.posteriors.mixture import Mixture
from avb_tf.posteriors.target import LogDensity

WIDTHS = (0.5, 2.0, 5.0, 15.0, 50.0)  # standard deviations of the first points around 0
POINTS = 512, 4096  # fewest and most first points of all widths together
_ROWS = 4096  # evaluations of the gradient in an iteration, which limit the number of starts
_LEAST, _ITERATIONS = 8, 30  # fewest and most iterations of Newton's method
_LENGTHS = np.array([1.0, 0.3, 0.1, 0.02, 1e-3, 1e-5])  # relative lengths of Newton's step
_CLIMBS = np.array([10.0, 1.0, 0.1, 1e-2, 1e-3])  # lengths of a step along the gradient
_FAR = 1e12  # largest standard deviation at a mode: a plateau has any
_MODES = 60  # most modes returned
_MASS_DRAWS = 256  # draws that estimate the mass of a mode
_LARGEST_WEIGHT = 50.0  # nats: limits the weight of a point if the evidence is far off
_SEEN = 64  # most points returned, those that exceed the mixture most
_COMPARED = 256  # points of a batch compared with the mixture, the densest for their distance
REACH = 12.0  # radius that the widest points reach, roughly, in standard deviations


class Modes(NamedTuple):
    """Local maxima in descending order of their mass by Laplace's approximation."""

    x: np.ndarray  # [modes, dim]
    roots: np.ndarray  # [modes, dim, dim], symmetric roots of the covariances at the modes
    log_mass: np.ndarray  # [modes], in nats


def first_points(
    log_density: Callable[[np.ndarray], np.ndarray],
    prior: np.ndarray,
    dim: int,
    rng: np.random.Generator,
    count: int,
    candidates: int = POINTS[1],
) -> tuple[np.ndarray, np.ndarray]:
    """Returns starts of the optimisation, [at most count, dim]: 0, and good points of many.

    Candidates are normal draws of several widths around 0, and the prior's draws. They are chosen
    at several temperatures: at low ones near the highest modes, at high ones anywhere.

    The second value has those of the lowest temperature, [n, dim], if the density is not finite at
    some candidates; otherwise it is empty.

    Args:
      log_density: function from x [n, dim] to the log density [n] in nats.
      prior: draws of the prior, [m, dim].
      dim: dimensions of x.
      rng: source of random numbers.
      count: largest number of starts.
      candidates: points of all widths together, from which the starts are chosen.
    """
    each = candidates // len(WIDTHS)
    wide = [width * rng.normal(size=[each, dim]) for width in WIDTHS]
    points = np.concatenate([*wide, prior])
    density = log_density(points)
    usable = np.isfinite(density)
    points, density = points[usable], density[usable]
    if not len(points):
        return np.zeros([1, dim]), points
    share = max(1, (count - 1) // 4)
    rows = []
    for temperature in (1.0, 10.0, 100.0, np.inf):
        # Gumbel noise draws without replacement in proportion to density^(1 / temperature).
        rows += list(np.argsort(-density / temperature - rng.gumbel(size=len(density)))[:share])
    starts = np.concatenate([np.zeros([1, dim]), points[list(dict.fromkeys(rows))]])
    return starts, points[[] if usable.all() else rows[:share]]


def starts(dim: int) -> int:
    """Returns the number of points from which to optimise."""
    return int(np.clip(_ROWS // dim, 8, 256))


def affordable(each: float, seconds: float, dim: int, least: int = 8) -> int:
    """Returns the number of points from which the first iterations of `climb` end in time.

    Args:
      each: seconds that the gradient at a point takes.
      seconds: seconds that are left; infinity without a limit.
      dim: dimensions of x.
      least: fewest points, though the time is over.
    """
    evaluations = _LEAST * (dim + len(_LENGTHS) + len(_CLIMBS))  # for each point
    return int(np.clip(seconds / (each * evaluations + 1e-9), least, starts(dim)))


def climb(scores: Scores, x: np.ndarray, deadline: float = np.inf) -> np.ndarray:
    """Climbs from all points at once to local maxima by Newton's method.

    Each iteration tries several lengths of a step along the Newton direction, which uses the
    absolute values of the curvature, and along the gradient, and takes the highest point.

    Args:
      scores: function from x [n, dim] to the log density [n] and its gradient [n, dim].
      x: first points, [n, dim].
      deadline: value of `time.monotonic` after which no further iteration begins but the first 8.
    Returns:
      The last points, [at most n, dim]; first points where the density is not finite are left out.
    """
    density, score = scores(x)
    usable = np.isfinite(density) & np.isfinite(score).all(1)
    x, density, score = x[usable], density[usable], score[usable]
    size = np.full(x.shape, 1e-2)  # step of the finite differences, by coordinate
    active = np.ones(len(x), bool)
    for iteration in range(_ITERATIONS):
        if not active.any() or (iteration >= _LEAST and time.monotonic() > deadline):
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
    """Returns Hessians of the log density at x, [n, dim, dim], by differences of the gradient."""
    count, dim = x.shape
    moved = x[:, np.newaxis] + size[:, :, np.newaxis] * np.eye(dim)
    other = scores(moved.reshape(-1, dim))[1].reshape(count, dim, dim)
    hessian = (other - score[:, np.newaxis]) / size[:, :, np.newaxis]
    hessian = np.nan_to_num(0.5 * (hessian + np.swapaxes(hessian, 1, 2)), posinf=0.0, neginf=0.0)
    return np.clip(hessian, -1e30, 1e30)


def _roots(hessians):
    """Returns R, [n, dim, dim], where R R^T is the inverse of the absolute curvature.

    The Hessians are first scaled by their diagonals. Otherwise, parameters of very different units
    would look like flat directions because of rounding.
    """
    diagonal = np.abs(np.einsum("nii->ni", hessians))
    largest = np.maximum(diagonal.max(1, keepdims=True), 1e-12)
    units = 1.0 / np.sqrt(np.maximum(diagonal, 1e-14 * largest))
    values, vectors = np.linalg.eigh(-units[:, :, np.newaxis] * hessians * units[:, np.newaxis])
    values = np.abs(values)
    values = np.maximum(values, 1e-8 * values.max(1, keepdims=True) + 1e-12)
    return units[:, :, np.newaxis] * vectors / np.sqrt(values)[:, np.newaxis]


def modes(scores: Scores, x: np.ndarray) -> Modes:
    """Returns the distinct modes among local maxima x [n, dim], with Laplace's approximations.

    Two maxima count as one mode if their Mahalanobis distance is less than sqrt(dim) / 2.
    """
    density, score = scores(x)
    dim = x.shape[1]
    precisions, roots = _laplace(scores, x, score)
    log_mass = density + np.linalg.slogdet(roots)[1] + 0.5 * dim * np.log(2.0 * np.pi)
    kept: list[int] = []
    for i in np.argsort(-density):
        away = x[i] - x[kept]
        if not (np.einsum("ni,nij,nj->n", away, precisions[kept], away) < 0.25 * dim).any():
            kept.append(int(i))
    order = np.array(kept, int)[np.argsort(-log_mass[kept])][:_MODES]
    return Modes(x[order], roots[order], log_mass[order])


def _laplace(scores, x, score):
    """Returns precisions and the covariances' roots at modes x [n, dim], both [n, dim, dim].

    The Hessians are found by two rounds of differences.
    """
    roots = _roots(_hessians(scores, x, score, np.full(x.shape, 1e-2)))
    size = np.clip(0.3 * np.linalg.norm(roots, axis=2), 1e-7, 1e3)
    roots = _roots(_hessians(scores, x, score, size))
    inverses = np.linalg.inv(roots)
    values, vectors = np.linalg.eigh(roots @ np.swapaxes(roots, 1, 2))
    halves = vectors * np.sqrt(np.clip(values, 0.0, _FAR**2))[:, np.newaxis]
    precisions = np.swapaxes(inverses, 1, 2) @ inverses
    return precisions, halves @ np.swapaxes(vectors, 1, 2)


def unseen(
    scores: Scores,
    modes: Modes,
    log_normaliser: float,
    rng: np.random.Generator,
    known: Callable[[np.ndarray], np.ndarray] | None = None,
    slack: float = 0.0,
) -> np.ndarray:
    """Returns the share of the posterior at each mode that a known density lacks, [modes].

    The share is that of the region where the known density is less than a tenth of the posterior's,
    or that of the mode if no density is known. It is found by importance sampling, because
    Laplace's approximation is far off at a pole, such as the neck of a hierarchical model. The
    proposal is a mixture over all modes, so that the mass of a shell, on which each point is a
    mode, counts once.

    Args:
      scores: function from x [n, dim] to the log density [n] and its gradient [n, dim].
      modes: the modes, from the function `modes`.
      log_normaliser: log normaliser of the density, in nats.
      rng: source of random numbers.
      known: function from x [n, dim] to the known log density [n] in nats, or None.
      slack: nats by which the posterior's density exceeds the known one in the known region.
    """
    near = mixture.of_gaussians(zip(modes.x, modes.roots, strict=True), mixture.DEGREES)
    x = np.concatenate([one.draw(_MASS_DRAWS, rng) for one in near.components()])
    density = scores(x)[0] - log_normaliser
    joint = near.log_densities(x)
    log_near = np.logaddexp.reduce(joint)
    weights = np.exp(np.minimum(density - log_near, _LARGEST_WEIGHT))
    if known is not None:
        weights *= density - known(x) > np.log(10.0) + slack
    return (weights * np.exp(joint - log_near)).mean(1)


class Look(NamedTuple):
    """Results of a wide search.

    Attributes:
      x: points that exceed the mixture, in descending order of the excess, [n, dim].
      points: number of points that were tried.
      lacking: share of the posterior where the mixture has less than a tenth of the posterior's
        density. It is a lower bound, because each batch counts only its densest points.
      where: draws of that share of the posterior, [m, dim].
    """

    x: np.ndarray
    points: int
    lacking: float
    where: np.ndarray


def look(
    log_density: LogDensity,
    dtype: tf.DType,
    known: Mixture,
    slack: float,
    deadline: float,
    most: int,
    rows: int,
    seed: int,
) -> Look:
    """Searches widely around a mixture for points where the density exceeds the mixture's.

    Gradients do not lead to a mode that takes up less than a thousandth of the space; only points
    that fall on it reveal it.

    Args:
      log_density: function from x [n, dim] to the log density [n] in nats, normalised by an
        estimate of the evidence.
      dtype: dtype of x.
      known: a mixture close to the known part of the posterior.
      slack: nats by which the density exceeds the mixture within the known part.
      deadline: value of `time.monotonic` after which no further batch begins.
      most: largest number of points.
      rows: points in a batch, an even number.
      seed: seed of the points.
    """
    dim = known.means.shape[1]
    merged = known.merged()
    mean, root = merged.means[0], merged.roots[0]
    widest = max(2.0, REACH / np.sqrt(dim))
    batch = _batch(log_density, dtype, known, mean, root, widest, rows)
    log_wide = _log_wide(dim, widest)
    volume = np.linalg.slogdet(root)[1]
    seen, weights, where, points = [], [], [], 0
    while points < most and time.monotonic() < deadline:
        parts = batch(tf.constant([seed, points // rows], tf.int32))
        x, excess, density, radius = (np.asarray(part, np.float64) for part in parts)
        points += rows
        row = excess.argmax()
        if excess[row] > np.log(3.0) + slack:
            seen.append((excess[row], x[row]))
        unseen = excess > np.log(10.0) + slack
        log_weights = density[unseen] - log_wide(radius[unseen]) + volume
        weights.append(np.exp(np.minimum(log_weights, _LARGEST_WEIGHT)))
        where.append(x[unseen])
    seen.sort(key=lambda pair: -pair[0])
    highest = np.reshape([x for _, x in seen[:_SEEN]], [-1, dim])
    mass = np.concatenate([[0.0], *weights])
    lacking = mass.sum() / max(1, points)
    draws = np.zeros([0, dim])
    # A share that rests on a few points is too noisy to draw from.
    if lacking > 0 and mass.sum() ** 2 / (mass**2).sum() > 20.0:
        rng = np.random.default_rng(seed)
        draws = np.concatenate(where)[rng.choice(len(mass) - 1, _SEEN, p=mass[1:] / mass.sum())]
    return Look(highest, points, float(lacking / (1.0 + lacking)), draws)


def _batch(log_density, dtype, known, mean, root, widest, rows):
    """Returns the graph that draws the points of a batch and compares the densest with `known`.

    It takes a seed and returns these points [n, dim], the excess of their log density over the
    mixture's, their log density, and their distance from `mean` in standardised coordinates.
    """
    dim = len(mean)
    inverses = np.linalg.inv(known.roots)
    compared = min(_COMPARED, rows)
    log_scales = np.log(known.weights) + np.linalg.slogdet(inverses)[1] + known.log_peak
    white = inverses.reshape(-1, dim).T  # x @ white - offsets is standardised in each component
    offsets = np.einsum("kij,kj->ki", inverses, known.means)

    @tf.function(autograph=False)
    def batch(seed):
        noise = tf.random.stateless_normal([rows // 2, dim], seed)
        noise *= tf.random.stateless_uniform([rows // 2, 1], seed + 1, 1.0, widest)
        noise = tf.concat([noise, -noise], 0)
        x = tf.constant(mean, dtype) + tf.matmul(tf.cast(noise, dtype), tf.constant(root.T, dtype))
        density = tf.cast(log_density(x), dtype)
        density = tf.where(tf.math.is_finite(density), density, -np.inf)
        # Comparing points with all components is expensive, so only the densest are compared.
        # Density counts relative to that of one component at the centre with the same covariance.
        squares = tf.reduce_sum(noise**2, -1)
        kernel = 0.5 * (known.degrees + dim) * tf.math.log1p(squares / (known.degrees - 2.0))
        densest = tf.math.top_k(density + tf.cast(kernel, dtype), compared, sorted=False)[1]
        x, density = tf.gather(x, densest), tf.gather(density, densest)
        y = tf.reshape(tf.matmul(x, tf.constant(white, dtype)), [compared, -1, dim])
        squares = tf.reduce_sum((y - tf.constant(offsets, dtype)) ** 2, -1)
        kernels = tf.math.log1p(squares / (known.degrees - 2.0))
        kernels = tf.constant(log_scales, dtype) - 0.5 * (known.degrees + dim) * kernels
        excess = density - tf.reduce_logsumexp(kernels, -1)
        radius = tf.norm(tf.gather(noise, densest), axis=-1)
        return x, excess, density, radius

    return batch


def _log_wide(dim, widest):
    """Returns the function from a radius to the log density of the wide search's points.

    Radius and density are in standardised coordinates.
    """
    radii = np.linspace(0.0, 10.0 * widest * np.sqrt(dim), 4000)
    widths = np.linspace(1.0, widest, 400)
    each = -0.5 * (radii[:, np.newaxis] / widths) ** 2 - dim * np.log(widths)
    table = special.logsumexp(each, axis=1) - np.log(len(widths))
    table -= 0.5 * dim * np.log(2.0 * np.pi)
    return lambda radius: np.interp(radius, radii, table)
