"""The joint density of a model and a cache of graphs, which the estimators share."""

import functools
from typing import Any

import tensorflow as tf

from avb_tf import likelihoods

# TensorFlow never frees traced graphs (2 to 10 MB each here), so they are cached for the latest
# model and its sizes only. If two models take turns, their graphs are traced again each time.
kept_for_the_last_model = functools.lru_cache(maxsize=1)


def log_joint(model: Any, x: tf.Tensor, z: tf.Tensor) -> tf.Tensor:
    """Returns log p(x, z) in nats, [samples, batch], by the averaged decoder.

    Args:
      model: an `AVB` with a prior.
      x: [batch, *event].
      z: [samples, batch, latent].
    """
    outputs = model.averaged_decoder(z)
    return likelihoods.log_likelihood(model.likelihood, outputs, x) + model.prior.log_prob(z)
