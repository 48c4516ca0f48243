"""Draws samples from the model of a trained run."""

import io
from pathlib import Path

import ml_collections
import numpy as np

from avb_tf import checkpoints, figures, files
from avb_tf.figures import model as model_figures


def sample(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Writes 64 draws of the newest checkpoint, E[x|z] at z ~ p(z), to `samples.npy`.

    Images are also drawn in a figure. Rows of a table are also written to `samples.csv`, with the
    names and categories of its columns.

    Raises:
      UserError: there is no checkpoint.
    """
    model = checkpoints.load(workdir)
    draws = np.asarray(model.sample(64, seed=0))
    buffer = io.BytesIO()
    np.save(buffer, draws, allow_pickle=False)
    files.write_atomically(workdir / "samples.npy", buffer.getvalue())
    print(workdir / "samples.npy")
    if model.table is not None:
        text = model.table.frame(draws).to_csv(index=False)
        files.write_atomically(workdir / "samples.csv", text)
        print(workdir / "samples.csv")
    if len(model.event_shape) == 3:
        print(
            *figures.save(
                {"samples": model_figures.image_grid(draws, "Samples")}, workdir / "figures"
            )
        )
