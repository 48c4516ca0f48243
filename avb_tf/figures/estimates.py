"""Figures that show how estimates of log p(x) were obtained."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

_LEVELS = {  # estimates drawn as horizontal lines: label, colour and style
    "log_likelihood_quadrature": ("log p(x), quadrature", "black", "-"),
    "log_likelihood_ais": ("AIS lower bound", "#d94801", "-"),
    "elbo": ("ELBO", "#31a354", "--"),
    "elbo_adversary": ("ELBO with the adversary", "#31a354", "--"),
}


def convergence(
    curve: Sequence[int], bounds: np.ndarray, levels: Mapping[str, np.ndarray]
) -> Figure:
    """Draws importance-weighted bounds against their number of samples, other estimates as lines.

    Args:
      curve: numbers of samples.
      bounds: [len(curve), repeats, examples], in nats.
      levels: estimate -> [examples], in nats; names that are not in `_LEVELS` are ignored.
    """
    figure = Figure((5.6, 4.0), layout="constrained")
    axes = figure.subplots()
    for repeat in np.moveaxis(bounds, 1, 0).mean(-1):
        axes.plot(curve, repeat, color="#3182bd", alpha=0.4, lw=1)
    axes.plot(
        curve, bounds.mean((1, 2)), "o-", ms=4, color="#08519c",
        label=f"importance-weighted ({bounds.shape[1]} repeats)",
    )  # fmt: skip
    for name, (label, colour, style) in _LEVELS.items():
        if name in levels:
            axes.axhline(np.mean(levels[name]), color=colour, ls=style, lw=1.2, label=label)
    axes.set(
        xscale="log", xlabel="importance samples", ylabel="nats per example",
        title=f"Bounds on log p(x), mean over {bounds.shape[-1]} examples",
    )  # fmt: skip
    axes.legend(frameon=False, fontsize=8)
    return figure


def weights(log_weights: Mapping[str, np.ndarray]) -> Figure:
    """Draws histograms of log w - log mean w over all draws of all examples.

    Args:
      log_weights: sampler -> [draws, examples].
    """
    figure = Figure((5.6, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, values in log_weights.items():
        relative = values - np.logaddexp.reduce(values, 0) + np.log(len(values))
        low, high = np.percentile(relative, [0.5, 100])
        axes.hist(
            relative.ravel(), np.linspace(low, high, 40), density=True, histtype="step", lw=1.4,
            label=f"{name}: {len(values)} draws for each of {values.shape[1]} examples",
        )  # fmt: skip
    axes.axvline(0.0, color="grey", lw=0.8)
    axes.set(
        yscale="log", xlabel="log weight - log of the example's mean weight, nats",
        ylabel="density", title="Weights: the narrower, the better",
    )  # fmt: skip
    axes.legend(frameon=False, fontsize=8, loc="lower center")
    axes.set_ylim(bottom=1e-5)
    return figure


def annealing(acceptance: np.ndarray) -> Figure:
    """Draws the acceptance rate by temperature: the mean and the central 90% of the examples.

    Args:
      acceptance: [temperatures, examples].
    """
    figure = Figure((5.6, 3.2), layout="constrained")
    axes = figure.subplots()
    steps = np.arange(1, len(acceptance) + 1)
    low, high = np.percentile(acceptance, [5, 95], axis=1)
    axes.fill_between(steps, low, high, color="#9ecae1", lw=0, label="middle 90% of the examples")
    axes.plot(steps, acceptance.mean(1), color="#08519c", label="mean")
    axes.set(
        ylim=(0, 1),
        xlabel="temperature, from the start to p(z|x)",
        ylabel="acceptance",
        title="Acceptance along the annealing",
    )
    axes.legend(frameon=False, fontsize=8, loc="lower left")
    return figure
