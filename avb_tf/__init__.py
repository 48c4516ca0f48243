"""Adversarial Variational Bayes (Mescheder, Nowozin and Geiger, 2017) in TensorFlow and Keras.

`build` makes a model from the name of its method; `AVB` takes your own parts. The public names are
imported on first use, so that the command line starts without TensorFlow.
"""

import importlib.abc
import importlib.util
import sys
from typing import TYPE_CHECKING

from avb_tf.errors import UserError
from avb_tf.version import __version__

if TYPE_CHECKING:
    from avb_tf.amortised.fit import fit_amortised
    from avb_tf.amortised.result import AmortisedFit
    from avb_tf.assembly import build
    from avb_tf.checkpoints import load_model
    from avb_tf.data.table import Table
    from avb_tf.hub import from_hub, push_to_hub
    from avb_tf.model import AVB
    from avb_tf.posteriors.fit import fit_posterior, load_posterior

__all__ = [
    "AVB", "AmortisedFit", "Table", "UserError", "__version__", "build", "fit_amortised",
    "fit_posterior", "from_hub", "load_model", "load_posterior", "push_to_hub",
]  # fmt: skip


class _WithKeras(importlib.abc.MetaPathFinder):
    """Registers our classes when Keras is imported, so that Keras's `load_model` knows them.

    Importing the classes together with this package would import TensorFlow.
    """

    def find_spec(self, fullname, path=None, target=None):
        """Returns the spec of Keras, changed to register our classes after Keras has loaded.

        Args:
          fullname: name of the module that is being imported.
          path: ignored.
          target: ignored.
        Returns:
          The spec, or None for every other module, so that the next finder is asked.
        """
        if fullname != "keras":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("keras")
        if spec is not None and spec.loader is not None and not _importing():
            execute = spec.loader.exec_module

            def execute_and_register(module):
                execute(module)
                importlib.import_module("avb_tf.model")

            spec.loader.exec_module = execute_and_register
        return spec


def _importing() -> bool:
    """Returns whether one of our modules imports Keras; importing the model would be circular."""
    ours = [module for name, module in sys.modules.items() if name.startswith("avb_tf.")]
    return any(getattr(module.__spec__, "_initializing", False) for module in ours)


if "keras" not in sys.modules:
    sys.meta_path.insert(0, _WithKeras())
else:
    importlib.import_module("avb_tf.model")

_HOME = {
    "AVB": "avb_tf.model",
    "AmortisedFit": "avb_tf.amortised.result",
    "Table": "avb_tf.data.table",
    "build": "avb_tf.assembly",
    "fit_amortised": "avb_tf.amortised.fit",
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
