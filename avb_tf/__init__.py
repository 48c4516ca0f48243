"""Adversarial Variational Bayes (Mescheder, Nowozin and Geiger, 2017) in TensorFlow and Keras.

`build` makes a model by name; `AVB` takes your own parts. The names are imported on first use, so
that the command line starts without TensorFlow.
"""

import importlib
from typing import TYPE_CHECKING

from avb_tf.errors import UserError
from avb_tf.version import __version__

if TYPE_CHECKING:
    from avb_tf.assembly import build
    from avb_tf.checkpoints import load_model
    from avb_tf.hub import from_hub, push_to_hub
    from avb_tf.model import AVB
    from avb_tf.posteriors.fit import fit_posterior, load_posterior

__all__ = [
    "AVB", "UserError", "__version__", "build", "fit_posterior", "from_hub", "load_model",
    "load_posterior", "push_to_hub",
]  # fmt: skip

_HOME = {
    "AVB": "avb_tf.model",
    "build": "avb_tf.assembly",
    "fit_posterior": "avb_tf.posteriors.fit",
    "from_hub": "avb_tf.hub",
    "load_model": "avb_tf.checkpoints",
    "load_posterior": "avb_tf.posteriors.fit",
    "push_to_hub": "avb_tf.hub",
}


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'avb_tf' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
