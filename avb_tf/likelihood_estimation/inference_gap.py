"""Where a model's bound on log p(x) loses: to amortisation, or to the shape of its posterior.

Cremer, Li and Duvenaud (2018) split the gap by the best bound that any member of a family reaches
when it is optimised for one x alone. Here the family is the Gaussians, of diagonal or of full
covariance.
"""

import math
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from avb_tf.likelihood_estimation import joint
from avb_tf.likelihood_estimation.entropy import entropy_beside_gaussian
from avb_tf.model import AVB

PAIRS = 8  # of antithetic draws for each start of each x in a step
DRAWS_PER_STEP = 5 * 2 * PAIRS  # of each x, from all starts
FRESH_DRAWS = 2000  # of the bound that is reported
POSTERIOR_DRAWS = 3000  # of an implicit posterior, for its entropy
LATENTS_LIMIT = 12  # up to which nearest neighbours tell an entropy
_RATE = 0.05  # of Adam, in coordinates that whiten the start; falls to 0 as a cosine
_BATCH = 250  # draws at a time


class Gaussians(NamedTuple):
    """A Gaussian for each x and its bound on log p(x)."""

    loc: np.ndarray  # [batch, latent]
    scale_tril: np.ndarray  # [batch, latent, latent]
    bound: np.ndarray  # [batch], in nats


class BestGaussian:
    """The Gaussian q(z) of the largest E_q[log p(x, z) - log q(z)], for each x by itself.

    Adam from several starts at once over means and Cholesky factors, all x in one compiled loop,
    by gradients of the path alone (Roeder, Wu and Duvenaud, 2017), whose noise vanishes where q
    is the posterior. Starts are compared, and the best one's bound is told, by fresh draws.

    Args:
      model: any; its weights may change afterwards, its parts may not.
      full: whether the covariance is full, or diagonal.
      steps: of Adam.
    """

    def __init__(self, model: AVB, full: bool, steps: int = 300):
        self.model, self.full, self.steps = model, full, steps
        self._climb = tf.function(self._optimise, reduce_retracing=True)
        self._draw = tf.function(self._log_weights, reduce_retracing=True)

    def __call__(self, x, loc, scale_tril, seed: int = 0) -> Gaussians:
        """The best for x [batch, *event].

        Args:
          x: [batch, *event].
          loc: [starts, batch, latent].
          scale_tril: [starts, batch, latent, latent]; diagonal if the family is.
          seed: of the draws.
        """
        x = tf.convert_to_tensor(x)
        loc, scale_tril = self._climb(x, loc, scale_tril, tf.constant([seed, 0]))
        compared = self._bound(x, loc, scale_tril, _BATCH, (seed, 1))
        best, each = np.argmax(compared, 0), np.arange(len(x))
        loc, scale_tril = loc.numpy()[best, each], scale_tril.numpy()[best, each]
        bound = self._bound(x, loc[np.newaxis], scale_tril[np.newaxis], FRESH_DRAWS, (seed, 2))
        return Gaussians(loc, scale_tril, bound[0])

    def _bound(self, x, loc, scale_tril, draws, seed):
        """[starts, batch]."""
        keys = [tf.constant([1000 * seed[0] + i, seed[1]]) for i in range(draws // _BATCH)]
        return np.mean([self._draw(x, loc, scale_tril, key).numpy() for key in keys], 0)

    def _log_weights(self, x, loc, scale_tril, seed):
        """Means over `_BATCH` draws of log p(x, z) - log q(z), [starts, batch]."""
        shape = tf.concat([[_BATCH], tf.shape(loc)], 0)
        noise = tf.random.stateless_normal(shape, seed)
        z = loc + tf.linalg.matvec(scale_tril, noise)
        volume = tf.reduce_sum(tf.math.log(tf.linalg.diag_part(scale_tril)), -1)
        log_q = self.model.prior.log_prob(noise) - volume
        return tf.reduce_mean(self._log_joint(x, z) - log_q, 0)

    def _log_joint(self, x, z):
        """log p(x, z), [draws, starts, batch, latent] -> [draws, starts, batch]."""
        flat = tf.reshape(z, tf.concat([[-1], tf.shape(z)[2:]], 0))
        return tf.reshape(joint.log_joint(self.model, x, flat), tf.shape(z)[:-1])

    def _optimise(self, x, loc, scale_tril, seed):
        """Adam on the mean and the Cholesky factor, in coordinates that whiten each start."""
        # The i-th row of the square holds row i of the factor, its diagonal as a logarithm, and
        # a last column the mean.
        first = tf.zeros(tf.concat([tf.shape(scale_tril)[:-1], [loc.shape[-1] + 1]], 0))
        parameters, mean, square = first, first, first
        for i in tf.range(self.steps):
            key = tf.random.fold_in(seed, i)
            half = tf.random.stateless_normal(tf.concat([[PAIRS], tf.shape(loc)], 0), key)
            noise = tf.concat([half, -half], 0)
            with tf.GradientTape() as tape:
                tape.watch(parameters)
                w_loc, w_scale = self._unpack(parameters)
                w = w_loc + tf.linalg.matvec(w_scale, noise)
                z = loc + tf.linalg.matvec(scale_tril, w)
                # -d/dw log q(w) = w_scale^-T noise, held fixed.
                slope = tf.linalg.triangular_solve(
                    tf.stop_gradient(w_scale)[tf.newaxis] + tf.zeros_like(noise)[..., tf.newaxis],
                    noise[..., tf.newaxis], adjoint=True,
                )[..., 0]  # fmt: skip
                path = self._log_joint(x, z) + tf.reduce_sum(tf.stop_gradient(slope) * w, -1)
                total = tf.reduce_sum(tf.reduce_mean(path, 0))
            gradient = tape.gradient(total, parameters)
            gradient = tf.where(tf.math.is_finite(gradient), gradient, 0.0)
            step = tf.cast(i, tf.float32)
            mean = 0.9 * mean + 0.1 * gradient
            square = 0.99 * square + 0.01 * gradient**2
            corrected = mean / (1.0 - 0.9 ** (step + 1.0))
            deviation = tf.sqrt(square / (1.0 - 0.99 ** (step + 1.0))) + 1e-8
            rate = 0.5 * _RATE * (1.0 + tf.cos(math.pi * step / self.steps))
            parameters += rate * corrected / deviation
        w_loc, w_scale = self._unpack(parameters)
        return loc + tf.linalg.matvec(scale_tril, w_loc), scale_tril @ w_scale

    def _unpack(self, parameters):
        """[..., latent, latent + 1] -> mean [..., latent], factor [..., latent, latent]."""
        square, w_loc = parameters[..., :-1], parameters[..., -1]
        w_scale = tf.linalg.diag(tf.exp(tf.linalg.diag_part(square)))
        if self.full:
            w_scale += tf.linalg.band_part(square, -1, 0) - tf.linalg.band_part(square, 0, 0)
        return w_loc, w_scale


@joint.kept_for_the_last_model
def best_gaussians(model: AVB, steps: int = 300):
    """x [batch, *event], seed -> the best of diagonal and of full covariance, as `Gaussians`.

    Starts: q's moments; its mean at half the width; two draws of q at half the width, for a
    posterior of several modes. The full one also starts from the diagonal one.
    """
    diagonal, full = BestGaussian(model, False, steps), BestGaussian(model, True, steps)
    moments = tf.function(lambda x: model.posterior(x, joint.MOMENT_DRAWS), reduce_retracing=True)

    def run(x, seed: int = 0) -> tuple[Gaussians, Gaussians]:
        posterior = moments(tf.convert_to_tensor(x))
        loc = tf.stack([posterior.mean, posterior.mean, posterior.z[0], posterior.z[1]])
        halves = tf.reshape([1.0, 0.5, 0.5, 0.5], [4, 1, 1, 1])
        scale = halves * posterior.scale_tril
        deviations = tf.linalg.diag(tf.norm(scale, axis=-1))
        narrow = diagonal(x, loc, deviations, seed)
        loc = tf.concat([loc, narrow.loc[np.newaxis]], 0)
        scale = tf.concat([scale, narrow.scale_tril[np.newaxis]], 0)
        return narrow, full(x, loc, scale, seed)

    return run


@joint.kept_for_the_last_model
def bound_of_draws(model: AVB):
    """x [batch, *event], seed -> the bound of an implicit posterior without the adversary, [batch].

    E_q[log p(x, z)] over draws, and q's entropy by their nearest neighbours, corrected by what
    that estimate makes of a Gaussian. For up to `LATENTS_LIMIT` latents.
    """

    @tf.function(reduce_retracing=True)
    def draw(x, seed):
        z = model.encode(x, POSTERIOR_DRAWS, seed)
        return z, tf.reduce_mean(joint.log_joint(model, x, z), 0)

    def run(x, seed: int = 0) -> np.ndarray:
        found = []
        for i in range(len(x)):
            z, log_joint = draw(tf.convert_to_tensor(x[i : i + 1]), tf.constant(1000 * seed + i))
            draws = z.numpy()[:, 0].astype(np.float64)
            found.append(log_joint.numpy()[0] + entropy_beside_gaussian(draws))
        return np.array(found)

    return run
