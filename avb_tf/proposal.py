"""A Gaussian near q(z|x): the proposal of importance sampling and the start of annealed chains.

Evaluation, monitoring and serving all use it, so that bounds of the same name are the same bound.
"""

import tensorflow as tf
from tensorflow_probability import distributions as tfd

from avb_tf.encoders import Encoder, moments_of_draws, sobol_normal

POINTS = 1024  # Sobol points for moments that are estimated from draws
# Factor of the standard deviations, because a Gaussian that is too narrow misses mass, and no
# diagnostic shows it.
WIDENING = 1.3
_CHUNK = 32  # points computed at a time, to bound the memory
DESCRIPTION = f"Gaussian of q's moments, {WIDENING} times as wide"


def moments(encoder: Encoder, x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns q(z|x)'s mean [batch, latent] and Cholesky factor [batch, latent, latent].

    If the moments have to be estimated from draws, the draws use the same Sobol points for every x,
    so an example's moments do not depend on its batch.

    Args:
      encoder: an `encoders.Encoder`.
      x: [batch, *event].
    """
    batch, dim = tf.shape(x)[0], encoder.noise_dim
    if not encoder.moments_from_draws:
        posterior = encoder(x, tf.zeros([1, batch, dim]))
        return posterior.mean, posterior.scale_tril
    parameters = encoder.parameters(x)

    def draw(noise):
        return encoder.draw(parameters, tf.broadcast_to(noise, [_CHUNK, batch, dim])).z

    z = tf.map_fn(
        draw, tf.constant(sobol_normal(POINTS, dim).reshape(-1, _CHUNK, 1, dim)),
        parallel_iterations=1,
        fn_output_signature=tf.TensorSpec([_CHUNK, None, encoder.latent_dim]),
    )  # fmt: skip
    return moments_of_draws(tf.reshape(z, [POINTS, batch, encoder.latent_dim]))


def widened_gaussian(encoder: Encoder, x: tf.Tensor) -> tfd.Distribution:
    """Returns a Gaussian with q's mean and a wider covariance, batch [batch], event [latent]."""
    mean, scale_tril = moments(encoder, x)
    return tfd.MultivariateNormalTriL(mean, WIDENING * scale_tril)
