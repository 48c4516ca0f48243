"""Coordinates in which heavy tails are Gaussian.

A Gaussian through a smooth network has Gaussian tails. It cannot fit a posterior with the tails of
a Student t, and short chains cannot explore such a posterior. If the density falls like a power of
a coordinate u, the coordinate is replaced by v, which is nearly Gaussian, with Tukey's h

    u = location + scale * v exp(weight v^2 / 2)

which has tails like |u|^(-1 - 1 / weight). The lower and the upper tail have a weight each. A
Student t with 1 to 10 degrees of freedom is at most 0.002 nats from this family. An exponential
tail, such as that of the logarithm of a scale near 0, is replaced likewise, with the small weight
that its draws show. Source: Goerg (2015), "The Lambert Way to Gaussianize Heavy-Tailed Data".
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from scipy import special

from avb_tf.posteriors.target import FLOOR

_LIGHT = 0.03  # tails of lower weight stay as they are, such as those of t with 20 degrees
_HEAVIEST = 2.0  # largest weight: t with half a degree of freedom
_WEIGHTS = np.geomspace(_LIGHT, _HEAVIEST, 20)  # weights that an estimate chooses from
_USED = 2 * 10**5  # most entries of draws that an estimate uses, but at least 1,024 draws
_STEP = 0.5 * np.log(10.0)  # from the log of one distance to the next
_DISTANCES = np.exp(_STEP * np.arange(1, 15))  # at which the density is measured, in scales
_OUTSIDE = 3  # index of the first distance that is outside the bulk: 100 scales
_EXPONENTIAL = 1.5  # a density exp(-|u|^power) of a lower power has a tail that no Gaussian has
_OF_EXPONENTIAL = 0.05  # least weight, by its draws, at which such a tail counts as heavy
_CLIMB = 10.0  # slope, in powers of the distance for each dimension, that only a ridge explains


class Tails(NamedTuple):
    """A transform of each coordinate from Gaussian tails to heavy ones.

    tails = Tails(np.zeros(1), np.ones(1), np.full([2, 1], 0.5))  # as heavy as t with 2 degrees
    u, volume = tails.forward(tf.constant([[3.0]]))
    """

    location: np.ndarray  # [dim]
    scale: np.ndarray  # [dim]
    weight: np.ndarray  # [2, dim], of the lower and the upper tail; both 0: the identity

    @property
    def heavy(self) -> np.ndarray:
        """Whether each coordinate is transformed, [dim]."""
        return np.any(self.weight > 0, axis=0)

    def forward(self, v: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns u [..., dim] and log |du / dv| [...] in nats for v [..., dim]."""
        if not self.heavy.any():
            return v, tf.zeros(tf.shape(v)[:-1], v.dtype)
        location, scale, heavy = (tf.constant(x, v.dtype) for x in self._flat())
        lower, upper = (tf.constant(w, v.dtype) for w in self._safe())
        squares = tf.where(v < 0, lower, upper) * v**2
        u = location + scale * v * tf.exp(0.5 * squares)
        slope = tf.math.log(scale) + 0.5 * squares + tf.math.log1p(squares)
        is_heavy = heavy > 0
        return tf.where(is_heavy, u, v), tf.reduce_sum(tf.where(is_heavy, slope, 0.0), -1)

    def inverse(self, u: np.ndarray) -> np.ndarray:
        """Returns v for u [n, dim], in float64."""
        location, scale, heavy = self._flat()
        lower, upper = self._safe()
        y = (u - location) / scale
        v = np.sign(y) * _inverse(np.abs(y), np.where(y < 0, lower, upper))
        return np.where(heavy > 0, v, u)

    def slope(self, v: np.ndarray) -> np.ndarray:
        """Returns du / dv of each coordinate at v [n, dim], in float64."""
        _, scale, heavy = self._flat()
        lower, upper = self._safe()
        squares = np.where(v < 0, lower, upper) * v**2
        with np.errstate(over="ignore"):  # where the coordinate is not heavy, and it is not used
            return np.where(heavy > 0, scale * np.exp(0.5 * squares) * (1.0 + squares), 1.0)

    def _flat(self):
        return self.location, self.scale, self.heavy.astype(np.float64)

    def _safe(self):
        """Returns weights above 0, as they are divisors; a light tail gets a small weight."""
        return np.maximum(self.weight, 0.5 * _LIGHT)


def _inverse(size, weight):
    """Returns the v >= 0 with v exp(weight v^2 / 2) = size, for weight > 0."""
    with np.errstate(divide="ignore"):  # of a size of 0
        return np.sqrt(special.wrightomega(np.log(weight) + 2.0 * np.log(size)) / weight)


def light(dim: int) -> Tails:
    """Returns the identity as `Tails`."""
    return Tails(np.zeros(dim), np.ones(dim), np.zeros([2, dim]))


def profile(
    log_density: Callable[[np.ndarray], np.ndarray], x: np.ndarray, directions: np.ndarray
) -> np.ndarray:
    """Returns the log density far out along lines, at both ends, relative to that at x, in nats.

    Args:
      log_density: function from x [n, dim] to the log density [n] in nats.
      x: point where the lines cross, [dim].
      directions: directions of the lines, [lines, dim], each about a standard deviation long.
    Returns:
      [2, lines, distances], first at the end opposite to the direction; minus infinity where the
      density is not finite.
    """
    signs = np.array([-1.0, 1.0])[:, np.newaxis, np.newaxis, np.newaxis]
    points = x + signs * _DISTANCES[:, np.newaxis] * directions[:, np.newaxis]
    density = log_density(np.vstack([x, points.reshape(-1, len(x))]))
    density = (density[1:] - density[0]).reshape(points.shape[:-1])
    return np.where(np.isfinite(density), density, -np.inf)


def _slopes(profile):
    """Returns d log p / d log distance from each distance to the next; the last axis shrinks."""
    with np.errstate(invalid="ignore"):
        steps = np.diff(profile, axis=-1) / _STEP
    return np.where(np.isnan(steps), -np.inf, steps)


def _farthest(profile):
    """Returns the index of the farthest distance of each line end at which the slope is finite."""
    finite = np.isfinite(_slopes(profile))
    return finite.shape[-1] - 1 - finite[..., ::-1].argmax(-1)[..., np.newaxis]


def improper(profile: np.ndarray, dim: int = 1) -> np.ndarray:
    """Returns whether the density's integral diverges at either end of each line, [lines].

    The farthest slope that is finite decides. A steep climb that has not reached the density at the
    centre does not count: it leads to a bent ridge that the line crosses. Neither does a plateau of
    no mass, such as where a model's scale is as small as numbers can be.

    Args:
      profile: the log density along the lines, from the function `profile`.
      dim: dimensions of the cone around a line in which the density falls alike; 1 for a line
        alone.
    """
    profile = profile[..., _OUTSIDE:]
    slopes, last = _slopes(profile), _farthest(profile)
    slope = np.take_along_axis(slopes, last, -1)[..., 0]
    height = np.take_along_axis(profile, last + 1, -1)[..., 0]
    falls = (slope < -1.02 * dim) | ((slope > _CLIMB * dim) & (height < 0.0))
    falls |= height < -FLOOR * dim
    return np.any(np.isfinite(slopes).any(-1) & ~falls, axis=0)


def of_profile(profile: np.ndarray, location: np.ndarray, scale: np.ndarray) -> Tails:
    """Returns tails as heavy as the density's own along each coordinate.

    Args:
      profile: the log density along the coordinates, from the function `profile`.
      location: centre of each coordinate, [dim].
      scale: scale of each coordinate, [dim].
    """
    slopes = _slopes(profile)
    power = -slopes[..., _OUTSIDE] - 1.0  # P(|u| > distance) ~ distance^-power, near the bulk
    far = -slopes[..., -1] - 1.0
    power = np.where(np.isfinite(far) & (far < 50.0), np.minimum(power, far), np.inf)
    return of_weights(1.0 / np.maximum(power, 1e-3), location, scale)


def exponential(profile: np.ndarray) -> np.ndarray:
    """Returns whether the log density falls about as fast as the distance, [2, lines].

    The two farthest distances decide at which the density is finite. It may end near the bulk:
    1 - p of a probability p is 0 in float64 from a log odds of 37 on.
    """
    last = _farthest(profile)
    near, far = (np.take_along_axis(profile, last + i, -1)[..., 0] for i in (0, 1))
    with np.errstate(invalid="ignore", divide="ignore"):
        power = np.log(far / near) / _STEP
    return (near < 0.0) & (far < 0.0) & (power < _EXPONENTIAL)


def of_weights(weight: np.ndarray, location: np.ndarray, scale: np.ndarray) -> Tails:
    """Returns tails of the weights; weights of light tails become 0, and none exceeds 2.

    Args:
      weight: weights of the lower and the upper tails, [2, dim].
      location: centre of each coordinate, [dim].
      scale: scale of each coordinate, [dim].
    """
    weight = np.where(weight < _LIGHT, 0.0, np.minimum(weight, _HEAVIEST))
    return Tails(location, scale, weight)


def estimated(u: np.ndarray, heavy: np.ndarray, exponential: np.ndarray) -> Tails:
    """Returns the tails of draws by maximum likelihood, for each half of a coordinate by itself.

    Given a weight, the upper half of a coordinate is a half-normal distribution of v, whose scale
    has a closed form. Draws of a Gaussian do not tell it from a slightly heavier distribution, so
    only tails count that the density shows to be heavy.

    Args:
      u: draws, [n, dim].
      heavy: coordinates along which the density falls like a power of the distance, [dim].
      exponential: tails along which its logarithm falls like the distance, [2, dim].
    """
    location = np.median(u, 0)
    scale = np.subtract(*np.quantile(u, [0.75, 0.25], axis=0)) / 1.35
    y = (u - location) / np.maximum(scale, 1e-300)
    y = y[:: max(1, len(y) // max(1024, _USED // y.shape[1]))]
    weights = []
    for upper in (y < 0, y > 0):
        count = np.maximum(1, upper.sum(0))
        likelihoods = []
        for weight in _WEIGHTS:
            squares = np.where(upper, _inverse(np.abs(y), weight) ** 2, 0.0)
            slopes = 0.5 * weight * squares + np.log1p(weight * squares)
            with np.errstate(divide="ignore"):  # where a coordinate has a single value
                spread = np.log(squares.sum(0) / count)
            likelihoods.append(-0.5 * spread - slopes.sum(0) / count)
        weights.append(_WEIGHTS[np.argmax(likelihoods, 0)])
    weight = np.stack(weights)
    counts = np.where(heavy, weight > _LIGHT, exponential & (weight > _OF_EXPONENTIAL))
    return Tails(location, scale, np.where(counts, weight, 0.0))
