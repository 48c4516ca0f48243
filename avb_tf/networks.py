"""Keras networks that do not depend on the method: trunks and decoders.

A decoder takes several z for each example in one call, so that all draws pass through a layer in
one larger matrix product. Images are `[..., height, width, channels]` of any size.

Outputs are float32. Inner layers compute in Keras's global dtype policy, so that under
`mixed_bfloat16` the large products are in bfloat16 while moments and densities are in float32.
"""

import inspect
import math
from collections.abc import Sequence
from typing import Any, Self

import keras
import tensorflow as tf

from avb_tf import replicas

_register = keras.saving.register_keras_serializable("avb_tf")


class Restorable:
    """Mixin for Keras objects that are restored from their constructor's arguments.

    The arguments may be other Keras objects.
    """

    _arguments: dict[str, Any]

    def __new__(cls, *args, **kwargs):
        """Keeps the constructor's arguments for `get_config`."""
        instance = super().__new__(cls, *args, **kwargs)
        bound = inspect.signature(cls.__init__).bind(instance, *args, **kwargs).arguments
        _, *arguments = (bound | bound.pop("kwargs", {})).items()
        vars(instance)["_arguments"] = dict(arguments)  # bypasses Keras's tracking
        return instance

    def get_config(self) -> dict[str, Any]:
        """Returns the serialised arguments of the constructor."""
        return {k: keras.saving.serialize_keras_object(v) for k, v in self._arguments.items()}

    def get_build_config(self) -> None:
        """Returns None, because the model that holds the object builds it by calling it."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Returns a new object from a config that `get_config` returned."""
        return cls(**{k: keras.saving.deserialize_keras_object(v) for k, v in config.items()})


def float32_dense(units: int, **kwargs: Any) -> keras.layers.Dense:
    """Returns a dense layer with float32 outputs under every dtype policy.

    Args:
      units: number of outputs.
      **kwargs: arguments of `keras.layers.Dense`.
    """
    return keras.layers.Dense(units, dtype="float32", **kwargs)


@_register
class DenseStack(Restorable, keras.layers.Layer):
    """Dense layers of equal width on the last axis: [..., inputs] -> [..., width].

    Args:
      width: units of each layer.
      depth: number of layers; 0 returns the inputs.
      activation: of every layer, a Keras name.
    """

    def __init__(self, width: int, depth: int, activation: str = "relu", **kwargs: Any):
        super().__init__(**kwargs)
        self.hidden = [keras.layers.Dense(width, activation=activation) for _ in range(depth)]

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Maps inputs [..., inputs] to features [..., width]."""
        hidden = tf.reshape(inputs, [-1, inputs.shape[-1]])  # at rank 2 bias and activation fuse
        for layer in self.hidden:
            hidden = layer(hidden)
        return _unflatten(hidden, tf.shape(inputs)[:-1], hidden.shape[-1:])


def _centred(x, support):
    """Returns x as a trunk's first layer reads it: x in [0, 1] centred, counts as log(1 + x)."""
    return {"unit": lambda: 2.0 * x - 1.0, "count": lambda: tf.math.log1p(x)}.get(
        support, lambda: x
    )()


@_register
class DenseTrunk(Restorable, keras.layers.Layer):
    """Features of x by dense layers: [batch, *event] -> [batch, width].

        trunk = DenseTrunk(width=300, depth=2)
        trunk(x)  # [batch, 300]

    Args:
      width: units of each layer.
      depth: number of layers; 0 returns x, flattened and centred.
      activation: of every layer, a Keras name.
      support: the values of x, as in `Likelihood`: "unit" for [0, 1], "real" or "count".
    """

    def __init__(
        self, width: int, depth: int, activation: str = "relu", support: str = "unit", **kwargs: Any
    ):
        super().__init__(**kwargs)
        self.support = support
        self.flatten = keras.layers.Flatten()
        self.stack = DenseStack(width, depth, activation)

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """Maps x [batch, *event] to features [batch, width]."""
        return self.stack(_centred(self.flatten(x), self.support))


@_register
class ConvTrunk(Restorable, keras.layers.Layer):
    """Features of an image by 5x5 convolutions: [batch, height, width, channels] ->
    [batch, features].

        trunk = ConvTrunk(filters=(32, 64), features=256)
        trunk(x)  # [batch, 256]

    Args:
      filters: number of filters of each convolution, from the image inwards.
      features: units of a last dense layer; 0 returns the flattened outputs of the convolutions.
      strides: stride of each convolution; 2 each by default.
      activation: of every layer, a Keras name.
      batch_norm: whether all convolutions but the last are followed by `BatchNorm`.
      support: the values of x, as in `Likelihood`: "unit" for [0, 1], "real" or "count".
    """

    def __init__(
        self,
        filters: Sequence[int],
        features: int,
        strides: Sequence[int] = (),
        activation: str = "relu",
        batch_norm: bool = False,
        support: str = "unit",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.support = support
        self.activation: Any = keras.activations.get(activation)
        normalised = [batch_norm and i < len(filters) - 1 for i in range(len(filters))]
        self.convolutions = [
            keras.layers.Conv2D(n, 5, strides=stride, padding="same", use_bias=not norm)
            for n, stride, norm in zip(
                filters, strides or [2] * len(filters), normalised, strict=True
            )
        ]
        self.norms = [BatchNorm() if norm else keras.layers.Identity() for norm in normalised]
        self.flatten = keras.layers.Flatten()
        self.dense = keras.layers.Dense(features, activation=activation) if features else None

    def call(self, x: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Maps images [batch, height, width, channels] to features [batch, features]."""
        hidden = _centred(x, self.support)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            hidden = self.activation(norm(convolution(hidden), training=training))
        features = self.flatten(hidden)
        return features if self.dense is None else self.dense(features)


class BatchNorm(keras.layers.Layer):
    """Batch normalisation over all axes but the last (Ioffe and Szegedy, 2015), across replicas.

    Training normalises by the moments of the whole batch over all replicas, so that a run does not
    depend on their number. All other uses normalise by running averages, so that an example's
    features do not depend on its batch. Keras's layer is not used, because after a batch with a NaN
    its running averages would stay NaN, although training skips the step.
    """

    MOMENTUM, EPSILON = 0.999, 1e-3

    def build(self, input_shape: Any) -> None:
        """Creates the gain, the offset and the running averages, [channels] each."""
        shape = input_shape[-1:]

        def weight(name, initializer, **kwargs):
            return self.add_weight(
                shape=shape, name=name, initializer=initializer, autocast=False, **kwargs
            )

        running = {"trainable": False, "aggregation": "only_first_replica"}
        self.gain, self.offset = weight("gain", "ones"), weight("offset", "zeros")
        self.mean = weight("mean", "zeros", **running)
        self.variance = weight("variance", "ones", **running)

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Normalises inputs [..., channels]."""
        mean, variance = self.mean.value, self.variance.value
        if training:
            mean, variance = self._batch_moments(tf.cast(inputs, tf.float32))
            self._update(self.mean, mean)
            self._update(self.variance, variance)
        scale = self.gain * tf.math.rsqrt(variance + self.EPSILON)
        shift = self.offset - mean * scale
        return inputs * tf.cast(scale, inputs.dtype) + tf.cast(shift, inputs.dtype)

    @staticmethod
    def _batch_moments(inputs):
        mean, variance = tf.nn.moments(inputs, list(range(inputs.shape.rank - 1)))
        mean, variance = replicas.pooled_moments(
            mean[:, tf.newaxis], variance[:, tf.newaxis, tf.newaxis]
        )
        return mean[:, 0], variance[:, 0, 0]

    def _update(self, average, value):
        moved = average.value + (1.0 - self.MOMENTUM) * (tf.stop_gradient(value) - average.value)
        average.assign(tf.where(tf.math.is_finite(moved), moved, average.value))


@_register
class ResidualTrunk(Restorable, keras.layers.Layer):
    """Features of x by residual blocks on another trunk: [batch, *event] -> [batch, width].

    A linear layer maps the other trunk's features to `width`. Each block applies layer
    normalisation, a dense relu layer and a linear layer, and adds the result to its input; it
    starts as the identity. A relu ends the trunk.

    Args:
      trunk: layer from x to features.
      width: units of each layer in the blocks.
      blocks: number of blocks.
    Source: He et al. (2016).
    """

    def __init__(self, trunk: keras.layers.Layer, width: int, blocks: int, **kwargs: Any):
        super().__init__(**kwargs)
        dense = keras.layers.Dense
        self.trunk = trunk
        self.first = dense(width)
        self.norms = [keras.layers.LayerNormalization() for _ in range(blocks)]
        self.hidden = [dense(width, activation="relu") for _ in range(blocks)]
        self.changes = [dense(width, kernel_initializer="zeros") for _ in range(blocks)]

    def call(self, x: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Maps x [batch, *event] to features [batch, width]."""
        features = self.first(self.trunk(x, training=training))
        for norm, hidden, change in zip(self.norms, self.hidden, self.changes, strict=True):
            features += change(hidden(norm(features)))
        return tf.nn.relu(features)


@_register
class DenseDecoder(Restorable, keras.Model):
    """Likelihood parameters of x by dense layers: [..., latent] -> [..., *event, parameters].

    Args:
      event_shape: shape of one x.
      parameters: numbers for each dimension of x, as many as the likelihood needs.
      width: units of each hidden layer.
      depth: number of hidden layers.
      activation: of the hidden layers, a Keras name.
      linear: whether the output also has a linear function of z. With it the model can be a factor
        analysis, which suits tables.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        parameters: int,
        width: int,
        depth: int,
        activation: str = "relu",
        linear: bool = False,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.output_event = (*event_shape, parameters)
        self.linear = linear
        self.stack = DenseStack(width, depth, activation)
        self.head = float32_dense(math.prod(self.output_event))

    def call(self, z: tf.Tensor) -> tf.Tensor:
        """Maps z [..., latent] to likelihood parameters [..., *event, parameters]."""
        hidden = self.stack(z)
        hidden = tf.concat([hidden, tf.cast(z, hidden.dtype)], -1) if self.linear else hidden
        return _unflatten(self.head(hidden), tf.shape(z)[:-1], self.output_event)


@_register
class ConvDecoder(Restorable, keras.Model):
    """Likelihood parameters of an image by transposed 5x5 convolutions: [..., latent] ->
    [..., height, width, channels, parameters].

    The decoder mirrors the `ConvTrunk` with the same `filters` and `strides`. If the strides do not
    divide an image's height or width, the output is cropped from the next larger size.

    Args:
      event_shape: (height, width, channels) of one image.
      parameters: numbers for each dimension of x, as many as the likelihood needs.
      filters: number of filters of each convolution, from the image inwards.
      strides: stride of each convolution; 2 each by default.
      activation: of all layers but the last, a Keras name.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        parameters: int,
        filters: Sequence[int],
        strides: Sequence[int] = (),
        activation: str = "relu",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        height, width, channels = event_shape
        self.output_event = (*event_shape, parameters)
        self.image_size = (height, width)
        first, *inner = strides or [2] * len(filters)
        down = math.prod([first, *inner])
        self.start = (math.ceil(height / down), math.ceil(width / down), filters[-1])
        self.dense = keras.layers.Dense(math.prod(self.start), activation=activation)
        self.convolutions = [
            keras.layers.Conv2DTranspose(n, 5, stride, padding="same", activation=activation)
            for n, stride in zip(reversed(filters[:-1]), reversed(inner), strict=True)
        ]
        self.head = keras.layers.Conv2DTranspose(
            channels * parameters, 5, first, padding="same", dtype="float32"
        )

    def call(self, z: tf.Tensor) -> tf.Tensor:
        """Maps z [..., latent] to parameters [..., height, width, channels, parameters]."""
        flat = tf.reshape(z, [-1, z.shape[-1]])
        hidden = tf.reshape(self.dense(flat), [-1, *self.start])
        for layer in self.convolutions:
            hidden = layer(hidden)
        height, width = self.image_size
        return _unflatten(
            self.head(hidden)[:, :height, :width], tf.shape(z)[:-1], self.output_event
        )


def tiny_normal() -> keras.initializers.Initializer:
    """Returns the authors' initializer for z0, theta and t, with which outputs start near 0."""
    return keras.initializers.TruncatedNormal(stddev=1e-5)


def _unflatten(flat, leading, event):
    return tf.reshape(flat, tf.concat([leading, event], 0))
