"""Adversaries: Keras networks that learn T = log q(z|x) - log r(z|x).

An adversary takes several z for each example in one call, so that all draws pass through a layer in
one larger matrix product. T is float32; inner layers compute in Keras's global dtype policy.
"""

import abc
from typing import Any

import keras
import tensorflow as tf

from avb_tf.networks import DenseStack, Restorable, float32_dense, tiny_normal

_register = keras.saving.register_keras_serializable("avb_tf")


class Adversary(Restorable, keras.Model):
    """Base class of T(x, z), the logit that learns log q(z|x) - log r(z|x) (paper, Section 3.1).

    To write your own adversary, subclass it and implement `features` and `logits`. The condition
    is x, or q's description (`objectives.description`). It passes through `features` once for the
    draws of both q and r. z comes whitened by the contrast.

        @keras.saving.register_keras_serializable("example")  # so that a saved model can be loaded
        class QuadraticAdversary(avb_tf.adversaries.Adversary):
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
