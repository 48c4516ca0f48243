"""The gap between log p(x) and a model's bound, split into amortisation and shape.

Cremer, Li and Duvenaud (2018) split the gap by the best bound that a family of posteriors reaches
when it is optimised for one x alone. Here the families are the Gaussians of diagonal and of full
covariance. The bound of a posterior without a density comes as an interval (`entropy`).
"""

import math
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from avb_tf import proposal
from avb_tf.likelihood_estimation import entropy, joint
from avb_tf.model import AVB

PAIRS = 8  # of antithetic draws for each start of each x in a step
DRAWS_PER_STEP = 5 * 2 * PAIRS  # of each x, from all starts
FRESH_DRAWS = 2000  # for the reported bound
REPEATS = 4  # independent intervals for each x
COMPONENTS = 20_000  # draws of q whose mixture is the density, for each x and repeat
PLANAR_COMPONENTS = 4_000_000  # the same with two latents, shared by all x
POINTS = 30_000  # z at which the density is bounded, for each repeat, shared by all x
_MOMENT_DRAWS = 4096  # of q, for the coordinates in which the noise is added
_DRAWS_PER_CALL = 10_000
_RATE = 0.05  # of Adam, in coordinates that whiten the start; falls to 0 as a cosine
_BATCH = 250  # draws at a time


class Gaussians(NamedTuple):
    """A Gaussian for each x and its bound on log p(x)."""

    loc: np.ndarray  # [batch, latent]
    scale_tril: np.ndarray  # [batch, latent, latent]
    bound: np.ndarray  # [batch], in nats


class BestGaussian:
    """The Gaussian q(z) of the largest E_q[log p(x, z) - log q(z)], for each x by itself.

        best = BestGaussian(model, full=True)
        best(x, loc, scale_tril).bound  # [batch], in nats

    Adam optimises means and Cholesky factors from several starts, all x in one compiled loop. It
    uses path gradients (Roeder, Wu and Duvenaud, 2017), whose noise vanishes where q is the
    posterior. Fresh draws select the best start, and more fresh draws give its bound.

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
          scale_tril: [starts, batch, latent, latent]; diagonal for the diagonal family.
          seed: of the draws.
        """
        x = tf.convert_to_tensor(x)
        loc, scale_tril = self._climb(x, loc, scale_tril, tf.constant([seed, 0]))
        compared = self._bound(x, loc, scale_tril, _BATCH, (seed, 1))
        start, example = np.argmax(compared, 0), np.arange(len(x))
        loc, scale_tril = loc.numpy()[start, example], scale_tril.numpy()[start, example]
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
        # Row i: row i of the factor, with the logarithm of its diagonal, then entry i of the mean.
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
    posterior with several modes. The full Gaussian also starts from the best diagonal one.
    """
    diagonal, full = BestGaussian(model, False, steps), BestGaussian(model, True, steps)

    @tf.function(reduce_retracing=True)
    def moments(x):
        return *proposal.moments(model.averaged_encoder, x), model.encode(x, 2)

    def run(x, seed: int = 0) -> tuple[Gaussians, Gaussians]:
        mean, scale_tril, z = moments(tf.convert_to_tensor(x))
        loc = tf.stack([mean, mean, z[0], z[1]])
        halves = tf.reshape([1.0, 0.5, 0.5, 0.5], [4, 1, 1, 1])
        scale = halves * scale_tril
        deviations = tf.linalg.diag(tf.norm(scale, axis=-1))
        narrow = diagonal(x, loc, deviations, seed)
        loc = tf.concat([loc, narrow.loc[np.newaxis]], 0)
        scale = tf.concat([scale, narrow.scale_tril[np.newaxis]], 0)
        return narrow, full(x, loc, scale, seed)

    return run


def smoothing_sizes(latents: int, examples: int) -> dict[str, int]:
    """Draws for each of `examples` x in a repeat: of the mixture, and points to evaluate it at.

    With two latents few examples get more components, as sharp edges need little noise.
    """
    components = COMPONENTS
    if latents <= 2:
        components = int(np.clip(PLANAR_COMPONENTS // examples, COMPONENTS, 1_000_000))
    return {"components": components, "points": int(np.clip(POINTS // examples, 100, 250))}


@joint.kept_for_the_last_model
def smoothed_bounds(model: AVB):
    """x [batch, *event], sizes, seed -> bounds on the ELBO of q with a little noise added.

    The function returns `entropy.Bounds` of [REPEATS, batch] in nats. In coordinates that whiten q
    the noise has the scale `entropy.noise_scale`, and keeps mean and covariance. The smoothed
    posterior is a posterior like any other, so its ELBO is at most log p(x), and so is the lower
    end of the interval in expectation. The interval holds in expectation over all draws; repeats
    are independent.
    """

    @tf.function(reduce_retracing=True)
    def draw(x, count, seed):
        return model.encode(x, count, seed)[:, 0]

    @tf.function(reduce_retracing=True)
    def log_joint(x, z):
        return joint.log_joint(model, x, z[:, tf.newaxis])[:, 0]

    def draws(x, count, seed):
        """[count, latent]; calls of one size, so that one graph serves all counts."""
        calls = -(-count // _DRAWS_PER_CALL)
        size = min(count, _DRAWS_PER_CALL)
        parts = [draw(x, tf.constant(size), tf.constant(seed + i)).numpy() for i in range(calls)]
        return np.concatenate(parts)[:count].astype(np.float64)

    def interval(x, components, points, seed):
        """One repeat for x [1, *event]."""
        pilot, z = draws(x, _MOMENT_DRAWS, seed), draws(x, points + components, seed + 1)
        noise = np.random.default_rng(seed).standard_normal((points, z.shape[1]))
        v, log_q = entropy.at_smoothed_points(pilot, z[:points], z[points:], noise)
        log_p = log_joint(x, tf.constant(v, tf.float32)).numpy().astype(np.float64)
        return np.mean(log_p - log_q.upper), np.mean(log_p - log_q.lower)

    def run(x, components: int, points: int, seed: int = 0) -> entropy.Bounds:
        lower_upper = np.empty((2, REPEATS, len(x)))
        for i, repeat in np.ndindex(len(x), REPEATS):
            key = 10_000 * (REPEATS * (len(x) * seed + i) + repeat)
            lower_upper[:, repeat, i] = interval(
                tf.convert_to_tensor(x[i : i + 1]), components, points, key
            )
        return entropy.Bounds(*lower_upper)

    return run
