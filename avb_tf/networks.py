"""Keras networks without a method in them: trunks, decoders and adversaries.

Every network takes any number of leading dimensions before the one it works on, so that several
noise draws per example pass through at the cost of one larger product. Images are
`[..., height, width, channels]` of any size.

What a part gives to others is float32. Its inner layers compute in Keras's global dtype policy, so
that under `mixed_bfloat16` the large products are in bfloat16 and no moment or density is.
"""

import abc
import inspect
import math
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

_register = keras.saving.register_keras_serializable("avb_tf")


class Restorable:
    """A Keras object that its constructor's arguments, other Keras objects among them, restore."""

    _arguments: dict

    def __new__(cls, *args, **kwargs):
        """Keeps the constructor's arguments for `get_config`."""
        instance = super().__new__(cls, *args, **kwargs)
        bound = inspect.signature(cls.__init__).bind(instance, *args, **kwargs).arguments
        _, *arguments = (bound | bound.pop("kwargs", {})).items()
        vars(instance)["_arguments"] = dict(arguments)  # past Keras's tracking of attributes
        return instance

    def get_config(self):
        """The constructor's arguments, serialised."""
        return {k: keras.saving.serialize_keras_object(v) for k, v in self._arguments.items()}

    def get_build_config(self):
        """Nothing: the model that holds the object builds it by running it."""

    @classmethod
    def from_config(cls, config: dict[str, Any]):
        """The object that `get_config` described."""
        return cls(**{k: keras.saving.deserialize_keras_object(v) for k, v in config.items()})


def float32_dense(units: int, **kwargs) -> keras.layers.Dense:
    """A dense layer whose outputs are float32 under every dtype policy."""
    return keras.layers.Dense(units, dtype="float32", **kwargs)


@_register
class DenseStack(Restorable, keras.layers.Layer):
    """Dense layers of equal width, [..., inputs] -> [..., width]; inputs are not flattened."""

    def __init__(self, width: int, depth: int, activation: str = "relu", **kwargs):
        super().__init__(**kwargs)
        self.hidden = [keras.layers.Dense(width, activation=activation) for _ in range(depth)]

    def call(self, inputs: tf.Tensor):
        """[..., inputs] -> [..., width]."""
        hidden = tf.reshape(inputs, [-1, inputs.shape[-1]])  # TensorFlow fuses what is of rank 2
        for layer in self.hidden:
            hidden = layer(hidden)
        return _unflatten(hidden, tf.shape(inputs)[:-1], hidden.shape[-1:])


@_register
class DenseTrunk(Restorable, keras.layers.Layer):
    """Features of x by dense layers: [batch, *event] in [0, 1] -> [batch, width]."""

    def __init__(self, width: int, depth: int, activation: str = "relu", **kwargs):
        super().__init__(**kwargs)
        self.flatten = keras.layers.Flatten()
        self.stack = DenseStack(width, depth, activation)

    def call(self, x: tf.Tensor):
        """[batch, *event] -> [batch, width]."""
        return self.stack(2.0 * self.flatten(x) - 1.0)


@_register
class ConvTrunk(Restorable, keras.layers.Layer):
    """Features of an image by 5x5 convolutions, each of stride 2 unless given, then a dense layer.

    [batch, height, width, channels] in [0, 1] -> [batch, features].
    """

    def __init__(
        self,
        filters: Sequence[int],
        features: int,
        strides: Sequence[int] = (),
        activation: str = "relu",
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.convolutions = [
            keras.layers.Conv2D(n, 5, strides=stride, padding="same", activation=activation)
            for n, stride in zip(filters, strides or [2] * len(filters), strict=True)
        ]
        self.flatten = keras.layers.Flatten()
        self.dense = keras.layers.Dense(features, activation=activation)

    def call(self, x: tf.Tensor):
        """[batch, height, width, channels] -> [batch, features]."""
        hidden = 2.0 * x - 1.0
        for layer in self.convolutions:
            hidden = layer(hidden)
        return self.dense(self.flatten(hidden))


@_register
class ResidualTrunk(Restorable, keras.layers.Layer):
    """Features of x by residual blocks (He et al., 2016) on a linear layer of another trunk's.

    [batch, *event] -> [batch, width]. A block adds two dense layers of the features, normalised
    over the layer, and changes nothing at first. Beside the blocks stands no activation but a last
    relu.
    """

    def __init__(self, trunk: keras.layers.Layer, width: int, blocks: int, **kwargs):
        super().__init__(**kwargs)
        dense = keras.layers.Dense
        self.trunk = trunk
        self.first = dense(width)
        self.norms = [keras.layers.LayerNormalization() for _ in range(blocks)]
        self.hidden = [dense(width, activation="relu") for _ in range(blocks)]
        self.changes = [dense(width, kernel_initializer="zeros") for _ in range(blocks)]

    def call(self, x: tf.Tensor):
        """[batch, *event] -> [batch, width]."""
        features = self.first(self.trunk(x))
        for norm, hidden, change in zip(self.norms, self.hidden, self.changes, strict=True):
            features += change(hidden(norm(features)))
        return tf.nn.relu(features)


@_register
class DenseDecoder(Restorable, keras.Model):
    """Likelihood parameters of x by dense layers.

    [..., latent] -> [..., *event, parameters], `parameters` numbers for each dimension of x.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        parameters: int,
        width: int,
        depth: int,
        activation: str = "relu",
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.output_event = (*event_shape, parameters)
        self.stack = DenseStack(width, depth, activation)
        self.head = float32_dense(math.prod(self.output_event))

    def call(self, z: tf.Tensor):
        """[..., latent] -> [..., *event, parameters]."""
        return _unflatten(self.head(self.stack(z)), tf.shape(z)[:-1], self.output_event)


@_register
class ConvDecoder(Restorable, keras.Model):
    """Likelihood parameters of an image by transposed 5x5 convolutions.

    [..., latent] -> [..., height, width, channels, parameters]. `filters` and `strides` are those
    of the trunk that it mirrors; sizes that the strides do not divide are cropped from the next
    larger one.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        parameters: int,
        filters: Sequence[int],
        strides: Sequence[int] = (),
        activation: str = "relu",
        **kwargs,
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

    def call(self, z: tf.Tensor):
        """[..., latent] -> [..., height, width, channels, parameters]."""
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

    Subclass it for an adversary of your own and implement `features` and `logits`. The condition
    is x, or q's description (`objectives.description`). It passes through `features` once for the
    draws of both q and r. z is whitened by the contrast.

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

    def __init__(self, **kwargs):
        super().__init__(dtype="float32", **kwargs)

    @abc.abstractmethod
    def features(self, condition: tf.Tensor):
        """The condition's branch: [batch, ...] -> [batch, features]."""

    @abc.abstractmethod
    def logits(self, features: Any, z: tf.Tensor):
        """T: [batch, features], [samples, batch, latent] -> [samples, batch]."""

    def call(self, condition: tf.Tensor, z: tf.Tensor):
        """T: [batch, ...], [samples, batch, latent] -> [samples, batch]."""
        return self.logits(self.features(condition), z)


@_register
class ResidualAdversary(Adversary):
    """Residual blocks on z with the condition's features added; T = 0 at the start.

    z enters with its squares, so that a change of scale, the commonest difference between q and
    r, is linear in the input.
    """

    def __init__(self, trunk: keras.layers.Layer, width: int, depth: int, **kwargs):
        super().__init__(**kwargs)
        self.trunk = trunk
        self.from_features = keras.layers.Dense(width)
        self.from_z = keras.layers.Dense(width)
        self.blocks = [keras.layers.Dense(width) for _ in range(depth)]
        self.head = float32_dense(1, kernel_initializer="zeros")

    def features(self, condition: tf.Tensor):
        """[batch, ...] -> [batch, width]."""
        return self.from_features(self.trunk(condition))

    def logits(self, features: Any, z: tf.Tensor):
        """[batch, width], [samples, batch, latent] -> [samples, batch]."""
        hidden = self.from_z(tf.concat([z, z**2], -1)) + features
        for block in self.blocks:
            hidden += block(tf.nn.silu(hidden))
        return self.head(tf.nn.silu(hidden))[..., 0]


@_register
class ConcatenatingAdversary(Adversary):
    """Dense layers on the condition's features and z side by side."""

    def __init__(self, trunk: keras.layers.Layer, width: int, depth: int, **kwargs):
        super().__init__(**kwargs)
        self.trunk = trunk
        # The first layer on [features, z] is the sum of one on each: the features' part is the
        # same for all samples and is computed once.
        self.from_features = keras.layers.Dense(width)
        self.from_z = keras.layers.Dense(width, use_bias=False)
        self.stack = DenseStack(width, depth - 1)
        self.head = float32_dense(1)

    def features(self, condition: tf.Tensor):
        """[batch, ...] -> [batch, width]."""
        return self.from_features(self.trunk(condition))

    def logits(self, features: Any, z: tf.Tensor):
        """[batch, width], [samples, batch, latent] -> [samples, batch]."""
        return self.head(self.stack(tf.nn.relu(features + self.from_z(z))))[..., 0]


class WideDense(keras.layers.Layer):
    """A dense layer for far more weights than rows, [rows, inputs] -> [rows, units].

    The kernel stands on the left in forward and backward pass alike. On a CPU the gradient of
    x @ W, a product with W^T on the right, runs at half the speed of the others.
    """

    def __init__(self, units: int, use_bias: bool = True, **kwargs):
        super().__init__(**kwargs)
        self.units, self.use_bias = units, use_bias

    def build(self, input_shape: Any):
        """The weights; the kernel is [units, inputs]."""
        self.kernel = self.add_weight(shape=(self.units, input_shape[-1]), name="kernel")
        self.bias = 0.0
        if self.use_bias:
            self.bias = self.add_weight(shape=(self.units,), initializer="zeros", name="bias")

    def call(self, inputs: tf.Tensor):
        """[rows, inputs] -> [rows, units]."""
        return tf.transpose(tf.matmul(self.kernel, inputs, transpose_b=True)) + self.bias


@_register
class FactorisedAdversary(Adversary):
    """T = <theta(x), s(z)> + t(x) + t(z) + |z|^2 / 2, as in the authors' experiments on MNIST.

    The last layer of s is linear: with s(z) = W h(z) + b the product is <W^T theta(x), h(z)> +
    <theta(x), b>. So W, the largest of all weights, meets each x once in place of every z.
    """

    def __init__(self, trunk: keras.layers.Layer, width: int, depth: int, products: int, **kwargs):
        super().__init__(**kwargs)
        self.trunk = trunk
        self.theta, self.t_features = WideDense(products), float32_dense(1)
        self.stack, self.t_z = DenseStack(width, depth), float32_dense(1)  # h(z) and t(z)
        self.s = WideDense(width, use_bias=False)  # its kernel is W^T
        self.s_bias = float32_dense(1, use_bias=False, kernel_initializer="zeros")  # b

    def features(self, condition: tf.Tensor):
        """[batch, ...] -> W^T theta(x) [batch, width] and <theta(x), b> + t(x) [batch, 1]."""
        hidden = self.trunk(condition)
        theta = self.theta(hidden)
        return self.s(theta), self.s_bias(theta) + self.t_features(hidden)

    def logits(self, features: Any, z: tf.Tensor):
        """The two of `features`, z [samples, batch, latent] -> [samples, batch]."""
        slope, offset = features
        hidden = self.stack(z)
        slope, h = (tf.cast(v, tf.float32) for v in (slope, hidden))  # a long sum
        product = tf.einsum("bw,sbw->sb", slope, h)
        return product + (offset + self.t_z(hidden))[..., 0] + 0.5 * tf.reduce_sum(z**2, -1)


def _unflatten(flat, leading, event):
    return tf.reshape(flat, tf.concat([leading, event], 0))
