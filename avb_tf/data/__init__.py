"""Data sets by name, one module for each source: x is float32 [batch, *event].

x is in [0, 1], except for tables and for arrays whose likelihood has another support.
"""

from collections.abc import Callable
from typing import Any

from avb_tf.data import digits, four_points, images, mnist, npz, table_files, tfds
from avb_tf.data.source import Source, Split
from avb_tf.errors import UserError

__all__ = ["SOURCES", "Source", "Split", "load"]

# name -> (config.data, the model's likelihood or None) -> source
SOURCES: dict[str, Callable[[Any, Any], Source]] = {
    "four_points": lambda settings, likelihood: four_points.load(),
    "digits": lambda settings, likelihood: digits.load(),
    "mnist": lambda settings, likelihood: mnist.load(settings.path),
    "mnist_4x4": lambda settings, likelihood: mnist.load_4x4(settings.path),
    "npz": lambda settings, likelihood: npz.load(
        settings.path, settings.seed, getattr(likelihood, "support", "unit")
    ),
    "table": lambda settings, likelihood: table_files.load(
        settings.path,
        settings.seed,
        settings.columns,
        settings.missing,
        getattr(likelihood, "table", None),
    ),
    "images": lambda settings, likelihood: images.load(
        settings.path, settings.seed, settings.image_size, settings.channels
    ),
    "tfds:<name>": lambda settings, likelihood: tfds.load(
        settings.name.removeprefix("tfds:"), settings.path, settings.seed
    ),
}


def load(settings: Any, likelihood: Any = None) -> Source:
    """Loads the source named by `settings.name`.

    Args:
      settings: the ConfigDict `config.data`. Its fields: `name`, a key of SOURCES; `path`, a file
        or folder, by default the folder named by AVB_TF_DATA_DIR; `seed` for splits that the source
        does not define; `image_size` and `channels` (1 or 3) for a folder of images; `columns` and
        `missing` for a table.
      likelihood: the model's likelihood, or None. It defines which numbers an array may hold and
        which columns a table has. With None, numbers must be in [0, 1], and a table has the columns
        of its file.

    Raises:
      UserError: the name is unknown, or the data are missing, damaged or unsuitable.
    """
    key = "tfds:<name>" if settings.name.startswith("tfds:") else settings.name
    if key not in SOURCES:
        raise UserError(
            f"config.data.name is '{settings.name}'; expected one of {', '.join(SOURCES)}"
        )
    return SOURCES[key](settings, likelihood)
