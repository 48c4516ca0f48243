"""Figures of one or more trained models."""

from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from scipy.special import ndtri

from avb_tf.likelihood_estimation import quadrature
from avb_tf.model import AVB

_COLOURS = matplotlib.color_sequences["tab10"]
_CONTENT = np.array([0.5, 0.9])  # shares of the posterior's mass inside the contours


def of_model(model: AVB, x: np.ndarray, labels: np.ndarray | None = None) -> dict[str, Figure]:
    """Draws all figures of one model, and returns them by name.

    Images are drawn only if x has rank 3, and the latent space only for models with two latents.

    Args:
      model: a trained model.
      x: [count, *event], held-out examples, at least 8.
      labels: [count] or None; they colour the latent space.
    """
    figures = {}
    if len(model.event_shape) == 3:
        samples = np.asarray(model.sample(64, seed=0))
        figures["samples"] = image_grid(samples, "Samples: E[x|z], z ~ p(z)")
        figures["reconstructions"] = reconstructions(model, x[:16])
        figures["interpolations"] = interpolations(model, x[:8], x[-8:])
        if model.encoder.latent_dim == 2:
            figures["manifold"] = manifold(model)
    if model.encoder.latent_dim == 2:
        figures["latent_space"] = latent_spaces({"": model}, x, labels)
    return figures


def image_grid(images: np.ndarray, title: str, columns: int = 8) -> Figure:
    """Draws images in a grid, row by row.

    Args:
      images: [count, height, width, channels] in [0, 1].
      title: title of the figure.
      columns: images in a row.
    """
    rows = -(-len(images) // columns)
    height, width, channels = images.shape[1:]
    blank = 0.0 if channels == 1 else 1.0  # white: monochrome images are drawn with 1 as black
    canvas = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1, channels), blank)
    for i, image in enumerate(images):
        top, left = i // columns * (height + 1), i % columns * (width + 1)
        canvas[top : top + height, left : left + width] = image
    inches = 0.7 * columns
    figure = Figure(
        (inches, inches * canvas.shape[0] / canvas.shape[1] + 0.4), layout="constrained"
    )
    axes = figure.subplots()
    _show(axes, canvas)
    axes.set_title(title, fontsize=10)
    return figure


def reconstructions(model: AVB, x: np.ndarray, columns: int = 8) -> Figure:
    """Draws examples, and below each a reconstruction E[x'|z] for one z ~ q(z|x).

    Args:
      model: a trained model.
      x: [count, *event], images.
      columns: examples in a row.
    """
    images = np.stack([x, np.asarray(model.reconstruct(x))])  # [2, count, *event]
    rows = [images[:, i : i + columns] for i in range(0, len(x), columns)]
    missing = columns - rows[-1].shape[1]
    rows[-1] = np.pad(rows[-1], [(0, 0), (0, missing), *[(0, 0)] * 3])
    pairs = np.concatenate([row.reshape(-1, *model.event_shape) for row in rows])
    return image_grid(pairs, "Examples, and below each a reconstruction", columns)


def interpolations(model: AVB, first: np.ndarray, last: np.ndarray, steps: int = 8) -> Figure:
    """Draws E[x|z] along straight lines in z, one row for each pair of `first` and `last`.

    Args:
      model: a trained model.
      first: [count, *event]; each line starts at the posterior mean of one of these.
      last: [count, *event]; each line ends at the posterior mean of one of these.
      steps: images in a row.
    """
    z, share = (
        [np.asarray(model.posterior(x, 64).mean) for x in (first, last)],
        np.linspace(0, 1, steps),
    )
    path = z[0][:, np.newaxis] + share[:, np.newaxis] * (z[1] - z[0])[:, np.newaxis]
    images = np.asarray(model.decode(path.reshape(-1, path.shape[-1])))
    return image_grid(images, "Interpolations between two posterior means", columns=steps)


def manifold(model: AVB, side: int = 16) -> Figure:
    """Draws E[x|z] over a grid of `side` x `side` quantiles of the prior of two latents."""
    quantiles = ndtri((np.arange(side) + 0.5) / side)
    z = np.stack(np.meshgrid(quantiles, -quantiles), -1).reshape(-1, 2)
    images = np.asarray(model.decode(z))
    return image_grid(images, "E[x|z] over quantiles of the prior", columns=side)


def latent_spaces(
    models: Mapping[str, AVB], x: np.ndarray, labels: np.ndarray | None = None, draws: int = 2000
) -> Figure:
    """Plots draws of q(z|x) for all x, with a panel for each model.

    Args:
      models: name -> model with two latents.
      x: [count, *event].
      labels: [count] or None; they colour the draws.
      draws: approximate number of draws in a panel.
    """
    figure = Figure((4.2 * len(models) + 0.8, 4.2), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(models), sharex=True, sharey=True))
    per_example = max(1, draws // len(x))
    colours = np.zeros(len(x), int) if labels is None else np.asarray(labels)
    for axes, (name, model) in zip(panels, models.items(), strict=True):
        z = np.asarray(model.encode(x, per_example))
        for label in np.unique(colours):
            points = z[:, colours == label].reshape(-1, 2)
            axes.scatter(*points.T, s=4, lw=0, alpha=0.6, color=_COLOURS[label % 10], label=label)
        axes.set(xlim=(-4, 4), ylim=(-4, 4), aspect="equal", title=name, xlabel="$z_1$")
    panels[0].set_ylabel("$z_2$")
    by_label = "" if labels is None else ", coloured by label"
    figure.suptitle(f"Draws of q(z|x) for {len(x)} held-out x{by_label}", fontsize=10)
    if labels is not None:
        figure.legend(
            *panels[0].get_legend_handles_labels(), markerscale=4, frameon=False,
            loc="outside right center",
        )  # fmt: skip
    return figure


def posteriors(models: Mapping[str, AVB], x: np.ndarray, cells: int = 120) -> Figure:
    """Plots the exact p(z|x), shaded, and draws of q(z|x): a row per model, a column per x.

    The first row shows x itself.

    Args:
      models: name -> model with two latents.
      x: [count, *event].
      cells: points along each side of the grid on which p(z|x) is computed.
    """
    figure = Figure((2.1 * len(x) + 0.6, 2.2 * len(models) + 1.8), layout="constrained")
    panels = figure.subplots(
        1 + len(models), len(x), squeeze=False, height_ratios=[0.7, *[1.0] * len(models)]
    )
    for axes, one in zip(panels[0], x, strict=True):
        _example(axes, one)
    panels[0, 0].set_ylabel("x")
    for row, (name, model) in zip(panels[1:], models.items(), strict=True):
        evidence = quadrature.log_likelihood(model, x)
        posterior = model.posterior(x, 600)
        for i, axes in enumerate(row):
            mean, scale = np.asarray(posterior.mean)[i], np.asarray(posterior.scale_tril)[i]
            square = np.eye(2) * np.sqrt(np.max(np.diag(scale @ scale.T)))
            z, log_p = quadrature.posterior_on_grid(model, x[i], mean, square, evidence[i], cells)
            density = np.exp(log_p - log_p.max())  # its peak is 1, however far off the grid is
            axes.contourf(
                z[..., 0], z[..., 1], density, _levels(density), colors=["#9ecae1", "#3182bd"]
            )
            draws = np.asarray(posterior.z)[:, i]
            axes.scatter(*draws.T, s=2, lw=0, color="#d94801", alpha=0.6)
            axes.set(xticks=[], yticks=[], aspect="equal")
        row[0].set_ylabel(f"{name}: $z_2$" if name else "$z_2$")
    for axes in panels[-1]:
        axes.set_xlabel("$z_1$")
    percent = " and ".join(f"{100 * c:.0f}%" for c in _CONTENT)
    figure.suptitle(
        f"p(z|x): {percent} regions, exact (blue); draws of q(z|x) (orange)", fontsize=10
    )
    return figure


def _levels(density) -> list[Any]:
    """Returns levels of `density`, on a uniform grid, that enclose `_CONTENT` of its mass.

    The levels differ by at least 0.1%, even if a single cell holds most of the mass.
    """
    values = np.sort(density.ravel())[::-1]
    mass = np.cumsum(values) / values.sum()
    outer, inner = (values[np.searchsorted(mass, c)] for c in _CONTENT[::-1])
    return [min(outer, 0.999 * inner), inner, 1.001 * values[0]]


def _example(axes, x):
    """x itself: an image, or a bar for each of its numbers."""
    if x.ndim == 3:
        _show(axes, x)
        axes.set_axis_on()  # its label stays
        axes.set(xticks=[], yticks=[])
    else:
        axes.bar(np.arange(x.size), x.ravel(), color="grey")
        axes.set(xticks=[], ylim=(min(0.0, x.min()), max(1.0, x.max())))


def _show(axes, image):
    if image.shape[-1] == 1:
        axes.imshow(image[..., 0], cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    else:
        axes.imshow(np.clip(image, 0, 1), interpolation="nearest")
    axes.set_axis_off()
