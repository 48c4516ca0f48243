"""What the estimators share: a model's joint density, and a Gaussian near its posterior."""

from tensorflow_probability import distributions as tfd

from avb_tf import likelihoods
from avb_tf.model import AVB

MOMENT_DRAWS = 1024  # for the moments of a posterior of which only draws are known
WIDENING = 1.3  # of standard deviations: a Gaussian too narrow misses mass without a sign of it


def log_joint(model: AVB, x, z):
    """log p(x, z) in nats for x [batch, *event], z [samples, batch, latent]: [samples, batch]."""
    outputs = model.averaged_decoder(z)
    return likelihoods.log_likelihood(model.likelihood, outputs, x) + model.prior.log_prob(z)


def widened_gaussian(model: AVB, x, seed: int = 0):
    """A Gaussian with q(z|x)'s mean and its covariance widened: batch [batch], event [latent]."""
    posterior = model.posterior(x, MOMENT_DRAWS, seed)
    return tfd.MultivariateNormalTriL(posterior.mean, WIDENING * posterior.scale_tril)
