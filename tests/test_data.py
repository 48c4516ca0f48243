"""Tests every data source: its splits, and its messages about unsuitable data."""

import gzip
import io
import logging
import resource
import struct
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf
from ml_collections import ConfigDict
from PIL import Image, ImageOps

from avb_tf import data
from avb_tf.data import mnist
from avb_tf.data.source import array_split
from avb_tf.errors import UserError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (30, 28, 28), dtype=np.uint8)
LABELS = (np.arange(30) % 10).astype(np.uint8)
MNIST_ARRAYS = {
    "x_train": IMAGES[:24],
    "y_train": LABELS[:24],
    "x_test": IMAGES[24:],
    "y_test": LABELS[24:],
}
IDX_NAMES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}


@pytest.fixture(autouse=True)
def no_default_folder(monkeypatch):
    monkeypatch.delenv("AVB_TF_DATA_DIR", raising=False)


def load(name, path: str | Path = "", seed=0, image_size=8, channels=3):
    settings = dict(name=name, path=str(path), seed=seed, image_size=image_size, channels=channels)
    return data.load(ConfigDict(settings))


def splits(source):
    return source.train, source.validation, source.test


def sizes(source):
    return tuple(split.size for split in splits(source))


def content(split):
    return split.read(tf.range(split.size, dtype=tf.int64)).numpy()


def assert_same(source, other):
    assert source.event_shape == other.event_shape
    for split, twin in zip(splits(source), splits(other), strict=True):
        np.testing.assert_array_equal(content(split), content(twin))
        np.testing.assert_array_equal(split.labels, twin.labels)


def assert_disjoint_and_complete(source, examples):
    """Asserts that the splits together hold each of the distinct `examples` [n, *event] once."""
    x = np.concatenate([content(split).reshape(split.size, -1) for split in splits(source)])
    expected = examples.reshape(len(examples), -1)
    assert len(np.unique(expected, axis=0)) == len(expected)
    np.testing.assert_allclose(np.unique(x, axis=0), np.unique(expected, axis=0), atol=1e-6)
    assert len(x) == len(expected)


def npz(folder, name="a.npz", /, **arrays):
    np.savez(folder / name, **arrays)
    return folder / name


def idx(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def encoded(pixels, form="PNG"):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def write_images(folder, count, size=(20, 16, 3)):
    for i in range(count):
        (folder / f"{i}.png").write_bytes(encoded(RNG.integers(0, 256, size, dtype=np.uint8)))
    return folder


# In-memory splits


def test_uint8_is_kept_as_one_uint8_tensor_outside_the_graph():
    split = array_split(IMAGES)
    read = tf.function(split.read).get_concrete_function(tf.TensorSpec([None], tf.int64))
    assert [(x.dtype, x.shape) for x in read.captured_inputs] == [(tf.uint8, IMAGES.shape)]
    assert read.graph.as_graph_def().ByteSize() < IMAGES.nbytes
    x = split.read(tf.constant([3, 0], tf.int64))
    assert x.dtype == tf.float32
    np.testing.assert_allclose(x, IMAGES[[3, 0]] / 255, rtol=1e-6)


# Sources


def test_four_points_are_the_one_hot_vectors_in_every_split():
    source = load("four_points")
    assert source.event_shape == (4,)
    for split in splits(source):
        np.testing.assert_array_equal(content(split), np.eye(4))
        np.testing.assert_array_equal(split.labels, [0, 1, 2, 3])


def test_the_splits_of_digits_are_fixed():
    from sklearn.datasets import load_digits

    source = load("digits")
    assert source.event_shape == (8, 8, 1)
    assert sizes(source) == (1297, 200, 300)
    assert_disjoint_and_complete(source, load_digits(return_X_y=True)[0] / 16)
    assert_same(source, load("digits", seed=1))
    # Labels belong to their images: most test images are nearest to the mean of their class.
    x, y = content(source.train), source.train.labels
    means = np.stack([x[y == digit].mean(0) for digit in range(10)])
    distances = ((content(source.test) - means[:, np.newaxis]) ** 2).sum((2, 3, 4))
    assert (distances.argmin(0) == source.test.labels).mean() > 0.8


def test_mnist_keeps_the_last_twelfth_for_validation(mnist_path):
    source = load("mnist", mnist_path)
    with np.load(mnist_path) as file:
        train, test, labels = len(file["x_train"]), len(file["x_test"]), file["y_train"]
        last_image = file["x_train"][-1] / 255
    assert source.event_shape == (28, 28, 1)
    assert sizes(source) == (train - train // 12, train // 12, test)
    np.testing.assert_array_equal(source.validation.labels, labels[-(train // 12) :])
    np.testing.assert_allclose(content(source.validation)[-1, ..., 0], last_image, rtol=1e-6)


def test_the_full_mnist_has_5000_validation_images(full_mnist):
    assert sizes(load("mnist", full_mnist)) == (55_000, 5_000, 10_000)


def test_mnist_from_idx_files_equals_mnist_from_npz(tmp_path):
    npz(tmp_path, "mnist.npz", **MNIST_ARRAYS)
    expected = load("mnist", tmp_path)
    assert sizes(expected) == (22, 2, 6)
    assert_disjoint_and_complete(expected, IMAGES / 255)
    np.testing.assert_array_equal(expected.validation.labels, LABELS[22:24])
    assert_same(load("mnist", tmp_path / "mnist.npz"), expected)

    plain, dotted, zipped = tmp_path / "plain", tmp_path / "dotted", tmp_path / "zipped"
    for folder in (plain, dotted, zipped):
        folder.mkdir()
    for key, name in IDX_NAMES.items():
        file = idx(MNIST_ARRAYS[key])
        (plain / name).write_bytes(file)
        (dotted / name.replace("-idx", ".idx")).write_bytes(file)
        (zipped / f"{name}.gz").write_bytes(gzip.compress(file))
    for folder in (plain, dotted, zipped):
        assert_same(load("mnist", folder), expected)


def test_mnist_looks_in_the_default_folder_and_then_downloads(tmp_path, monkeypatch):
    arrays = {key: array[::-1] for key, array in MNIST_ARRAYS.items()}
    pairs = [(arrays[f"x_{split}"], arrays[f"y_{split}"]) for split in ("train", "test")]
    monkeypatch.setattr(keras.datasets.mnist, "load_data", lambda: pairs)
    monkeypatch.setenv("AVB_TF_DATA_DIR", str(tmp_path))
    np.testing.assert_array_equal(load("mnist").test.labels, LABELS[24:][::-1])
    npz(tmp_path, "mnist.npz", **MNIST_ARRAYS)
    np.testing.assert_array_equal(load("mnist").test.labels, LABELS[24:])


def test_mnist_says_where_to_put_the_file_when_the_download_fails(monkeypatch):
    def fail():
        raise Exception("URL fetch failure\non https://example.org")

    monkeypatch.setattr(keras.datasets.mnist, "load_data", fail)
    with pytest.raises(UserError, match=r"URL fetch failure on .*AVB_TF_DATA_DIR") as caught:
        load("mnist")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "event_shape"), [((20, 3), (3,)), ((20, 4, 5), (4, 5, 1)), ((20, 4, 5, 3), (4, 5, 3))]
)
def test_npz_cuts_missing_splits_by_the_seed(tmp_path, shape, event_shape):
    x = RNG.random(shape)
    source = load("npz", npz(tmp_path, x_train=x, y_train=np.arange(20)), seed=1)
    assert source.event_shape == event_shape
    assert sizes(source) == (16, 2, 2)
    assert_disjoint_and_complete(source, x)
    for split in splits(source):
        np.testing.assert_allclose(content(split), x[split.labels].reshape(-1, *event_shape), 1e-6)
    assert_same(load("npz", tmp_path, seed=1), source)
    assert (content(load("npz", tmp_path, seed=2).test) != content(source.test)).any()


def test_npz_keeps_existing_splits(tmp_path, monkeypatch):
    x = RNG.random((25, 3), dtype=np.float32)
    npz(tmp_path, x_train=x[:20], x_test=x[20:])
    monkeypatch.setenv("AVB_TF_DATA_DIR", str(tmp_path))
    source = load("npz")
    assert sizes(source) == (18, 2, 5)
    np.testing.assert_array_equal(content(source.test), x[20:])
    assert_disjoint_and_complete(source, x)
    assert source.train.labels is None


def test_images_are_cut_by_the_seed_and_searched_recursively(tmp_path):
    (tmp_path / "below").mkdir()
    write_images(tmp_path, 12)
    write_images(tmp_path / "below", 8)
    (tmp_path / "notes.txt").write_text("not an image")
    source = load("images", tmp_path)
    assert source.event_shape == (8, 8, 3)
    assert sizes(source) == (16, 2, 2)
    images = np.concatenate([content(split) for split in splits(source)])
    assert len(np.unique(images.reshape(20, -1), axis=0)) == 20
    assert 0 <= images.min() < images.max() <= 1
    assert_same(load("images", tmp_path), source)
    assert (content(load("images", tmp_path, seed=1).test) != content(source.test)).any()
    batch = source.train.read(tf.constant([5, 5, 0], tf.int64)).numpy()
    np.testing.assert_array_equal(batch, content(source.train)[[5, 5, 0]])


def _png_of(width, height):
    """Returns a PNG file whose header claims this size; its only line of pixels is blank."""

    def chunk(kind, content):
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(1 + width))
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def test_a_giant_image_is_skipped_before_it_is_decoded(tmp_path, caplog):
    write_images(tmp_path, 5)
    (tmp_path / "giant.png").write_bytes(_png_of(50_000, 50_000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with caplog.at_level("WARNING", "absl"):
        source = load("images", tmp_path)
    assert sum(split.size for split in splits(source)) == 5
    assert "1 of 6 images cannot be decoded, or have more than 100,000,000 pixels" in caplog.text
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB


def test_no_more_of_a_gzip_bomb_is_read_than_mnist_has(tmp_path, monkeypatch):
    monkeypatch.setattr(mnist, "_LARGEST", 2**20)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        header = bytes([0, 0, 8, int(name[-1])]) + b"\xff" * 4 * int(name[-1])
        with gzip.open(tmp_path / f"{name}-ubyte.gz", "wb") as file:
            file.write(header + bytes(2**24))
    with pytest.raises(UserError, match=r"has 1048576 bytes; expected \d+ for shape"):
        load("mnist", tmp_path)


@pytest.mark.parametrize(("form", "suffix"), [("PNG", ".PNG"), ("JPEG", ".jpg"), ("JPEG", ".jpeg")])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_cropped_to_the_central_square(tmp_path, form, suffix, channels):
    # White outside the central 16 x 16 square, which is grey: no white may remain.
    pixels = np.full((16, 48, 3), 255, np.uint8)
    pixels[:, 16:32] = 102
    for i, image in enumerate([pixels, pixels.transpose(1, 0, 2), pixels]):
        (tmp_path / f"{i}{suffix}").write_bytes(encoded(image, form))
    source = load("images", tmp_path, channels=channels)
    for split in splits(source):
        x = content(split)
        assert x.shape == (1, 8, 8, channels)
        np.testing.assert_allclose(x, 0.4, atol=2 / 255)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright(tmp_path, orientation):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 6, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    for i in range(3):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png", exif=exif)
    with Image.open(tmp_path / "0.png") as image:
        upright = np.asarray(ImageOps.exif_transpose(image))
    source = load("images", tmp_path, image_size=6)
    np.testing.assert_allclose(content(source.train)[0], upright / 255, atol=1e-6)


def test_webp_and_folders_behind_links_are_read_once(tmp_path):
    photos, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    photos.mkdir()
    elsewhere.mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8), (90 * i, 0, 0)).save(elsewhere / f"{i}.webp", lossless=True)
    frames = [Image.new("RGB", (8, 8), (0, 200, 0)) for _ in range(2)]
    frames[0].save(photos / "moving.webp", save_all=True, append_images=frames[1:], lossless=True)
    (photos / "linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(photos)
    (photos / "nowhere").symlink_to(tmp_path / "missing")
    source = load("images", photos)
    images = np.concatenate([content(split) for split in splits(source)])
    assert sorted(np.rint(255 * images[:, 0, 0, 0]).tolist()) == [0, 0, 90, 180]


def test_an_unreadable_image_is_skipped_with_a_warning(tmp_path, caplog):
    write_images(tmp_path, 6)
    whole = (tmp_path / "2.png").read_bytes()
    (tmp_path / "2.png").write_bytes(whole[: len(whole) // 2])  # the header is intact
    with caplog.at_level(logging.WARNING):
        source = load("images", tmp_path)
    assert sum(sizes(source)) == 5
    (message,) = caplog.messages
    assert message.startswith("1 of 6 images")
    assert str(tmp_path / "2.png") in message
    assert all(np.isfinite(content(split)).all() for split in splits(source))


@pytest.mark.parametrize("labelled", [True, False])
def test_tfds_reads_image_and_label(monkeypatch, labelled):
    features = {"image": IMAGES[..., np.newaxis], "label": LABELS.astype(np.int64)}
    if not labelled:
        del features["label"]
    stored = {"train": slice(20), "test": slice(20, 30), "extra": slice(0)}

    class Builder:
        info = SimpleNamespace(splits=stored, features=features)

        def __init__(self, name, data_dir):
            assert (name, data_dir) == ("pictures", "somewhere")

        def download_and_prepare(self):
            pass

        def as_dataset(self, split, batch_size):
            assert split == {"train": "train", "test": "test"}
            assert batch_size == -1
            return {
                name: {key: tf.constant(value[stored[name]]) for key, value in features.items()}
                for name in split
            }

    fake = SimpleNamespace(builder=Builder)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", fake)
    source = load("tfds:pictures", "somewhere")
    assert (source.name, source.event_shape, sizes(source)) == (
        "tfds:pictures",
        (28, 28, 1),
        (18, 2, 10),
    )
    assert_disjoint_and_complete(source, IMAGES / 255)
    np.testing.assert_array_equal(source.test.labels, LABELS[20:] if labelled else None)


# Mistakes


def file(folder, name, content):
    (folder / name).write_bytes(content)
    return folder / name


def truncated(folder):
    path = npz(folder, x_train=IMAGES)
    return file(folder, "b.npz", path.read_bytes()[:2000])


def npy(folder, name):
    np.save(folder / "a.npy", IMAGES)
    return (folder / "a.npy").rename(folder / name)


def idx_folder(folder, key, content):
    for other, name in IDX_NAMES.items():
        (folder / name).write_bytes(idx(MNIST_ARRAYS[other]))
    (folder / IDX_NAMES[key]).write_bytes(content)
    return folder


def idx_incomplete(folder):
    return file(folder, IDX_NAMES["x_train"], idx(IMAGES)).parent


def gzip_truncated(folder):
    for key, name in IDX_NAMES.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(idx(MNIST_ARRAYS[key]))[:-12])
    return folder


def all_bad(folder):
    for i in range(3):
        (folder / f"{i}.jpg").write_bytes(b"no image")
    return folder


X = RNG.random((20, 3))
NAN = np.where(np.arange(60).reshape(20, 3) == 7, np.nan, X)


def test_mnist_of_4x4_is_white_where_a_quarter_is_ink(mnist_path):
    whole, small = load("mnist", mnist_path), load("mnist_4x4", mnist_path)
    assert small.event_shape == (4, 4, 1)
    assert sizes(small) == sizes(whole)
    np.testing.assert_array_equal(small.test.labels, whole.test.labels)
    squares = content(whole.test)[..., 0].reshape(-1, 4, 7, 4, 7).mean((2, 4))
    pixels = content(small.test)[..., 0]
    clear = np.abs(squares - 0.25) > 1e-5
    assert clear.mean() > 0.999
    np.testing.assert_array_equal(pixels[clear], (squares > 0.25)[clear])


MISTAKES = {
    "name": (
        "mnits",
        lambda d: "",
        "'mnits'.*four_points, digits, .*npz, table, images",
    ),
    "seed": ("npz", lambda d: npz(d, x_train=X), "seed is -1"),
    "npz path empty": ("npz", lambda d: "", "path is empty"),
    "npz missing": ("npz", lambda d: d / "a.npz", "a.npz cannot be read.*No such file"),
    "npz empty": ("npz", lambda d: file(d, "a.npz", b""), "a.npz cannot be read.*not a zip file"),
    "npz truncated": ("npz", truncated, "b.npz cannot be read.*zip"),
    "npz text": ("npz", lambda d: file(d, "a.npz", b"hello"), "a.npz cannot be read"),
    "npz pickled": (
        "npz",
        lambda d: npz(d, x_train=np.array([{}, 1], dtype=object)),
        "a.npz cannot be read.*pickled objects",
    ),
    "npy": ("npz", lambda d: npy(d, "a.npy"), r"a.npy is a single .npy array.*numpy.savez"),
    "npy in disguise": ("npz", lambda d: npy(d, "a.npz"), "a.npz cannot be read"),
    "no npz in folder": ("npz", lambda d: d, "holds 0 .npz files"),
    "no arrays": ("npz", lambda d: npz(d), "holds no arrays; expected x_train"),
    "no x_train": ("npz", lambda d: npz(d, x_test=X), "holds x_test; expected x_train"),
    "unknown array": ("npz", lambda d: npz(d, x_train=X, x_val=X), "holds x_val; expected only"),
    "labels alone": ("npz", lambda d: npz(d, x_train=X, y_test=[1]), "holds y_test; expected only"),
    "rank": ("npz", lambda d: npz(d, x_train=X[:, 0]), r"x_train has shape \(20,\)"),
    "no examples": ("npz", lambda d: npz(d, x_train=X[:0]), r"x_train has shape \(0, 3\)"),
    "too few": ("npz", lambda d: npz(d, x_train=X[:2]), "2 example.* at least 3"),
    "NaN": ("npz", lambda d: npz(d, x_train=NAN), "x_train contains NaN"),
    "too high": ("npz", lambda d: npz(d, x_train=X * 0 + 200), "runs from 200.0 to 200.0"),
    "too low": ("npz", lambda d: npz(d, x_train=X - 0.5, x_test=X), "x_train runs from -0"),
    "infinite": (
        "npz",
        lambda d: npz(d, x_train=X, x_test=X + np.inf),
        "x_test runs from .* to inf",
    ),
    "integers": ("npz", lambda d: npz(d, x_train=np.ones((9, 2), int)), "x_train is of type int64"),
    "event shape": (
        "npz",
        lambda d: npz(d, x_train=X, x_test=X[:, :2]),
        r"x_test has examples of shape \(2,\); expected \(3,\)",
    ),
    "label count": (
        "npz",
        lambda d: npz(d, x_train=X, y_train=np.arange(19)),
        r"y_train has shape \(19,\); expected \(20,\)",
    ),
    "label type": ("npz", lambda d: npz(d, x_train=X, y_train=X[:, 0]), "y_train is of type float"),
    "mnist missing": ("mnist", lambda d: d, "holds no MNIST"),
    "mnist not there": ("mnist", lambda d: d / "nowhere", "nowhere cannot be read"),
    "mnist keys": ("mnist", lambda d: npz(d, x_train=IMAGES), "holds x_train; expected x_train, y"),
    "mnist shape": (
        "mnist",
        lambda d: npz(d, **{k: v[..., :9] if k[0] == "x" else v for k, v in MNIST_ARRAYS.items()}),
        r"x_train has shape \(24, 28, 9, 1\)",
    ),
    "mnist incomplete": ("mnist", idx_incomplete, "lacks train-labels, t10k-images, t10k-labels"),
    "idx magic": (
        "mnist",
        lambda d: idx_folder(d, "x_train", idx(LABELS)),
        "train-images-idx3-ubyte starts with 0x00000801; expected 0x00000803",
    ),
    "idx empty": (
        "mnist",
        lambda d: idx_folder(d, "y_test", b""),
        "t10k-labels-idx1-ubyte starts with 0x; expected 0x00000801",
    ),
    "idx length": (
        "mnist",
        lambda d: idx_folder(d, "y_train", idx(LABELS[:24])[:-1]),
        r"train-labels-idx1-ubyte has 31 bytes; expected 32",
    ),
    "idx header": (
        "mnist",
        lambda d: idx_folder(d, "x_train", idx(IMAGES)[:9]),
        "train-images-idx3-ubyte has 9 bytes; expected 16",
    ),
    "idx label count": (
        "mnist",
        lambda d: idx_folder(d, "y_train", idx(LABELS[:20])),
        r"y_train has shape \(20,\); expected \(24,\)",
    ),
    "gzip": ("mnist", gzip_truncated, "train-images-idx3-ubyte.gz cannot be read"),
    "images path empty": ("images", lambda d: "", "'' is not a folder"),
    "images missing": ("images", lambda d: d / "nowhere", "nowhere' is not a folder"),
    "images empty": ("images", lambda d: d, "holds no .png, .jpg, .jpeg or .webp"),
    "images bad": ("images", all_bad, "3 of 3 images cannot be decoded.*0.jpg first"),
    "images too few": ("images", lambda d: write_images(d, 2), "2 example.* at least 3"),
    "channels": ("images", lambda d: write_images(d, 3), "channels 2"),
    "image size": ("images", lambda d: write_images(d, 3), "image_size is 0"),
    "tfds": ("tfds:no_such_set", lambda d: d, "tfds:no_such_set"),
}
SETTINGS = {"seed": {"seed": -1}, "channels": {"channels": 2}, "image size": {"image_size": 0}}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gives_one_line(tmp_path, mistake):
    name, write, message = MISTAKES[mistake]
    path = write(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        load(name, path, **SETTINGS.get(mistake, {}))
    assert "\n" not in str(caught.value)
