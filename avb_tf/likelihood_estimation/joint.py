"""Shared by the estimators: a model's joint density, and a cache of graphs."""

import functools
from typing import Any

from avb_tf import likelihoods

# TensorFlow never frees traced graphs (2 to 10 MB each here), so they are cached for the latest
# model and its sizes only. Two models in turn are traced anew each time.
kept_for_the_last_model = functools.lru_cache(maxsize=1)


def log_joint(model: Any, x, z):
    """log p(x, z) in nats for x [batch, *event], z [samples, batch, latent]: [samples, batch]."""
    outputs = model.averaged_decoder(z)
    return likelihoods.log_likelihood(model.likelihood, outputs, x) + model.prior.log_prob(z)
