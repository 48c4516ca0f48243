"""Draws the figures of a trained run, each as PNG and as PDF."""

from pathlib import Path

import ml_collections

from avb_tf import checkpoints, data, figures
from avb_tf.data import pipeline
from avb_tf.figures import model as model_figures
from avb_tf.figures import training as training_figures

EXAMPLES = 500
POSTERIORS = 8  # examples in the figure of exact posteriors, for models with two latents


def draw(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Draws figures of the newest checkpoint and its training curves into `figures/`.

    Raises:
      UserError: there is no checkpoint, or the data cannot be used.
    """
    model = checkpoints.load(workdir)
    split = getattr(data.load(config.data, model.likelihood), config.eval.split)
    x = pipeline.examples(split, EXAMPLES, model.likelihood.binary)
    labels = None if split.labels is None else split.labels[: len(x)]
    drawn = model_figures.of_model(model, x, labels)
    if model.encoder.latent_dim == 2:
        drawn["posteriors"] = model_figures.posteriors({config.method: model}, x[:POSTERIORS])
    if (curves := training_figures.of_run(workdir)) is not None:
        drawn["training"] = curves
    print(*figures.save(drawn, workdir / "figures", ("png", "pdf")), sep="\n")
