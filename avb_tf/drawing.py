"""A trained run -> its figures for a paper, each as PNG and as PDF."""

from pathlib import Path

import ml_collections
from matplotlib.figure import Figure

from avb_tf import checkpoints, data, figures, training_curves
from avb_tf.data import pipeline

EXAMPLES = 500
POSTERIORS = 8  # examples whose posterior is drawn beside the exact one, two latents


def draw(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Draws the newest checkpoint's figures, and the curves of its training, into `figures/`.

    Raises:
      UserError: no checkpoint, or bad data.
    """
    model = checkpoints.load(workdir)
    split = getattr(data.load(config.data), config.eval.split)
    x = pipeline.examples(split, EXAMPLES, model.likelihood.binary)
    labels = None if split.labels is None else split.labels[: len(x)]
    found = figures.of_model(model, x, labels)
    if model.encoder.latent_dim == 2:
        found["posteriors"] = figures.posteriors({config.method: model}, x[:POSTERIORS])
    if (curves := training(workdir)) is not None:
        found["training"] = curves
    print(*figures.save(found, workdir / "figures", ("png", "pdf")), sep="\n")


def training(workdir: Path) -> Figure | None:
    """The bounds of a run, and its adversary, against the step; None without logs."""
    sides = ("train", "validation")
    elbo = {f"ELBO, {side}": training_curves.read(workdir, "elbo", side) for side in sides}
    bounds = elbo | {"importance-sampled, some of validation": training_curves.read(workdir)}
    adversary = {
        f"{name.partition('_')[2]}, {side}": training_curves.read(workdir, name, side)
        for name in ("adversary_loss", "adversary_accuracy")
        for side in sides
    }
    panels = [(bounds, "nats per example"), (adversary, "adversary")]
    panels = [panel for panel in panels if any(len(curve) for curve in panel[0].values())]
    if not panels:
        return None
    figure = Figure((4.6 * len(panels), 3.4), layout="constrained")
    for axes, (curves, quantity) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels,
                                        strict=True):  # fmt: skip
        for name, curve in curves.items():
            if len(curve):
                style = "--" if name.endswith("train") else "-"
                axes.plot(*curve.T, style, linewidth=1.2, label=name)
        axes.set(xlabel="primal steps", ylabel=quantity)
        axes.legend(frameon=False, fontsize=8)
    return figure
