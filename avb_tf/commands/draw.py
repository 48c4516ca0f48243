"""A trained run -> its figures for a paper, each as PNG and as PDF."""

from pathlib import Path

import ml_collections

from avb_tf import checkpoints, data, figures
from avb_tf.data import pipeline
from avb_tf.figures import model as model_figures
from avb_tf.figures import training as training_figures

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
    found = model_figures.of_model(model, x, labels)
    if model.encoder.latent_dim == 2:
        found["posteriors"] = model_figures.posteriors({config.method: model}, x[:POSTERIORS])
    if (curves := training_figures.of_run(workdir)) is not None:
        found["training"] = curves
    print(*figures.save(found, workdir / "figures", ("png", "pdf")), sep="\n")
