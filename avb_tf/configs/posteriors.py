"""Posteriors of fixed models: `avb_tf.fit_posterior` compared with NUTS and Gaussians.

avb-tf --config=posteriors:eight_schools --mode=train_and_evaluate
avb-tf --config=posteriors --config.model=path.py:function

The name after the colon is a function in this file that returns a model. You may also name a
function in a file of your own, which returns a pinned TFP joint distribution, a pair (joint,
observed), or a `Problem`.
"""

import dataclasses
import functools
from typing import TYPE_CHECKING

import ml_collections
import numpy as np

from avb_tf.settings import posterior

if TYPE_CHECKING:
    from tensorflow_probability import distributions as tfd

    from avb_tf.posteriors.models import Problem

# Rubin (1981): effects of coaching in eight schools, and their standard errors.
EFFECTS = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], np.float32)
ERRORS = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], np.float32)
# Standard errors of the effects / 10, from the notebook of AVB's authors.
NOTEBOOK_ERRORS = np.array([0.8, 0.5, 0.8, 0.6, 0.5, 0.6, 0.5, 0.4], np.float32)


def get_config(model: str = "eight_schools") -> ml_collections.ConfigDict:
    return posterior.config(f"{__file__}:{model}")


def eight_schools() -> "Problem":
    """Eight schools as in Stan, non-centred: mu, log tau and the standardised effects."""
    import tensorflow as tf
    from tensorflow_probability import distributions as tfd

    from avb_tf.posteriors.models import Problem

    joint = tfd.JointDistributionNamed(
        {
            "mu": tfd.Normal(0.0, 5.0),
            "tau": tfd.HalfCauchy(0.0, 5.0),
            "eta": tfd.Sample(tfd.Normal(0.0, 1.0), 8),
            "y": lambda eta, tau, mu: tfd.Independent(
                tfd.Normal(mu[..., tf.newaxis] + tau[..., tf.newaxis] * eta, ERRORS), 1
            ),
        }
    )
    return Problem(joint, {"y": EFFECTS}, exact=functools.partial(_eight_schools, centred=False))


def eight_schools_centred() -> "Problem":
    """Eight schools, centred: mu, log tau and the effects; a funnel forms where tau is small."""
    from tensorflow_probability import distributions as tfd

    from avb_tf.posteriors.models import Problem

    joint = tfd.JointDistributionNamed(
        {
            "mu": tfd.Normal(0.0, 5.0),
            "tau": tfd.HalfCauchy(0.0, 5.0),
            "theta": lambda tau, mu: tfd.Sample(tfd.Normal(mu, tau), 8),
            "y": lambda theta: tfd.Independent(tfd.Normal(theta, ERRORS), 1),
        }
    )
    return Problem(joint, {"y": EFFECTS}, exact=functools.partial(_eight_schools, centred=True))


def eight_schools_two_modes() -> "Problem":
    """The AVB authors' notebook model: tau may be negative, and its sign is not identified."""
    import tensorflow as tf
    from tensorflow_probability import distributions as tfd

    from avb_tf.posteriors.models import Problem

    standard = tfd.Normal(0.0, 1.0)
    joint = tfd.JointDistributionNamed(
        {
            "mu": standard,
            "tau": standard,
            "eta": tfd.Sample(standard, 8),
            "y": lambda eta, tau, mu: tfd.Independent(
                tfd.Normal(mu[..., tf.newaxis] + tau[..., tf.newaxis] * eta, NOTEBOOK_ERRORS), 1
            ),
        }
    )

    def exact(count, seed):
        rng = np.random.default_rng(seed)
        y, errors = EFFECTS / 10.0, NOTEBOOK_ERRORS

        def log_density(mu, tau):
            variance = errors**2 + tau[..., None] ** 2
            quadratic = (y - mu[..., None]) ** 2 / variance
            return -0.5 * (mu**2 + tau**2 + (quadratic + np.log(variance)).sum(-1))

        mu, tau = _from_grid(log_density, [(-4.0, 5.0), (-5.0, 5.0)], count, rng)
        precision = 1.0 + (tau[:, None] / errors) ** 2
        mean = tau[:, None] * (y - mu[:, None]) / errors**2 / precision
        eta = mean + rng.normal(size=mean.shape) / np.sqrt(precision)
        return {"mu": mu, "tau": tau, "eta": eta}

    return Problem(
        joint,
        {"y": EFFECTS / 10.0},
        exact=exact,
        statistics=lambda draws: {"share of tau > 0": np.mean(draws["tau"] > 0)},
        log_evidence=-12.71081,  # by quadrature
    )


def gauss_unknown_scale() -> "Problem":
    """Mean and scale of a Gaussian, given twelve draws."""
    from tensorflow_probability import distributions as tfd

    from avb_tf.posteriors.models import Problem

    data = np.random.default_rng(1).normal(2.0, 1.5, 12).astype(np.float32)
    joint = tfd.JointDistributionNamed(
        {
            "mu": tfd.Normal(0.0, 10.0),
            "sigma": tfd.HalfNormal(5.0),
            "y": lambda sigma, mu: tfd.Sample(tfd.Normal(mu, sigma), len(data)),
        }
    )

    def exact(count, seed):
        def log_density(mu, log_sigma):
            sigma = np.exp(log_sigma)
            squares = ((data - mu[..., None]) ** 2).sum(-1)
            prior = -0.5 * (mu / 10.0) ** 2 - 0.5 * (sigma / 5.0) ** 2
            return prior - 0.5 * squares / sigma**2 + (1 - len(data)) * log_sigma

        rng = np.random.default_rng(seed)
        mu, log_sigma = _from_grid(log_density, [(-3.0, 7.0), (-1.5, 2.5)], count, rng)
        return {"mu": mu, "sigma": np.exp(log_sigma)}

    return Problem(joint, {"y": data}, exact=exact)


def rosenbrock() -> "Problem":
    """exp(-(x1 - 1)^2 - (x2^2 - x1)^2): two branches that meet."""
    return _in_the_plane(
        lambda x1, x2: -((x1 - 1.0) ** 2) - (x2**2 - x1) ** 2, [(-4.0, 5.5), (-3.5, 3.5)]
    )


def torus() -> "Problem":
    """exp(-(|x|^2 - 2)^2): a ring."""
    from scipy import stats

    def statistics(x):
        angle = np.arctan2(x[:, 1], x[:, 0])
        uniform = stats.uniform(-np.pi, 2.0 * np.pi)
        return {"Kolmogorov-Smirnov p of a uniform angle": stats.kstest(angle, uniform.cdf).pvalue}

    ring = _in_the_plane(lambda x1, x2: -((x1**2 + x2**2 - 2.0) ** 2), [(-2.6, 2.6), (-2.6, 2.6)])
    return dataclasses.replace(ring, statistics=statistics)


def banana() -> "Problem":
    """A bent Gaussian with standard deviations 10 and 1: x2 rises with x1^2."""
    from avb_tf.posteriors.models import Problem

    def log_density(x):
        x1, x2 = x[..., 0], x[..., 1]
        return -0.5 * (x1 / 10.0) ** 2 - 0.5 * (x2 - 0.03 * (x1**2 - 100.0)) ** 2

    def exact(count, seed):
        noise = np.random.default_rng(seed).normal(size=[count, 2]) * [10.0, 1.0]
        return noise + np.stack([0.0 * noise[:, 0], 0.03 * (noise[:, 0] ** 2 - 100.0)], -1)

    return Problem(log_density, shape=[2], exact=exact)


def funnel() -> "Problem":
    """Neal's funnel: v has standard deviation 3, and nine x have scale exp(v / 2)."""
    import tensorflow as tf
    from tensorflow_probability import distributions as tfd

    from avb_tf.posteriors.models import Problem

    def log_density(v, x):
        scale = tf.exp(v / 2.0)[..., tf.newaxis]
        return tfd.Normal(0.0, 3.0).log_prob(v) + tf.reduce_sum(
            tfd.Normal(0.0, scale).log_prob(x), -1
        )

    def exact(count, seed):
        rng = np.random.default_rng(seed)
        v = 3.0 * rng.normal(size=count)
        return {"v": v, "x": np.exp(v / 2.0)[:, None] * rng.normal(size=[count, 9])}

    return Problem(log_density, shape={"v": [], "x": [9]}, exact=exact)


def mixture() -> "Problem":
    """Means and weight of a mixture of two Gaussians, whose components are exchangeable."""
    import tensorflow as tf
    from tensorflow_probability import distributions as tfd

    from avb_tf.posteriors.models import Problem

    rng = np.random.default_rng(2)
    data = np.where(rng.random(30) < 0.5, -1.2, 1.2) + rng.normal(size=30)
    data = data.astype(np.float32)

    def components(weight, mu):
        weights = tf.stack([weight, 1.0 - weight], -1)
        return tfd.MixtureSameFamily(tfd.Categorical(probs=weights), tfd.Normal(mu, 1.0))

    joint = tfd.JointDistributionNamed(
        {
            "mu": tfd.Sample(tfd.Normal(0.0, 3.0), 2),
            "weight": tfd.Beta(2.0, 2.0),
            "y": lambda weight, mu: tfd.Sample(components(weight, mu), len(data)),
        }
    )

    def exact(count, seed):
        def log_density(mu1, mu2, logit):
            weight = 1.0 / (1.0 + np.exp(-logit))
            prior = -(mu1**2 + mu2**2) / 18.0 + 2.0 * np.log(weight * (1.0 - weight))
            return prior + sum(
                np.log(
                    weight * np.exp(-0.5 * (y - mu1) ** 2)
                    + (1.0 - weight) * np.exp(-0.5 * (y - mu2) ** 2)
                )
                for y in data
            )

        box = [(-5.0, 5.0), (-5.0, 5.0), (-6.0, 6.0)]
        rng = np.random.default_rng(seed)
        mu1, mu2, logit = _from_grid(log_density, box, count, rng, 150)
        return {"mu": np.stack([mu1, mu2], -1), "weight": 1.0 / (1.0 + np.exp(-logit))}

    return Problem(joint, {"y": data}, exact=exact)


def logistic_regression() -> tuple["tfd.JointDistribution", dict[str, np.ndarray]]:
    """Logistic regression: ten features of the first 150 patients in the breast cancer data."""
    import tensorflow as tf
    from sklearn.datasets import load_breast_cancer
    from tensorflow_probability import distributions as tfd

    x, y = map(np.asarray, load_breast_cancer(return_X_y=True))
    x = x[:150, :10]
    x = np.concatenate([np.ones([150, 1]), (x - x.mean(0)) / x.std(0)], 1).astype(np.float32)
    joint = tfd.JointDistributionNamed(
        {
            "beta": tfd.Sample(tfd.Normal(0.0, 2.0), 11),
            "y": lambda beta: tfd.Independent(tfd.Bernoulli(logits=tf.linalg.matvec(x, beta)), 1),
        }
    )
    return joint, {"y": y[:150].astype(np.int32)}


def gaussian_process() -> tuple["tfd.JointDistribution", dict[str, np.ndarray]]:
    """Amplitude, length scale and noise of a Gaussian process through 25 points."""
    import tensorflow as tf
    from tensorflow_probability import distributions as tfd

    rng = np.random.default_rng(3)
    x = np.sort(rng.uniform(-3.0, 3.0, 25))
    y = np.sin(1.5 * x) + 0.3 * rng.normal(size=25)
    squares = ((x[:, None] - x) ** 2).astype(np.float32)

    def process(noise, length, amplitude):
        amplitude, length, noise = (
            v[..., tf.newaxis, tf.newaxis] for v in (amplitude, length, noise)
        )
        kernel = amplitude**2 * tf.exp(-0.5 * squares / length**2)
        covariance = kernel + (noise**2 + 1e-5) * tf.eye(25)
        return tfd.MultivariateNormalTriL(tf.zeros(25), tf.linalg.cholesky(covariance))

    joint = tfd.JointDistributionNamed(
        {
            "amplitude": tfd.HalfNormal(2.0),
            "length": tfd.InverseGamma(3.0, 3.0),
            "noise": tfd.HalfNormal(1.0),
            "y": process,
        }
    )
    return joint, {"y": y.astype(np.float32)}


def autoregression() -> tuple["tfd.JointDistribution", dict[str, np.ndarray]]:
    """An AR(1) process of 60 steps with a coefficient between -1 and 1."""
    import tensorflow as tf
    from tensorflow_probability import distributions as tfd

    rng = np.random.default_rng(4)
    series = [0.0]
    for _ in range(60):
        series.append(0.3 + 0.8 * series[-1] + 0.5 * rng.normal())
    series = np.array(series, np.float32)

    def steps(sigma, phi, constant):
        mean = constant[..., tf.newaxis] + phi[..., tf.newaxis] * series[:-1]
        return tfd.Independent(tfd.Normal(mean, sigma[..., tf.newaxis]), 1)

    joint = tfd.JointDistributionNamed(
        {
            "constant": tfd.Normal(0.0, 1.0),
            "phi": tfd.Uniform(-1.0, 1.0),
            "sigma": tfd.HalfNormal(1.0),
            "y": steps,
        }
    )
    return joint, {"y": series[1:]}


def correlated_regression() -> "Problem":
    """Linear regression on nearly collinear features: posterior correlations of -0.998."""
    import tensorflow as tf
    from tensorflow_probability import distributions as tfd

    from avb_tf.posteriors.models import Problem

    rng = np.random.default_rng(5)
    common = rng.normal(size=[50, 1])
    x = np.concatenate([np.ones([50, 1]), common + 0.03 * rng.normal(size=[50, 2])], 1)
    y = x @ [1.0, 2.0, -1.0] + rng.normal(size=50)
    features = x.astype(np.float32)
    joint = tfd.JointDistributionNamed(
        {
            "beta": tfd.Sample(tfd.Normal(0.0, 10.0), 3),
            "y": lambda beta: tfd.Independent(tfd.Normal(tf.linalg.matvec(features, beta), 1.0), 1),
        }
    )

    def exact(count, seed):
        covariance = np.linalg.inv(x.T @ x + np.eye(3) / 100.0)
        rng = np.random.default_rng(seed)
        return {"beta": rng.multivariate_normal(covariance @ x.T @ y, covariance, count)}

    def statistics(draws):
        correlation = np.corrcoef(np.transpose(draws["beta"]))
        pairs = [(0, 1), (0, 2), (1, 2)]
        return {f"correlation of beta[{i}] and beta[{j}]": correlation[i, j] for i, j in pairs}

    return Problem(joint, {"y": y.astype(np.float32)}, exact=exact, statistics=statistics)


def _eight_schools(count, seed, centred):
    """Draws exactly: (mu, log tau) on a grid with the effects integrated out, then the effects."""
    rng = np.random.default_rng(seed)

    def log_density(mu, log_tau):
        tau = np.exp(log_tau)
        variance = ERRORS**2 + tau[..., None] ** 2
        quadratic = (EFFECTS - mu[..., None]) ** 2 / variance
        prior = -0.5 * (mu / 5.0) ** 2 - np.log1p((tau / 5.0) ** 2) + log_tau
        return prior - 0.5 * (quadratic + np.log(variance)).sum(-1)

    mu, log_tau = _from_grid(log_density, [(-18.0, 26.0), (-9.0, 5.5)], count, rng)
    tau = np.exp(log_tau)
    precision = 1.0 + (tau[:, None] / ERRORS) ** 2
    mean = tau[:, None] * (EFFECTS - mu[:, None]) / ERRORS**2 / precision
    eta = mean + rng.normal(size=mean.shape) / np.sqrt(precision)
    if centred:
        return {"mu": mu, "tau": tau, "theta": mu[:, None] + tau[:, None] * eta}
    return {"mu": mu, "tau": tau, "eta": eta}


def _in_the_plane(log_density, box):
    from avb_tf.posteriors.models import Problem

    def exact(count, seed):
        return np.stack(_from_grid(log_density, box, count, np.random.default_rng(seed)), -1)

    return Problem(lambda x: log_density(x[..., 0], x[..., 1]), shape=[2], exact=exact)


def _from_grid(log_density, box, count, rng, points=800):
    """Draws from a low-dimensional density: a cell of a fine grid, then a uniform point in it."""
    edges = [np.linspace(low, high, points + 1) for low, high in box]
    centres = [0.5 * (edge[1:] + edge[:-1]) for edge in edges]
    log_p = log_density(*np.meshgrid(*centres, indexing="ij"))
    p = np.exp(log_p - log_p.max()).ravel()
    cells = np.unravel_index(rng.choice(p.size, count, p=p / p.sum()), log_p.shape)
    return [
        centre[cell] + (edge[1] - edge[0]) * (rng.random(count) - 0.5)
        for centre, edge, cell in zip(centres, edges, cells, strict=True)
    ]
