"""Computes how often the best possible test flags data with wrong noise, for one model.

    .venv/bin/python -m tests.campaigns.amortised_power

The model is the benchmark's Gaussian linear uniform. Its noisy data y + 2 (y - other), as in
`amortised.misspecification`, have a known density, so the most powerful test is known, too: the
likelihood ratio (Neyman and Pearson). No test with as many false alarms flags more.
"""

import numpy as np
from scipy import stats

SCALE = np.sqrt(0.1)  # of the noise
LEVEL = 0.05  # rate of false alarms
COUNT = 200_000  # data sets of each kind


def log_density(y: np.ndarray, scale: float) -> np.ndarray:
    """Returns log p(y) in nats, [n], for noise of this scale and y [n, 10]."""
    high, low = stats.norm.cdf((y + 1.0) / scale), stats.norm.cdf((y - 1.0) / scale)
    return np.log(np.maximum(high - low, 1e-300) / 2.0).sum(1)


def power(rng: np.random.Generator) -> float:
    """Returns the share of noisy data sets that the likelihood ratio flags."""
    theta = rng.uniform(-1.0, 1.0, (COUNT, 10))
    own, other = SCALE * rng.normal(size=(2, COUNT, 10))
    larger = np.sqrt(3.0**2 + 2.0**2) * SCALE  # the scale of 3 own - 2 other

    def ratio(y):
        return log_density(y, larger) - log_density(y, SCALE)

    threshold = np.quantile(ratio(theta + own), 1.0 - LEVEL)
    return float((ratio(theta + 3.0 * own - 2.0 * other) > threshold).mean())


if __name__ == "__main__":
    print(f"{power(np.random.default_rng(0)):.3f}")
