"""scikit-learn's handwritten digits: real images without a download."""

import numpy as np

from avb_tf.data.source import Source, array_split

_SHUFFLE_SEED = 0  # defines the splits: results on different splits are not comparable


def load() -> Source:
    """Loads 1297 training, 200 validation and 300 test images, event [8, 8, 1], labels 0..9."""
    from sklearn.datasets import load_digits  # slow to import, used only here

    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(_SHUFFLE_SEED).permutation(len(pixels))
    images, labels = pixels[order].reshape(-1, 8, 8, 1) / 16, labels[order]
    parts = slice(1297), slice(1297, 1497), slice(1497, None)
    return Source("digits", (8, 8, 1), *(array_split(images[part], labels[part]) for part in parts))
