"""Training curves from TensorBoard logs: the bounds of several runs against the step."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import TENSORS, EventAccumulator

BOUND = "importance_bound"  # logged by `callbacks.monitor`
DIFFERENCE = "elbo_minus_importance_bound"
_COLOURS = matplotlib.color_sequences["tab10"]
_MARKED = 30  # a curve with at most this many points shows each as a dot
_CLOSE = 6.0  # the second panel shows this many nats below the best value


def read(workdir: Path, tag: str = BOUND, side: str = "validation") -> np.ndarray:
    """Returns the steps and values of a logged scalar, [points, 2]; [0, 2] if it was not logged.

    If a resumed run logged a step twice, the later value counts.

    Args:
      workdir: the run's directory.
      tag: name of the scalar.
      side: "train" or "validation".
    """
    directory = workdir / "logs" / side
    if not directory.is_dir():
        return np.zeros([0, 2])
    events = EventAccumulator(str(directory), size_guidance={TENSORS: 0}).Reload()
    tags: dict[str, Any] = events.Tags()
    if tag not in tags["tensors"]:
        return np.zeros([0, 2])
    logged = sorted(events.Tensors(tag), key=lambda event: event.wall_time)
    values = {event.step: float(tf.make_ndarray(event.tensor_proto)) for event in logged}
    return np.array(sorted(values.items()))


def draw(curves: Mapping[str, np.ndarray], methods: Mapping[str, str]) -> Figure:
    """Draws the importance-weighted bound of every run against the step.

    If the range is wide, a second panel zooms in on the best values.

    Args:
      curves: run -> [points, 2], as `read` returns them, not empty.
      methods: run -> its method, which sets the colour.
    """
    best = max(curve[:, 1].max() for curve in curves.values())
    worst = min(curve[:, 1].min() for curve in curves.values())
    panels = 2 if worst < best - _CLOSE else 1
    figure = Figure((5 * panels, 4), layout="constrained")
    whole, *close = figure.subplots(1, panels, squeeze=False)[0]
    colours = {m: _COLOURS[i % 10] for i, m in enumerate(dict.fromkeys(methods.values()))}
    for axes in (whole, *close):
        for run, curve in curves.items():
            axes.plot(*curve.T, color=colours[methods[run]], linewidth=1, **_marker(curve))
        axes.set_xlabel("primal steps")
        axes.set_ylabel("nats per held-out example")
    for method, colour in colours.items():
        whole.plot([], [], color=colour, label=method)
    whole.set_title("log p(x) by importance sampling, a lower bound")
    for axes in close:
        axes.set_ylim(best - _CLOSE, best + 0.1 * _CLOSE)
        axes.set_title(f"within {_CLOSE:.0f} nats of the best")
    whole.legend(loc="center right", frameon=False)
    return figure


def _marker(curve) -> dict[str, Any]:
    """Returns the marker of a short curve, because a single point has no line."""
    return {"marker": "o", "markersize": 3} if len(curve) <= _MARKED else {}


def of_run(workdir: Path) -> Figure | None:
    """Draws a run's bounds and its adversary's metrics against the step; returns None without logs.

    A separate panel compares the ELBO with the importance-weighted bound on the same examples,
    because the validation data have more examples than that bound uses.
    """
    sides = ("train", "validation")
    elbo = {side: read(workdir, "elbo", side) for side in sides}
    same = {"ELBO": read(workdir, "monitored_elbo"), "importance-weighted bound": read(workdir)}
    adversary = {
        f"{name.partition('_')[2]}, {side}": read(workdir, name, side)
        for name in ("adversary_loss", "adversary_accuracy")
        for side in sides
    }
    difference = {"difference, two standard errors": read(workdir, DIFFERENCE)}
    panels = {
        "ELBO of all examples": (elbo, "nats per example"),
        "two bounds of the same examples": (same, "nats per example"),
        "ELBO minus the other bound: at most 0": (difference, "nats per example"),
        "adversary": (adversary, "loss in nats, accuracy"),
    }
    panels = {k: p for k, p in panels.items() if any(len(curve) for curve in p[0].values())}
    if not panels:
        return None
    figure = Figure((4.4 * len(panels), 3.4), layout="constrained")
    for axes, (title, (curves, quantity)) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for name, curve in curves.items():
            if len(curve):
                style = "--" if name.endswith("train") else "-"
                axes.plot(*curve.T, style, linewidth=1.2, label=name, **_marker(curve))
        if curves is difference:
            lower, upper = (read(workdir, f"{DIFFERENCE}_{end}") for end in ("lower", "upper"))
            if len(lower):
                axes.fill_between(lower[:, 0], lower[:, 1], upper[:, 1], alpha=0.25, linewidth=0)
            axes.axhline(0.0, color="black", linewidth=0.8)
        axes.set(title=title, xlabel="primal steps", ylabel=quantity)
        axes.legend(frameon=False, fontsize=8)
    return figure
