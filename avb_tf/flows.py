"""Inverse autoregressive flow (Kingma et al., 2016), after any encoder."""

import itertools
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from avb_tf import parts
from avb_tf.encoders import Encoder, Posterior, moments_of_draws
from avb_tf.networks import float32_dense

_register = keras.saving.register_keras_serializable("avb_tf")

OPEN = 2.0  # the gates' logit at first: each step keeps most of z


class MaskedDense(keras.layers.Layer):
    """Dense without the connections where `mask` [inputs, outputs] is zero."""

    def __init__(self, mask: np.ndarray, initializer: str = "glorot_uniform"):
        super().__init__(dtype="float32")
        self.mask = mask.astype(np.float32)
        self.initializer = initializer

    def build(self, input_shape: Any):
        """The weights."""
        shape = self.mask.shape
        self.kernel = self.add_weight(shape=shape, initializer=self.initializer, name="kernel")
        self.bias = self.add_weight(shape=shape[1:], initializer="zeros", name="bias")

    def call(self, inputs: tf.Tensor):
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

    def call(self, z: tf.Tensor, context: tf.Tensor):
        """z [samples, batch, latent], context [batch, width] -> `outputs` tensors like z."""
        hidden = tf.nn.relu(self.hidden[0](z) + context)
        for layer in self.hidden[1:]:
            hidden = tf.nn.relu(layer(hidden))
        return tf.split(self.head(hidden), self.outputs, -1)


@_register
class FlowEncoder(Encoder):
    """Draws of another encoder, then gated autoregressive steps in alternating order.

    Each step takes z to g * z + (1 - g) * m with gates g and means m that an autoregressive network
    reads from z and x, so that its Jacobian is triangular with g on the diagonal (Section 4 there).
    The moments are those of the draws, as in `encoders.BlackBoxEncoder`.

    After a Gaussian the density is known: inverse autoregressive flow. After an implicit encoder it
    is not; but log q - log r is the same before and after the steps, if r goes through them too,
    and so an adaptive contrast may stay a Gaussian there and follow a q that no Gaussian does.

    Args:
      trunk: x -> features, which `base` reads in place of x.
      base: the encoder whose draws are taken further.
      steps: how many.
      width: of the networks' hidden layers.
      depth: number of these.
    """

    def __init__(
        self,
        trunk: keras.layers.Layer,
        base: Encoder,
        steps: int,
        width: int,
        depth: int = 2,
        **kwargs,
    ):
        super().__init__(**kwargs)
        parts.check_flow(width, base.latent_dim)
        self.latent_dim, self.noise_dim = base.latent_dim, base.noise_dim
        self.sample_moments = base.sample_moments  # an adaptive contrast has the base's moments
        self.trunk, self.base = trunk, base
        base.built = True  # for Keras, which expects a call of it as a whole
        self.from_features = float32_dense(steps * width)
        self.steps = [MADE(base.latent_dim, 2, width, depth) for _ in range(steps)]

    def parameters(self, x: tf.Tensor):
        """Those of the base, and each step's [batch, width]."""
        features = self.trunk(x)
        contexts = tf.split(self.from_features(features), len(self.steps), -1)
        return self.base.parameters(features), contexts

    def draw(self, parameters: Any, noise: tf.Tensor, training: bool = False):
        """The base's draws after all steps, with their own moments."""
        of_base, contexts = parameters
        base = self.base.draw(of_base, noise, training)
        z, log_volume = base.z, tf.zeros(tf.shape(base.z)[:-1])
        for step, context in zip(self.steps, contexts, strict=True):
            m, logit = step(z, context)
            gate = tf.sigmoid(logit + OPEN)
            z = gate * z + (1.0 - gate) * m
            log_volume += tf.reduce_sum(tf.math.log_sigmoid(logit + OPEN), -1)
            z = tf.reverse(z, [-1])  # the next step reads them in the other order
        log_prob = None if base.log_prob is None else base.log_prob - log_volume
        return Posterior(
            z, *moments_of_draws(z), log_prob=log_prob, base=base, log_volume=log_volume
        )

    def freezing(self):
        """Within, graphs hold as numbers what the base's do."""
        return self.base.freezing()
