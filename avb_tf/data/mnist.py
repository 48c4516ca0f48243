"""MNIST, from a local file or downloaded by Keras."""

import gzip
import math
import zlib
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from avb_tf.data import arrays, npz
from avb_tf.data.source import Source, Split, array_split, data_path
from avb_tf.errors import UserError

_IDX_FILES = {  # array -> name and rank
    "x_train": ("train-images", 3),
    "y_train": ("train-labels", 1),
    "x_test": ("t10k-images", 3),
    "y_test": ("t10k-labels", 1),
}
_LARGEST = 2**28  # most bytes to read from a file; MNIST has a fifth of that
_EXPECTED = "mnist.npz or the four IDX files (train-images-idx3-ubyte and so on, or their .gz)"


def load(path: str) -> Source:
    """Loads grey images, event [28, 28, 1], with labels 0..9.

    The last twelfth of the training examples, 5000 of 60000, is the validation split.

    Args:
      path: mnist.npz, or a folder that holds it or the four IDX files. If `path` is empty, the
        folder named by AVB_TF_DATA_DIR is searched; if it holds neither, Keras downloads MNIST.

    Raises:
      UserError: the file is missing, damaged or not MNIST, or the download fails.
    """
    place = data_path(path)
    content = _read(Path(place)) if place else {}
    if not content and path:
        raise UserError(f"{path} holds no MNIST; expected {_EXPECTED}; put them there")
    if not content:
        place, content = "Keras's mnist", _download()
    if content.keys() != _IDX_FILES.keys():
        raise UserError(
            f"{place} holds {', '.join(sorted(content))}; expected {', '.join(_IDX_FILES)}"
        )
    examples = arrays.check(place, content)
    x, labels = examples["train"]
    if x.shape[1:] != (28, 28, 1) or len(x) < 2 or labels is None:
        raise UserError(
            f"{place}: x_train has shape {x.shape}; expected two or more images of 28 x 28"
        )
    held_out = max(1, len(x) // 12)
    examples["train"] = arrays.Examples(x[:-held_out], labels[:-held_out])
    examples["validation"] = arrays.Examples(x[-held_out:], labels[-held_out:])
    return arrays.source("mnist", place, examples)


def load_4x4(path: str) -> Source:
    """Loads MNIST in 4 x 4 binary pixels, event [4, 4, 1].

    A pixel is 1 if the mean of its 7 x 7 original pixels exceeds a quarter. The training images
    have 715 distinct patterns with an entropy of 4.06 nats. The 16 most common patterns cover two
    thirds of the images, so a model can give each of them its own region of z.

    Args:
      path: as for `load`.
    Raises:
      UserError: as for `load`.
    """
    whole = load(path)

    def smaller(split: Split) -> Split:
        parts = np.array_split(np.arange(split.size), -(-split.size // 10_000))
        means = [tf.nn.avg_pool2d(split.read(part), 7, 7, "VALID") for part in parts]
        x = np.concatenate([np.where(mean > 0.25, 255, 0) for mean in means])
        return array_split(x.astype(np.uint8), split.labels)

    parts = map(smaller, (whole.train, whole.validation, whole.test))
    return Source("mnist_4x4", (4, 4, 1), *parts)


def _read(place: Path) -> dict[str, np.ndarray]:
    """Reads the arrays of a file or folder; returns {} if the folder holds no part of MNIST."""
    if not place.is_dir():
        return npz.read(place)
    if (place / "mnist.npz").exists():
        return npz.read(place / "mnist.npz")
    files = {name: _find(place, stem, rank) for name, (stem, rank) in _IDX_FILES.items()}
    present = {name: file for name, file in files.items() if file}
    if present and len(present) < len(files):
        missing = ", ".join(_IDX_FILES[name][0] for name in files if name not in present)
        raise UserError(f"{place} lacks {missing}; expected {_EXPECTED}; add what is missing")
    return {name: _read_idx(file, _IDX_FILES[name][1]) for name, file in present.items()}


def _find(folder: Path, stem: str, rank: int) -> Path | None:
    names = (f"{stem}{mark}idx{rank}-ubyte{end}" for mark in "-." for end in ("", ".gz"))
    return next((folder / name for name in names if (folder / name).exists()), None)


def _read_idx(path: Path, rank: int) -> np.ndarray:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read(_LARGEST)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}); expected an IDX file") from error
    magic = bytes([0, 0, 8, rank])  # 8: unsigned bytes
    if data[:4] != magic:
        raise UserError(f"{path} starts with 0x{data[:4].hex()}; expected 0x{magic.hex()}, IDX")
    start = 4 + 4 * rank
    shape = [int.from_bytes(data[i : i + 4], "big") for i in range(4, start, 4)]
    if len(data) != start + math.prod(shape):
        raise UserError(
            f"{path} has {len(data)} bytes; expected {start + math.prod(shape)} for shape {shape}"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _download() -> dict[str, np.ndarray]:
    try:
        (x_train, y_train), (x_test, y_test) = keras.datasets.mnist.load_data()
    except Exception as error:  # Keras raises a bare Exception when a download fails
        raise UserError(
            f"MNIST cannot be downloaded ({error}); expected {_EXPECTED}; "
            "put them in a folder and name it in config.data.path or AVB_TF_DATA_DIR"
        ) from error
    return {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}
