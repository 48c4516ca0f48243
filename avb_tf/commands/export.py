"""Exports a trained run to `export/<version>/` for TensorFlow Serving."""

import json
from pathlib import Path

import ml_collections

from avb_tf import checkpoints, configuration, results
from avb_tf.serving import layout


def export(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Exports the newest checkpoint with its config and, if it was evaluated, its results.

    Raises:
      UserError: there is no checkpoint, or the version exists or cannot be written.
    """
    model = checkpoints.load(workdir)
    evaluated = workdir / results.FILE
    path = model.export(
        workdir / layout.DIRECTORY,
        **config.export,
        name=config.name or workdir.name,
        config=configuration.resolve(config),
        results=json.loads(evaluated.read_text()) if evaluated.exists() else None,
    )
    print(path)
