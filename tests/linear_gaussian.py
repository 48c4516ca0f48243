"""A model with log p(x) in closed form: x = W z + noise."""

import keras
import numpy as np
import scipy.stats
import tensorflow as tf
from tensorflow_probability import distributions as tfd

from avb_tf import AVB, likelihoods
from avb_tf.encoders import VARIANCE_FLOOR, GaussianEncoder

SCALE = 0.6
WEIGHT = np.array([[1.0, 0.4], [-0.3, 0.8], [0.5, 0.5]], np.float32)


class LinearDecoder(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(3, use_bias=False)

    def call(self, z):
        return self.dense(z)[..., tf.newaxis]


def _normal(outputs):
    return tfd.Normal(outputs[..., 0], SCALE)


def _mean(outputs):
    return outputs[..., 0]


def make(monkeypatch):
    """Returns the untrained model and the distribution of x."""
    linear = likelihoods.Likelihood(1, _normal, _mean, False, False, support="real")
    monkeypatch.setitem(likelihoods.LIKELIHOODS, "linear", linear)
    encoder = GaussianEncoder(keras.layers.Flatten(), 2, full_covariance=True)
    decoder = LinearDecoder()
    model = AVB((3,), encoder, decoder, likelihood="linear")
    decoder.dense.set_weights([WEIGHT.T])
    evidence = scipy.stats.multivariate_normal(
        np.zeros(3), WEIGHT @ WEIGHT.T + SCALE**2 * np.eye(3)
    )
    return model, evidence


def set_posterior(model, width, weight=WEIGHT):
    """Sets q(z|x) to the exact posterior with standard deviations `width` times as large."""
    covariance = np.linalg.inv(np.eye(2) + weight.T @ weight / SCALE**2)
    scale = width * np.linalg.cholesky(covariance)
    model.encoder.set_weights([
        weight / SCALE**2 @ covariance, np.zeros(2),
        np.zeros((3, 2)), np.log(np.diag(scale) - VARIANCE_FLOOR**0.5),
        np.zeros((3, 4)), np.tril(scale, -1).ravel(),
    ])  # fmt: skip
