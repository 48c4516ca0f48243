"""The networks of a fixed model's posterior: noise -> z, and a chart that takes z to parameters."""

import math

import keras
import tensorflow as tf
from tensorflow_probability import distributions as tfd

from avb_tf.encoders import Encoder, Posterior, fixed_noise, moments_of_draws
from avb_tf.flows import MADE
from avb_tf.networks import DenseStack, Restorable

_register = keras.saving.register_keras_serializable("avb_tf")


class NormalEncoder(Encoder):
    """z ~ N(0, I), whatever x: its density is known and nothing in it is learned."""

    def __init__(self, latent_dim: int, **kwargs):
        super().__init__(**kwargs)
        self.latent_dim = self.noise_dim = latent_dim

    def parameters(self, x, training=False):
        """The same for every x."""
        zeros = tf.zeros([tf.shape(x)[0], self.latent_dim])
        return zeros, tf.linalg.diag(tf.ones_like(zeros))

    def draw(self, parameters, noise, training=False):
        """The noise itself."""
        mean, scale_tril = parameters
        log_prob = tfd.MultivariateNormalTriL(mean, scale_tril).log_prob(noise)
        return Posterior(noise, mean, scale_tril, log_prob=log_prob)


@_register
class GatedEncoder(Encoder):
    """z from noise by blocks z <- A z * exp(s) + t, where s and t are networks of z and more noise.

    Sums bend and split q; products narrow it, as the neck of a funnel asks. Every block is the
    identity at first, so that training starts from N(0, I). Unlike a flow's, its blocks need no
    inverse and may fold, and the noise beside z lets one z go several ways. Bounded units leave q
    Gaussian tails: with unbounded ones single draws went hundreds of standard deviations away and
    took the contrast's moments with them.
    """

    def __init__(self, latent_dim: int, noise_dim: int, blocks: int, width: int, **kwargs):
        super().__init__(**kwargs)
        self.latent_dim, self.noise_dim = latent_dim, latent_dim + noise_dim
        dense, count = keras.layers.Dense, range(blocks)
        self.mixing = [dense(latent_dim, kernel_initializer="identity") for _ in count]
        self.stacks = [DenseStack(width, 2, "tanh") for _ in count]
        self.gates = [dense(2 * latent_dim, kernel_initializer="zeros") for _ in count]

    def parameters(self, x, training=False):
        """Nothing: x is fixed."""
        return ()

    def draw(self, parameters, noise, training=False):
        """z for noise [samples, 1, noise_dim], with its moments."""
        z = self.z(noise)
        if not self.stacks:  # z is the noise: no estimate of its moments is as exact
            zeros = tf.zeros([1, self.latent_dim])
            return Posterior(z, zeros, tf.linalg.diag(zeros + 1.0))
        moments_of = z if training else self.z(tf.constant(fixed_noise(self.noise_dim)))
        return Posterior(z, *moments_of_draws(moments_of))

    def z(self, noise):
        """[..., noise_dim] -> [..., latent]."""
        z, more = tf.split(noise, [self.latent_dim, self.noise_dim - self.latent_dim], -1)
        for mixing, stack, gate in zip(self.mixing, self.stacks, self.gates, strict=True):
            z = mixing(z)
            scale, shift = tf.split(gate(stack(tf.concat([z, more], -1))), 2, -1)
            z = z * _gain(scale, 1.5)[0] + shift
        return z


@_register
class Chart(Restorable, keras.layers.Layer):
    """An invertible map of R^dim in autoregressive steps, with its log Jacobian determinant.

    It stands where a model of data has its decoder, and takes what bends and narrows in a posterior
    upon itself, so that q and its Gaussian contrast live where the posterior is round. The
    identity at first. Steps alternate in order: each coordinate may scale every other.
    """

    def __init__(self, dim: int, steps: int, width: int, **kwargs):
        super().__init__(**kwargs)
        self.steps = [MADE(dim, 2, width, 2) for _ in range(steps)]

    def call(self, z):
        """z [..., dim] -> [..., dim + 1]: coordinates, and log |their derivative by z|."""
        volume = tf.zeros(tf.shape(z)[:-1])
        for step in self.steps:
            scale, shift = step(z, tf.zeros([]))
            gain, log_gain = _gain(scale, 5.0)
            z = tf.reverse(z * gain + shift, [-1])
            volume += tf.reduce_sum(log_gain, -1)
        if len(self.steps) % 2:
            z = tf.reverse(z, [-1])
        return tf.concat([z, volume[..., tf.newaxis]], -1)

    def inverse(self, u):
        """z [n, dim] for coordinates u [n, dim], one after the other."""
        z = tf.reverse(u, [-1]) if len(self.steps) % 2 else u
        for step in reversed(self.steps):
            moved, z = tf.reverse(z, [-1]), tf.zeros_like(z)
            for _ in range(u.shape[-1]):  # each pass gets one more coordinate right
                scale, shift = step(z, tf.zeros([]))
                z = (moved - shift) / _gain(scale, 5.0)[0]
        return z


@_register
class Plain(Restorable, keras.layers.Layer):
    """A chart that changes nothing."""

    def call(self, z):
        """z [..., dim] -> [..., dim + 1]: z, and 0."""
        return tf.concat([z, tf.zeros_like(z[..., :1])], -1)

    def inverse(self, u):
        """The same."""
        return u


def log_normal(z):
    """log N(z; 0, I) in nats, [..., dim] -> [...]."""
    constant = 0.5 * z.shape[-1] * math.log(2.0 * math.pi)
    return -0.5 * tf.reduce_sum(z**2, -1) - constant


def _gain(x, limit):
    """A factor, exp(x) near x = 0, between exp(-limit) and exp(limit), and its logarithm."""
    log_gain = limit * tf.tanh(x / limit)
    return tf.exp(log_gain), log_gain
