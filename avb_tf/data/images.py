"""A folder of PNG and JPEG files, decoded on the fly, so it may be larger than memory."""

import math
import os
import warnings
from pathlib import Path

import tensorflow as tf
from absl import logging
from PIL import Image

from avb_tf.data.source import Source, Split, cut, data_path
from avb_tf.errors import UserError

_LARGEST = 10**8  # pixels of an image, which takes 300 MB while it is decoded
_SUFFIXES = {".png", ".jpg", ".jpeg"}


def load(path: str, seed: int, image_size: int, channels: int) -> Source:
    """The central square of each image, event [image_size, image_size, channels].

    Every file is decoded once at the start; unreadable files are skipped with a warning.

    Args:
      path: a folder, searched recursively.
      seed: of the cut into 80 % train, 10 % validation and 10 % test.
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

    def square(file: tf.Tensor) -> tf.Tensor:
        image = _decode(file, channels)
        size = tf.shape(image)[:2]
        side = tf.reduce_min(size)
        top, left = tf.unstack((size - side) // 2)
        image = image[top : top + side, left : left + side]
        resized = tf.image.resize(image, [image_size, image_size], antialias=True)
        return tf.clip_by_value(resized / 255.0, 0.0, 1.0)  # resampling may round above 1

    def split(part) -> Split:
        with tf.device("CPU:0"):
            names = tf.gather(tf.constant(files), part)

        def read(indices: tf.Tensor) -> tf.Tensor:
            spec = tf.TensorSpec(event_shape, tf.float32)
            return tf.map_fn(square, tf.gather(names, indices), fn_output_signature=spec)

        return Split(len(part), read)

    return Source("images", event_shape, *map(split, cut(len(files), 2, seed, folder)))


def _decode(file: tf.Tensor, channels: int) -> tf.Tensor:
    return tf.io.decode_image(tf.io.read_file(file), channels, expand_animations=False)


def _decodable(folder: str, channels: int) -> list[bytes]:
    """Sorted names of the readable images; each is decoded in full, if its header allows it."""
    files = sorted(
        os.fsencode(file) for file in Path(folder).rglob("*") if file.suffix.lower() in _SUFFIXES
    )
    if not files:
        raise UserError(f"{folder} holds no .png, .jpg or .jpeg file; expected a folder of images")

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
            raise UserError(f"{summary}; expected PNG or JPEG files; check or replace them")
        logging.warning("%s; they are skipped", summary)
    return readable


def _is_small(file: bytes) -> bool:
    """Whether an image is small enough to be decoded, by its header; False if it has none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(os.fsdecode(file)) as image:
                return math.prod(image.size) <= _LARGEST
    except Exception:  # Pillow raises many kinds on a damaged header
        return False
