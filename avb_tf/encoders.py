"""Encoders: q(z|x) as a network of x and noise, with its first two moments.

The noise is an argument, so that the caller controls its seed. One draw of z needs `noise_dim`
standard normal numbers.
"""

import abc
import contextlib
import functools
import itertools
from collections.abc import Generator
from typing import Any, NamedTuple

import keras
import numpy as np
import scipy.stats
import tensorflow as tf
from tensorflow_probability import distributions as tfd

from avb_tf import replicas
from avb_tf.networks import DenseStack, Restorable, float32_dense, tiny_normal

_register = keras.saving.register_keras_serializable("avb_tf")

# Keeps the covariance factorisable where q is nearly a point or has fewer draws than latents. The
# contrast's density, its samples and the whitening use the same floored scale.
VARIANCE_FLOOR = 1e-6
MOMENT_POINTS = 4096  # Sobol points for the moments of the noise bases outside training
# SciPy reads the direction numbers of Sobol sequences from a file at their first use. A process
# that cannot open one more file then would go on with wrong points, and only print a traceback.
scipy.stats.qmc.Sobol(1)


class Posterior(NamedTuple):
    """Draws of q(z|x) for a batch of x, with its moments and, if known, its density.

    Attributes:
      z: [samples, batch, latent], draws of q(z|x).
      mean: [batch, latent], mean of q(z|x).
      scale_tril: [batch, latent, latent], Cholesky factor of q's covariance.
      columns: [batch, latent, bases] if z = mean + columns @ features(noise), else None; an
        adversary with condition "posterior" reads them.
      log_prob: [samples, batch], log q(z|x) at z in nats, or None if it is not known.
        `auxiliary.AuxiliaryEncoder` gives an upper bound on it, which holds on average.
      base: the posterior before a flow's steps, or None without a flow.
      log_volume: [samples, batch], log |dz / dz_base| of the flow's steps, or None without a flow.
    """

    z: tf.Tensor
    mean: tf.Tensor
    scale_tril: tf.Tensor
    columns: tf.Tensor | None = None
    log_prob: tf.Tensor | None = None
    base: "Posterior | None" = None
    log_volume: tf.Tensor | None = None


class Encoder(Restorable, keras.Model):
    """Base class of encoders: q(z|x) as a function of x and standard normal noise.

    To write your own encoder, subclass it, set `latent_dim` and `noise_dim`, and implement
    `parameters` and `draw`. Each z must depend only on its own x and noise. Outside training the
    moments of an x must not depend on the rest of the batch either. They may depend on the draws in
    `z` only if `moments_from_draws` is True.

        @keras.saving.register_keras_serializable("example")  # so that a saved model can be loaded
        class LaplaceEncoder(avb_tf.encoders.Encoder):
            def __init__(self, trunk, latent_dim, **kwargs):
                super().__init__(**kwargs)
                self.latent_dim = self.noise_dim = latent_dim
                self.trunk = trunk
                self.location = keras.layers.Dense(latent_dim)
                self.log_scale = keras.layers.Dense(latent_dim)

            def parameters(self, x, training=False):  # [batch, *event]
                features = self.trunk(x, training=training)
                return self.location(features), tf.exp(self.log_scale(features))

            def draw(self, parameters, noise, training=False):  # [samples, batch, noise_dim]
                location, scale = parameters  # each [batch, latent]
                uniform = tfp.distributions.Normal(0.0, 1.0).cdf(noise)
                laplace = tfp.distributions.Laplace(location, scale)
                z = laplace.quantile(tf.clip_by_value(uniform, 1e-6, 1.0 - 1e-6))
                return avb_tf.encoders.Posterior(
                    z,
                    mean=location,
                    scale_tril=tf.linalg.diag(2.0**0.5 * scale),
                    log_prob=tf.reduce_sum(laplace.log_prob(z), -1),
                )

        trunk = keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(32, "relu")])
        encoder = LaplaceEncoder(trunk, latent_dim=2)
        decoder = avb_tf.networks.DenseDecoder((6,), 1, 32, 1)
        model = avb_tf.AVB((6,), encoder, decoder)  # the density is known: no adversary

    Attributes:
      latent_dim: dimensions of z.
      noise_dim: standard normal numbers that one draw of z needs.
      moments_from_draws: whether `mean` and `scale_tril` are estimated from the draws in `z`, so
        that an adaptive contrast needs several draws for each x.
    """

    latent_dim: int
    noise_dim: int
    moments_from_draws: bool = False

    def __init__(self, **kwargs: Any):
        super().__init__(dtype="float32", **kwargs)

    @abc.abstractmethod
    def parameters(self, x: tf.Tensor, training: bool = False) -> Any:
        """Computes the part of q(z|x) that depends on x alone and is shared by all draws.

        Args:
          x: [batch, *event].
          training: whether this is a training step.
        Returns:
          Whatever `draw` needs.
        """

    @abc.abstractmethod
    def draw(self, parameters: Any, noise: tf.Tensor, training: bool = False) -> Posterior:
        """Transforms noise into draws of z.

        Args:
          parameters: the result of `parameters`.
          noise: [samples, batch, noise_dim], standard normal.
          training: whether this is a training step.
        """

    def call(self, x: tf.Tensor, noise: tf.Tensor, training: bool = False) -> Posterior:
        """Returns the `Posterior` of x with a draw of z for each noise.

        Args:
          x: [batch, *event].
          noise: [samples, batch, noise_dim], standard normal.
          training: whether this is a training step.
        """
        return self.draw(self.parameters(x, training), noise, training)

    @contextlib.contextmanager
    def freezing(self) -> Generator[None]:
        """Makes graphs traced inside the block hold as constants what depends only on the weights.

        Such a graph is valid until the weights change.
        """
        yield


@_register
class GaussianEncoder(Encoder):
    """Gaussian posterior q(z|x) = N(mean(x), scale(x)) with a known density.

        encoder = GaussianEncoder(networks.DenseTrunk(256, 2), latent_dim=8)
        encoder(x, noise).log_prob  # [samples, batch], for noise [samples, batch, 8]

    Args:
      trunk: layer from x [batch, *event] to features [batch, width].
      latent_dim: dimensions of z.
      full_covariance: whether the scale is a full lower triangle or diagonal.
    Source: Kingma and Welling (2014), Section 3.
    """

    def __init__(
        self,
        trunk: keras.layers.Layer,
        latent_dim: int,
        full_covariance: bool = False,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.latent_dim = self.noise_dim = latent_dim
        self.full_covariance = full_covariance
        self.trunk = trunk
        self.mean = float32_dense(latent_dim)
        self.log_scale = float32_dense(latent_dim)
        if full_covariance:
            self.off_diagonal = float32_dense(latent_dim**2, kernel_initializer="zeros")

    def parameters(self, x: tf.Tensor, training: bool = False) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns mean [batch, latent] and Cholesky factor [batch, latent, latent]."""
        features = self.trunk(x, training=training)
        scale_tril = tf.linalg.diag(tf.exp(self.log_scale(features)) + VARIANCE_FLOOR**0.5)
        if self.full_covariance:
            square = tf.reshape(self.off_diagonal(features), [-1, *[self.latent_dim] * 2])
            scale_tril += tf.linalg.band_part(square, -1, 0) - tf.linalg.band_part(square, 0, 0)
        return self.mean(features), scale_tril

    def draw(self, parameters: Any, noise: tf.Tensor, training: bool = False) -> Posterior:
        """Draws from the Gaussian, with the log density (see `Encoder.draw`)."""
        mean, scale_tril = parameters
        z = mean + tf.einsum("bij,sbj->sbi", scale_tril, noise)
        log_prob = tfd.MultivariateNormalTriL(mean, scale_tril).log_prob(z)
        return Posterior(z, mean, scale_tril, scale_tril, log_prob)


@_register
class BlackBoxEncoder(Encoder):
    """Implicit posterior: z is a dense network of x's features and noise (paper, Figure 2).

    The moments are estimated from the draws. Adaptive contrast therefore needs several draws per x,
    and more than `latent_dim` of them for a full covariance.

    Args:
      trunk: layer from x [batch, *event] to features [batch, width].
      latent_dim: dimensions of z.
      noise_dim: dimensions of the noise.
      width: units of each hidden layer.
      depth: number of hidden layers.
      inject_every_layer: whether the noise enters every hidden layer or only the first.
    """

    moments_from_draws = True

    def __init__(
        self,
        trunk: keras.layers.Layer,
        latent_dim: int,
        noise_dim: int,
        width: int,
        depth: int,
        inject_every_layer: bool = False,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.latent_dim, self.noise_dim = latent_dim, noise_dim
        self.trunk = trunk
        # A dense layer on [features, noise] is the sum of a layer on each. The sum's first part is
        # the same for all draws, so it is computed once per x.
        self.from_features = keras.layers.Dense(width)
        self.from_noise = [
            keras.layers.Dense(width, use_bias=False)
            for _ in range(depth if inject_every_layer else 1)
        ]
        self.hidden = [keras.layers.Dense(width) for _ in range(depth - 1)]
        self.head = float32_dense(latent_dim)

    def parameters(self, x: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Returns the part of the first layer that depends on x, [batch, width]."""
        return self.from_features(self.trunk(x, training=training))

    def draw(self, parameters: Any, noise: tf.Tensor, training: bool = False) -> Posterior:
        """Draws outputs of the network and estimates their moments (see `Encoder.draw`)."""
        hidden = tf.nn.relu(parameters + self.from_noise[0](noise))
        for i, layer in enumerate(self.hidden, start=1):
            injected = self.from_noise[i](noise) if i < len(self.from_noise) else 0.0
            hidden = tf.nn.relu(layer(hidden) + injected)
        z = self.head(hidden)
        return Posterior(z, *moments_of_draws(z))


class BasisEncoder(Encoder):
    """Base class of encoders with z linear in functions v of the noise.

    v does not depend on x, so its moments are the same for every x.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.frozen = None  # the moments of v inside `freezing`

    @abc.abstractmethod
    def _bases(self, noise) -> tf.Tensor:
        """Computes v of noise [samples, batch, noise_dim]."""

    @abc.abstractmethod
    def _samples(self, v) -> tf.Tensor:
        """Reshapes v to [..., samples, functions]."""

    def _moments(self, v, training):
        """Returns mean [..., functions] and covariance [..., functions, functions] of v.

        Training estimates them from the whole batch on all replicas, other uses from fixed noise.
        """
        if training:
            return replicas.pooled_moments(*_moments(self._samples(v)))
        return self.frozen or self._fixed_moments()

    def _fixed_moments(self):
        return _moments(self._samples(self._bases(fixed_noise(self.noise_dim))))

    @contextlib.contextmanager
    def freezing(self) -> Generator[None]:
        """Makes graphs that are traced inside the block hold the moments of v as constants."""
        self.frozen = self._fixed_moments()
        try:
            yield
        finally:
            self.frozen = None


@_register
class NoiseBasisEncoder(BasisEncoder):
    """Encoder of the paper for adaptive contrast: z = z0(x) + sum_i a_i(x) * v_i(noise_i).

        encoder = NoiseBasisEncoder(trunk, 8, 32, 16, 128, "elu", "positive")  # as published

    The products are elementwise. Each v_i is a network of its own noise with three hidden layers,
    so the moments of q(z|x) follow from a(x) and the moments of v_i (paper, Section 4). Training
    estimates the moments of v_i from the batch, other uses from fixed noise.

    Args:
      trunk: layer from x [batch, *event] to features [batch, width].
      latent_dim: dimensions of z.
      noise_dim: dimensions of each noise_i.
      bases: number of the v_i.
      width: units of their hidden layers.
      activation: of their hidden layers, a Keras name.
      coefficients: "positive" for the authors' a = elu(c(x) - 5) + 1 with c linear in the
        features, "linear" for a = c. Files of earlier versions hold encoders with linear
        coefficients and relu.
    """

    def __init__(
        self,
        trunk: keras.layers.Layer,
        latent_dim: int,
        noise_dim: int,
        bases: int,
        width: int,
        activation: str = "relu",
        coefficients: str = "linear",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.latent_dim, self.noise_dim, self.bases = latent_dim, noise_dim * bases, bases
        self.trunk = trunk
        self.activation: Any = keras.activations.get(activation)
        self.positive = coefficients == "positive"
        self.mean = float32_dense(latent_dim, kernel_initializer=tiny_normal())
        self.coefficients = float32_dense(bases * latent_dim, kernel_initializer=_SideBySide(bases))
        shape = [noise_dim, width, width, width, latent_dim]
        # The networks v_i are stacked, so that each layer is one batched product.
        self.kernels = [
            self.add_weight(
                shape=(bases, inputs, outputs), initializer=_PerBasis(), name=f"kernel_{i}"
            )
            for i, (inputs, outputs) in enumerate(itertools.pairwise(shape))
        ]
        self.biases = [
            self.add_weight(shape=(bases, 1, outputs), initializer="zeros", name=f"bias_{i}")
            for i, outputs in enumerate(shape[1:])
        ]

    def parameters(self, x: tf.Tensor, training: bool = False) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns z0 [batch, latent] and the coefficients a [batch, bases, latent]."""
        features = self.trunk(x, training=training)
        a = tf.reshape(self.coefficients(features), [-1, self.bases, self.latent_dim])
        return self.mean(features), tf.nn.elu(a - 5.0) + 1.0 if self.positive else a

    def draw(self, parameters: Any, noise: tf.Tensor, training: bool = False) -> Posterior:
        """Draws sums of the bases; the moments follow in closed form from the moments of v.

        Args:
          parameters: z0 and the coefficients a.
          noise: [samples, batch, bases * noise_dim], standard normal.
          training: whether the moments of v are estimated from this noise.
        """
        z0, a = parameters
        v = self._bases(noise)
        v_mean, v_covariance = self._moments(v, training)
        z = z0 + tf.einsum("bml,msbl->sbl", a, v)
        mean = z0 + tf.einsum("bml,ml->bl", a, v_mean)
        covariance = tf.einsum("bmi,mij,bmj->bij", a, v_covariance, a)
        return Posterior(z, mean, _cholesky(covariance))

    def _bases(self, noise):
        """Maps noise [samples, batch, noise] to v_i(noise_i) [bases, samples, batch, latent]."""
        shape = tf.shape(noise)
        v = tf.reshape(noise, [shape[0] * shape[1], self.bases, -1])
        v = tf.transpose(v, [1, 0, 2])  # [bases, samples * batch, noise_dim]
        for i, (kernel, bias) in enumerate(zip(self.kernels, self.biases, strict=True)):
            v = (self.activation(v) if i else v) @ kernel + bias
        return tf.reshape(v, [self.bases, shape[0], shape[1], self.latent_dim])

    def _samples(self, v):
        return tf.reshape(v, [self.bases, -1, self.latent_dim])


@_register
class JointBasisEncoder(BasisEncoder):
    """Encoder z = z0(x) + s(x) * (I + A(x)) v(noise), with all functions v of the same noise.

        encoder = JointBasisEncoder(trunk, latent_dim=8, noise_dim=8, bases=32, width=128)
        encoder(x, noise).columns  # [batch, 8, 40]

    The paper's bases are independent, so their sum tends to a Gaussian as their number grows.
    Functions of a common noise can bend and split q, and the moments stay in closed form: the
    covariance is W(x) Cov[v] W(x)^T with W = s * (I + A). The noise itself comes first among the v,
    and A starts at zero, so training starts from a diagonal Gaussian. The scales s multiply all of
    W, so that random errors in A, which act as noise in z, shrink as q narrows.

    Args:
      trunk: layer from x [batch, *event] to features [batch, width].
      latent_dim: dimensions of z.
      noise_dim: dimensions of the noise.
      bases: number of the functions v in addition to the noise itself.
      width: units of their two hidden layers.
      activation: of these layers, a Keras name; tanh gives q Gaussian tails, relu sharper edges.
    """

    def __init__(
        self,
        trunk: keras.layers.Layer,
        latent_dim: int,
        noise_dim: int,
        bases: int,
        width: int,
        activation: str = "tanh",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.latent_dim, self.noise_dim, self.bases = latent_dim, noise_dim, bases
        self.trunk = trunk
        self.mean = float32_dense(latent_dim)
        self.log_scale = float32_dense(latent_dim)
        self.relative = float32_dense(latent_dim * (noise_dim + bases), kernel_initializer="zeros")
        self.stack = DenseStack(width, 2, activation)
        self.basis = float32_dense(bases)

    def parameters(self, x: tf.Tensor, training: bool = False) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns z0 [batch, latent] and W [batch, latent, noise_dim + bases]."""
        features = self.trunk(x, training=training)
        scale = tf.exp(self.log_scale(features))[..., tf.newaxis]
        functions = self.noise_dim + self.bases
        a = tf.reshape(self.relative(features), [-1, self.latent_dim, functions])
        identity = tf.pad(tf.eye(self.latent_dim, self.noise_dim), [[0, 0], [0, self.bases]])
        # Without the root, a training step would move z further the more functions there are.
        return self.mean(features), scale * (identity + functions**-0.5 * a)

    def draw(self, parameters: Any, noise: tf.Tensor, training: bool = False) -> Posterior:
        """Draws sums of functions of the noise; the moments follow from the moments of v.

        Args:
          parameters: z0 and W.
          noise: [samples, batch, noise_dim], standard normal.
          training: whether the moments of v are estimated from this noise.
        """
        z0, columns = parameters
        v = self._bases(noise)
        v_mean, v_covariance = self._moments(v, training)
        z = z0 + tf.einsum("bij,sbj->sbi", columns, v)
        mean = z0 + tf.linalg.matvec(columns, v_mean)
        covariance = columns @ v_covariance @ tf.linalg.matrix_transpose(columns)
        return Posterior(z, mean, _cholesky(covariance), columns)

    def _bases(self, noise):
        """Maps noise [samples, batch, noise_dim] to v [samples, batch, noise_dim + bases]."""
        return tf.concat([noise, self.basis(self.stack(noise))], -1)

    def _samples(self, v):
        return tf.reshape(v, [-1, v.shape[-1]])


class _PerBasis(keras.initializers.Initializer):
    """Glorot's initialiser for each of the stacked kernels [bases, inputs, outputs]."""

    def __call__(self, shape, dtype=None):
        bases, inputs, outputs = shape
        glorot = keras.initializers.GlorotUniform()
        return keras.ops.stack([glorot((inputs, outputs), dtype) for _ in range(bases)])


class _SideBySide(keras.initializers.Initializer):
    """Glorot's initialiser for `parts` equal layers that share one kernel [inputs, outputs]."""

    def __init__(self, parts: int):
        self.parts = parts

    def __call__(self, shape, dtype=None):
        inputs, outputs = shape
        glorot = keras.initializers.GlorotUniform()
        kernels = [glorot((inputs, outputs // self.parts), dtype) for _ in range(self.parts)]
        return keras.ops.concatenate(kernels, -1)


@functools.cache
def sobol_normal(count: int, dim: int) -> np.ndarray:
    """Returns standard normal points of a Sobol sequence, the same at every call, [count, dim].

    Moments outside training are estimated from these points, because moments over the batch would
    depend on the other x in it. A Sobol sequence gives more precise moments than as many random
    draws.
    """
    points = scipy.stats.qmc.MultivariateNormalQMC(np.zeros(dim), rng=0)
    return points.random(count).astype(np.float32)


def fixed_noise(noise_dim: int) -> np.ndarray:
    """Returns the fixed noise for moments outside training, [MOMENT_POINTS, 1, noise_dim]."""
    return sobol_normal(MOMENT_POINTS, noise_dim)[:, np.newaxis]


def _moments(draws):
    """Returns mean [..., n] and covariance [..., n, n] over the samples [..., samples, n]."""
    mean = tf.reduce_mean(draws, -2)
    centred = draws - mean[..., tf.newaxis, :]
    count = tf.cast(tf.shape(draws)[-2], draws.dtype)
    return mean, tf.matmul(centred, centred, transpose_a=True) / count


def moments_of_draws(z: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns each example's mean and Cholesky factor of the covariance over its draws.

    Args:
      z: [samples, batch, latent].
    Returns:
      (mean [batch, latent], Cholesky factor [batch, latent, latent]).
    """
    mean, covariance = _moments(tf.transpose(z, [1, 0, 2]))
    return mean, _cholesky(covariance)


def _cholesky(covariance):
    """Returns the Cholesky factor of `covariance` [..., n, n] with the floor added."""
    # The floor grows with the variances, because float32 would round a fixed one away.
    floor = VARIANCE_FLOOR * (1.0 + tf.linalg.trace(covariance))[..., tf.newaxis, tf.newaxis]
    return tf.linalg.cholesky(covariance + floor * tf.eye(covariance.shape[-1]))
