"""Models with exact posteriors for amortised fits: a Gaussian, a hierarchy, sets of rows, images.

target = TARGETS["hierarchy"]()
target.exact(target.observation(0), 1000, np.random.default_rng(0))  # {"mu": [1000], ...}
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from scipy import stats
from tensorflow_probability import distributions as tfd

SIZES = (2, 3, 5, 8, 12, 18, 25, 33, 41, 50)  # rows of the observations
GRID = 4000


class Target(NamedTuple):
    """A model, its exact posterior, and what `fit_amortised` gets besides the model.

    Attributes:
      model: joint distribution with the observed part `y`.
      exact: (y, count, rng) -> exact draws of the posterior by name, [count, ...] each.
      arguments: arguments of `fit_amortised`.
    """

    model: tfd.JointDistribution
    exact: Callable[[np.ndarray, int, np.random.Generator], dict[str, np.ndarray]]
    arguments: Mapping[str, Any] = {}

    def observation(self, number: int) -> np.ndarray:
        """Returns a data set that the model simulates."""
        if "rows" not in self.arguments:
            return self.model.sample(seed=(number, 1))["y"].numpy()
        drawn = self.model.sample(seed=(number, 1))
        given = {name: value for name, value in drawn.items() if name != "y"}
        rows = {
            name: tf.repeat(value[tf.newaxis], SIZES[number], 0) for name, value in given.items()
        }
        return self.model.sample(seed=(number, 2), value=rows)["y"].numpy()


def gaussian_linear() -> Target:
    """Returns the benchmark's Gaussian with a Gaussian prior, in ten dimensions."""
    scale = np.sqrt(0.1).astype(np.float32)
    prior = tfd.Independent(tfd.Normal(tf.zeros(10), scale), 1)
    model = {"theta": prior, "y": lambda theta: tfd.Independent(tfd.Normal(theta, scale), 1)}

    def exact(y, count, rng):
        return {"theta": y / 2 + scale / np.sqrt(2.0) * rng.normal(size=[count, 10])}

    return Target(tfd.JointDistributionNamed(model), exact)


def _on_grid(log_density, low, high, count, rng):
    """Draws from a density on an interval by its cumulated values on a grid."""
    grid = np.linspace(low, high, GRID)
    log_p = log_density(grid)
    cumulated = np.cumsum(np.exp(log_p - log_p.max()))
    return np.interp(rng.uniform(0.0, cumulated[-1], count), cumulated, grid)


def hierarchy() -> Target:
    """Returns eight groups with unknown means of unknown mean and scale, ten parameters."""
    model = {
        "mu": tfd.Normal(0.0, 2.0),
        "tau": tfd.HalfNormal(1.0),
        "theta": lambda tau, mu: tfd.Independent(
            tfd.Normal(mu[..., tf.newaxis] + tf.zeros(8), tau[..., tf.newaxis]), 1
        ),
        "y": lambda theta: tfd.Independent(tfd.Normal(theta, 1.0), 1),
    }

    def exact(y, count, rng):
        y = y.astype(np.float64)

        def log_density(taus):
            covariances = [(1.0 + tau**2) * np.eye(8) + 4.0 for tau in taus]
            each = [stats.multivariate_normal.logpdf(y, np.zeros(8), c) for c in covariances]
            return np.array(each) - 0.5 * taus**2

        tau = _on_grid(log_density, 1e-3, 6.0, count, rng)
        precision = 0.25 + 8.0 / (1.0 + tau**2)
        mu = y.sum() / (1.0 + tau**2) / precision + rng.normal(size=count) / np.sqrt(precision)
        precision = (1.0 + tau**-2.0)[:, np.newaxis]
        mean = ((mu * tau**-2.0)[:, np.newaxis] + y) / precision
        theta = mean + rng.normal(size=mean.shape) / np.sqrt(precision)
        return {"mu": mu, "tau": tau, "theta": theta}

    return Target(tfd.JointDistributionNamed(model), exact)


def rows() -> Target:
    """Returns 2 to 50 numbers of unknown mean and scale."""
    model = {
        "mu": tfd.Normal(0.0, 2.0),
        "sigma": tfd.HalfNormal(1.0),
        "y": lambda sigma, mu: tfd.Normal(mu, sigma),
    }

    def exact(y, count, rng):
        n, y = len(y), y.astype(np.float64)
        squares, mean = ((y - y.mean()) ** 2).sum(), y.mean()

        def log_density(sigma):  # mu is integrated out
            wide = stats.norm.logpdf(mean, 0.0, np.sqrt(4.0 + sigma**2 / n))
            return wide - (n - 1) * np.log(sigma) - 0.5 * squares / sigma**2 - 0.5 * sigma**2

        sigma = _on_grid(log_density, 1e-3, 6.0, count, rng)
        precision = 0.25 + n / sigma**2
        mu = n * mean / sigma**2 / precision + rng.normal(size=count) / np.sqrt(precision)
        return {"mu": mu, "sigma": sigma}

    return Target(tfd.JointDistributionNamed(model), exact, {"rows": (2, 50)})


def image() -> Target:
    """Returns images [16, 16] of a spot of unknown place and size, in noise."""
    pixels, noise = np.linspace(-1.0, 1.0, 16, dtype=np.float32), 0.3

    def profile(place, size):
        away = (pixels - place[..., tf.newaxis]) / size[..., tf.newaxis]
        return tf.exp(-0.5 * away**2)

    def data(size, place):
        first, second = profile(place[..., 0], size), profile(place[..., 1], size)
        mean = first[..., :, tf.newaxis] * second[..., tf.newaxis, :]
        return tfd.Independent(tfd.Normal(mean, noise), 2)

    model = {
        "place": tfd.Independent(tfd.Uniform(-0.8 * tf.ones(2), 0.8), 1),
        "size": tfd.LogNormal(-1.5, 0.4),
        "y": data,
    }

    def exact(y, count, rng):
        def weights(first, second, log_size):
            """Returns the posterior's weights on a grid of places and logs of sizes."""
            log_p = np.empty([len(log_size), len(first), len(second)])
            for i, size in enumerate(np.exp(log_size)):
                a, b = (np.exp(-0.5 * ((pixels - p[:, None]) / size) ** 2) for p in (first, second))
                squares = np.outer((a**2).sum(1), (b**2).sum(1))
                log_p[i] = (a @ y @ b.T - 0.5 * squares) / noise**2
            log_p -= 0.5 * ((log_size + 1.5) / 0.4)[:, None, None] ** 2
            return np.exp(log_p - log_p.max())

        axes = [np.linspace(-0.8, 0.8, 200)] * 2 + [np.linspace(-3.5, 0.5, 100)]
        for last in (False, True):
            p = weights(*axes)
            if not last:  # a second, finer grid covers what has weight in the first
                seen = np.argwhere(p > 1e-7)[:, [1, 2, 0]]
                ends = [
                    (axis[k.min()], axis[k.max()]) for axis, k in zip(axes, seen.T, strict=True)
                ]
                steps = [axis[1] - axis[0] for axis in axes]
                limits = [(-0.8, 0.8), (-0.8, 0.8), (-3.5, 0.5)]
                axes = [
                    np.linspace(max(low - h, a), min(high + h, b), 150)
                    for (low, high), h, (a, b) in zip(ends, steps, limits, strict=True)
                ]
        cell = rng.choice(p.size, count, p=p.ravel() / p.sum())
        k, i, j = np.unravel_index(cell, p.shape)
        jitter = rng.uniform(-0.5, 0.5, [3, count])
        values = [
            axis[n] + u * (axis[1] - axis[0])
            for axis, n, u in zip(axes, (i, j, k), jitter, strict=True)
        ]
        place = np.clip(np.stack(values[:2], -1), -0.8, 0.8)
        return {"place": place, "size": np.exp(values[2])}

    return Target(tfd.JointDistributionNamed(model), exact, {"filters": 16})


TARGETS: dict[str, Callable[[], Target]] = {
    target.__name__: target for target in (gaussian_linear, hierarchy, rows, image)
}
