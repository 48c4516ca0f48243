"""Targets with exact draws, for the campaign on verdicts.

`TARGETS` maps names to functions without arguments that return a `Truth`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
from scipy import special, stats
from tensorflow_probability import distributions as tfd


@dataclasses.dataclass(frozen=True)
class Truth:
    """A model and the known facts about its posterior.

    Attributes:
      model: a model that `fit_posterior` accepts.
      draw: (count, generator) -> exact draws of the parameters, in the model's structure.
      observed: observed values, for a joint distribution.
      shape: shape of the argument, for a log density.
      modes: [modes, dim], centres of the modes, or None. A draw belongs to the nearest centre.
      log_evidence: exact log evidence in nats, or None.
    """

    model: Any
    draw: Callable[[int, np.random.Generator], Any]
    observed: Any = None
    shape: Any = None
    modes: Any = None
    log_evidence: float | None = None


def gaussian(dim, condition=1.0):
    rng = np.random.default_rng(dim)
    basis = np.linalg.qr(rng.normal(size=[dim, dim]))[0]
    deviations = np.geomspace(1.0, condition**0.5, dim)
    root = (basis * deviations).astype(np.float64)
    inverse = tf.constant((basis / deviations).T, tf.float64)
    volume = np.log(deviations).sum() + 0.5 * dim * np.log(2.0 * np.pi)
    return Truth(
        lambda x: -0.5 * tf.reduce_sum(tf.linalg.matvec(inverse, x) ** 2, -1) - volume,
        lambda count, rng: rng.normal(size=[count, dim]) @ root.T,
        shape=[dim],
        log_evidence=0.0,
    )


def independent(distribution, dim):
    """Returns the target of `dim` independent numbers from a distribution in scipy and in TFP."""
    of_scipy, of_tfp = distribution()
    return Truth(
        lambda x: tf.reduce_sum(of_tfp.log_prob(x), -1),
        lambda count, rng: of_scipy.rvs([count, dim], random_state=rng),
        shape=[dim],
        log_evidence=0.0,
    )


def student(nu):
    return stats.t(nu), tfd.StudentT(np.float64(nu), 0.0, 1.0)


def multivariate_t(nu, dim):
    eye = tf.linalg.LinearOperatorIdentity(dim, dtype=tf.float64)
    density = tfd.MultivariateStudentTLinearOperator(np.float64(nu), np.zeros(dim), eye)

    def draw(count, rng):
        return rng.normal(size=[count, dim]) / np.sqrt(rng.chisquare(nu, [count, 1]) / nu)

    return Truth(density.log_prob, draw, shape=[dim], log_evidence=0.0)


def funnel(dim, sd=3.0):
    def log_density(x):
        neck, rest = x[..., 0], x[..., 1:]
        density = tfd.Normal(np.float64(0.0), sd).log_prob(neck)
        scaled = tfd.Normal(np.float64(0.0), tf.exp(neck / 2.0)[..., tf.newaxis])
        return density + tf.reduce_sum(scaled.log_prob(rest), -1)

    def draw(count, rng):
        neck = sd * rng.normal(size=[count, 1])
        return np.concatenate([neck, np.exp(neck / 2) * rng.normal(size=[count, dim - 1])], 1)

    return Truth(log_density, draw, shape=[dim], log_evidence=0.0)


def banana(dim, bend, width=1.0):
    def log_density(x):
        first, second, rest = x[..., 0], x[..., 1], x[..., 2:]
        standard = tfd.Normal(np.float64(0.0), 1.0)
        density = standard.log_prob(first) + tf.reduce_sum(standard.log_prob(rest), -1)
        return density + tfd.Normal(bend * (first**2 - 1.0), width).log_prob(second)

    def draw(count, rng):
        x = rng.normal(size=[count, dim])
        x[:, 1] = width * x[:, 1] + bend * (x[:, 0] ** 2 - 1.0)
        return x

    return Truth(log_density, draw, shape=[dim], log_evidence=0.0)


def mixture(centres, widths, weights):
    centres = np.asarray(centres, np.float64)
    count, dim = centres.shape
    widths = np.broadcast_to(np.asarray(widths, np.float64), [count])
    weights = np.broadcast_to(np.asarray(weights, np.float64), [count]) / np.sum(
        np.broadcast_to(weights, [count])
    )
    density = tfd.MixtureSameFamily(
        tfd.Categorical(probs=weights),
        tfd.MultivariateNormalDiag(centres, widths[:, np.newaxis] * np.ones([1, dim])),
    )

    def draw(total, rng):
        k = rng.choice(count, total, p=weights)
        return centres[k] + widths[k, np.newaxis] * rng.normal(size=[total, dim])

    return Truth(density.log_prob, draw, shape=[dim], modes=centres, log_evidence=0.0)


def along(*positions, dim):
    """Returns centres at these positions on the main diagonal, [positions, dim]."""
    return np.outer(positions, np.ones(dim)) / np.sqrt(dim)


def grid():
    return mixture([[4.0 * i, 4.0 * j] for i in range(-2, 3) for j in range(-2, 3)], 0.3, 1.0)


def circle(count, radius, width):
    angle = 2.0 * np.pi * np.arange(count) / count
    return mixture(radius * np.stack([np.cos(angle), np.sin(angle)], 1), width, 1.0)


def shell(dim, radius, width):
    def log_density(x):
        return -0.5 * ((tf.norm(x, axis=-1) - radius) / width) ** 2

    r = np.linspace(max(0.0, radius - 10 * width), radius + 10 * width, 20_001)
    mass = r ** (dim - 1) * np.exp(-0.5 * ((r - radius) / width) ** 2)
    surface = np.log(2.0) + 0.5 * dim * np.log(np.pi) - special.gammaln(0.5 * dim)
    evidence = surface + np.log(np.trapezoid(mass, r))

    def draw(count, rng):
        cumulative = np.cumsum(mass) / mass.sum()
        lengths = np.interp(rng.random(count), cumulative, r)
        x = rng.normal(size=[count, dim])
        return x * (lengths / np.linalg.norm(x, axis=1))[:, np.newaxis]

    return Truth(log_density, draw, shape=[dim], log_evidence=float(evidence))


def prior(make):
    """Returns a target with one constrained parameter, which the data do not inform."""
    distribution = make()
    joint = tfd.JointDistributionNamed(
        {"x": make(), "y": tfd.Normal(np.float64(0.0), np.float64(1.0))}
    )

    def draw(count, rng):
        return {"x": distribution.sample(count, seed=int(rng.integers(2**31))).numpy()}

    return Truth(joint, draw, {"y": 0.0}, log_evidence=float(stats.norm.logpdf(0.0)))


def poisson():
    counts = np.array([3.0, 5.0, 4.0, 8.0, 2.0])
    joint = tfd.JointDistributionNamed(
        {
            "rate": tfd.Gamma(np.float64(2.0), np.float64(1.0)),
            "n": lambda rate: tfd.Sample(tfd.Poisson(rate), 5),
        }
    )
    evidence = special.gammaln(24) - 24 * np.log(6) - special.gammaln(counts + 1).sum()
    return Truth(
        joint, lambda count, rng: {"rate": rng.gamma(24.0, 1 / 6.0, count)}, {"n": counts},
        log_evidence=float(evidence),
    )  # fmt: skip


def truncated():
    joint = tfd.JointDistributionNamed(
        {"p": tfd.Uniform(np.float64(0.0), np.float64(1.0)), "y": lambda p: tfd.Normal(p, 0.2)}
    )
    low, high = stats.norm.cdf([0.0, 1.0], 2.0, 0.2)

    def draw(count, rng):
        return {"p": stats.norm.ppf(low + (high - low) * rng.random(count), 2.0, 0.2)}

    return Truth(joint, draw, {"y": 2.0}, log_evidence=float(np.log(high - low)))


def regression(rows, dim, scale):
    rng = np.random.default_rng(0)
    x = scale * rng.normal(size=[rows, dim])
    y = x @ np.ones(dim) + rng.normal(size=rows)
    joint = tfd.JointDistributionNamed(
        {
            "b": tfd.Sample(tfd.Normal(np.float64(0.0), np.float64(10.0)), dim),
            "y": lambda b: tfd.Independent(tfd.Normal(tf.linalg.matvec(x, b), np.float64(1.0)), 1),
        }
    )
    covariance = np.linalg.inv(x.T @ x + np.eye(dim) / 100.0)
    mean, root = covariance @ x.T @ y, np.linalg.cholesky(covariance)
    # N(y; 0, I + 100 x x^T) without that matrix, which is badly conditioned.
    misfit = y @ (y - x @ mean)
    volume = np.linalg.slogdet(np.eye(dim) + 100.0 * x.T @ x)[1]
    evidence = -0.5 * (misfit + volume + rows * np.log(2.0 * np.pi))
    return Truth(
        joint, lambda count, rng: {"b": mean + rng.normal(size=[count, dim]) @ root.T}, {"y": y},
        log_evidence=float(evidence),
    )  # fmt: skip


_F = np.float64
_PRIORS = {
    "Gamma": lambda: tfd.Gamma(_F(0.5), _F(1.0)),
    "Exponential": lambda: tfd.Exponential(_F(2.0)),
    "Beta, U-shaped": lambda: tfd.Beta(_F(0.5), _F(0.5)),
    "Beta": lambda: tfd.Beta(_F(2.0), _F(5.0)),
    "Dirichlet": lambda: tfd.Dirichlet(np.array([0.5, 1.0, 5.0])),
    "Dirichlet, 10": lambda: tfd.Dirichlet(np.ones(10)),
    "LKJ": lambda: tfd.LKJ(3, _F(1.0)),
    "CholeskyLKJ": lambda: tfd.CholeskyLKJ(4, _F(2.0)),
    "Wishart": lambda: tfd.WishartTriL(_F(5.0), scale_tril=np.eye(3)),
    "HalfCauchy": lambda: tfd.HalfCauchy(_F(0.0), _F(1.0)),
    "HalfNormal": lambda: tfd.HalfNormal(_F(1.0)),
    "InverseGamma": lambda: tfd.InverseGamma(_F(3.0), _F(1.0)),
    "Uniform": lambda: tfd.Uniform(_F(-1.0), _F(3.0)),
    "TruncatedNormal": lambda: tfd.TruncatedNormal(_F(0.0), _F(1.0), _F(-0.5), _F(np.inf)),
    "VonMises": lambda: tfd.VonMises(_F(0.0), _F(2.0)),
    "LogNormal": lambda: tfd.LogNormal(_F(0.0), _F(1.0)),
    "Weibull": lambda: tfd.Weibull(_F(2.0), _F(1.0)),
    "Pareto": lambda: tfd.Pareto(_F(3.0), _F(1.0)),
}

TARGETS: dict[str, Callable[[], Truth]] = {
    **{f"Gaussian, {d}": functools.partial(gaussian, d) for d in (2, 10, 50, 200)},
    **{f"ridge 1e8, {d}": functools.partial(gaussian, d, 1e8) for d in (2, 10, 50)},
    **{
        f"t({nu}), {d}": functools.partial(independent, functools.partial(student, nu), d)
        for nu, d in ((2, 1), (2, 10), (3, 2), (5, 10), (10, 20))
    },
    "multivariate t(2), 5": lambda: multivariate_t(2.0, 5),
    "multivariate t(5), 10": lambda: multivariate_t(5.0, 10),
    "Laplace, 5": lambda: independent(
        lambda: (stats.laplace(), tfd.Laplace(np.float64(0.0), 1.0)), 5
    ),
    "Gumbel, 5": lambda: independent(
        lambda: (stats.gumbel_r(), tfd.Gumbel(np.float64(0.0), 1.0)), 5
    ),
    "logistic, 20": lambda: independent(
        lambda: (stats.logistic(), tfd.Logistic(np.float64(0.0), 1.0)), 20
    ),
    **{f"funnel, {d}": functools.partial(funnel, d) for d in (2, 5, 10)},
    "mild funnel, 10": lambda: funnel(10, 1.0),
    "banana": lambda: banana(2, 1.0),
    "strong banana": lambda: banana(2, 3.0, 0.3),
    "banana, 20": lambda: banana(20, 1.0),
    "two near, 1": lambda: mixture(along(-2, 2, dim=1), 0.7, [0.5, 0.5]),
    "two far, 1": lambda: mixture(along(-10, 10, dim=1), [0.5, 1.0], [0.3, 0.7]),
    "two near, 10": lambda: mixture(along(-3, 3, dim=10), 1.0, [0.5, 0.5]),
    "two far, 10": lambda: mixture(along(-10, 10, dim=10), 1.0, [0.3, 0.7]),
    "two of 9 to 1, 4": lambda: mixture(along(-4, 4, dim=4), 1.0, [0.9, 0.1]),
    "wide and narrow, 2": lambda: mixture(along(0, 6, dim=2), [1.0, 0.05], [0.5, 0.5]),
    "wide and needle, 4": lambda: mixture(along(0, 6, dim=4), [1.0, 0.02], [0.5, 0.5]),
    "narrow within wide, 2": lambda: mixture(along(0, 0.5, dim=2), [1.0, 0.05], [0.5, 0.5]),
    "three, 5": lambda: mixture(np.eye(3, 5) * 6.0, [1.0, 0.5, 2.0], [0.2, 0.3, 0.5]),
    "25 on a grid": grid,
    "8 on a circle": lambda: circle(8, 5.0, 0.4),
    "5 spikes": lambda: mixture([[i] for i in range(5)], 0.01, [0.1, 0.2, 0.4, 0.2, 0.1]),
    **{f"shell, {d}": functools.partial(shell, d, 4.0, 0.5) for d in (2, 3, 5, 10)},
    "thin ring": lambda: shell(2, 4.0, 0.1),
    "Poisson's rate": poisson,
    "a share out of reach": truncated,
    "regression, 5": lambda: regression(100, 5, 1.0),
    "regression, 5, unscaled": lambda: regression(100, 5, 1000.0),
    "regression, 100": lambda: regression(300, 100, 1.0),
    **{f"prior: {name}": functools.partial(prior, make) for name, make in _PRIORS.items()},
}
