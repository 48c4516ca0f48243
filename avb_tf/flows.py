"""Inverse autoregressive flow (Kingma et al., 2016) on the draws of any encoder."""

import contextlib
import itertools
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from avb_tf import parts
from avb_tf.encoders import Encoder, Posterior, moments_of_draws
from avb_tf.networks import float32_dense

_register = keras.saving.register_keras_serializable("avb_tf")

OPEN = 2.0  # initial logit of the gates: each step keeps most of z


class MaskedDense(keras.layers.Layer):
    """Dense layer without the connections where `mask` [inputs, outputs] is zero."""

    def __init__(self, mask: np.ndarray, initializer: str = "glorot_uniform"):
        super().__init__(dtype="float32")
        self.mask = mask.astype(np.float32)
        self.initializer = initializer

    def build(self, input_shape: Any) -> None:
        """Creates the kernel and the bias."""
        shape = self.mask.shape
        self.kernel = self.add_weight(shape=shape, initializer=self.initializer, name="kernel")
        self.bias = self.add_weight(shape=shape[1:], initializer="zeros", name="bias")

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Maps inputs [..., inputs] to outputs [..., outputs]."""
        return tf.matmul(inputs, self.kernel * self.mask) + self.bias


class MADE(keras.layers.Layer):
    """Autoregressive network: output i depends only on the context and the inputs before i.

    Input z_i has degree i = 1..latent. A hidden unit reads units of at most its own degree. Hidden
    units of degree 0 read only the context, so the context reaches every output. The outputs are
    zero at the start of training.

    Args:
      latent_dim: dimensions of z.
      outputs: number of output tensors.
      width: units of each hidden layer.
      depth: number of hidden layers.
    Source: Germain et al. (2015).
    """

    def __init__(self, latent_dim: int, outputs: int, width: int, depth: int):
        super().__init__(dtype="float32")
        self.outputs = outputs
        inputs, hidden = np.arange(1, latent_dim + 1), np.arange(width) % latent_dim
        degrees = itertools.pairwise([inputs, *[hidden] * depth])
        self.hidden = [MaskedDense(after >= before[:, None]) for before, after in degrees]
        reads = inputs > hidden[:, None]
        self.head = MaskedDense(np.tile(reads, outputs), initializer="zeros")

    def call(self, z: tf.Tensor, context: tf.Tensor) -> list[tf.Tensor]:
        """Returns `outputs` tensors of z's shape.

        Args:
          z: [samples, batch, latent].
          context: [batch, width].
        """
        hidden = tf.nn.relu(self.hidden[0](z) + context)
        for layer in self.hidden[1:]:
            hidden = tf.nn.relu(layer(hidden))
        return tf.split(self.head(hidden), self.outputs, -1)


@_register
class FlowEncoder(Encoder):
    """Encoder that transforms another encoder's draws by gated autoregressive steps.

        base = encoders.GaussianEncoder(keras.layers.Identity(), latent_dim=8)
        encoder = FlowEncoder(networks.DenseTrunk(256, 2), base, steps=4, width=128)
        encoder(x, noise).log_prob  # [samples, batch]

    A step maps z to g * z + (1 - g) * m. An autoregressive network computes the gates g and the
    means m from z and x, so the Jacobian is triangular with g on its diagonal. Each step reads the
    latents in the reverse order of the step before. The moments are estimated from the draws.

    On a Gaussian base the density of q is known: inverse autoregressive flow. On an implicit base
    it is unknown. If the contrast r passes through the steps too, log q - log r is the same before
    and after them, so an adaptive contrast can remain a Gaussian before the steps.

    Args:
      trunk: layer from x to the features that `base` and the steps read.
      base: encoder that reads these features and makes the draws that the steps transform.
      steps: number of steps.
      width: units of each hidden layer of a step's network.
      depth: number of these layers.
    Source: Kingma et al. (2016), Section 4.
    """

    moments_from_draws = True

    def __init__(
        self,
        trunk: keras.layers.Layer,
        base: Encoder,
        steps: int,
        width: int,
        depth: int = 2,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        parts.check_flow(width, base.latent_dim)
        self.latent_dim, self.noise_dim = base.latent_dim, base.noise_dim
        self.trunk, self.base = trunk, base
        base.built = True  # otherwise Keras would wait for a call of the base, which never comes
        self.from_features = float32_dense(steps * width)
        self.steps = [MADE(base.latent_dim, 2, width, depth) for _ in range(steps)]

    def parameters(self, x: tf.Tensor, training: bool = False) -> tuple[Any, list[tf.Tensor]]:
        """Returns the parameters of the base, and a context [batch, width] for each step."""
        features = self.trunk(x, training=training)
        contexts = tf.split(self.from_features(features), len(self.steps), -1)
        return self.base.parameters(features, training), contexts

    def draw(self, parameters: Any, noise: tf.Tensor, training: bool = False) -> Posterior:
        """Draws from the base, applies all steps and estimates the moments (see `Encoder.draw`)."""
        base_parameters, contexts = parameters
        base = self.base.draw(base_parameters, noise, training)
        z, log_volume = base.z, tf.zeros(tf.shape(base.z)[:-1])
        for step, context in zip(self.steps, contexts, strict=True):
            m, logit = step(z, context)
            gate = tf.sigmoid(logit + OPEN)
            z = gate * z + (1.0 - gate) * m
            log_volume += tf.reduce_sum(tf.math.log_sigmoid(logit + OPEN), -1)
            z = tf.reverse(z, [-1])  # the next step reads the latents in reverse order
        log_prob = None if base.log_prob is None else base.log_prob - log_volume
        return Posterior(
            z, *moments_of_draws(z), log_prob=log_prob, base=base, log_volume=log_volume
        )

    def freezing(self) -> contextlib.AbstractContextManager[None]:
        """Makes graphs traced inside the block hold the same constants as graphs of the base."""
        return self.base.freezing()
