"""Pair plots of posteriors."""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

_COLOURS = matplotlib.color_sequences["tab10"]
_POINTS = 1000  # draws of each set in a panel
_COORDINATES = 6  # most coordinates drawn: the last ones, which tend to be scales and means


def pairs(
    draws: Mapping[str, np.ndarray], coordinates: Sequence[str], title: str | None = None
) -> Figure:
    """Plots each pair of coordinates of several sets of draws, with densities on the diagonal.

    Args:
      draws: name -> [n, dim]. The first set is drawn on top, and the axes span the central 99.8% of
        the last set.
      coordinates: names of the dim coordinates.
      title: title of the legend.
    """
    shown = list(range(len(coordinates)))[-_COORDINATES:]
    last = list(draws.values())[-1]
    limits = np.quantile(last, [0.001, 0.999], axis=0).T
    size = max(3.0, 1.6 * len(shown))
    figure = Figure((size, size), layout="constrained")
    panels = figure.subplots(len(shown), len(shown), squeeze=False)
    for row, i in enumerate(shown):
        for column, j in enumerate(shown):
            axes = panels[row, column]
            if column > row:
                axes.set_axis_off()
                continue
            for order, (name, values) in enumerate(draws.items()):
                style = {"color": _COLOURS[order], "label": name, "zorder": 3 - 0.1 * order}
                if i == j:
                    bins = np.linspace(limits[i, 0], limits[i, 1], 40)
                    axes.hist(values[:, i], bins, density=True, histtype="step", **style)
                else:
                    points = values[:_POINTS, [j, i]].T
                    axes.plot(*points, ".", markersize=1.2, alpha=0.5, **style)
                    axes.set_ylim(*limits[i])
            axes.set_xlim(*limits[j])
            axes.tick_params(labelsize=6)
            if i == j or column:
                axes.set_yticks([])
            axes.set_xlabel(coordinates[j] if i == shown[-1] else "", fontsize=8)
            axes.set_ylabel(coordinates[i] if column == 0 and row else "", fontsize=8)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper right", fontsize=9, title=title)
    return figure
