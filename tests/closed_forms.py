"""Exact values that several tests use as references, and checks of estimates against them."""

import numpy as np


def gaussian_kl(mean, covariance):
    """Returns KL(N(mean, covariance) || N(0, I)) in nats."""
    log_determinant = np.linalg.slogdet(covariance)[1]
    return 0.5 * (np.trace(covariance) + mean @ mean - len(mean) - log_determinant)


def assert_moments(draws, mean, covariance, known_from=np.inf):
    """Asserts that the moments of independent `draws` are right within five standard errors.

    Args:
      draws: [count, n].
      mean: expected mean, [n].
      covariance: expected covariance, [n, n].
      known_from: number of other draws from which `mean` and `covariance` were estimated.
    """
    draws = np.asarray(draws, np.float64)
    centred = draws - draws.mean(0)
    products = centred[:, :, np.newaxis] * centred[:, np.newaxis]
    share = np.sqrt(1 / len(draws) + 1 / known_from)
    assert (np.abs(draws.mean(0) - mean) < 5 * share * draws.std(0)).all()
    assert (np.abs(products.mean(0) - covariance) < 5 * share * products.std(0)).all()
