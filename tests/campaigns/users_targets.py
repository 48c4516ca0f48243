"""Targets as users write them: edges, label switching, change points, periods, products, rounding.

The exact draws are of closed forms, of sums over all cases, or of a fine grid. `TARGETS` has these
and those of `verdict_targets`.
"""

import functools
import itertools
from typing import Any

import numpy as np
import tensorflow as tf
from scipy import integrate, special, stats
from tensorflow_probability import distributions as tfd

from tests.campaigns import verdict_targets
from tests.campaigns.verdict_targets import Truth

_F = np.float64
# Coal mining disasters in Britain in each year from 1851, without two years of which the usual
# table has no number (Jarrett, 1979, "A note on the intervals between coal-mining disasters").
DISASTERS = np.array(
    [4, 5, 4, 0, 1, 4, 3, 4, 0, 6, 3, 3, 4, 0, 2, 6, 3, 3, 5, 4, 5, 3, 1, 4, 4, 1, 5, 5, 3, 4, 2,
     5, 2, 2, 3, 4, 2, 1, 3, 2, 1, 1, 1, 1, 3, 0, 0, 1, 0, 1, 1, 0, 0, 3, 1, 0, 3, 2, 2, 0, 1, 1,
     1, 0, 1, 0, 1, 0, 0, 0, 2, 1, 0, 0, 0, 1, 1, 0, 2, 3, 3, 1, 2, 1, 1, 1, 1, 2, 4, 2, 0, 0, 1,
     4, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 1, 0, 1], _F
)  # fmt: skip


class Grid:
    """Exact draws from a density of few parameters, by cells so small that it is constant in each.

    Args:
      log_density: function of the coordinates of all cells to the log density in nats.
      axes: the cells' centres along each coordinate, evenly spaced.
    """

    def __init__(self, log_density: Any, *axes: np.ndarray):
        self._cells = np.meshgrid(*axes, indexing="ij")
        density = log_density(*self._cells).ravel()
        self._widths = [axis[1] - axis[0] for axis in axes]
        total = special.logsumexp(density)
        self._shares = np.exp(density - total)
        self.log_evidence = float(total + np.log(self._widths).sum())

    def draw(self, count, rng):
        """Returns draws, one row for each coordinate."""
        cell = rng.choice(len(self._shares), count, p=self._shares / self._shares.sum())
        return [
            centres.ravel()[cell] + width * (rng.random(count) - 0.5)
            for centres, width in zip(self._cells, self._widths, strict=True)
        ]


def change_point():
    """Poisson counts whose rate changes at an unknown time, where the density has jumps."""
    years, n = np.arange(len(DISASTERS), dtype=_F), len(DISASTERS)
    joint = tfd.JointDistributionNamed(
        {
            "time": tfd.Uniform(_F(0.0), _F(n - 1)),
            "early": tfd.Exponential(_F(1.0)),
            "late": tfd.Exponential(_F(1.0)),
            "y": lambda time, early, late: tfd.Independent(
                tfd.Poisson(
                    tf.where(
                        years < time[..., tf.newaxis],
                        early[..., tf.newaxis],
                        late[..., tf.newaxis],
                    )
                ),
                1,
            ),
        }
    )
    before = np.arange(1, n)  # counts of the early rate if the time is in (before - 1, before]
    sums = np.cumsum(DISASTERS)[before - 1]
    shapes = np.stack([1.0 + sums, 1.0 + DISASTERS.sum() - sums])
    rates = np.stack([1.0 + before, 1.0 + n - before])
    masses = (special.gammaln(shapes) - shapes * np.log(rates)).sum(0)
    evidence = special.logsumexp(masses) - np.log(n - 1) - special.gammaln(DISASTERS + 1).sum()

    def draw(count, rng):
        k = rng.choice(n - 1, count, p=special.softmax(masses))
        early, late = rng.gamma(shapes[:, k]) / rates[:, k]
        return {"time": before[k] - rng.random(count), "early": early, "late": late}

    return Truth(joint, draw, {"y": DISASTERS}, log_evidence=float(evidence))


def label_switching():
    """A mixture of three Gaussians with unknown means: six modes alike."""
    rng = np.random.default_rng(0)
    y = np.array([-4.0, 0.0, 4.0])[rng.integers(3, size=60)] + rng.normal(size=60)

    def mixed(means):
        return tfd.MixtureSameFamily(tfd.Categorical(np.zeros(3)), tfd.Normal(means, _F(1.0)))

    joint = tfd.JointDistributionNamed(
        {
            "means": tfd.Sample(tfd.Normal(_F(0.0), _F(5.0)), 3),
            "y": lambda means: tfd.Sample(mixed(means), 60),
        }
    )
    # Importance sampling of one mode.
    centre = np.array([y[y < -2].mean(), y[np.abs(y) < 2].mean(), y[y > 2].mean()])
    t = rng.standard_t(5, [200_000, 3])
    means = centre + 0.3 * t
    parts = stats.norm.logpdf(y[:, np.newaxis, np.newaxis], means) - np.log(3.0)
    joints = special.logsumexp(parts, axis=2).sum(0) + stats.norm.logpdf(means, 0, 5).sum(1)
    log_weights = joints - (stats.t.logpdf(t, 5) - np.log(0.3)).sum(1)
    evidence = special.logsumexp(log_weights) - np.log(len(t)) + np.log(6.0)

    def draw(count, rng):
        of_one_mode = means[rng.choice(len(t), count, p=special.softmax(log_weights))]
        return {"means": rng.permuted(of_one_mode, axis=1)}

    return Truth(joint, draw, {"y": y}, log_evidence=float(evidence))


def triangle(outside):
    """Two of three proportions: a triangle with an edge where the density is high."""

    def log_density(x):
        inside = tf.reduce_all(x > 0.0, -1) & (tf.reduce_sum(x, -1) < 1.0)
        safe = tf.where(inside[..., tf.newaxis], x, _F(0.3))
        return tf.where(
            inside, 2.0 * tf.math.log(safe[..., 0]) + tf.math.log(safe[..., 1]), _F(outside)
        )

    return Truth(
        log_density, lambda count, rng: rng.dirichlet([3, 2, 1], count)[:, :2], shape=[2],
        log_evidence=float(np.log(2 / 120)),
    )  # fmt: skip


def disc():
    def log_density(x):
        return tf.where(tf.norm(x, axis=-1) < 1.0, 0.0 * x[..., 0], _F(-np.inf))

    def draw(count, rng):
        x = rng.normal(size=[count, 2])
        lengths = np.sqrt(rng.random(count)) / np.linalg.norm(x, axis=1)
        return x * lengths[:, np.newaxis]

    return Truth(log_density, draw, shape=[2], log_evidence=float(np.log(np.pi)))


def bound_by_another():
    joint = tfd.JointDistributionNamed(
        {
            "a": tfd.Exponential(_F(1.0)),
            "b": lambda a: tfd.Uniform(_F(0.0), a),
            "y": lambda b: tfd.Normal(b, _F(0.5)),
        }
    )

    def draw(count, rng):
        a = rng.exponential(size=100 * count)
        b = a * rng.random(len(a))
        kept = rng.random(len(a)) < np.exp(-0.5 * ((0.4 - b) / 0.5) ** 2)
        return {"a": a[kept][:count], "b": b[kept][:count]}

    mass = integrate.quad(lambda b: special.exp1(b) * stats.norm.pdf(0.4, b, 0.5), 0.0, 20.0)[0]
    return Truth(joint, draw, {"y": 0.4}, log_evidence=float(np.log(mass)))


def two_outliers():
    """The location of a Cauchy distribution, given two observations far apart."""
    joint = tfd.JointDistributionNamed(
        {
            "x": tfd.Cauchy(_F(0.0), _F(10.0)),
            "y": lambda x: tfd.Sample(tfd.Cauchy(x, _F(1.0)), 2),
        }
    )
    density = stats.cauchy.logpdf
    exact = Grid(
        lambda x: density(x, 0, 10) + density(-8, x) + density(8, x),
        np.linspace(-1000.0, 1000.0, 1_000_001),
    )
    return Truth(
        joint, lambda count, rng: {"x": exact.draw(count, rng)[0]}, {"y": np.array([-8.0, 8.0])},
        log_evidence=exact.log_evidence,
    )  # fmt: skip


def angle():
    """An angle whose posterior is cut in two at pi."""
    joint = tfd.JointDistributionNamed(
        {
            "angle": tfd.VonMises(_F(0.0), _F(0.01)),
            "y": lambda angle: tfd.Sample(tfd.VonMises(angle, _F(3.0)), 4),
        }
    )
    y = np.array([3.0, -3.0, 2.8, -2.9])
    width = 2.0 * np.pi / 100_000
    exact = Grid(
        lambda x: (
            stats.vonmises.logpdf(x, 0.01) + stats.vonmises.logpdf(y[:, np.newaxis], 3.0, x).sum(0)
        ),
        np.arange(-np.pi + width / 2.0, np.pi, width),
    )
    return Truth(
        joint, lambda count, rng: {"angle": exact.draw(count, rng)[0]}, {"y": y},
        log_evidence=exact.log_evidence,
    )  # fmt: skip


def spike_and_slab():
    """A regression with 2^6 modes: each coefficient is near 0 or not."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=[30, 6])
    y = x @ [2.0, 0.0, 0.0, 0.4, 0.0, 0.3] + rng.normal(size=30)
    widths = np.array([0.05, 3.0])
    each = tfd.MixtureSameFamily(tfd.Categorical(np.zeros(2)), tfd.Normal(np.zeros(2), widths))
    joint = tfd.JointDistributionNamed(
        {
            "b": tfd.Sample(each, 6),
            "y": lambda b: tfd.Independent(tfd.Normal(tf.linalg.matvec(x, b), _F(1.0)), 1),
        }
    )
    masses, means, roots = [], [], []
    for chosen in itertools.product(widths, repeat=6):
        prior = np.diag(np.square(chosen))
        masses.append(
            stats.multivariate_normal.logpdf(y, np.zeros(30), x @ prior @ x.T + np.eye(30))
        )
        covariance = np.linalg.inv(x.T @ x + np.linalg.inv(prior))
        means.append(covariance @ x.T @ y)
        roots.append(np.linalg.cholesky(covariance))

    def draw(count, rng):
        k = rng.choice(len(masses), count, p=special.softmax(masses))
        noise = rng.normal(size=[count, 6])
        return {"b": np.array(means)[k] + np.einsum("nij,nj->ni", np.array(roots)[k], noise)}

    evidence = special.logsumexp(masses) - 6.0 * np.log(2.0)
    return Truth(joint, draw, {"y": y}, log_evidence=float(evidence))


def product(dim, cells):
    """Parameters of which the data inform only the product: 2^(dim - 1) bent modes."""
    joint = tfd.JointDistributionNamed(
        {
            "x": tfd.Sample(tfd.Normal(_F(0.0), _F(1.0)), dim),
            "y": lambda x: tfd.Normal(tf.reduce_prod(x, -1), _F(0.1)),
        }
    )
    exact = Grid(
        lambda *x: sum(map(stats.norm.logpdf, x)) + stats.norm.logpdf(1.0, np.prod(x, 0), 0.1),
        *[np.linspace(-5.0, 5.0, cells)] * dim,
    )
    return Truth(
        joint, lambda count, rng: {"x": np.stack(exact.draw(count, rng), 1)}, {"y": 1.0},
        log_evidence=exact.log_evidence,
    )  # fmt: skip


def frequency():
    """The frequency, the phase and the amplitude of a wave: many modes in the frequency."""
    rng = np.random.default_rng(3)
    time = np.linspace(0.0, 10.0, 25)
    y = 1.2 * np.sin(2.3 * time + 0.5) + rng.normal(size=25)
    joint = tfd.JointDistributionNamed(
        {
            "frequency": tfd.Uniform(_F(0.0), _F(6.0)),
            "amplitude": tfd.HalfNormal(_F(2.0)),
            "phase": tfd.Uniform(_F(-np.pi), _F(np.pi)),
            "y": lambda frequency, amplitude, phase: tfd.Independent(
                tfd.Normal(
                    amplitude[..., tf.newaxis]
                    * tf.sin(frequency[..., tf.newaxis] * time + phase[..., tf.newaxis]),
                    _F(1.0),
                ),
                1,
            ),
        }
    )

    def log_density(frequency, amplitude, phase):
        wave = sum(
            stats.norm.logpdf(one, amplitude * np.sin(frequency * at + phase))
            for at, one in zip(time, y, strict=True)
        )
        return wave + stats.halfnorm.logpdf(amplitude, 0, 2) - np.log(12.0 * np.pi)

    centres = [(np.arange(n) + 0.5) / n for n in (1200, 80, 120)]
    exact = Grid(log_density, 6.0 * centres[0], 4.0 * centres[1], np.pi * (2.0 * centres[2] - 1.0))

    def draw(count, rng):
        names = "frequency", "amplitude", "phase"
        return dict(zip(names, exact.draw(count, rng), strict=True))

    return Truth(joint, draw, {"y": y}, log_evidence=exact.log_evidence)


def rounding():
    """Mean and scale of a Gaussian of which only rounded values are seen."""
    y = np.array([3.0, 4.0, 3.0, 3.0, 4.0, 3.0, 4.0, 3.0])
    joint = tfd.JointDistributionNamed(
        {
            "mean": tfd.Normal(_F(0.0), _F(10.0)),
            "scale": tfd.HalfNormal(_F(5.0)),
            "y": lambda mean, scale: tfd.Sample(
                tfd.QuantizedDistribution(tfd.Normal(mean, scale)), 8
            ),
        }
    )

    def log_density(mean, log_scale):
        scale = np.exp(log_scale)
        density = stats.norm.logpdf(mean, 0, 10) + stats.halfnorm.logpdf(scale, 0, 5) + log_scale
        for value, times in zip(*np.unique(y, return_counts=True), strict=True):
            ends = special.ndtr((value - mean) / scale), special.ndtr((value - 1 - mean) / scale)
            density += times * np.log(np.maximum(ends[0] - ends[1], 1e-300))
        return density

    exact = Grid(
        log_density, np.linspace(0.0, 6.0, 1501), np.linspace(np.log(1e-4), np.log(8.0), 1501)
    )

    def draw(count, rng):
        mean, log_scale = exact.draw(count, rng)
        return {"mean": mean, "scale": np.exp(log_scale)}

    return Truth(joint, draw, {"y": y}, log_evidence=exact.log_evidence)


TARGETS = {
    **verdict_targets.TARGETS,
    "change point": change_point,
    "label switching": label_switching,
    "triangle": functools.partial(triangle, -np.inf),
    "triangle, -1e10": functools.partial(triangle, -1e10),
    "disc": disc,
    "a bound by another": bound_by_another,
    "two outliers": two_outliers,
    "an angle at pi": angle,
    "spike and slab": spike_and_slab,
    "product of 2": functools.partial(product, 2, 2001),
    "product of 3": functools.partial(product, 3, 251),
    "frequency": frequency,
    "rounding": rounding,
}
