"""A Gaussian near q(z|x), from which importance samples are drawn and annealed chains start.

Evaluation, monitoring and serving all use it, so that bounds of one name are the same bound.
"""

import tensorflow as tf
from tensorflow_probability import distributions as tfd

from avb_tf.encoders import moments_of_draws, sobol_normal

POINTS = 1024  # Sobol points for moments that are estimated from draws
WIDENING = 1.3  # of standard deviations: too narrow a Gaussian misses mass without a sign of it
_CHUNK = 32  # points at a time, to bound the memory
DESCRIPTION = f"Gaussian of q's moments, {WIDENING} times as wide"


def moments(encoder, x):
    """Mean [batch, latent] and Cholesky factor [batch, latent, latent] of q(z|x)'s covariance.

    Draws, where they are needed, are made from the same Sobol points for every x, so an example's
    moments do not depend on its batch.

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


def widened_gaussian(encoder, x):
    """q(z|x)'s mean and its covariance widened: batch [batch], event [latent]."""
    mean, scale_tril = moments(encoder, x)
    return tfd.MultivariateNormalTriL(mean, WIDENING * scale_tril)
