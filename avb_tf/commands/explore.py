"""Writes an interactive page of the latent space as one HTML file.

The page needs neither a server nor a network, because it contains the decoder's weights and the
JavaScript that runs the decoder. `explorer.html` in this folder is its template.
"""

import base64
import json
from pathlib import Path
from typing import Any

import keras
import ml_collections
import numpy as np
from sklearn.decomposition import PCA

from avb_tf import checkpoints, data, files
from avb_tf.data import pipeline
from avb_tf.errors import UserError
from avb_tf.model import AVB
from avb_tf.networks import ConvDecoder, DenseDecoder

FILE = "explorer.html"
_TEMPLATE = Path(__file__).with_name("explorer.html")
_MARK = "/* MODEL */ null"  # placeholder for the model in the template
_EXAMPLES = 1000  # held-out examples on the map
_ACTIVATIONS = ("linear", "relu", "tanh", "sigmoid")


def explore(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Writes `explorer.html` for the newest checkpoint.

    Raises:
      UserError: there is no checkpoint, the data cannot be used, or the page cannot run the
        decoder.
    """
    model = checkpoints.load(workdir)
    if model.likelihood.support != "unit":
        raise UserError(
            "the explorer shows x in [0, 1], found a model of other values; use --mode=figures"
        )
    split = getattr(data.load(config.data, model.likelihood), config.eval.split)
    x = pipeline.examples(split, _EXAMPLES, model.likelihood.binary)
    labels = None if split.labels is None else split.labels[: len(x)]
    file = workdir / FILE
    files.write_atomically(file, page(model, x, labels, config.name or workdir.name))
    print(file)


def page(
    model: AVB, x: np.ndarray, labels: np.ndarray | None = None, title: str = "Latent explorer"
) -> str:
    """Returns the page as HTML.

    Args:
      model: an `AVB`.
      x: [count, *event], the examples on the map.
      labels: [count] or None; they colour the map.
      title: title of the page.
    Raises:
      UserError: the page cannot run the decoder.
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
    # "</" in the title, which is user input, would end the script.
    return _TEMPLATE.read_text().replace(_MARK, json.dumps(described).replace("</", "<\\/"))


def layers(decoder: keras.Model) -> list[dict[str, Any]]:
    """Returns the decoder as a list of layers for the page, with their weights.

    Raises:
      UserError: the decoder is not one of this package's, or the page lacks an activation.
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
    """Encodes an array as little-endian float32 in base64."""
    return base64.b64encode(np.ascontiguousarray(array, "<f4").tobytes()).decode()
