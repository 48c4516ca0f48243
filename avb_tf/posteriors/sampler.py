"""The networks of a fixed model's posterior: noise -> z, and a chart from z to parameters."""

import math
from typing import Any

import keras
import tensorflow as tf
from tensorflow_probability import distributions as tfd

from avb_tf.encoders import Encoder, Posterior, fixed_noise, moments_of_draws
from avb_tf.flows import MADE
from avb_tf.networks import DenseStack, Restorable
from avb_tf.posteriors.mixture import Mixture

_SOLVED = 1e-6  # change of a coordinate, relative to its size, below which it is solved

_register = keras.saving.register_keras_serializable("avb_tf")


class NormalEncoder(Encoder):
    """z ~ N(0, I) for every x, with a known density and no weights."""

    def __init__(self, latent_dim: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.latent_dim = self.noise_dim = latent_dim

    def parameters(self, x: tf.Tensor, training: bool = False) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns mean 0 and scale I, the same for every x [batch, ...]."""
        zeros = tf.zeros([tf.shape(x)[0], self.latent_dim])
        return zeros, tf.linalg.diag(tf.ones_like(zeros))

    def draw(self, parameters: Any, noise: tf.Tensor, training: bool = False) -> Posterior:
        """Returns the noise itself as z, with its log density.

        Args:
          parameters: mean [batch, latent] and scale [batch, latent, latent].
          noise: [samples, batch, latent].
          training: ignored.
        """
        mean, scale_tril = parameters
        log_prob = tfd.MultivariateNormalTriL(mean, scale_tril).log_prob(noise)
        return Posterior(noise, mean, scale_tril, log_prob=log_prob)


class MixtureEncoder(Encoder):
    """z from a mixture of Gaussians, the same for every x, with a known density and no weights.

    The first noise selects the component, so that modes may lie far apart.

    Args:
      mixture: the mixture; it must be one of Gaussians.
    """

    def __init__(self, mixture: Mixture, **kwargs: Any):
        super().__init__(**kwargs)
        self.latent_dim = mixture.means.shape[1]
        self.noise_dim = self.latent_dim + 1
        merged = mixture.merged()
        self._moments = merged.means[0], merged.roots[0]
        weights, self._means, self._roots = (
            tf.constant(part, tf.float32)
            for part in (mixture.weights, mixture.means, mixture.roots)
        )
        self._below = tf.cumsum(weights)[:-1]
        components = tfd.MultivariateNormalTriL(self._means, self._roots)
        self._density = tfd.MixtureSameFamily(tfd.Categorical(tf.math.log(weights)), components)

    def parameters(self, x: tf.Tensor, training: bool = False) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the mixture's mean and scale, the same for every x [batch, ...]."""
        shape = tf.shape(x)[:1]
        return tuple(
            tf.broadcast_to(tf.constant(moment, tf.float32), tf.concat([shape, moment.shape], 0))
            for moment in self._moments
        )

    def draw(self, parameters: Any, noise: tf.Tensor, training: bool = False) -> Posterior:
        """Returns draws of the mixture, with their log density.

        Args:
          parameters: mean [batch, latent] and scale [batch, latent, latent].
          noise: [samples, batch, latent + 1].
          training: ignored.
        """
        z = self.z(noise)
        return Posterior(z, *parameters, log_prob=self.log_density(z))

    def z(self, noise: tf.Tensor) -> tf.Tensor:
        """Returns z for noise, [..., latent + 1] -> [..., latent]."""
        uniform = 0.5 * tf.math.erfc(-noise[..., :1] / math.sqrt(2.0))
        component = tf.reduce_sum(tf.cast(uniform > self._below, tf.int32), -1)
        moved = self._means + tf.einsum("...j,kij->...ki", noise[..., 1:], self._roots)
        return tf.gather(moved, component, axis=-2, batch_dims=len(component.shape))

    def log_density(self, z: tf.Tensor) -> tf.Tensor:
        """Returns the log density of z in nats, [..., latent] -> [...]."""
        return self._density.log_prob(z)


@_register
class GatedEncoder(Encoder):
    """z from noise by blocks z <- A z * exp(s) + t, where s and t are networks of z and more noise.

    Shifts t bend and split q; gains exp(s) narrow it, as the neck of a funnel requires. Every block
    starts as the identity, so that training starts from N(0, I). Unlike the steps of a flow, the
    blocks need no inverse and may fold space, and the additional noise lets equal z move to
    different places. Bounded hidden units preserve q's Gaussian tails: with unbounded ones, single
    draws moved hundreds of standard deviations away and distorted the contrast's moments.

    Args:
      latent_dim: dimensions of z.
      noise_dim: dimensions of the additional noise.
      blocks: number of blocks.
      width: units of each hidden layer.
    """

    def __init__(self, latent_dim: int, noise_dim: int, blocks: int, width: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.latent_dim, self.noise_dim = latent_dim, latent_dim + noise_dim
        dense, count = keras.layers.Dense, range(blocks)
        self.mixing = [dense(latent_dim, kernel_initializer="identity") for _ in count]
        self.stacks = [DenseStack(width, 2, "tanh") for _ in count]
        self.gates = [dense(2 * latent_dim, kernel_initializer="zeros") for _ in count]

    def parameters(self, x: tf.Tensor, training: bool = False) -> tuple[()]:
        """Returns no parameters, because x is fixed."""
        return ()

    def draw(self, parameters: Any, noise: tf.Tensor, training: bool = False) -> Posterior:
        """Returns z with its moments.

        Args:
          parameters: ignored.
          noise: [samples, 1, noise_dim].
          training: whether to take the moments of these draws; if not, they are those of z for
            fixed noise.
        """
        z = self.z(noise)
        if not self.stacks:  # z is the noise itself, whose moments are known exactly
            zeros = tf.zeros([1, self.latent_dim])
            return Posterior(z, zeros, tf.linalg.diag(zeros + 1.0))
        moments_of = z if training else self.z(tf.constant(fixed_noise(self.noise_dim)))
        return Posterior(z, *moments_of_draws(moments_of))

    def z(self, noise: tf.Tensor) -> tf.Tensor:
        """Returns z for noise, [..., noise_dim] -> [..., latent]."""
        z, more = tf.split(noise, [self.latent_dim, self.noise_dim - self.latent_dim], -1)
        for mixing, stack, gate in zip(self.mixing, self.stacks, self.gates, strict=True):
            z = mixing(z)
            scale, shift = tf.split(gate(stack(tf.concat([z, more], -1))), 2, -1)
            z = z * _gain(scale, 1.5)[0] + shift
        return z


@_register
class Chart(Restorable, keras.layers.Layer):
    """An invertible map of R^dim in autoregressive steps, with its log Jacobian determinant.

    The chart takes the place of the decoder in a model of data. It models the bends and narrow
    parts of a posterior, so that q and its Gaussian contrast work in coordinates where the
    posterior is nearly Gaussian. It starts as the identity. The order of the coordinates is
    reversed after each step, so that each coordinate may scale every other.

    Args:
      dim: dimensions of z.
      steps: number of autoregressive steps.
      width: units of each hidden layer.
    """

    def __init__(self, dim: int, steps: int, width: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.steps = [MADE(dim, 2, width, 2) for _ in range(steps)]

    def call(self, z: tf.Tensor) -> tf.Tensor:
        """Returns the coordinates u of z and log |du / dz|, [..., dim] -> [..., dim + 1]."""
        volume = tf.zeros(tf.shape(z)[:-1])
        for step in self.steps:
            scale, shift = step(z, tf.zeros([]))
            gain, log_gain = _gain(scale, 5.0)
            z = tf.reverse(z * gain + shift, [-1])
            volume += tf.reduce_sum(log_gain, -1)
        if len(self.steps) % 2:
            z = tf.reverse(z, [-1])
        return tf.concat([z, volume[..., tf.newaxis]], -1)

    def inverse(self, u: tf.Tensor) -> tf.Tensor:
        """Returns z [n, dim] for coordinates u [n, dim].

        Each pass of a step solves for one more coordinate exactly. It ends as soon as no coordinate
        changes, which in hundreds of dimensions is long before all of them are solved.
        """
        z = tf.reverse(u, [-1]) if len(self.steps) % 2 else u
        for step in reversed(self.steps):
            z = _solved(step, tf.reverse(z, [-1]))
        return z


def _solved(step, moved):
    """Returns the z that an autoregressive step moves to `moved`, [n, dim]."""

    def closer(z, _):
        scale, shift = step(z, tf.zeros([]))
        new = (moved - shift) / _gain(scale, 5.0)[0]
        return new, tf.reduce_all(tf.abs(new - z) <= _SOLVED * (1.0 + tf.abs(new)))

    z, _ = tf.while_loop(
        lambda _, solved: ~solved,  # NaN is not solved: it may depend on a later coordinate
        closer,
        (tf.zeros_like(moved), tf.constant(False)),
        maximum_iterations=moved.shape[-1],
    )
    return z


@_register
class Plain(Restorable, keras.layers.Layer):
    """A chart that is the identity."""

    def call(self, z: tf.Tensor) -> tf.Tensor:
        """Returns z and a log determinant of 0, [..., dim] -> [..., dim + 1]."""
        return tf.concat([z, tf.zeros_like(z[..., :1])], -1)

    def inverse(self, u: tf.Tensor) -> tf.Tensor:
        """Returns u itself."""
        return u


def log_normal(z: tf.Tensor) -> tf.Tensor:
    """Returns log N(z; 0, I) in nats, [..., dim] -> [...]."""
    dim: Any = z.shape[-1]
    constant = 0.5 * dim * math.log(2.0 * math.pi)
    return -0.5 * tf.reduce_sum(z**2, -1) - constant


def _gain(x, limit):
    """Returns a gain between exp(-limit) and exp(limit), about exp(x) near 0, and its logarithm."""
    log_gain = limit * tf.tanh(x / limit)
    return tf.exp(log_gain), log_gain
