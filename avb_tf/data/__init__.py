"""Data sets by name, one module for each source: x is float32 in [0, 1], [batch, *event]."""

from collections.abc import Callable
from typing import Any

from avb_tf.data import digits, four_points, images, mnist, npz, tfds
from avb_tf.data.source import Source, Split
from avb_tf.errors import UserError

__all__ = ["SOURCES", "Source", "Split", "load"]

SOURCES: dict[str, Callable[[Any], Source]] = {
    "four_points": lambda settings: four_points.load(),
    "digits": lambda settings: digits.load(),
    "mnist": lambda settings: mnist.load(settings.path),
    "mnist_4x4": lambda settings: mnist.load_4x4(settings.path),
    "npz": lambda settings: npz.load(settings.path, settings.seed),
    "images": lambda settings: images.load(
        settings.path, settings.seed, settings.image_size, settings.channels
    ),
    "tfds:<name>": lambda settings: tfds.load(
        settings.name.removeprefix("tfds:"), settings.path, settings.seed
    ),
}


def load(settings: Any) -> Source:
    """Loads the source named by `settings.name`.

    Args:
      settings: the ConfigDict `config.data`. Its fields: `name`, a key of SOURCES; `path`, a file
        or folder, by default the folder named by AVB_TF_DATA_DIR; `seed` for splits that the source
        does not define; `image_size` and `channels` (1 or 3) for a folder of images.

    Raises:
      UserError: the name is unknown, or the data are missing, damaged or unsuitable.
    """
    key = "tfds:<name>" if settings.name.startswith("tfds:") else settings.name
    if key not in SOURCES:
        raise UserError(
            f"config.data.name is '{settings.name}'; expected one of {', '.join(SOURCES)}"
        )
    return SOURCES[key](settings)
