"""The figure of ranks in simulation-based calibration."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure


def ranks(shares: Mapping[str, np.ndarray], band: float) -> Figure:
    """Draws the distribution function of the ranks minus the uniform distribution function.

    Args:
      shares: name -> [possible ranks], the share of this name's ranks up to each possible rank.
      band: half-width of the band that contains uniform ranks with probability 95%.
    """
    figure = Figure((6.0, 4.0), layout="constrained")
    axes = figure.subplots()
    for name, share in shares.items():
        uniform = np.arange(1, len(share) + 1) / len(share)
        axes.plot(uniform, share - uniform, linewidth=1.0, label=name)
    axes.axhspan(-band, band, color="0.9", zorder=0, label="95% of uniform ranks")
    axes.set_xlabel("rank of the parameters among draws, as a share")
    axes.set_ylabel("distribution function minus the uniform one")
    axes.set_title("Ranks of true parameters: calibrated inside the band", fontsize=10)
    axes.legend(fontsize=7, ncols=2)
    return figure
