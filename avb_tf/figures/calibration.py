"""Ranks of simulation-based calibration."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure


def ranks(shares: Mapping[str, np.ndarray], band: float) -> Figure:
    """How far the distribution functions of ranks are from that of uniform ones.

    Args:
      shares: name -> [possible ranks], share of the ranks of this kind up to each.
      band: largest deviation of uniform ranks with probability 95%.
    """
    figure = Figure((6.0, 4.0), layout="constrained")
    axes = figure.subplots()
    for name, share in shares.items():
        uniform = np.arange(1, len(share) + 1) / len(share)
        axes.plot(uniform, share - uniform, linewidth=1.0, label=name)
    axes.axhspan(-band, band, color="0.9", zorder=0, label="95% of uniform ranks")
    axes.set_xlabel("rank of the parameters among draws, as a share")
    axes.set_ylabel("distribution function less the uniform one")
    axes.set_title("Ranks of true parameters: calibrated inside the band", fontsize=10)
    axes.legend(fontsize=7, ncols=2)
    return figure
