"""Estimates log p(x) by AIS, with errors and diagnostics, for `AVB.log_likelihood`."""

from typing import Any, NamedTuple

import numpy as np

from avb_tf import diagnostics
from avb_tf.likelihood_estimation import ais, chunks


class LogLikelihood(NamedTuple):
    """Estimates of log p(x) in nats by annealed importance sampling, lower bounds in expectation.

        log_p = model.log_likelihood(x)
        print(log_p)  # the mean with its standard error, diagnostics and warnings
        log_p.values, log_p.errors  # of each example

    Attributes:
      values: [examples], the estimates.
      errors: [examples], the standard error of each value, estimated from its chains; NaN with
        a single chain.
      effective_sample_size: [examples], from 1 to the number of chains.
      pareto_k: [examples]; above 0.7 a value and its error cannot be trusted. NaN with fewer than
        25 chains.
      acceptance: [temperatures], the acceptance rate, mean over chains and examples.
      chains: number of chains for each example.
    """

    values: np.ndarray
    errors: np.ndarray
    effective_sample_size: np.ndarray
    pareto_k: np.ndarray
    acceptance: np.ndarray
    chains: int

    @property
    def mean(self) -> float:
        """Mean of the values over the examples."""
        return float(self.values.mean())

    @property
    def standard_error(self) -> float:
        """Standard error of the mean, from the spread of the examples; NaN for one example."""
        spread = self.values.std(ddof=1) if len(self.values) > 1 else np.nan
        return float(spread / np.sqrt(len(self.values)))

    @property
    def warnings(self) -> list[str]:
        """Reasons not to trust the values."""
        warnings = []
        share = float(np.mean(self.pareto_k > diagnostics.PARETO_K_LIMIT))
        if share > diagnostics.PARETO_K_SHARE:
            warnings.append(
                f"Pareto k is above {diagnostics.PARETO_K_LIMIT} for {share:.0%} of the examples: "
                "log p(x) is likely higher; use more temperatures"
            )
        if self.acceptance.min() < 0.2:
            warnings.append(
                f"at some temperature {self.acceptance.min():.0%} of the transitions are accepted: "
                "the chains hardly move; use more temperatures"
            )
        return warnings

    def __str__(self) -> str:
        error = np.sqrt(np.sum(self.errors**2)) / len(self.errors)
        lines = [
            f"log p(x) = {self.mean:.4f} +- {self.standard_error:.4f} nats over {len(self.values)} "
            f"examples, by AIS with {self.chains} chains and {len(self.acceptance)} temperatures",
            f"error of AIS {error:.4f}, effective chains {self.effective_sample_size.mean():.1f}, "
            f"acceptance {self.acceptance.min():.2f} to {self.acceptance.max():.2f}",
        ]
        return "\n".join([*lines, *(f"Warning: {warning}" for warning in self.warnings)])


def log_likelihood(
    model: Any, x: Any, temperatures: int, chains: int, leapfrog_steps: int, verbose: bool
) -> LogLikelihood:
    """Estimates log p(x) of each example by AIS.

    Args:
      model: an `AVB`.
      x: [examples, *event].
      temperatures: number of temperatures.
      chains: chains for each example.
      leapfrog_steps: leapfrog steps at each temperature.
      verbose: whether to show a progress bar.
    """
    sampler = ais.kept_sampler(
        model, temperatures=temperatures, chains=chains, leapfrog_steps=leapfrog_steps
    )
    size = ais.examples_at_once(model, chains)
    starts = range(0, len(x), size)
    label = f"log p(x) by annealed importance sampling, {len(x)} examples"
    parts = [
        sampler.forward(x[i : i + size], seed=i // size)
        for i in (chunks.tracked(starts, label) if verbose else starts)
    ]
    log_weights = np.concatenate([part.log_weights for part in parts], -1)
    effective = diagnostics.effective_sample_size(log_weights)
    # Of the mean weight, relative to its square.
    variance = (1.0 / effective - 1.0 / chains) * chains / (chains - 1 if chains > 1 else np.nan)
    return LogLikelihood(
        ais.lower_bound(log_weights),
        np.sqrt(np.maximum(variance, 0.0)),
        effective,
        diagnostics.pareto_k(log_weights),
        np.concatenate([part.acceptance for part in parts], -1).mean(-1),
        chains,
    )
