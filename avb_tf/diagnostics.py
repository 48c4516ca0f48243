"""How far weighted draws can be trusted; the only module that uses arviz."""

import functools
import warnings
from types import ModuleType

import numpy as np

PARETO_K_LIMIT = 0.7  # above it importance sampling is unreliable (Vehtari et al., 2024)
_FEWEST_DRAWS = 25  # that leave five in the tail


def pareto_k(log_weights) -> np.ndarray:
    """Shape of the generalised Pareto distribution in the weights' right tail, [...].

    Above `PARETO_K_LIMIT` the mean of the weights is dominated by draws that were not made, and
    neither it nor its standard error can be trusted (Vehtari, Simpson, Gelman, Yao and Gabry,
    2024, "Pareto smoothed importance sampling").

    Args:
      log_weights: [draws, ...], the draws independent.
    Returns:
      0 where all weights are equal, infinity where some weight is not finite, and NaN throughout
      if there are fewer than 25 draws.
    """
    log_weights = np.asarray(log_weights, np.float64)
    if len(log_weights) < _FEWEST_DRAWS:
        return np.full(log_weights.shape[1:], np.nan)
    bad = (np.isnan(log_weights) | (log_weights == np.inf)).any(0)
    bad |= (log_weights == -np.inf).all(0)
    # A tail heavy beyond all numbers overflows, and one of equal weights divides 0 by 0.
    with np.errstate(over="ignore", invalid="ignore"):
        k = _arviz().psislw(np.moveaxis(np.where(bad, 0.0, log_weights), 0, -1))[1]
    # Rounding apart, equal weights have no tail, which arviz takes for an infinite one.
    equal = np.max(log_weights, 0) - np.min(log_weights, 0) < 1e-3
    return np.where(bad, np.inf, np.where(equal, 0.0, k))


def effective_sample_size(log_weights) -> np.ndarray:
    """(sum w)^2 / sum w^2 over the draws, [...]: from 1 to the number of draws (Kish, 1965).

    Args:
      log_weights: [draws, ...].
    """
    log_weights = np.asarray(log_weights, np.float64)
    weights = np.exp(log_weights - np.max(log_weights, 0))
    return np.sum(weights, 0) ** 2 / np.sum(weights**2, 0)


@functools.cache
def _arviz() -> ModuleType:
    """arviz, imported where first needed: it takes seconds."""
    with warnings.catch_warnings():
        # 0.23 announces 1.0, which needs Python 3.12.
        warnings.filterwarnings("ignore", "(?s).*ArviZ is undergoing", FutureWarning)
        import arviz
    return arviz


def convergence(states) -> tuple[np.ndarray, np.ndarray]:
    """Rank-normalised split R-hat and bulk effective sample size, each [dim].

    Vehtari, Gelman, Simpson, Carpenter and Buerkner (2021).

    Args:
      states: [chains, draws, dim].
    """
    states = np.asarray(states, np.float64)
    each = [states[..., i] for i in range(states.shape[-1])]
    arviz = _arviz()
    return np.array([arviz.rhat(x) for x in each]), np.array([arviz.ess(x) for x in each])


def inference_data(posterior, sample_stats, observed):
    """`arviz.InferenceData` of one chain of independent draws.

    Args:
      posterior: name -> [draws, ...].
      sample_stats: name -> [draws].
      observed: name -> [...].
    """
    one_chain = [
        {k: np.asarray(v)[np.newaxis] for k, v in d.items()} for d in (posterior, sample_stats)
    ]
    return _arviz().from_dict(
        posterior=one_chain[0], sample_stats=one_chain[1], observed_data=observed or None
    )
