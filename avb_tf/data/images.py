"""A folder of PNG, JPEG and WebP files, decoded batch by batch: it may be larger than memory."""

import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf
from absl import logging
from PIL import Image

from avb_tf.data.source import Source, Split, cut, data_path
from avb_tf.errors import UserError

_LARGEST = 10**8  # most pixels of an image: it takes 300 MB while it is decoded
_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
_ORIENTATION = 0x0112  # the EXIF tag


def load(path: str, seed: int, image_size: int, channels: int) -> Source:
    """Loads the central square of each image, event [image_size, image_size, channels].

    Every file is decoded once at the start, and unreadable files are skipped with a warning. Images
    are turned upright according to their EXIF orientation.

    Args:
      path: a folder, which is searched recursively and through links to folders.
      seed: seed of the cut into 80 % train, 10 % validation and 10 % test.
      image_size: height and width in pixels after resizing.
      channels: 1 for grey, 3 for colour.

    Raises:
      UserError: the folder does not exist, it holds fewer than 3 readable images, or a setting is
        out of range.
    """
    if image_size < 1 or channels not in (1, 3):
        raise UserError(
            f"config.data.image_size is {image_size} and config.data.channels {channels}; "
            "expected at least 1 pixel, and 1 (grey) or 3 (colour) channels"
        )
    folder = data_path(path)
    if not folder or not Path(folder).is_dir():
        raise UserError(f"'{folder}' is not a folder; expected images; name it in config.data.path")
    event_shape = (image_size, image_size, channels)
    files = _decodable(folder, channels)
    orientations = [_orientation(file) for file in files]

    def split(part) -> Split:
        with tf.device("CPU:0"):
            names, turns = (tf.gather(tf.constant(v), part) for v in (files, orientations))

        def read(indices: tf.Tensor) -> tf.Tensor:
            spec = tf.TensorSpec(event_shape, tf.float32)
            each = tf.gather(names, indices), tf.gather(turns, indices)
            return tf.map_fn(
                lambda one: _centre(one[0], one[1], event_shape), each, fn_output_signature=spec
            )

        return Split(len(part), read)

    return Source("images", event_shape, *map(split, cut(len(files), 2, seed, folder)))


def read(file: str | os.PathLike[str], event_shape: Sequence[int]) -> np.ndarray:
    """One image as those of a folder are read: float32 [height, width, channels] in [0, 1].

    Args:
      file: a PNG, JPEG or WebP file.
      event_shape: height, width and channels; the largest part of this form in the middle is taken.
    Raises:
      UserError: the file is missing, too large or no image.
    """
    name = os.fsencode(file)
    if not _is_small(name):
        raise UserError(
            f"{file} cannot be decoded, or has more than {_LARGEST:,} pixels; expected a PNG, JPEG "
            "or WebP file; check it"
        )
    try:
        return _centre(tf.constant(name), tf.constant(_orientation(name)), event_shape).numpy()
    except tf.errors.InvalidArgumentError as error:
        raise UserError(
            f"{file} cannot be decoded; expected a PNG, JPEG or WebP file; check it"
        ) from error


def _centre(file: tf.Tensor, orientation: tf.Tensor, event_shape: Sequence[int]) -> tf.Tensor:
    """The largest part of the event's form in the middle of an image, resized to the event."""
    height, width, channels = event_shape
    image = _upright(_decode(file, channels), orientation)
    size = tf.shape(image)[:2]
    part = tf.minimum(size, [size[1] * height // width, size[0] * width // height])
    part = tf.maximum(part, 1)
    top, left = tf.unstack((size - part) // 2)
    image = image[top : top + part[0], left : left + part[1]]
    resized = tf.image.resize(image, [height, width], antialias=True)
    return tf.clip_by_value(resized / 255.0, 0.0, 1.0)  # resampling may round above 1


def _decode(file: tf.Tensor, channels: int) -> tf.Tensor:
    return tf.io.decode_image(tf.io.read_file(file), channels, expand_animations=False)


def _orientation(file: bytes) -> int:
    """Reads the EXIF orientation, 1 to 8, from the header; 1, upright, if there is none."""
    try:
        with Image.open(os.fsdecode(file)) as image:
            value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # Pillow raises many exception types on damaged metadata
        return 1
    return value if value in range(1, 9) else 1


def _upright(image: tf.Tensor, orientation: tf.Tensor) -> tf.Tensor:
    """Turns an image [height, width, channels] with this EXIF orientation upright."""

    def when(orientations, change, image):
        return tf.cond(
            tf.reduce_any(orientation == orientations), lambda: change(image), lambda: image
        )

    image = when([5, 6, 7, 8], lambda i: tf.transpose(i, [1, 0, 2]), image)
    image = when([2, 3, 6, 7], lambda i: i[:, ::-1], image)
    return when([3, 4, 7, 8], lambda i: i[::-1], image)


def _files(folder: str) -> list[bytes]:
    """Returns the sorted paths of the images below a folder, visiting each real folder once."""
    files, visited = [], set()
    for directory, inner, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(directory)) in visited:  # a link may point upwards
            inner.clear()
            continue
        visited.add(real)
        paths = (Path(directory, name) for name in names)
        files += [os.fsencode(path) for path in paths if path.suffix.lower() in _SUFFIXES]
    return sorted(files)


def _decodable(folder: str, channels: int) -> list[bytes]:
    """Returns the sorted paths of the readable images.

    Every image is decoded in full, unless its header shows more than `_LARGEST` pixels.
    """
    if not (files := _files(folder)):
        raise UserError(
            f"{folder} holds no .png, .jpg, .jpeg or .webp file; expected a folder of images"
        )

    def check(file: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return file, tf.shape(_decode(file, channels))

    small = [file for file in files if _is_small(file)]
    names = tf.data.Dataset.from_tensor_slices(tf.constant(small, tf.string))
    decoded = names.map(check, num_parallel_calls=tf.data.AUTOTUNE).ignore_errors()
    readable = [file for file, _ in decoded.as_numpy_iterator()]
    if len(readable) < len(files):
        first = os.fsdecode(min(set(files) - set(readable)))
        unreadable = len(files) - len(readable)
        summary = (
            f"{unreadable} of {len(files)} images cannot be decoded, or have more than "
            f"{_LARGEST:,} pixels, {first} first"
        )
        if not readable:
            raise UserError(f"{summary}; expected PNG, JPEG or WebP files; check or replace them")
        logging.warning("%s; they are skipped", summary)
    return readable


def _is_small(file: bytes) -> bool:
    """Returns whether the header shows a size small enough to decode; False without a header."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(os.fsdecode(file)) as image:
                return math.prod(image.size) <= _LARGEST
    except Exception:  # Pillow raises many exception types on a damaged header
        return False
