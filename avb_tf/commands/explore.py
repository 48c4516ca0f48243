"""Writes an interactive page of the latent space as one HTML file.

The page needs neither a server nor a network, because it contains the decoder's weights and the
JavaScript that runs the decoder. `explorer.html` in this folder is its template.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import ml_collections
import numpy as np
import tensorflow as tf
from sklearn.decomposition import PCA

from avb_tf import checkpoints, data, files
from avb_tf.data import checks, pipeline
from avb_tf.data import images as image_files
from avb_tf.data.source import array_split
from avb_tf.errors import UserError
from avb_tf.model import AVB
from avb_tf.networks import ConvDecoder, DenseDecoder

FILE = "explorer.html"
_TEMPLATE = Path(__file__).with_name("explorer.html")
_MARK = "/* MODEL */ null"  # placeholder for the model in the template
_EXAMPLES = 1000  # held-out examples on the map
_SHOWN = 24  # of them that the page shows, with draws of their posteriors
_DRAWS = 100  # of each posterior
_ACTIVATIONS = ("linear", "relu", "tanh", "sigmoid")


def explore(config: ml_collections.ConfigDict, workdir: Path, images: Sequence[str] = ()) -> None:
    """Writes `explorer.html` for the newest checkpoint.

    Args:
      config: of the run.
      workdir: of the run.
      images: paths of images of one's own; the page shows draws of their posteriors too. They are
        cropped and resized as those of a folder, and binarised for a binary likelihood.
    Raises:
      UserError: there is no checkpoint, the data or an image cannot be used, or the page cannot run
        the decoder.
    """
    model = checkpoints.load(workdir)
    split = getattr(data.load(config.data, model.likelihood), config.eval.split)
    x = pipeline.examples(split, _EXAMPLES, model.likelihood.binary)
    labels = None if split.labels is None else split.labels[: len(x)]
    title = config.name or workdir.name
    file = workdir / FILE
    files.write_atomically(file, page(model, x, labels, title, _own(model, images)))
    print(file)


def _own(model, paths) -> dict[str, np.ndarray]:
    """Name -> image [*event] for the files at `paths`."""
    if not paths:
        return {}
    if len(model.event_shape) != 3:
        raise UserError(
            f"--image={paths[0]} is an image, and the model's x has shape {model.event_shape}; "
            "expected a model of images; leave it out"
        )
    split = array_split(np.stack([image_files.read(path, model.event_shape) for path in paths]))
    x = pipeline.examples(split, len(paths), model.likelihood.binary)
    return dict(zip(paths, x, strict=True))


def page(
    model: AVB,
    x: np.ndarray,
    labels: np.ndarray | None = None,
    title: str = "Latent explorer",
    own: Mapping[str, np.ndarray] | None = None,
) -> str:
    """Returns the page as HTML.

    Args:
      model: an `AVB`.
      x: [count, *event], the examples on the map; the page shows the first of them.
      labels: [count] or None; they colour the map.
      title: title of the page.
      own: name -> [*event], further examples, which are shown first.
    Raises:
      UserError: the page cannot run the decoder, or x is not in [0, 1].
    """
    _check_mean(model)
    means = np.asarray(model.posterior(x, 64).mean)
    shown = {**(own or {}), **{f"example {i}": one for i, one in enumerate(x[:_SHOWN])}}
    rows = np.stack(list(shown.values()))
    draws = np.asarray(model.encode(rows, _DRAWS))  # [draws, shown, latents]
    components = PCA().fit(means) if len(means) > means.shape[1] else None
    described = {
        "title": title,
        "event": list(model.event_shape),
        "parameters": model.likelihood.parameters,
        "layers": layers(model.averaged_decoder),
        "means": _encoded(means),
        "names": [Path(name).name for name in shown],
        "shown": _encoded(checks.as_examples(rows, model.event_shape)),
        "draws": _encoded(draws.swapaxes(0, 1)),
        "latents": means.shape[1],
        "labels": None if labels is None else np.asarray(labels).tolist(),
        "components": [] if components is None else components.components_.tolist(),
    }
    # "</" in the title, which is user input, would end the script.
    return _TEMPLATE.read_text().replace(_MARK, json.dumps(described).replace("</", "<\\/"))


def _check_mean(model):
    """Raises `UserError` unless E[x|z] is the sigmoid of the decoder's first output."""
    likelihood = model.likelihood
    if likelihood.support != "unit":
        raise UserError(
            "the explorer shows x in [0, 1], found a model of other values; use --mode=figures"
        )
    shape = [8, *model.event_shape, likelihood.parameters]
    outputs = np.random.default_rng(0).normal(0.0, 3.0, shape).astype(np.float32)
    expected = 1.0 / (1.0 + np.exp(-outputs[..., :1]))
    if not likelihood.parameters or not np.allclose(
        likelihood.mean(tf.constant(outputs)), expected[..., 0], atol=1e-5
    ):
        raise UserError(
            "the explorer shows means sigmoid(output 0 of the decoder), found a likelihood with "
            "another mean; use --mode=figures"
        )


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
