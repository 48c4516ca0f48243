"""The evidence by bridge sampling, whose variance is finite wherever two sets of draws overlap.

Importance sampling from a density that is too narrow somewhere has an infinite variance, and its
standard error does not show it. Source: Meng and Wong (1996). The standard error follows
Fruehwirth-Schnatter (2004), but is computed over chains instead of draws, so that it includes
autocorrelation.
"""

from typing import NamedTuple

import numpy as np

_ROUNDS = 100
_UNKNOWN = 0.5  # nats: with a larger standard error, the evidence counts as unknown


class Evidence(NamedTuple):
    """The log evidence in nats and its standard error; NaN and infinity if it is unknown."""

    value: float
    standard_error: float

    def __str__(self):
        if not np.isfinite(self.standard_error):
            return "unknown"
        return f"{self.value:.3f} +- {self.standard_error:.3f}"


UNKNOWN = Evidence(float("nan"), float("inf"))


def bridge(at_proposal: np.ndarray, at_states: np.ndarray) -> Evidence:
    """Returns the log evidence in nats, by a bridge between a proposal g and the posterior p.

    Args:
      at_proposal: log p - log g at independent draws of g, [n]; g is normalised, p is not.
      at_states: log p - log g at states of chains of p, [chains, kept]; g must not have been
        fitted to these chains.
    """
    chains, kept = at_states.shape
    at_states = at_states.ravel()
    centre = float(np.median(at_states))
    with np.errstate(over="ignore"):
        value, share = centre, 0.5
        for _ in range(_ROUNDS):
            of_g = _sigmoid(at_proposal - value, share)
            of_p = _sigmoid(value - at_states, 1.0 - share)
            step = np.log(of_g.mean() / of_p.mean()) if of_g.sum() and of_p.sum() else np.nan
            if not np.isfinite(step):
                return UNKNOWN
            value += step
            if abs(step) < 1e-9:
                break
    if not min(of_g.mean(), of_p.mean()) > 1e-100:
        return UNKNOWN
    by_chain = of_p.reshape(chains, kept)
    means = by_chain.mean(1)
    halves = by_chain[:, : kept // 2].mean() - by_chain[:, kept // 2 :].mean()
    variance = of_g.var(ddof=1) / len(of_g) / of_g.mean() ** 2
    # A drift that all chains share means that they have not converged, so it counts as an error.
    spread = max(means.var(ddof=1) / chains, halves**2 / 4.0)
    variance += spread / of_p.mean() ** 2
    error = float(np.sqrt(variance))
    return Evidence(float(value), error) if error < _UNKNOWN else UNKNOWN


def with_error(estimate: Evidence, error: float) -> Evidence:
    """Returns the estimate with another independent standard error, in nats, added to its own."""
    total = float(np.hypot(estimate.standard_error, error))
    return estimate._replace(standard_error=total) if total < _UNKNOWN else UNKNOWN


def _sigmoid(log_ratio, share):
    """Returns ratio / (share * ratio + 1 - share), without overflow."""
    return 1.0 / (share + (1.0 - share) * np.exp(np.minimum(-log_ratio, 700.0)))


def average(estimates: list[Evidence]) -> Evidence:
    """Returns the mean of independent estimates of one log evidence, unknown if one of them is."""
    values, errors = np.array(estimates).T
    if not np.isfinite(errors).all():
        return UNKNOWN
    disagreement = np.ptp(values) / 2.0
    error = np.sqrt((errors**2).sum()) / len(errors)
    return Evidence(float(values.mean()), float(max(error, disagreement / np.sqrt(len(errors)))))
