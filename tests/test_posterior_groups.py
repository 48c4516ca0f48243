"""A regression with a thousand groups, beside importance sampling of its four other parameters."""

import numpy as np
from scipy import optimize
from tensorflow_probability import distributions as tfd

from avb_tf import fit_posterior

GROUPS, ROWS = 1000, 5
DRAWS = 20_000


def test_a_thousand_groups():
    """All means and standard deviations are within a tenth of a standard deviation."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=[GROUPS, ROWS]).astype(np.float32)
    y = rng.normal(1.0, 0.7, size=[GROUPS, 1]) + 0.5 * x + rng.normal(size=[GROUPS, ROWS])

    def observation(a, b, sigma):
        mean = a[..., np.newaxis] + b[..., np.newaxis, np.newaxis] * x
        return tfd.Independent(tfd.Normal(mean, sigma[..., np.newaxis, np.newaxis]), 2)

    joint = tfd.JointDistributionNamed(
        {
            "mu": tfd.Normal(0.0, 5.0),
            "tau": tfd.HalfNormal(2.0),
            "b": tfd.Normal(0.0, 5.0),
            "sigma": tfd.HalfNormal(2.0),
            "a": lambda mu, tau: tfd.Sample(tfd.Normal(mu, tau), GROUPS),
            "y": observation,
        }
    )
    fit = fit_posterior(joint, {"y": y.astype(np.float32)}, seconds=120, verbose=False)
    assert 0.3 < fit.diagnostics().distance < 0.45  # a Gaussian does not follow it all
    draws = fit.sample(DRAWS, seed=1)
    found = np.column_stack([draws[name] for name in ("mu", "tau", "b", "sigma", "a")])
    mean, sd = _by_importance_sampling(x.astype(float), y, rng)
    np.testing.assert_allclose((found.mean(0) - mean) / sd, 0.0, atol=0.1)
    np.testing.assert_allclose(found.std(0) / sd, 1.0, atol=0.1)


def _by_importance_sampling(x, y, rng):
    """Returns means and sds of mu, tau, b, sigma and a: given the first four, a is Gaussian."""
    mean_x, mean_y = x.mean(1), y.mean(1)
    within_x, within_y = x - mean_x[:, np.newaxis], y - mean_y[:, np.newaxis]
    square, product = (within_x**2).sum(), (within_x * within_y).sum()

    def log_density(rows):  # of mu, log tau, b and log sigma, without constants
        mu, log_tau, b, log_sigma = rows.T[:, :, np.newaxis]
        tau, sigma = np.exp(log_tau), np.exp(log_sigma)
        variance = tau**2 + sigma**2 / ROWS
        between = ((mean_y - b * mean_x - mu) ** 2 / variance + np.log(variance)).sum(1)[
            :, np.newaxis
        ]
        residual = (within_y**2).sum() - 2.0 * b * product + b**2 * square
        prior = (mu / 5.0) ** 2 + (b / 5.0) ** 2 + (tau / 2.0) ** 2 + (sigma / 2.0) ** 2
        likelihood = between + residual / sigma**2 + 2.0 * GROUPS * (ROWS - 1) * log_sigma
        return (-0.5 * (likelihood + prior) + log_tau + log_sigma)[:, 0]

    def negative(row):
        return -log_density(row[np.newaxis])[0]

    options = {"maxiter": 5000, "xatol": 1e-7, "fatol": 1e-7}
    mode = optimize.minimize(
        negative, [1.0, -0.3, 0.5, 0.0], method="Nelder-Mead", options=options
    ).x
    steps = 1e-3 * np.eye(4)
    hessian = [
        [
            sum(s * t * negative(mode + s * one + t * other) for s in (1, -1) for t in (1, -1))
            for one in steps
        ]
        for other in steps
    ]
    root = np.linalg.cholesky(np.linalg.inv(np.array(hessian) / 4e-6))
    z = rng.normal(size=[DRAWS, 4]) / np.sqrt(rng.chisquare(8, size=[DRAWS, 1]) / 8.0)
    rows = np.split(mode + z @ root.T, 100)
    log_weights = np.concatenate([log_density(part) for part in rows])
    log_weights += 6.0 * np.log1p((z**2).sum(1) / 8.0)  # of a t distribution with 8 degrees
    weights = np.exp(log_weights - log_weights.max())
    weights /= weights.sum()
    assert 1.0 / (weights**2).sum() > 0.5 * DRAWS
    mean = square_mean = 0.0
    for part, weight in zip(rows, np.split(weights, 100), strict=True):
        mu, tau, b, sigma = (part * [1.0, 0.0, 1.0, 0.0] + np.exp(part) * [0.0, 1.0, 0.0, 1.0]).T
        precision = 1.0 / tau**2 + ROWS / sigma**2
        effects = ROWS * (mean_y - np.outer(b, mean_x)) / sigma[:, np.newaxis] ** 2
        effects = (effects + (mu / tau**2)[:, np.newaxis]) / precision[:, np.newaxis]
        values = np.column_stack([mu, tau, b, sigma, effects])
        mean += weight @ values
        square_mean += weight @ values**2
        square_mean[4:] += weight @ (1.0 / precision)
    return mean, np.sqrt(square_mean - mean**2)
