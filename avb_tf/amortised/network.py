"""q(u|y): one conditional density for every y, a mixture of Gaussians in each coordinate."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from avb_tf.amortised.trunks import DeepSet, Residual
from avb_tf.networks import ConvTrunk

_SMALLEST, _LARGEST = -9.0, 4.0  # limits of a component's log scale, in standardised coordinates
_SPREAD = 1.5  # the components' initial means lie between -_SPREAD and _SPREAD
_FAR = 12.0  # robust standard deviations beyond which the networks' inputs grow logarithmically
_DEGREES = 5.0  # degrees of freedom, see `log_student`
_QUANTILES = [0.16, 0.5, 0.84]  # one standard deviation of a normal to each side of its median
_HUGE = 1e30  # stands for numbers that float32 cannot hold
_TINY = 1e-37  # the smallest positive number that float32 holds in full precision, roughly


class Scaling(NamedTuple):
    """Locations and scales by which u and y are standardised."""

    u_mean: np.ndarray  # [dim]
    u_scale: np.ndarray  # [dim]
    y_floor: np.ndarray  # [features], as of `floors`; y_mean and y_scale are of `logged` y
    y_mean: np.ndarray  # [features]
    y_scale: np.ndarray  # [features]


def scaling(u: np.ndarray, y: np.ndarray) -> Scaling:
    """Returns medians and scales from quantiles of simulated pairs.

    Quantiles exist even for data without moments.

    Args:
      u: unconstrained parameters, [n, dim].
      y: data, [n, features].
    """
    floor = floors(y)
    parts = (*robust(u), floor, *robust(logged(y, floor).numpy()))
    return Scaling(*(part.astype(np.float32) for part in parts))


def floors(y: np.ndarray) -> np.ndarray:
    """Returns the smallest positive number of each column of which the logarithm is taken, or 0.

    These are the columns of y [n, columns] without negative numbers that are less skewed in the
    logarithm. In a linear scale, the small ones of numbers of several magnitudes look all the same.
    """
    positive = np.where(y > 0.0, y, np.inf).min(0)
    able = (y >= 0.0).all(0) & np.isfinite(positive)
    floor = np.where(able, np.maximum(positive, _TINY), 0.0)
    return np.where(_skewness(logged(y, floor)) < _skewness(y), floor, 0.0)


def logged(y: Any, floor: Any) -> Any:
    """Returns log(y + floor) in the columns of y [..., columns] with a positive floor, else y.

    Negative numbers count as 0. A NaN, which marks a missing row, stays one.
    """
    none = tf.zeros([], y.dtype)
    shifted = tf.where(y < 0.0, none, y) + tf.where(floor > 0.0, floor, none + 1.0)
    return tf.where(floor > 0.0, tf.math.log(shifted), y)


def _skewness(x):
    low, middle, high = np.quantile(x, _QUANTILES, axis=0)
    return np.abs(low + high - 2.0 * middle) / np.maximum(high - low, _TINY)


def robust(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the median and a scale of each column of x [n, columns], from quantiles."""
    low, middle, high = np.quantile(x, _QUANTILES, axis=0)
    scale = 0.5 * (high - low)
    scale = np.where(scale > 0.0, scale, x.std(0))  # for counts that are mostly 0
    return middle, np.where(scale > 0.0, scale, 1.0)


class Context(NamedTuple):
    """The outputs of q's networks of y, computed once for all draws of u."""

    mean: Any  # [n or 1, dim], mean of standardised u
    precision: Any  # [n or 1, dim, dim], lower triangular factor P of the precision
    log_volume: Any  # [n or 1], log determinant of P
    features: Any  # [dim, n or 1, width], features of y for each factor

    def repeated(self, count: int) -> "Context":
        """Returns the context with each y repeated `count` times in a row."""
        mean, precision, log_volume = (tf.repeat(part, count, 0) for part in self[:3])
        return Context(mean, precision, log_volume, tf.repeat(self.features, count, 1))


class Whitening(keras.layers.Layer):
    """Mean and triangle P of v = P(y) (u - mean(y)), which is roughly standard given y.

    In the coordinates v, a narrow posterior is as easy to follow as a wide one.

    Args:
      dim: dimensions of u.
      trunk: layer from y to features [n, width].
    """

    def __init__(self, dim: int, trunk: keras.layers.Layer):
        super().__init__()
        self.dim, self.trunk = dim, trunk
        self.head = keras.layers.Dense(dim * (dim + 2), kernel_initializer="zeros")

    def call(self, y: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Returns mean [n, dim], P [n, dim, dim] and log |P| [n] for y [n, ..., features]."""
        outputs = self.head(self.trunk(y))
        mean, diagonal, square = tf.split(outputs, [self.dim, self.dim, self.dim**2], -1)
        diagonal = tf.clip_by_value(diagonal, -_LARGEST, -_SMALLEST)
        below = tf.reshape(square, [-1, self.dim, self.dim]) * np.tri(self.dim, k=-1, dtype="f")
        return mean, below + tf.linalg.diag(tf.exp(diagonal)), tf.reduce_sum(diagonal, -1)


class ConditionalMixture(keras.Model):
    """q(u|y) = q(v_1|y) q(v_2|v_1, y) .. in whitened v, each factor a mixture of Gaussians.

        q = ConditionalMixture(dim=2, features=3, components=8, width=64, depth=2,
                               trunk_width=64, trunk_depth=2)
        q.log_prob(u, y)                    # u [n, 2], y [n, 3] -> [n], in nats
        q.sample(y[:1], 1000, seed=(0, 0))  # [1000, 2]

    Every coordinate has its own residual network, so that a draw costs no more than a density. A
    mixture in each factor can represent several modes, sharp edges and skewness, and its likelihood
    needs no inverse.

    Args:
      dim: dimensions of u.
      features: dimensions of y, or of each row of y.
      components: number of components of each factor.
      width: units of the factors' residual networks; the inner layer of a block has half as many.
      depth: number of residual blocks of each factor.
      trunk_width: units of each layer of the two networks of y, one for the factors and one for
        the whitening.
      trunk_depth: number of residual blocks of these two. They cost little, because all draws of a
        posterior have the same y.
      rows: whether y is a set of rows, [n, rows * features], whose order does not matter.
      image: height, width and channels if convolutions read y, or else None.
      filters: filters of the first of these two convolutions; the second has twice as many.
    Source: mixture density networks (Bishop, 1994), in autoregressive order (Uria, Murray and
    Larochelle, 2013).
    """

    def __init__(
        self,
        dim: int,
        features: int,
        components: int,
        width: int,
        depth: int,
        trunk_width: int,
        trunk_depth: int,
        rows: bool = False,
        image: Sequence[int] | None = None,
        filters: int = 0,
    ):
        super().__init__()
        self.dim, self.components, self.width = dim, components, width
        self.shape = [-1, features] if rows else [features] if image is None else list(image)

        def trunk():
            if image is not None:
                return ConvTrunk((filters, 2 * filters), trunk_width, (), "silu", support="real")
            return (DeepSet if rows else Residual)(trunk_width, trunk_depth)

        sizes = [dim, dim, features, features, features]
        self.scaling: Any = Scaling(*(
            self.add_weight(shape=[n], initializer="ones", trainable=False, name=name)
            for name, n in zip(Scaling._fields, sizes, strict=True)
        ))  # fmt: skip
        self.whitening = Whitening(dim, trunk())
        self.trunk = trunk()
        self.context = keras.layers.Dense(dim * width, name="context")
        self.first = self._kernel(dim, width)
        inner = max(1, width // 2)
        self.blocks = [
            (self._kernel(width, inner), self._bias(inner), self._kernel(inner, width, 0.3))
            for _ in range(depth)
        ]
        self.head = self._kernel(width, 3 * components, 0.1)
        self.head_bias = self._bias(3 * components)
        means = np.linspace(-_SPREAD, _SPREAD, components) if components > 1 else np.zeros(1)
        start = np.concatenate([np.zeros(components), means, np.full(components, -0.5)])
        self.head_bias.assign(np.broadcast_to(start, self.head_bias.shape))
        # Masks v for each factor, which reads only the coordinates before its own.
        self.before = np.tri(dim, k=-1, dtype="f")[:, :, np.newaxis]

    def standardise(self, scaling: Scaling) -> None:
        """Sets the locations and scales by which u and y are standardised."""
        for weight, value in zip(self.scaling, scaling, strict=True):
            weight.assign(value)

    def given(self, y: tf.Tensor) -> Context:
        """Returns the context of y [n, features]."""
        seen = self._seen(y)
        features = tf.reshape(self.context(self.trunk(seen)), [-1, self.dim, self.width])
        # Only `log_student` trains the whitening.
        mean, precision, log_volume = map(tf.stop_gradient, self.whitening(seen))
        return Context(mean, precision, log_volume, tf.transpose(features, [1, 0, 2]))

    def log_student(self, u: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        """Returns the log density of a Student t with the whitening's location and scale.

        It lacks a constant. Because of its heavy tails, a rare pair hardly moves the location and
        scale of all others.
        """
        mean, precision, log_volume = self.whitening(self._seen(y))
        v = tf.linalg.matvec(precision, self._standard(u) - mean)
        squares = tf.reduce_sum(v**2, -1) / _DEGREES
        return log_volume - 0.5 * (_DEGREES + self.dim) * tf.math.log1p(squares)

    def log_prob(self, u: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        """Returns log q(u|y) in nats of pairs, u [n, dim] and y [n, features] -> [n]."""
        return self.log_prob_given(u, self.given(y))

    def log_prob_given(self, u: tf.Tensor, context: Context) -> tf.Tensor:
        """Returns log q(u|y) in nats, [n], for u [n, dim] and the context of n data sets or one."""
        v = tf.linalg.matvec(context.precision, self._standard(u) - context.mean)
        kernel = tf.reshape(tf.transpose(self.first * self.before, [1, 0, 2]), [self.dim, -1])
        first = tf.reshape(tf.matmul(_squashed(v), kernel), [-1, self.dim, self.width])
        hidden = context.features + tf.transpose(first, [1, 0, 2])
        for inner, bias, outer in self.blocks:
            hidden += tf.matmul(tf.nn.silu(tf.matmul(hidden, inner) + bias), outer)
        logits, means, log_scales = _mixture(tf.matmul(hidden, self.head) + self.head_bias)
        z = (tf.transpose(v)[:, :, tf.newaxis] - means) * tf.exp(-log_scales)
        parts = tf.nn.log_softmax(logits) - 0.5 * z**2 - log_scales
        factors = tf.reduce_logsumexp(parts, -1) - 0.5 * math.log(2.0 * math.pi)
        return tf.reduce_sum(factors, 0) + context.log_volume - self._log_scale()

    def sample(
        self, y: tf.Tensor, n: int | tf.Tensor, seed: tf.Tensor | Sequence[int]
    ) -> tf.Tensor:
        """Draws from q(u|y) for one y.

        Args:
          y: the data set, [1, features].
          n: number of draws.
          seed: integers [2].
        Returns:
          Draws of u, [n, dim].
        """
        return self.sample_given(self.given(y), n, seed)

    def sample_given(
        self, context: Context, n: int | tf.Tensor, seed: tf.Tensor | Sequence[int]
    ) -> tf.Tensor:
        """Draws from q(u|y), given the context of y.

        Args:
          context: context of one data set, or of n of them, with one draw for each.
          n: number of draws.
          seed: integers [2].
        Returns:
          Draws of u, [n, dim].
        """
        seeds = tf.random.split(seed, 2)
        noise = tf.random.stateless_normal([self.dim, n], seeds[0])
        return self.transform(
            context, noise, tf.random.stateless_uniform([self.dim, n, 1], seeds[1])
        )

    def transform(self, context: Context, noise: tf.Tensor, uniform: tf.Tensor) -> tf.Tensor:
        """Maps standard normal noise [dim, n] and uniform [dim, n, 1] to draws of u, [n, dim]."""
        n = tf.shape(noise)[1]
        v, seen = [], tf.zeros([n, 0])
        for i in range(self.dim):
            hidden = context.features[i]
            if i:  # the first factor is the same for all draws of one y
                hidden += tf.matmul(seen, self.first[i, :i])
            for inner, bias, outer in self.blocks:
                # TensorFlow fuses `bias_add` with the product.
                inside = tf.nn.bias_add(tf.matmul(hidden, inner[i]), bias[i, 0])
                hidden += tf.matmul(tf.nn.silu(inside), outer[i])
            outputs = tf.nn.bias_add(tf.matmul(hidden, self.head[i]), self.head_bias[i, 0])
            outputs = tf.broadcast_to(outputs, [n, 3 * self.components])
            v.append(_drawn(outputs, uniform[i], noise[i]))
            seen = tf.concat([seen, _squashed(v[-1])[:, tf.newaxis]], -1)
        # All draws of one y share a triangle, which is solved once.
        sets = tf.shape(context.mean)[0]
        away = tf.reshape(tf.stack(v, -1), [sets, n // tf.maximum(1, sets), self.dim])
        away = tf.linalg.triangular_solve(context.precision, tf.transpose(away, [0, 2, 1]))
        away = tf.reshape(tf.transpose(away, [0, 2, 1]), [n, self.dim])
        return self.scaling.u_mean + self.scaling.u_scale * (context.mean + away)

    def call(self, inputs: tuple[tf.Tensor, tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns log q(u|y) and `log_student` of pairs (u, y)."""
        return self.log_prob(*inputs), self.log_student(*inputs)

    def _seen(self, y):
        """Returns the networks' input for y: standardised, with tails compressed."""
        rows = tf.reshape(y, [tf.shape(y)[0], -1, self.scaling.y_floor.shape[0]])
        rows = tf.cast(logged(rows, tf.cast(self.scaling.y_floor, y.dtype)), tf.float32)
        seen = (rows - self.scaling.y_mean) / self.scaling.y_scale
        seen = _squashed(tf.where(tf.math.is_inf(seen), _HUGE * tf.sign(seen), seen))
        return tf.reshape(seen, [tf.shape(y)[0], *self.shape])

    def _standard(self, u):
        return (tf.cast(u, tf.float32) - self.scaling.u_mean) / self.scaling.u_scale

    def _log_scale(self):
        return tf.reduce_sum(tf.math.log(self.scaling.u_scale))

    def _kernel(self, inputs, outputs, gain=1.0):
        """Adds a kernel for each coordinate, [dim, inputs, outputs]."""
        start = keras.initializers.RandomNormal(stddev=gain / math.sqrt(max(1, inputs)))
        return self.add_weight(shape=[self.dim, inputs, outputs], initializer=start)

    def _bias(self, outputs):
        return self.add_weight(shape=[self.dim, 1, outputs], initializer="zeros")


def _squashed(x):
    """Returns about x near 0, and about a multiple of log |x| with x's sign far from 0."""
    return _FAR * tf.math.asinh(x / _FAR)


def _mixture(outputs):
    """Returns logits, means and log scales of a factor's components."""
    logits, means, log_scales = tf.split(outputs, 3, -1)
    return logits, means, tf.clip_by_value(log_scales, _SMALLEST, _LARGEST)


def _drawn(outputs, uniform, noise):
    """Draws from mixtures of outputs [n, 3 * components] by uniform [n, 1] and noise [n]."""
    n, components = tf.shape(outputs)[0], outputs.shape[1] // 3
    logits = outputs[:, :components]
    weights = tf.exp(logits - tf.reduce_max(logits, -1, keepdims=True))
    # `tf.cumsum`, and `tf.gather` with `batch_dims`, would take most of a draw's time.
    cumulated = tf.matmul(weights, 1.0 - np.tri(components, k=-1, dtype="f"))
    above = uniform * cumulated[:, -1:] > cumulated[:, :-1]
    place = 3 * components * tf.range(n) + tf.reduce_sum(tf.cast(above, tf.int32), -1)
    flat = tf.reshape(outputs, [-1])
    log_scale = tf.gather(flat, place + 2 * components)
    scale = tf.exp(tf.clip_by_value(log_scale, _SMALLEST, _LARGEST))
    return tf.gather(flat, place + components) + scale * noise
