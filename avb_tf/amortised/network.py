"""q(u|y): one conditional density for every y, coordinate after coordinate a mixture of Gaussians."""

import math
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from avb_tf.networks import DenseStack

_SMALLEST, _LARGEST = -9.0, 4.0  # log scales of a component, in standardised coordinates
_SPREAD = 1.5  # first means of the components, from minus to plus
_FAR = 12.0  # robust standard deviations of y, beyond which the network sees no difference


class Scaling(NamedTuple):
    """Locations and scales by which u and y are standardised."""

    u_mean: np.ndarray  # [dim]
    u_scale: np.ndarray  # [dim]
    y_mean: np.ndarray  # [features]
    y_scale: np.ndarray  # [features]


def scaling(u: np.ndarray, y: np.ndarray) -> Scaling:
    """Medians and quantiles of simulated pairs: finite for data without moments.

    Args:
      u: [n, dim].
      y: [n, features].
    """

    def robust(x):
        low, middle, high = np.quantile(x, [0.16, 0.5, 0.84], axis=0)
        scale = 0.5 * (high - low)
        # Counts that are mostly 0 have no quantiles that differ.
        scale = np.where(scale > 0.0, scale, x.std(0))
        scale = np.where(scale > 0.0, scale, 1.0)
        return middle.astype(np.float32), scale.astype(np.float32)

    return Scaling(*robust(u), *robust(y))


class ConditionalMixture(keras.Model):
    """q(u|y) = prod_i q(u_i | u_1 .. u_i-1, y), each factor a mixture of Gaussians.

        q = ConditionalMixture(dim=2, features=3, components=8, width=64, depth=2)
        q.log_prob(u, y)                    # u [n, 2], y [n, 3] -> [n], in nats
        q.sample(y[:1], 1000, seed=(0, 0))  # [1000, 2]

    Every coordinate has a residual network of its own, so that a draw costs no more than a density.
    A mixture in each factor follows several modes, sharp edges and skewness alike, and its
    likelihood needs no inverse.

    Args:
      dim: of u.
      features: of y.
      components: of each factor.
      width: of the residual networks.
      depth: residual blocks of each.
      summary: layer from y [n, features] to features [n, any], beside which y is kept; or None.
    Source: mixture density networks (Bishop, 1994), in autoregressive order (Uria, Murray and
    Larochelle, 2013).
    """

    def __init__(self, dim, features, components, width, depth, summary=None):
        super().__init__()
        self.dim, self.components, self.summary = dim, components, summary
        self.locations = [
            self.add_weight(shape=[n], initializer=start, trainable=False, name=name)
            for name, n, start in (
                ("u_mean", dim, "zeros"), ("u_scale", dim, "ones"),
                ("y_mean", features, "zeros"), ("y_scale", features, "ones"),
            )
        ]  # fmt: skip
        self.context = keras.layers.Dense(dim * width, name="context")
        self.first = self.add_weight(
            shape=[dim, dim, width], initializer=_scaled(dim), name="first"
        )
        self.blocks = [
            tuple(
                self.add_weight(shape=shape, initializer=start, name=name)
                for name, shape, start in (
                    ("inner", [dim, width, width], _scaled(width)),
                    ("inner_bias", [dim, 1, width], "zeros"),
                    ("outer", [dim, width, width], _scaled(width, 0.3)),
                )
            )
            for _ in range(depth)
        ]
        outputs = 3 * components
        self.head = self.add_weight(
            shape=[dim, width, outputs], initializer=_scaled(width, 0.3), name="head"
        )
        means = np.linspace(-_SPREAD, _SPREAD, components) if components > 1 else np.zeros(1)
        bias = np.concatenate([np.zeros(components), means, np.full(components, -0.5)])
        self.head_bias = self.add_weight(
            shape=[dim, 1, outputs],
            initializer=lambda shape, dtype=None: tf.broadcast_to(
                tf.constant(bias, tf.float32), shape
            ),
            name="head_bias",
        )
        self.mask = np.tri(dim, k=-1, dtype=np.float32)[:, :, np.newaxis]  # reads those before

    def standardise(self, scaling: Scaling) -> None:
        """Sets the locations and scales."""
        for weight, value in zip(self.locations, scaling, strict=True):
            weight.assign(value)

    def features(self, y):
        """What the factors see of y: [n, features] -> [dim, n, width]."""
        _, _, mean, scale = self.locations
        seen = _squashed((tf.cast(y, tf.float32) - mean) / scale)
        if self.summary is not None:
            seen = tf.concat([seen, self.summary(seen)], -1)
        seen = self.context(seen)
        shape = [tf.shape(y)[0], self.dim, seen.shape[-1] // self.dim]
        return tf.transpose(tf.reshape(seen, shape), [1, 0, 2])

    def log_prob(self, u, y):
        """log q(u|y) in nats of pairs, u [n, dim] and y [n, features] -> [n]."""
        return self.log_prob_of(u, self.features(y))

    def log_prob_of(self, u, features):
        """log q in nats, u [n, dim] and features [dim, n or 1, width] -> [n]."""
        mean, scale, _, _ = self.locations
        v = (tf.cast(u, tf.float32) - mean) / scale
        logits, means, log_scales = self._factors(v, features)
        z = (tf.transpose(v)[:, :, tf.newaxis] - means) * tf.exp(-log_scales)
        parts = tf.nn.log_softmax(logits) - 0.5 * z**2 - log_scales
        constant = 0.5 * self.dim * math.log(2.0 * math.pi)
        volume = tf.reduce_sum(tf.math.log(scale))
        return tf.reduce_sum(tf.reduce_logsumexp(parts, -1), 0) - constant - volume

    def sample(self, y, n, seed):
        """Draws for one y, [1, features] -> [n, dim]."""
        return self.sample_of(self.features(y), n, seed)

    def sample_of(self, features, n, seed):
        """Draws [n, dim] for features [dim, n or 1, width]."""
        mean, scale, _, _ = self.locations
        seeds = tf.random.split(seed, 2)
        noise = tf.random.stateless_normal([self.dim, n], seeds[0])
        uniform = tf.random.stateless_uniform([self.dim, n, 1], seeds[1])
        v = tf.zeros([n, 0])
        for i in range(self.dim):
            first = tf.matmul(v, self.first[i, :i]) if i else 0.0
            hidden = features[i] + first
            for inner, bias, outer in self.blocks:
                hidden += tf.matmul(tf.nn.silu(tf.matmul(hidden, inner[i]) + bias[i]), outer[i])
            logits, means, log_scales = self._outputs(
                tf.matmul(hidden, self.head[i]) + self.head_bias[i]
            )
            below = tf.cumsum(tf.nn.softmax(logits), -1)[..., :-1]
            k = tf.reduce_sum(tf.cast(uniform[i] > below, tf.int32), -1)
            pick = tf.one_hot(k, self.components)
            m, s = (tf.reduce_sum(pick * x, -1) for x in (means, log_scales))
            v = tf.concat([v, (m + tf.exp(s) * noise[i])[:, tf.newaxis]], -1)
        return mean + scale * v

    def call(self, inputs):
        """log q(u|y) of pairs (u, y)."""
        return self.log_prob(*inputs)

    def _factors(self, v, features):
        """Logits, means and log scales of all factors at once, [dim, n, components] each."""
        count = tf.shape(v)[0]
        kernel = tf.transpose(self.first * self.mask, [1, 0, 2])
        first = tf.matmul(v, tf.reshape(kernel, [self.dim, -1]))
        shape = [count, self.dim, self.first.shape[-1]]
        hidden = features + tf.transpose(tf.reshape(first, shape), [1, 0, 2])
        for inner, bias, outer in self.blocks:
            hidden += tf.matmul(tf.nn.silu(tf.matmul(hidden, inner) + bias), outer)
        return self._outputs(tf.matmul(hidden, self.head) + self.head_bias)

    def _outputs(self, outputs):
        logits, means, log_scales = tf.split(outputs, 3, -1)
        return logits, means, tf.clip_by_value(log_scales, _SMALLEST, _LARGEST)


def dense_summary(width: int, depth: int) -> DenseStack:
    """A summary of y by dense layers."""
    return DenseStack(width, depth, "silu")


def _squashed(x):
    """x near 0, and ever slower beyond: data without moments have values that ruin a step."""
    return _FAR * tf.math.asinh(x / _FAR)


def _scaled(fan_in, gain=1.0):
    return keras.initializers.RandomNormal(stddev=gain / math.sqrt(fan_in))
