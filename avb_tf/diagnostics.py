"""Diagnostics of weighted draws and Markov chains; the only module that uses arviz."""

import functools
import warnings
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

PARETO_K_LIMIT = 0.7  # above it importance sampling is unreliable (Vehtari et al., 2024)
PARETO_K_SHARE = 0.1  # largest share of examples above the limit without a warning
_FEWEST_DRAWS = 25  # leaves five draws in the tail
_COORDINATES = 40  # most coordinates used for the largest R-hat


def pareto_k(log_weights: npt.ArrayLike) -> np.ndarray:
    """Returns the shape k of a generalised Pareto distribution fitted to the weights' right tail.

    Above `PARETO_K_LIMIT` neither the mean of the weights nor its standard error can be trusted,
    because rare draws that have not occurred yet would dominate the mean.

    Args:
      log_weights: [draws, ...], log importance weights of independent draws.
    Returns:
      [...]: 0 if all weights are equal, infinity if a weight is not finite, and NaN everywhere if
      there are fewer than 25 draws.
    Source: Vehtari, Simpson, Gelman, Yao and Gabry (2024), "Pareto smoothed importance sampling".
    """
    log_weights = np.asarray(log_weights, np.float64)
    if len(log_weights) < _FEWEST_DRAWS:
        return np.full(log_weights.shape[1:], np.nan)
    bad = (np.isnan(log_weights) | (log_weights == np.inf)).any(0)
    bad |= (log_weights == -np.inf).all(0)
    # A very heavy tail overflows, and equal weights divide 0 by 0.
    with np.errstate(over="ignore", invalid="ignore"):
        k = _arviz().psislw(np.moveaxis(np.where(bad, 0.0, log_weights), 0, -1))[1]
    # Weights that are equal up to rounding have no tail; arviz returns infinity for them.
    equal = np.max(log_weights, 0) - np.min(log_weights, 0) < 1e-3
    return np.where(bad, np.inf, np.where(equal, 0.0, k))


def effective_sample_size(log_weights: npt.ArrayLike) -> np.ndarray:
    """Returns the effective sample size (sum w)^2 / sum w^2 over the draws, [...].

    It lies between 1 and the number of draws.

    Args:
      log_weights: [draws, ...], log importance weights.
    Source: Kish (1965).
    """
    log_weights = np.asarray(log_weights, np.float64)
    weights = np.exp(log_weights - np.max(log_weights, 0))
    return np.sum(weights, 0) ** 2 / np.sum(weights**2, 0)


@functools.cache
def _arviz() -> ModuleType:
    """Imports arviz on first use, because the import takes seconds."""
    with warnings.catch_warnings():
        # Version 0.23 warns about version 1.0, which needs Python 3.12.
        warnings.filterwarnings("ignore", "(?s).*ArviZ is undergoing", FutureWarning)
        import arviz
    return arviz


def convergence(states: npt.ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Returns rank-normalised split R-hat and bulk effective sample size, each [dim].

    Args:
      states: [chains, draws, dim], states of Markov chains.
    Source: Vehtari, Gelman, Simpson, Carpenter and Buerkner (2021).
    """
    states = np.asarray(states, np.float64)
    each = [states[..., i] for i in range(states.shape[-1])]
    arviz = _arviz()
    return np.array([arviz.rhat(x) for x in each]), np.array([arviz.ess(x) for x in each])


def largest_r_hat(states: np.ndarray) -> float:
    """Returns the largest rank-normalised split R-hat of any coordinate.

    In many dimensions it is computed only for the 40 coordinates whose chains differ most.

    Args:
      states: states of chains, [chains, kept, dim].
    """
    between = states.mean(1).var(0) / np.maximum(states.var(1).mean(0), 1e-300)
    widest = np.argsort(-between)[:_COORDINATES]
    rhat = _arviz().rhat
    return max(float(rhat(np.asarray(states[..., i], np.float64))) for i in widest)


def inference_data(
    posterior: Mapping[str, npt.ArrayLike],
    sample_stats: Mapping[str, npt.ArrayLike],
    observed: Mapping[str, npt.ArrayLike],
) -> Any:
    """Returns an `arviz.InferenceData` of independent draws, as one chain.

    Args:
      posterior: parameter -> its draws [draws, ...].
      sample_stats: statistic -> its values [draws].
      observed: variable -> the observed data [...].
    """
    one_chain = [
        {k: np.asarray(v)[np.newaxis] for k, v in d.items()} for d in (posterior, sample_stats)
    ]
    return _arviz().from_dict(
        posterior=one_chain[0], sample_stats=one_chain[1], observed_data=observed or None
    )
