"""Auxiliary deep generative models (Maaløe et al., 2016): another latent makes q(z|x) a mixture."""

from typing import Any

import keras
import tensorflow as tf
from tensorflow_probability import distributions as tfd

from avb_tf.encoders import VARIANCE_FLOOR, Encoder, Posterior, moments_of_draws
from avb_tf.networks import DenseStack, float32_dense

_register = keras.saving.register_keras_serializable("avb_tf")


class ConditionalGaussian(keras.layers.Layer):
    """Diagonal Gaussian of one latent given x and another latent, by dense layers on both.

    Args:
      dim: dimensions of the Gaussian.
      width: units of each hidden layer.
      depth: number of hidden layers.
    """

    def __init__(self, dim: int, width: int, depth: int):
        super().__init__(dtype="float32")
        self.from_latent = float32_dense(width, use_bias=False)
        self.stack = DenseStack(width, depth - 1)
        self.mean, self.log_scale = float32_dense(dim), float32_dense(dim)

    def call(self, context: tf.Tensor, latent: tf.Tensor) -> tfd.Distribution:
        """Returns the Gaussian, batch [samples, batch], event [dim].

        Args:
          context: [batch, width], computed from x.
          latent: [samples, batch, n], the other latent.
        """
        hidden = self.stack(tf.nn.relu(context + self.from_latent(latent)))
        return _gaussian(self.mean(hidden), self.log_scale(hidden))


@_register
class AuxiliaryEncoder(Encoder):
    """Posterior q(a|x) q(z|a, x) of two Gaussians, so that q(z|x) is a mixture of Gaussians over a.

        encoder = AuxiliaryEncoder(trunk, latent_dim=8, auxiliary_dim=8, width=256, depth=2)
        encoder(x, noise).log_prob  # [samples, batch], for noise [samples, batch, 16]

    The density of q(z|x) is unknown. The auxiliary model r(a|x, z) gives a stand-in,

        log_prob = log q(a|x) + log q(z|a, x) - log r(a|x, z)

    which exceeds log q(z|x) by KL(q(a|x, z) || r(a|x, z)) on average over a. The bound is then the
    bound of the extended model p(z) p(x|z) r(a|x, z), which has the same p(x). r does not take part
    in generating x, so it belongs to the encoder and is trained by the same bound.

    Args:
      trunk: layer from x [batch, *event] to features.
      latent_dim: dimensions of z.
      auxiliary_dim: dimensions of a.
      width: units of each hidden layer.
      depth: number of hidden layers.
    Source: Maaløe et al. (2016).
    """

    moments_from_draws = True

    def __init__(
        self,
        trunk: keras.layers.Layer,
        latent_dim: int,
        auxiliary_dim: int,
        width: int,
        depth: int,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.latent_dim, self.noise_dim = latent_dim, auxiliary_dim + latent_dim
        self.auxiliary_dim = auxiliary_dim
        self.sizes = [auxiliary_dim, auxiliary_dim, width, width]
        self.trunk = trunk
        self.from_features = float32_dense(sum(self.sizes))
        self.latent = ConditionalGaussian(latent_dim, width, depth)
        self.auxiliary = ConditionalGaussian(auxiliary_dim, width, depth)

    def parameters(self, x: tf.Tensor, training: bool = False) -> list[tf.Tensor]:
        """Returns mean and log scale of q(a|x) [batch, auxiliary], and two contexts [batch, width].

        The contexts are those of q(z|a, x) and r(a|x, z).
        """
        return tf.split(self.from_features(self.trunk(x, training=training)), self.sizes, -1)

    def draw(self, parameters: Any, noise: tf.Tensor, training: bool = False) -> Posterior:
        """Draws a, then z given a, and estimates the moments from the draws.

        Args:
          parameters: the four tensors that `parameters` returns.
          noise: [samples, batch, auxiliary + latent], standard normal.
          training: ignored.
        """
        mean, log_scale, for_latent, for_auxiliary = parameters
        noise_a, noise_z = tf.split(noise, [self.auxiliary_dim, self.latent_dim], -1)
        q_a = _gaussian(mean, log_scale)
        a = q_a.loc + q_a.scale.matvec(noise_a)
        q_z = self.latent(for_latent, a)
        z = q_z.loc + q_z.scale.matvec(noise_z)
        r_a = self.auxiliary(for_auxiliary, z)
        log_prob = q_a.log_prob(a) + q_z.log_prob(z) - r_a.log_prob(a)
        return Posterior(z, *moments_of_draws(z), log_prob=log_prob)


def _gaussian(mean, log_scale):
    """Returns a diagonal Gaussian, batch [...], event [dim]."""
    return tfd.MultivariateNormalDiag(mean, tf.exp(log_scale) + VARIANCE_FLOOR**0.5)
