"""Measures how the time and memory of a step and of AIS grow with each size that a user sets."""

import json
import multiprocessing
import resource
from pathlib import Path
from typing import Any

import matplotlib.figure
import ml_collections
import numpy as np
import tensorflow as tf

from avb_tf import configuration, data, figures, files
from avb_tf.benchmarks.step import seconds_of
from avb_tf.commands import train
from avb_tf.likelihood_estimation import ais

FILE = "scaling.json"
# Fields of the config that grow together -> their values. For AIS they are the sampler's arguments.
STEP = {
    ("batch_size",): (32, 64, 128, 256, 512, 1024),
    ("model.latent_dim",): (2, 4, 8, 16, 32, 64, 128),
    ("model.draws", "model.adversary_draws"): (1, 2, 4, 8, 16, 32),
}
AIS = {"temperatures": (25, 50, 100, 200), "chains": (4, 8, 16, 32)}
_REPEATS = 7


def scaling(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Times each size with everything else as in the config.

    Writes `scaling.json` and a figure, and prints the exponents of the growth. Each point runs in
    its own process, so that the peak memory of the process belongs to that point alone.

    Raises:
      UserError: the data cannot be used, or the parts of the model do not fit each other.
    """
    event_shape = data.load(config.data).event_shape
    plain = configuration.resolve(config)
    jobs = [(_step, names, value) for names, values in STEP.items() for value in values]
    jobs += [(_ais, (name,), value) for name, values in AIS.items() for value in values]
    curves: dict[str, list[dict[str, float]]] = {}
    context = multiprocessing.get_context("spawn")
    for function, names, value in jobs:
        with context.Pool(1) as pool:
            seconds, megabytes = pool.apply(function, (plain, event_shape, names, value))
        print(f"{names[0]:24} {value:6d} {seconds:10.4f} s {megabytes:8.0f} MB")
        point = {"value": value, "seconds": seconds, "megabytes": megabytes}
        curves.setdefault(names[0], []).append(point)
    for name, points in curves.items():
        print(f"{name:24} time grows as its power {exponent(points, 'seconds'):.2f} at the end")
    workdir.mkdir(parents=True, exist_ok=True)
    files.write_atomically(workdir / FILE, json.dumps(curves, indent=2) + "\n")
    print(
        workdir / FILE, *figures.save({"scaling": _figure(curves)}, workdir / "figures"), sep="\n"
    )


def exponent(points: list[dict[str, float]], quantity: str) -> float:
    """Returns the slope of log quantity against log value over the upper half of the values.

    The slope is 1 for linear growth. Small values are left out because constant costs dominate
    there.

    Args:
      points: measurements with the keys "value", "seconds" and "megabytes", in ascending order.
      quantity: "seconds" or "megabytes".
    """
    upper = points[-max(2, len(points) // 2) :]
    values, quantities = ([np.log(p[key]) for p in upper] for key in ("value", quantity))
    return float(np.polyfit(values, quantities, 1)[0])


def _changed(
    plain: dict[str, Any], names: tuple[str, ...], value: int
) -> ml_collections.ConfigDict:
    config = configuration.default("vae")
    config.update(plain)
    config.update_from_flattened_dict(dict.fromkeys(names, value))
    return config


def _step(plain, event_shape, names, value) -> tuple[float, float]:
    config = _changed(plain, names, value)
    model = train.create(config, event_shape)
    x = tf.zeros([config.batch_size, *event_shape])
    step = tf.function(model.train_step)
    (seconds,) = seconds_of(lambda: step(x), repeats=_REPEATS)
    return seconds, _peak()


def _ais(plain, event_shape, names, value) -> tuple[float, float]:
    model = train.create(_changed(plain, (), 0), event_shape)
    x = np.zeros([25, *event_shape], np.float32)
    sizes = {"temperatures": 50, "chains": 8} | {names[0]: value}
    sampler = ais.AnnealedSampler(model, **sizes)
    (seconds,) = seconds_of(lambda: sampler.forward(x), repeats=3)
    return seconds, _peak()


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _figure(curves) -> matplotlib.figure.Figure:
    figure = matplotlib.figure.Figure(figsize=(3.2 * len(curves), 5.6), layout="constrained")
    axes = figure.subplots(2, len(curves), squeeze=False)
    for column, (name, points) in zip(axes.T, curves.items(), strict=True):
        values = np.array([p["value"] for p in points])
        for ax, quantity, unit in zip(column, ("seconds", "megabytes"), ("s", "MB"), strict=True):
            measured = np.array([p[quantity] for p in points])
            ax.plot(values, measured, "o-", label="measured")
            # A quantity that grows linearly lies on this least-squares line.
            a, b = np.polyfit(values, measured, 1)[::-1]
            ax.plot(values, a + b * values, "k--", lw=1, label="linear fit")
            ax.set(xlabel=name, ylabel=unit, xlim=(0, None), ylim=(0, None))
        column[0].legend()
    return figure
