"""Keras networks that do not depend on the method: trunks, decoders and adversaries.

Decoders and adversaries take several z for each example in one call, so that all draws pass through
a layer in one larger matrix product. Images are `[..., height, width, channels]` of any size.

Outputs are float32. Inner layers compute in Keras's global dtype policy, so that under
`mixed_bfloat16` the large products are in bfloat16 while moments and densities are in float32.
"""

import abc
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
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        parameters: int,
        width: int,
        depth: int,
        activation: str = "relu",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.output_event = (*event_shape, parameters)
        self.stack = DenseStack(width, depth, activation)
        self.head = float32_dense(math.prod(self.output_event))

    def call(self, z: tf.Tensor) -> tf.Tensor:
        """Maps z [..., latent] to likelihood parameters [..., *event, parameters]."""
        return _unflatten(self.head(self.stack(z)), tf.shape(z)[:-1], self.output_event)


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


class Adversary(Restorable, keras.Model):
    """Base class of T(x, z), the logit that learns log q(z|x) - log r(z|x) (paper, Section 3.1).

    To write your own adversary, subclass it and implement `features` and `logits`. The condition
    is x, or q's description (`objectives.description`). It passes through `features` once for the
    draws of both q and r. z comes whitened by the contrast.

        @keras.saving.register_keras_serializable("example")  # so that a saved model can be loaded
        class QuadraticAdversary(avb_tf.networks.Adversary):
            def __init__(self, latent_dim, **kwargs):
                super().__init__(**kwargs)
                self.latent_dim = latent_dim
                self.flatten = keras.layers.Flatten()
                self.coefficients = keras.layers.Dense(2 * latent_dim + 1)

            def features(self, condition):  # [batch, ...]
                return self.coefficients(self.flatten(condition))

            def logits(self, features, z):  # z [samples, batch, latent]
                linear, quadratic, constant = tf.split(features, [self.latent_dim] * 2 + [1], -1)
                return tf.reduce_sum(linear * z + quadratic * z**2, -1) + constant[:, 0]

        trunk = avb_tf.networks.DenseTrunk(32, 1)
        encoder = avb_tf.encoders.BlackBoxEncoder(trunk, 2, noise_dim=4, width=32, depth=2)
        decoder = avb_tf.networks.DenseDecoder((6,), 1, 32, 1)
        adversary = QuadraticAdversary(latent_dim=2)
        model = avb_tf.AVB((6,), encoder, decoder, adversary, contrast="prior", condition="x")
    """

    def __init__(self, **kwargs: Any):
        super().__init__(dtype="float32", **kwargs)

    @abc.abstractmethod
    def features(self, condition: tf.Tensor) -> Any:
        """Computes from the condition [batch, ...] what `logits` needs, one row per example."""

    @abc.abstractmethod
    def logits(self, features: Any, z: tf.Tensor) -> tf.Tensor:
        """Computes T, [samples, batch].

        Args:
          features: the result of `features`.
          z: [samples, batch, latent], whitened.
        """

    def call(self, condition: tf.Tensor, z: tf.Tensor) -> tf.Tensor:
        """Computes T, [samples, batch].

        Args:
          condition: [batch, ...].
          z: [samples, batch, latent], whitened.
        """
        return self.logits(self.features(condition), z)


@_register
class ResidualAdversary(Adversary):
    """Adversary of residual blocks on z with the condition's features added; T starts at 0.

    z enters together with its squares, so that a difference in scale between q and r is linear in
    the input.

    Args:
      trunk: layer from the condition [batch, ...] to features.
      width: units of each block.
      depth: number of blocks.
    """

    def __init__(self, trunk: keras.layers.Layer, width: int, depth: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.trunk = trunk
        self.from_features = keras.layers.Dense(width)
        self.from_z = keras.layers.Dense(width)
        self.blocks = [keras.layers.Dense(width) for _ in range(depth)]
        self.head = float32_dense(1, kernel_initializer="zeros")

    def features(self, condition: tf.Tensor) -> tf.Tensor:
        """Maps the condition [batch, ...] to features [batch, width]."""
        return self.from_features(self.trunk(condition))

    def logits(self, features: Any, z: tf.Tensor) -> tf.Tensor:
        """Computes T [samples, batch] for features [batch, width], z [samples, batch, latent]."""
        hidden = self.from_z(tf.concat([z, z**2], -1)) + features
        for block in self.blocks:
            hidden += block(tf.nn.silu(hidden))
        return self.head(tf.nn.silu(hidden))[..., 0]


@_register
class ConcatenatingAdversary(Adversary):
    """Adversary of dense layers on the concatenation of the condition's features and z.

    Args:
      trunk: layer from the condition [batch, ...] to features.
      width: units of each layer.
      depth: number of layers.
    """

    def __init__(self, trunk: keras.layers.Layer, width: int, depth: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.trunk = trunk
        # A dense layer on [features, z] is the sum of a layer on each. The sum's first part is the
        # same for all samples, so it is computed once.
        self.from_features = keras.layers.Dense(width)
        self.from_z = keras.layers.Dense(width, use_bias=False)
        self.stack = DenseStack(width, depth - 1)
        self.head = float32_dense(1)

    def features(self, condition: tf.Tensor) -> tf.Tensor:
        """Maps the condition [batch, ...] to features [batch, width]."""
        return self.from_features(self.trunk(condition))

    def logits(self, features: Any, z: tf.Tensor) -> tf.Tensor:
        """Computes T [samples, batch] for features [batch, width], z [samples, batch, latent]."""
        return self.head(self.stack(tf.nn.relu(features + self.from_z(z))))[..., 0]


class WideDense(keras.layers.Layer):
    """Dense layer for far more weights than rows: [rows, inputs] -> [rows, units].

    The kernel is the left factor in the forward and the backward pass. On a CPU the gradient of
    x @ W, which is a product with W^T on the right, runs at half the speed.

    Args:
      units: number of outputs.
      use_bias: whether to add a bias.
      kernel_initializer: a Keras initializer or its name.
    """

    def __init__(
        self,
        units: int,
        use_bias: bool = True,
        kernel_initializer: Any = "glorot_uniform",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.units, self.use_bias = units, use_bias
        self.kernel_initializer = kernel_initializer

    def build(self, input_shape: Any) -> None:
        """Creates the weights; the kernel is [units, inputs]."""
        shape = (self.units, input_shape[-1])
        self.kernel = self.add_weight(
            shape=shape, initializer=self.kernel_initializer, name="kernel"
        )
        self.bias = 0.0
        if self.use_bias:
            self.bias = self.add_weight(shape=(self.units,), initializer="zeros", name="bias")

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Maps inputs [rows, inputs] to outputs [rows, units]."""
        return tf.transpose(tf.matmul(self.kernel, inputs, transpose_b=True)) + self.bias


def tiny_normal() -> keras.initializers.Initializer:
    """Returns the authors' initializer for z0, theta and t, with which outputs start near 0."""
    return keras.initializers.TruncatedNormal(stddev=1e-5)


@_register
class FourTrunkAdversary(Adversary):
    """Adversary T = <theta(x), s(z)> + t(x) + t(z) + |z|^2 / 2 of four separate networks.

        adversary = FourTrunkAdversary(width=1024, depth=3, products=8192)  # as published
        adversary(x, z)  # x [batch, *event], z [samples, batch, latent] -> [samples, batch]

    The last layer of s is linear, s(z) = W h(z) + b, so the product is <W^T theta(x), h(z)> +
    <theta(x), b>. W, the largest weight, is then applied once to each x instead of to each z.

    Args:
      width: units of each hidden layer.
      depth: number of hidden layers in each of the four networks.
      products: length of theta(x) and s(z).
    Source: the adversary `conv0` in the authors' code for MNIST.
    """

    def __init__(self, width: int, depth: int, products: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.flatten = keras.layers.Flatten()
        self.theta_stack, self.t_x_stack, self.s_stack, self.t_z_stack = (
            DenseStack(width, depth, "leaky_relu") for _ in range(4)
        )
        self.theta = WideDense(products, kernel_initializer=tiny_normal())
        self.s = WideDense(width, use_bias=False)  # its kernel is W^T
        self.s_bias = float32_dense(1, use_bias=False, kernel_initializer="zeros")  # b
        self.t_x, self.t_z = (float32_dense(1, kernel_initializer=tiny_normal()) for _ in range(2))

    def features(self, condition: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns W^T theta(x) [batch, width] and <theta(x), b> + t(x) [batch, 1]."""
        x = self.flatten(condition)
        theta = tf.nn.elu(self.theta(self.theta_stack(x)))
        return self.s(theta), self.s_bias(theta) + self.t_x(self.t_x_stack(x))

    def logits(self, features: Any, z: tf.Tensor) -> tf.Tensor:
        """Computes T [samples, batch] for the pair of `features`, z [samples, batch, latent]."""
        return _factorised_t(features, self.s_stack(z), self.t_z(self.t_z_stack(z)), z)


@_register
class FactorisedAdversary(Adversary):
    """Adversary like `FourTrunkAdversary`, with only two trunks: one of x and one of z.

    theta(x) and t(x) share one trunk, s(z) and t(z) the other. No method uses this class. It exists
    to load `.keras` files that earlier versions wrote for `avb_ac_paper`.

    Args:
      trunk: layer from the condition [batch, ...] to features.
      width: units of each hidden layer of the trunk of z.
      depth: number of these layers.
      products: length of theta(x) and s(z).
    """

    def __init__(
        self, trunk: keras.layers.Layer, width: int, depth: int, products: int, **kwargs: Any
    ):
        super().__init__(**kwargs)
        self.trunk = trunk
        self.theta, self.t_features = WideDense(products), float32_dense(1)
        self.stack, self.t_z = DenseStack(width, depth), float32_dense(1)  # h(z) and t(z)
        self.s = WideDense(width, use_bias=False)  # its kernel is W^T
        self.s_bias = float32_dense(1, use_bias=False, kernel_initializer="zeros")  # b

    def features(self, condition: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns W^T theta(x) [batch, width] and <theta(x), b> + t(x) [batch, 1]."""
        hidden = self.trunk(condition)
        theta = self.theta(hidden)
        return self.s(theta), self.s_bias(theta) + self.t_features(hidden)

    def logits(self, features: Any, z: tf.Tensor) -> tf.Tensor:
        """Computes T [samples, batch] for the pair of `features`, z [samples, batch, latent]."""
        hidden = self.stack(z)
        return _factorised_t(features, hidden, self.t_z(hidden), z)


def _factorised_t(features, h, t_z, z):
    """Returns <slope, h(z)> + offset + t(z) + |z|^2 / 2, [samples, batch]."""
    slope, offset = features
    # The sum has many terms, so it is computed in float32.
    slope, h = (tf.cast(v, tf.float32) for v in (slope, h))
    product = tf.einsum("bw,sbw->sb", slope, h)
    return product + (offset + t_z)[..., 0] + 0.5 * tf.reduce_sum(z**2, -1)


def _unflatten(flat, leading, event):
    return tf.reshape(flat, tf.concat([leading, event], 0))
