"""The figure that compares methods."""

from typing import Any

import matplotlib
from matplotlib.figure import Figure

_COLOURS = matplotlib.color_sequences["tab10"]
_BLUE, _GREY = _COLOURS[0], _COLOURS[7]


def log_likelihoods(rows: list[dict[str, Any]]) -> Figure:
    """Draws how far each method is from `vae` in log p(x), and below it log p(x) and the bound.

    There is a column for each data set. The differences, paired by example, show which method is
    better. The errors of log p(x) itself come mostly from the choice of examples, which all methods
    share.

    Args:
      rows: rows as `commands.compare.row` returns them.
    """
    data = list(dict.fromkeys((row["data"], row["split"]) for row in rows))
    groups = [[row for row in rows if (row["data"], row["split"]) == key] for key in data]
    paired = any(row["above_vae"] for row in rows)
    tallest = max(map(len, groups))
    panel = 0.42 * tallest + 0.9
    figure = Figure((4.8 * len(data) + 0.6, panel * (1 + paired) + 1.1), layout="constrained")
    panels = figure.subplots(1 + paired, len(data), squeeze=False)
    for column, (key, of_data) in enumerate(zip(data, groups, strict=True)):
        if paired:
            panels[0, column].set_title(f"{key[0]} ({key[1]}): log p(x) minus that of vae")
            _differences(panels[0, column], [row for row in of_data if row["above_vae"]][::-1])
        panels[-1, column].set_title(f"{key[0]} ({key[1]}): log p(x) and the bound")
        _absolute(panels[-1, column], of_data[::-1])
    figure.legend(
        *panels[-1, 0].get_legend_handles_labels(), frameon=False, ncols=2, fontsize=8,
        loc="outside lower center", title_fontsize=8,
        title="thick: one standard error, thin: two; over seeds if several (their number in "
        "brackets)\nand, in differences, over examples, paired",
    )  # fmt: skip
    return figure


def _differences(axes, rows):
    """Draws log p(x) minus that of `vae`: one standard error thick, two thin, and as text."""
    if not rows:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "no other method on the same examples", transform=axes.transAxes,
                  ha="center", fontsize=8)  # fmt: skip
        return
    axes.axvline(0.0, color="black", lw=0.8)
    for i, row in enumerate(rows):
        mean, error = (row["above_vae"][key] for key in ("mean", "standard_error"))
        _interval(axes, i, mean, error, "o", _BLUE)
        axes.annotate(
            f"{mean:+.3f} $\\pm$ {error:.3f}", (mean, i), (0, 8), fontsize=8, ha="center",
            textcoords="offset points", bbox={"facecolor": "white", "lw": 0, "pad": 0.5},
        )  # fmt: skip
    _methods(axes, rows)
    axes.set_xlabel("nats per example; right of the line is better")
    axes.margins(x=0.3)


def _absolute(axes, rows):
    """Draws log p(x) and the bound of each method."""
    for i, row in enumerate(rows):
        for key, label, marker, colour, offset in (
            ("elbo", "bound", "s", _GREY, -0.12),
            ("log_likelihood", "log p(x)", "o", _BLUE, 0.12),
        ):
            if row[key] is not None:
                mean, error = row[key]["mean"], row[key]["standard_error"]
                _interval(axes, i + offset, mean, error, marker, colour, None if i else label)
    _methods(axes, rows)
    axes.set_xlabel("nats per example")


def _interval(axes, y, mean, error, marker, colour, label=None):
    axes.errorbar(mean, y, xerr=2.0 * error, fmt="none", color=colour, elinewidth=0.8)
    axes.errorbar(
        mean, y, xerr=error, fmt=marker, ms=5, color=colour, elinewidth=2.4, label=label
    )  # fmt: skip


def _methods(axes, rows):
    """Labels each row with its method and number of seeds."""
    axes.set_yticks(range(len(rows)), [f"{row['label']} ({row['seeds']})" for row in rows])
    axes.set_ylim(-0.6, max(len(rows), 1) - 0.4)
    axes.grid(axis="x", lw=0.3)
    axes.locator_params(axis="x", nbins=5)
