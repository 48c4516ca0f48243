"""A page on which to move through the latent space: one HTML file, no server and no network.

The decoder's weights lie in the page, and a few lines of JavaScript run it (`explorer.html`).
"""

import base64
import json
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
from sklearn.decomposition import PCA

from avb_tf import checkpoints, data, files
from avb_tf.data import pipeline
from avb_tf.errors import UserError
from avb_tf.networks import ConvDecoder, DenseDecoder

FILE = "explorer.html"
_TEMPLATE = Path(__file__).with_name("explorer.html")
_MARK = "/* MODEL */ null"  # in the template, where the model goes
_EXAMPLES = 1000  # held-out examples on the map or to start from
_ACTIVATIONS = ("linear", "relu", "tanh", "sigmoid")


def explore(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Writes `explorer.html` of the newest checkpoint.

    Raises:
      UserError: no checkpoint, bad data, or a decoder that the page cannot run.
    """
    model = checkpoints.load(workdir)
    split = getattr(data.load(config.data), config.eval.split)
    x = pipeline.examples(split, _EXAMPLES, model.likelihood.binary)
    labels = None if split.labels is None else split.labels[: len(x)]
    file = workdir / FILE
    files.write_atomically(file, page(model, x, labels, config.name or workdir.name))
    print(file)


def page(model, x, labels=None, title: str = "Latent explorer") -> str:
    """The page, for examples x [count, *event] with labels [count] or None.

    Raises:
      UserError: a decoder that the page cannot run.
    """
    means = np.asarray(model.posterior(x, 64).mean)
    components = PCA().fit(means) if len(means) > means.shape[1] else None
    described = {
        "title": title,
        "event": list(model.event_shape),
        "parameters": model.likelihood.parameters,
        "layers": layers(model.averaged_decoder),
        "means": _encoded(means),
        "latents": means.shape[1],
        "labels": None if labels is None else np.asarray(labels).tolist(),
        "components": [] if components is None else components.components_.tolist(),
        "scales": [] if components is None else np.sqrt(components.explained_variance_).tolist(),
    }
    # "</" would end the script, and a title is anybody's.
    return _TEMPLATE.read_text().replace(_MARK, json.dumps(described).replace("</", "<\\/"))


def layers(decoder) -> list[dict[str, Any]]:
    """The decoder as steps for the page, weights included.

    Raises:
      UserError: it is none of this package's, or has an activation that the page does not know.
    """
    if isinstance(decoder, DenseDecoder):
        return [_dense(layer) for layer in [*decoder.stack.hidden, decoder.head]]
    if isinstance(decoder, ConvDecoder):
        height, width, channels = decoder.start
        steps = [_dense(decoder.dense) | {"shape": [height, width, channels]}]
        for layer in [*decoder.convolutions, decoder.head]:
            steps.append(_weights(layer) | {"kind": "conv", "stride": layer.strides[0]})
        return steps
    raise UserError(
        f"the explorer runs dense and convolutional decoders, found {type(decoder).__name__}; "
        "use --mode=figures for others"
    )


def _dense(layer) -> dict[str, Any]:
    return _weights(layer) | {"kind": "dense"}


def _weights(layer) -> dict[str, Any]:
    activation = layer.activation.__name__
    if activation not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise UserError(f"the explorer knows the activations {known}, found {activation}")
    kernel, bias = (np.asarray(weight) for weight in (layer.kernel, layer.bias))
    return {
        "kernel": _encoded(kernel),
        "size": list(kernel.shape),
        "bias": _encoded(bias),
        "activation": activation,
    }


def _encoded(array) -> str:
    """float32, little-endian, base64."""
    return base64.b64encode(np.ascontiguousarray(array, "<f4").tobytes()).decode()
