"""What the estimators share: a model's joint density, a Gaussian near its posterior, graphs."""

import functools

from tensorflow_probability import distributions as tfd

from avb_tf import likelihoods
from avb_tf.model import AVB

MOMENT_DRAWS = 1024  # for the moments of a posterior of which only draws are known
WIDENING = 1.3  # of standard deviations: a Gaussian too narrow misses mass without a sign of it

# TensorFlow never frees a graph that it has traced, 2 to 10 MB each here. What has graphs of a
# model is kept for the last model and its sizes, which may be evaluated any number of times; two
# in turn are traced anew each time.
kept_for_the_last_model = functools.lru_cache(maxsize=1)


def log_joint(model: AVB, x, z):
    """log p(x, z) in nats for x [batch, *event], z [samples, batch, latent]: [samples, batch]."""
    outputs = model.averaged_decoder(z)
    return likelihoods.log_likelihood(model.likelihood, outputs, x) + model.prior.log_prob(z)


def widened_gaussian(model: AVB, x, seed: int = 0):
    """A Gaussian with q(z|x)'s mean and its covariance widened: batch [batch], event [latent]."""
    posterior = model.posterior(x, MOMENT_DRAWS, seed)
    return tfd.MultivariateNormalTriL(posterior.mean, WIDENING * posterior.scale_tril)
