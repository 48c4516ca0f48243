"""Likelihoods p(x|z): TFP distributions of x given the decoder's output."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import keras
import tensorflow as tf
from tensorflow_probability import bijectors as tfb
from tensorflow_probability import distributions as tfd

from avb_tf.errors import UserError

SCALE_FLOOR = 1e-2  # smallest scale; without it the density of a constant pixel is unbounded
LEVELS = 256.0  # intensities of an 8-bit image

_register = keras.saving.register_keras_serializable("avb_tf")


@_register
@dataclass(frozen=True)
class Likelihood:
    """Likelihood p(x|z), given the decoder's output [..., *event, parameters].

    To use your own likelihood, create a `Likelihood`. A model with it can be saved if `LIKELIHOODS`
    has a name for it, or if both of its functions are registered with Keras:

        avb_tf.likelihoods.LIKELIHOODS["laplace"] = avb_tf.likelihoods.Likelihood(
            parameters=1,
            distribution=lambda outputs: tfp.distributions.Laplace(
                tf.sigmoid(outputs[..., 0]), 0.1
            ),
            mean=lambda outputs: tf.sigmoid(outputs[..., 0]),
            binary=False,
            bits_per_dim=False,
        )
        encoder = avb_tf.encoders.GaussianEncoder(avb_tf.networks.DenseTrunk(32, 1), latent_dim=2)
        decoder = avb_tf.networks.DenseDecoder((6,), 1, 32, 1)  # 1 parameter
        model = avb_tf.AVB((6,), encoder, decoder, likelihood="laplace")

    Attributes:
      parameters: numbers in the decoder's output for each dimension of x; 0 if the output has
        another shape.
      distribution: function of the decoder's output that returns a TFP distribution with batch
        [..., *event] and event [].
      mean: function of the decoder's output that returns E[x|z], [..., *event].
      binary: whether training binarises the data.
      bits_per_dim: whether to report bits per dimension as well, as is usual for 256 levels.
      support: the values of x: "unit" for numbers in [0, 1] or bytes, which are divided by 255;
        "real" for real numbers; "count" for 0, 1, 2, ...
    """

    parameters: int
    distribution: Callable[[tf.Tensor], Any]
    mean: Callable[[tf.Tensor], tf.Tensor]
    binary: bool
    bits_per_dim: bool
    support: str = "unit"

    def predictive_mean(self, outputs: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
        """Returns E[x'|x], [batch, *event], the mean over draws of q(z|x).

        Args:
          outputs: [samples, batch, *event, parameters], the decoder's output for the draws.
          x: [batch, *event]; ignored.
        """
        del x  # only `columns.TableLikelihood` needs x, for its exposures
        return tf.reduce_mean(self.mean(outputs), 0)

    def get_config(self) -> dict[str, Any]:
        """Returns the serialised fields, for `.keras` files.

        Raises:
          UserError: a function is not registered with Keras, so that a file cannot refer to it.
        """
        for function in (self.distribution, self.mean):
            name = keras.saving.get_registered_name(function)
            if keras.saving.get_registered_object(name) is None:
                raise UserError(
                    f"the likelihood's function {function.__name__} is not registered; decorate it "
                    "with @keras.saving.register_keras_serializable() to save the model"
                )
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {k: keras.saving.serialize_keras_object(v) for k, v in values.items()}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Likelihood":
        """Returns the likelihood of a config that `get_config` returned."""
        values = {k: keras.saving.deserialize_keras_object(v) for k, v in config.items()}
        if "unit" in values:  # files of earlier versions have `unit` instead of `support`
            values["support"] = "unit" if values.pop("unit") else "real"
        return cls(**values)


@_register
def _bernoulli(outputs):
    return tfd.Bernoulli(logits=outputs[..., 0])


@_register
def _normal(outputs):
    scale = SCALE_FLOOR + tf.nn.softplus(outputs[..., 1])
    return tfd.Normal(tf.sigmoid(outputs[..., 0]), scale)


@_register
def _logistic(outputs):
    scale = (SCALE_FLOOR + tf.nn.softplus(outputs[..., 1])) * (LEVELS - 1.0)
    logistic = tfd.Logistic(tf.sigmoid(outputs[..., 0]) * (LEVELS - 1.0), scale)
    # QuantizedDistribution rounds up; a shift by half a level makes it round to the nearest level.
    centred = tfd.TransformedDistribution(logistic, tfb.Shift(-0.5))
    return _Levels(tfd.QuantizedDistribution(centred, low=0.0, high=LEVELS - 1.0))


class _Levels:
    """Distribution over the levels 0..255, scaled to x in [0, 1]."""

    def __init__(self, levels):
        self.levels = levels

    def log_prob(self, x):
        return self.levels.log_prob(tf.round(x * (LEVELS - 1.0)))

    def sample(self, seed):
        return self.levels.sample(seed=seed) / (LEVELS - 1.0)


@_register
def _gaussian(outputs):
    return tfd.Normal(outputs[..., 0], SCALE_FLOOR + tf.nn.softplus(outputs[..., 1]))


@_register
def _student_t(outputs):
    scale = SCALE_FLOOR + tf.nn.softplus(outputs[..., 1])
    degrees = 2.0 + tf.nn.softplus(outputs[..., 2])  # above 2 the variance is finite
    return tfd.StudentT(degrees, outputs[..., 0], scale)


@_register
def _poisson(outputs):
    return tfd.Poisson(log_rate=outputs[..., 0])


@_register
def _negative_binomial(outputs):
    """Has mean m = exp(outputs[..., 0]) and variance m + m^2 exp(outputs[..., 1])."""
    log_failures = -outputs[..., 1]
    return tfd.NegativeBinomial(tf.exp(log_failures), logits=outputs[..., 0] - log_failures)


@_register
def _first(outputs):
    return outputs[..., 0]


@_register
def _exp_mean(outputs):
    return tf.exp(outputs[..., 0])


@_register
def _sigmoid_mean(outputs):
    return tf.sigmoid(outputs[..., 0])


LIKELIHOODS = {
    "bernoulli": Likelihood(1, _bernoulli, _sigmoid_mean, binary=True, bits_per_dim=False),
    "normal": Likelihood(2, _normal, _sigmoid_mean, binary=False, bits_per_dim=False),
    "logistic": Likelihood(2, _logistic, _sigmoid_mean, binary=False, bits_per_dim=True),
    "gaussian": Likelihood(2, _gaussian, _first, False, False, support="real"),
    "student_t": Likelihood(3, _student_t, _first, False, False, support="real"),
    "poisson": Likelihood(1, _poisson, _exp_mean, False, False, support="count"),
    "negative_binomial": Likelihood(2, _negative_binomial, _exp_mean, False, False, "count"),
}


def log_likelihood(likelihood: Likelihood, outputs: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    """Returns log p(x|z) in nats, summed over x's dimensions.

    Args:
      likelihood: a `Likelihood` or a `columns.TableLikelihood`.
      outputs: [..., batch, *event, parameters], the decoder's output.
      x: [batch, *event].
    Returns:
      [..., batch].
    """
    if likelihood.binary:  # half the work of TFP's Bernoulli, which computes softplus twice
        log_prob = x * outputs[..., 0] - tf.nn.softplus(outputs[..., 0])
    else:
        log_prob = likelihood.distribution(outputs).log_prob(x)
    event = x.shape.rank - 1
    return tf.reduce_sum(log_prob, axis=list(range(-event, 0)))


def pairwise_log_likelihood(likelihood: Likelihood, outputs: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    """Returns log p(x_i|z_j) in nats for every pair, [batch, points].

    Args:
      likelihood: a `Likelihood` or a `columns.TableLikelihood`.
      outputs: [points, *event, parameters], the decoder's output for each z_j.
      x: [batch, *event].
    """
    if likelihood.binary:  # linear in x: one matrix product instead of batch * points * event terms
        logits = tf.reshape(outputs, [tf.shape(outputs)[0], -1])
        linear = tf.matmul(tf.reshape(x, [tf.shape(x)[0], -1]), logits, transpose_b=True)
        return linear - tf.reduce_sum(tf.nn.softplus(logits), -1)
    return tf.map_fn(
        lambda one: log_likelihood(likelihood, outputs[:, tf.newaxis], one[tf.newaxis])[:, 0], x
    )
