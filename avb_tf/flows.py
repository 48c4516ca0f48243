"""Inverse autoregressive flow (Kingma et al., 2016): any shape, and yet a known density."""

import itertools

import keras
import numpy as np
import tensorflow as tf
from tensorflow_probability import distributions as tfd

from avb_tf.encoders import VARIANCE_FLOOR, Encoder, Posterior, moments_of_draws
from avb_tf.networks import float32_dense

_register = keras.saving.register_keras_serializable("avb_tf")

OPEN = 2.0  # the gates' logit at first: each step keeps most of z


class MaskedDense(keras.layers.Layer):
    """Dense without the connections where `mask` [inputs, outputs] is zero."""

    def __init__(self, mask: np.ndarray, initializer: str = "glorot_uniform"):
        super().__init__(dtype="float32")
        self.mask = mask.astype(np.float32)
        self.initializer = initializer

    def build(self, input_shape):
        """The weights."""
        shape = self.mask.shape
        self.kernel = self.add_weight(shape=shape, initializer=self.initializer, name="kernel")
        self.bias = self.add_weight(shape=shape[1:], initializer="zeros", name="bias")

    def call(self, inputs):
        """[..., inputs] -> [..., outputs]."""
        return tf.matmul(inputs, self.kernel * self.mask) + self.bias


class MADE(keras.layers.Layer):
    """An autoregressive network (Germain et al., 2015): output i reads the inputs before i alone.

    Every unit has a degree: the input z_i has i = 1..latent, and a hidden unit reads units of at
    most its own degree. Those of degree 0 read the context alone, which so reaches every output.
    The outputs are zero at first.
    """

    def __init__(self, latent_dim: int, outputs: int, width: int, depth: int):
        super().__init__(dtype="float32")
        self.outputs = outputs
        inputs, hidden = np.arange(1, latent_dim + 1), np.arange(width) % latent_dim
        degrees = itertools.pairwise([inputs, *[hidden] * depth])
        self.hidden = [MaskedDense(after >= before[:, None]) for before, after in degrees]
        reads = inputs > hidden[:, None]
        self.head = MaskedDense(np.tile(reads, outputs), initializer="zeros")

    def call(self, z, context):
        """z [samples, batch, latent], context [batch, width] -> `outputs` tensors like z."""
        hidden = tf.nn.relu(self.hidden[0](z) + context)
        for layer in self.hidden[1:]:
            hidden = tf.nn.relu(layer(hidden))
        return tf.split(self.head(hidden), self.outputs, -1)


@_register
class InverseAutoregressiveEncoder(Encoder):
    """A Gaussian, then gated autoregressive steps in alternating order (Section 4 there).

    Each step takes z to g * z + (1 - g) * m with gates g and means m that an autoregressive network
    reads from z and x, so that its Jacobian is triangular with g on the diagonal. The moments are
    those of the draws, as in `encoders.BlackBoxEncoder`.
    """

    def __init__(
        self,
        trunk: keras.layers.Layer,
        latent_dim: int,
        steps: int,
        width: int,
        depth: int = 2,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.latent_dim = self.noise_dim = latent_dim
        self.sizes = [latent_dim, latent_dim, *[width] * steps]
        self.trunk = trunk
        self.from_features = float32_dense(sum(self.sizes))
        self.steps = [MADE(latent_dim, 2, width, depth) for _ in range(steps)]

    def parameters(self, x):
        """Mean and log scale of the Gaussian, [batch, latent], and each step's [batch, width]."""
        return tf.split(self.from_features(self.trunk(x)), self.sizes, -1)

    def draw(self, parameters, noise, training=False):
        """The flow's draws, with their density and their own moments."""
        mean, log_scale, *contexts = parameters
        scale = tf.exp(log_scale) + VARIANCE_FLOOR**0.5
        z = mean + scale * noise
        log_prob = tfd.MultivariateNormalDiag(mean, scale).log_prob(z)
        for step, context in zip(self.steps, contexts, strict=True):
            m, logit = step(z, context)
            gate = tf.sigmoid(logit + OPEN)
            z = gate * z + (1.0 - gate) * m
            log_prob -= tf.reduce_sum(tf.math.log_sigmoid(logit + OPEN), -1)
            z = tf.reverse(z, [-1])  # the next step reads them in the other order
        return Posterior(z, *moments_of_draws(z), log_prob=log_prob)
