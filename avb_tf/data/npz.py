"""A user's own images or tables in one .npz file."""

from pathlib import Path

import numpy as np

from avb_tf import archives
from avb_tf.data import arrays
from avb_tf.data.source import Source, data_path
from avb_tf.errors import UserError


def load(path: str, seed: int, support: str = "unit") -> Source:
    """Returns a source of the file's arrays: x_train and optionally other splits and labels.

    Args:
      path: an .npz file, or a folder with exactly one; `arrays.check` describes the arrays.
      seed: seed for cutting a tenth off train for each missing validation or test split.
      support: kind of values in x, as in `Likelihood.support`.

    Raises:
      UserError: the file cannot be read, or an array is not as described.
    """
    place = data_path(path)
    if not place:
        raise UserError("config.data.path is empty; expected an .npz file with x_train; name one")
    file = Path(place)
    if file.is_dir():
        files = sorted(file.glob("*.npz"))
        if len(files) != 1:
            raise UserError(
                f"{place} holds {len(files)} .npz files; expected one; name it in config.data.path"
            )
        file = files[0]
    examples = arrays.check(str(file), read(file), support)
    return arrays.source("npz", str(file), examples, seed)


def read(path: Path) -> dict[str, np.ndarray]:
    """Reads all arrays of an .npz file without unpickling anything.

    Raises:
      UserError: the file is missing or damaged, holds pickled objects, or is not an .npz file.
    """
    if path.suffix == ".npy":
        raise UserError(
            f"{path} is a single .npy array; expected an .npz; "
            "save it with numpy.savez(file, x_train=...)"
        )
    try:
        return archives.read_arrays(path)
    except Exception as error:  # numpy, zipfile, zlib and tokenize raise different types
        raise UserError(
            f"{path} cannot be read ({error}); expected an .npz of plain arrays; "
            "save it again with numpy.savez"
        ) from error
