"""The start of a posterior of hundreds of dimensions, without a full covariance.

A Gaussian with a diagonal covariance is fitted by its bound on the evidence. It is not placed at
the highest density, which in a hierarchical model is where all effects are equal. Chains from its
draws then give means and scales, which the density's gradient makes much more exact than the number
of states alone would (`fitted`), and those directions of correlation that exceed the sampling
noise of a covariance of that many states.
"""

import time

import numpy as np

from avb_tf.errors import UserError
from avb_tf.posteriors import hmc, sampling

CHAINS = 64
ROUNDS = 12  # warm-up rounds; the scales are estimated again from all chains after each
TRANSITIONS = 12  # transitions in a round
LEAPFROGS = 8  # leapfrog steps in a transition
KEPT = 16, 64  # fewest and most states kept of each chain
THINNED = 4  # most transitions from one kept state to the next
RANK = 20  # most directions of correlation
_ROWS = 512  # evaluations of the gradient in a batch
_DRAWS = 16  # draws in each step that fits the Gaussian
_LEAST, _STEPS = 20, 1500  # fewest and most steps that fit the Gaussian
_RATE = 0.1  # Adam's first learning rate, in standard deviations; it falls to a hundredth of it


def gaussian(
    scores: hmc.Scores, points: np.ndarray, rng: np.random.Generator, deadline: float
) -> tuple[np.ndarray, np.ndarray] | None:
    """Fits a Gaussian with a diagonal covariance from each point, and returns the best one.

    Adam moves the mean in units of the standard deviations, and the logarithms of the standard
    deviations. The Gaussian with the highest bound on the evidence is the best one.

    Args:
      scores: function from u [n, dim] to the log density [n] and its gradient [n, dim].
      points: first means, [n, dim].
      rng: source of random numbers.
      deadline: value of `time.monotonic` at which the fits end; each point gets an equal share.
    Returns:
      Mean [dim] and standard deviations [dim], or None if the density is not finite near any point.
    """
    best, highest = None, -np.inf
    began = time.monotonic()
    for i, point in enumerate(points):
        until = began + (i + 1) / len(points) * (deadline - began)
        mean, scale, bound = _mean_field(scores, point.copy(), rng, until)
        if np.isfinite(bound) and bound > highest:
            best, highest = (mean, scale), bound
    return best


def _mean_field(scores, mean, rng, deadline):
    """Fits a Gaussian from a first mean: returns its mean, its scales and a smoothed bound."""
    log_scale = np.log(_scales(scores, mean))
    moments = np.zeros([2, 2, len(mean)])  # Adam's moments of both gradients
    bound, began = -np.inf, time.monotonic()
    for step in range(1, _STEPS + 1):
        passed = time.monotonic() - began
        share = max(step / _STEPS, passed / max(deadline - began, 1e-9))
        if share > 1.0 and step > _LEAST:
            break
        share = min(share, 1.0)
        half = rng.normal(size=[_DRAWS // 2, len(mean)])
        noise = np.concatenate([half, -half])
        scale = np.exp(log_scale)
        density, score = scores(mean + scale * noise)
        usable = np.isfinite(density) & np.isfinite(score).all(1)
        if not usable.any():
            log_scale -= 0.5
            continue
        whitened = score[usable] * scale
        gradient = np.stack([whitened.mean(0), (whitened * noise[usable]).mean(0) + 1.0])
        moments[0] += 0.1 * (gradient - moments[0])
        moments[1] += 0.01 * (gradient**2 - moments[1])
        corrected = moments[0] / (1.0 - 0.9**step), moments[1] / (1.0 - 0.99**step)
        rate = _RATE * 0.01**share
        move = rate * corrected[0] / (np.sqrt(corrected[1]) + 1e-12)
        mean += scale * move[0]
        log_scale += move[1]
        now = density[usable].mean() + log_scale.sum()
        bound = now if not np.isfinite(bound) else bound + 0.05 * (now - bound)
    return mean, np.exp(log_scale), bound


def _scales(scores, x):
    """Returns 1 / sqrt(curvature) along each coordinate, [dim], by differences of the gradient."""
    dim = len(x)
    scale = np.ones(dim)
    size = np.full(dim, 1e-2)
    for _ in range(2):
        curvature = np.empty(dim)
        for rows in np.array_split(np.arange(dim), -(-dim // _ROWS)):
            step = np.zeros([len(rows), dim])
            step[np.arange(len(rows)), rows] = size[rows]
            ahead, behind = scores(x + step)[1], scores(x - step)[1]
            column = np.arange(len(rows)), rows
            curvature[rows] = (behind[column] - ahead[column]) / (2.0 * size[rows])
        usable = np.isfinite(curvature) & (curvature > 0)
        scale = np.where(usable, np.clip(curvature, 1e-12, 1e24), 1.0) ** -0.5
        size = np.clip(0.1 * scale, 1e-6, 1.0)
    return scale


def states(
    scores: hmc.Scores, dim: int, points: np.ndarray, rng: np.random.Generator, deadline: float
) -> np.ndarray:
    """Returns states of short chains, [chains, kept, dim], that start from a fitted Gaussian.

    Args:
      scores: function from u [n, dim] to the log density [n] and its gradient [n, dim].
      dim: dimensions of u.
      points: first means of the Gaussian, [n, dim]; see `gaussian`.
      rng: source of random numbers.
      deadline: value of `time.monotonic` at which the chains should end.
    Raises:
      UserError: the density is not finite near any point.
    """
    began = time.monotonic()
    best = gaussian(scores, points, rng, began + 0.4 * (deadline - began))
    if best is None:
        raise UserError(sampling.NOT_FINITE)
    mean, scale = best
    draws = mean + scale * rng.normal(size=[CHAINS, dim])
    usable = np.flatnonzero(np.isfinite(scores(draws)[0]))
    if not len(usable):
        raise UserError(sampling.NOT_FINITE)
    draws = draws[rng.choice(usable, CHAINS)]
    step_size: float | np.ndarray = 0.1
    for _ in range(ROUNDS):
        since = time.monotonic()
        chains = hmc.run_chains(
            scores, draws, scale, TRANSITIONS, LEAPFROGS, step_size, rng, adapt=True
        )
        draws, step_size = chains.states[-1], chains.step_size
        scale = chains.states[-4:].reshape(-1, dim).std(0)
        lasted = (time.monotonic() - since) / TRANSITIONS
        if time.monotonic() > began + 0.6 * (deadline - began):
            break
    affordable = (deadline - time.monotonic()) / lasted
    kept = int(np.clip(affordable / THINNED, *KEPT))
    thinned = int(np.clip(affordable / kept, 1, THINNED))
    exact = hmc.run_chains(scores, draws, scale, kept * thinned, LEAPFROGS, step_size, rng)
    return np.swapaxes(exact.states[thinned - 1 :: thinned], 0, 1)


def fitted(
    x: np.ndarray, scores: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns the Gaussian of draws, with zero-variance control variates (Mira et al., 2013).

    The errors of a thousand means and scales add up: with 4,000 draws they alone keep a Gaussian
    half a nat away from the posterior. The gradient s of the log density has mean 0, and
    (x - mean) (C s)^T has mean -C for any matrix C, so multiples of both may be added. If C is a
    Gaussian's own covariance, no sampling error is left.

    Args:
      x: draws, [n, dim].
      scores: gradients of the log density at x, [n, dim].
    Returns:
      Mean [dim], scale [dim], directions [dim, rank] and stretch [rank], as those of `Start`.
    """
    mean, deviation = x.mean(0), x.std(0)
    along, stretch = directions((x - mean) / deviation)
    inflation = np.sqrt(1.0 + along**2 @ (stretch**2 - 1.0))
    scale = deviation / inflation
    control = scores * scale
    control = scale * (control + (control @ along * (stretch**2 - 1.0)) @ along.T)
    mean = _controlled(x, control)
    away = x - mean
    variance = _controlled(away**2, away * control + deviation**2)
    # A posterior far from Gaussian has no use for the control; its estimate might be negative.
    usable = variance > 0.25 * deviation**2
    scale = np.sqrt(np.where(usable, variance, deviation**2)) / inflation
    return mean, scale, along, stretch


def _controlled(values, control):
    """Returns means of values [n, dim], given for each a control variate of mean 0, [n, dim]."""
    control = np.where(np.isfinite(control).all(0), control, 0.0)
    mean = control.mean(0)
    variance, covariance = (((control - mean) * part).mean(0) for part in (control, values))
    constant = variance <= 1e-12 * mean**2  # nothing but rounding, as of a flat density
    slope = np.where(constant, 0.0, covariance / np.where(constant, 1.0, variance))
    return values.mean(0) - slope * mean


def directions(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the directions along which states vary by more than independent noise would.

    The limit is 1.1 times the upper edge of the Marchenko-Pastur law for n independent states.

    Args:
      z: states of mean 0 and unit variances, [n, dim].
    Returns:
      Orthonormal directions [dim, rank], and standard deviations along them [rank].
    """
    count, dim = z.shape
    left, values, _ = np.linalg.svd(z.T / np.sqrt(count), full_matrices=False)
    edge = 1.0 + np.sqrt(dim / count)
    rank = min(RANK, int((values > 1.1 * edge).sum()))
    # Sampling noise adds about l (dim / count) / (l - 1) to a large eigenvalue l.
    squares = values[:rank] ** 2
    for _ in range(3):
        true = np.maximum(squares, 1.0 + 1e-6)
        shrunk = values[:rank] ** 2 / (1.0 + dim / count / np.maximum(true - 1.0, 0.1))
        squares = np.maximum(shrunk, 1.0)
    return left[:, :rank], np.sqrt(squares)
