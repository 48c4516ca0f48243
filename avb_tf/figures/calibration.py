"""The figure of simulation-based calibration: ranks, posterior predictive, coverage, recovery."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

_COLUMNS = 3
_SHOWN = 6  # features and coordinates at most
_POINTS = 300  # pairs in a panel


class Recovery(NamedTuple):
    """Parameters beside the posteriors of their data."""

    parameters: np.ndarray  # [pairs, dim]
    means: np.ndarray  # [pairs, dim]
    sds: np.ndarray  # [pairs, dim]


def check(
    ranks: Mapping[str, np.ndarray],
    outcomes: Mapping[str, np.ndarray],
    band: float,
    levels: np.ndarray,
    coverage: np.ndarray,
    coordinates: Sequence[str],
    recovery: Recovery,
) -> Figure:
    """Draws ranks, posterior predictive, coverage, and the recovery of each coordinate.

    Args:
      ranks: name -> [possible ranks], the share of this name's ranks up to each possible rank.
      outcomes: the same for new data among predicted data.
      band: half-width of the band that contains uniform ranks with probability 95%.
      levels: levels of central intervals, [levels].
      coverage: share of parameters in them, [levels, dim].
      coordinates: a name for each dimension.
      recovery: parameters and posteriors; the last coordinates are drawn.
    """
    shown = range(len(coordinates))[-_SHOWN:]
    rows = 1 + -(-len(shown) // _COLUMNS)
    figure = Figure((4.0 * _COLUMNS, 3.2 * rows), layout="constrained")
    panels = figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
    _ranks(panels[0], ranks, band)
    panels[0].set_title("simulation-based calibration", fontsize=9)
    panels[0].set_xlabel("rank of the parameters among draws, as a share")
    panels[1].set_visible(bool(outcomes))
    farthest = sorted(outcomes, key=lambda name: -np.abs(_difference(outcomes[name])).max())
    _ranks(panels[1], {name: outcomes[name] for name in farthest[:_SHOWN]}, band)
    panels[1].set_title("posterior predictive", fontsize=9)
    panels[1].set_xlabel("rank of new data among predicted ones, as a share")
    for name, shares in zip(coordinates, coverage.T, strict=True):
        panels[2].plot(levels, shares, linewidth=1.0, label=name)
    panels[2].plot([0.0, 1.0], [0.0, 1.0], color="0.7", zorder=0)
    panels[2].set_title("coverage", fontsize=9)
    panels[2].set_xlabel("central interval")
    panels[2].set_ylabel("share of parameters in it")
    for axes, i in zip(panels[_COLUMNS:], shown, strict=False):
        truth, mean, sd = (part[:_POINTS, i] for part in recovery)
        axes.errorbar(truth, mean, sd, fmt=".", markersize=2.0, linewidth=0.4)
        axes.axline((truth[0], truth[0]), slope=1.0, color="0.7", zorder=0)
        axes.set_title(f"recovery of {coordinates[i]}, unconstrained", fontsize=9)
        axes.set_xlabel("that made the data")
        axes.set_ylabel("posterior mean and sd")
    for axes in panels[_COLUMNS + len(shown) :]:
        axes.set_axis_off()
    return figure


def _ranks(axes, shares: Mapping[str, np.ndarray], band: float):
    """How far the distribution functions of ranks are from that of uniform ones."""
    for name, share in shares.items():
        uniform = np.arange(1, len(share) + 1) / len(share)
        axes.plot(uniform, _difference(share), linewidth=1.0, label=name)
    axes.axhspan(-band, band, color="0.9", zorder=0, label="95% of uniform ranks")
    axes.set_ylabel("distribution minus uniform")
    axes.legend(fontsize=6, ncols=2)


def _difference(share):
    return share - np.arange(1, len(share) + 1) / len(share)
