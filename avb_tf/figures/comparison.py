"""The figure that compares methods."""

from typing import Any

import matplotlib
from matplotlib.figure import Figure

_COLOURS = matplotlib.color_sequences["tab10"]


def log_likelihoods(rows: list[dict[str, Any]]) -> Figure:
    """Draws log p(x) and the bound of each method, with a panel for each data set.

    Args:
      rows: rows as `commands.compare.row` returns them.
    """
    data = list(dict.fromkeys(row["data"] for row in rows))
    tallest = max(sum(row["data"] == name for row in rows) for name in data)
    figure = Figure((4.6 * len(data) + 0.6, 0.42 * tallest + 1.6), layout="constrained")
    panels = figure.subplots(1, len(data), squeeze=False)[0]
    for axes, name in zip(panels, data, strict=True):
        of_data = [row for row in rows if row["data"] == name][::-1]
        for i, row in enumerate(of_data):
            for key, marker, colour, offset in (
                ("elbo", "s", _COLOURS[7], -0.12),
                ("log_likelihood", "o", _COLOURS[0], 0.12),
            ):
                if row[key] is not None:
                    axes.errorbar(
                        row[key]["mean"], i + offset, xerr=row[key]["standard_error"],
                        fmt=marker, ms=5, capsize=3, color=colour,
                        label=None if i else {"elbo": "bound", "log_likelihood": "log p(x)"}[key],
                    )  # fmt: skip
        labels = [f"{row['method']} ({row['seeds']})" for row in of_data]
        axes.set_yticks(range(len(of_data)), labels)
        axes.set(xlabel="nats per example", title=name, ylim=(-0.6, len(of_data) - 0.4))
        axes.grid(axis="x", lw=0.3)
        axes.locator_params(axis="x", nbins=5)
    figure.legend(
        *panels[0].get_legend_handles_labels(), frameon=False, ncols=2, fontsize=8,
        loc="outside lower center",
        title="one standard error, over seeds if several (their number in brackets)",
        title_fontsize=8,
    )  # fmt: skip
    return figure
