"""The gap between log p(x) and a model's ELBO, split into amortisation and shape.

Cremer, Li and Duvenaud (2018) split the gap at the best ELBO that a family of posteriors reaches
if it is optimised for each x alone. Here the families are the Gaussians of diagonal and of full
covariance. The ELBO of a posterior without a known density is an interval (`entropy`).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from avb_tf import proposal
from avb_tf.likelihood_estimation import entropy, joint
from avb_tf.model import AVB

PAIRS = 8  # antithetic pairs of draws for each start of each x in a step
DRAWS_PER_STEP = 5 * 2 * PAIRS  # draws for each x in a step, from all five starts
FRESH_DRAWS = 2000  # draws for the reported ELBO, at least
REPEATS = 4  # independent estimates for each x
COMPONENTS = 20_000  # draws of q that are components of the smoothed density, for each x and repeat
PLANAR_COMPONENTS = 4_000_000  # with two latents: the components of all x together, in each repeat
POINTS = 30_000  # z at which the density is bounded, of all x together, in each repeat
_MOMENT_DRAWS = 4096  # draws of q for the coordinates in which the noise is added
_DRAWS_PER_CALL = 10_000
_SEEDS = 1000  # seeds for the calls of one set of draws
_RATE = 0.05  # learning rate in coordinates that whiten the start; falls to 0 as a cosine
_BATCH = 250  # draws computed at a time


class Gaussians(NamedTuple):
    """A Gaussian for each x and its ELBO."""

    loc: np.ndarray  # [batch, latent]
    scale_tril: np.ndarray  # [batch, latent, latent]
    bound: np.ndarray  # [REPEATS, batch], in nats, from independent draws


class BestGaussian:
    """Optimiser of a Gaussian q(z) for each x: it maximises E_q[log p(x, z) - log q(z)].

        best = BestGaussian(model, full=True)
        best(x, loc, scale_tril).bound.mean(0)  # [batch], in nats

    Adam optimises means and Cholesky factors from several starts, for all x in one compiled loop.
    It uses path gradients (Roeder, Wu and Duvenaud, 2017), because their noise vanishes if q is the
    exact posterior. After a third of the steps, fresh draws select the best start for each x, which
    the other steps improve; further fresh draws estimate its ELBO.

    Args:
      model: any `AVB`. Its weights may change afterwards, but its parts must not.
      full: whether the covariance is full or diagonal.
      steps: steps of Adam.
    """

    def __init__(self, model: AVB, full: bool, steps: int = 300):
        self.model, self.full, self.steps = model, full, steps
        self._climb = tf.function(self._optimise, reduce_retracing=True)
        self._draw = tf.function(self._log_weights, reduce_retracing=True)

    def __call__(
        self,
        x: np.ndarray | tf.Tensor,
        loc: tf.Tensor,
        scale_tril: tf.Tensor,
        seed: int = 0,
        draws: int = FRESH_DRAWS,
    ) -> Gaussians:
        """Returns the best Gaussian for each x.

        Args:
          x: [batch, *event].
          loc: [starts, batch, latent], means of the starts.
          scale_tril: [starts, batch, latent, latent], Cholesky factors of the starts; they must be
            diagonal if `full` is False.
          seed: seed of the draws.
          draws: fresh draws for each x, at least.
        """
        x, first = tf.convert_to_tensor(x), self.steps // 3
        loc, scale_tril = self._climb(
            x, loc, scale_tril, tf.constant(first), tf.constant([seed, 0])
        )
        start = np.argmax(self._bounds(x, loc, scale_tril, 1, (seed, 1))[0], 0)
        loc, scale_tril = (
            tf.constant(part.numpy()[start, np.arange(len(x))][np.newaxis])
            for part in (loc, scale_tril)
        )
        rest = tf.constant(self.steps - first)
        loc, scale_tril = self._climb(x, loc, scale_tril, rest, tf.constant([seed, 3]))
        calls = -(-draws // (REPEATS * _BATCH))  # for each repeat
        bounds = self._bounds(x, loc, scale_tril, REPEATS * calls, (seed, 2))[:, 0]
        bound = bounds.reshape(REPEATS, calls, -1).mean(1)
        return Gaussians(loc.numpy()[0], scale_tril.numpy()[0], bound)

    def _bounds(self, x, loc, scale_tril, calls, seed):
        """Estimates the ELBO in nats from `_BATCH` draws in each call, [calls, starts, batch]."""
        keys = [tf.constant([1000 * seed[0] + i, seed[1]]) for i in range(calls)]
        return np.stack([self._draw(x, loc, scale_tril, key).numpy() for key in keys])

    def _log_weights(self, x, loc, scale_tril, seed):
        """Returns the mean of log p(x, z) - log q(z) over `_BATCH` draws, [starts, batch]."""
        shape = tf.concat([[_BATCH], tf.shape(loc)], 0)
        noise = tf.random.stateless_normal(shape, seed)
        z = loc + tf.linalg.matvec(scale_tril, noise)
        volume = tf.reduce_sum(tf.math.log(tf.linalg.diag_part(scale_tril)), -1)
        log_q = self.model.prior.log_prob(noise) - volume
        return tf.reduce_mean(self._log_joint(x, z) - log_q, 0)

    def _log_joint(self, x, z):
        """Returns log p(x, z), [draws, starts, batch]; z is [draws, starts, batch, latent]."""
        flat = tf.reshape(z, tf.concat([[-1], tf.shape(z)[2:]], 0))
        return tf.reshape(joint.log_joint(self.model, x, flat), tf.shape(z)[:-1])

    def _optimise(self, x, loc, scale_tril, steps, seed):
        """Runs Adam on mean and Cholesky factor, in coordinates that whiten each start."""
        # Row i of the parameters is row i of the factor, with the log of its diagonal entry,
        # followed by entry i of the mean.
        first = tf.zeros(tf.concat([tf.shape(scale_tril)[:-1], [loc.shape[-1] + 1]], 0))
        parameters, mean, square = first, first, first
        for i in tf.range(steps):
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
            rate = 0.5 * _RATE * (1.0 + tf.cos(math.pi * step / tf.cast(steps, tf.float32)))
            parameters += rate * corrected / deviation
        w_loc, w_scale = self._unpack(parameters)
        return loc + tf.linalg.matvec(scale_tril, w_loc), scale_tril @ w_scale

    def _unpack(self, parameters):
        """Splits [..., latent, latent + 1] into mean [..., latent] and factor, without the log."""
        square, w_loc = parameters[..., :-1], parameters[..., -1]
        w_scale = tf.linalg.diag(tf.exp(tf.linalg.diag_part(square)))
        if self.full:
            w_scale += tf.linalg.band_part(square, -1, 0) - tf.linalg.band_part(square, 0, 0)
        return w_loc, w_scale


@joint.kept_for_the_last_model
def best_gaussians(model: AVB, steps: int = 300) -> Callable[..., tuple[Gaussians, Gaussians]]:
    """Returns a function that finds the best diagonal and the best full Gaussian for each x.

    The function takes x [batch, *event], a seed and the number of fresh draws for each x, and
    returns two `Gaussians`. The optimisation
    has four starts: q's moments, q's mean with half the standard deviations, and two draws of q
    with half the standard deviations, for a posterior with several modes. The full Gaussian also
    starts from the best diagonal one.

    Args:
      model: any `AVB`.
      steps: steps of Adam.
    """
    diagonal, full = BestGaussian(model, False, steps), BestGaussian(model, True, steps)

    @tf.function(reduce_retracing=True)
    def moments(x):
        return *proposal.moments(model.averaged_encoder, x), model.encode(x, 2)

    def run(x, seed: int = 0, draws: int = FRESH_DRAWS) -> tuple[Gaussians, Gaussians]:
        mean, scale_tril, z = moments(tf.convert_to_tensor(x))
        loc = tf.stack([mean, mean, z[0], z[1]])
        halves = tf.reshape([1.0, 0.5, 0.5, 0.5], [4, 1, 1, 1])
        scale = halves * scale_tril
        deviations = tf.linalg.diag(tf.norm(scale, axis=-1))
        narrow = diagonal(x, loc, deviations, seed, draws)
        loc = tf.concat([loc, narrow.loc[np.newaxis]], 0)
        scale = tf.concat([scale, narrow.scale_tril[np.newaxis]], 0)
        return narrow, full(x, loc, scale, seed, draws)

    return run


def smoothing_sizes(latents: int, examples: int) -> dict[str, int]:
    """Returns the number of components and of points for each of `examples` x in a repeat.

    With two latents, fewer examples get more components each, because sharp edges need little
    noise.
    """
    components = COMPONENTS
    if latents <= 2:
        components = int(np.clip(PLANAR_COMPONENTS // examples, COMPONENTS, 1_000_000))
    return {"components": components, "points": int(np.clip(POINTS // examples, 100, 250))}


@joint.kept_for_the_last_model
def smoothed_bounds(model: AVB) -> Callable[..., entropy.Bounds]:
    """Returns a function that bounds the ELBO of q with a little noise added.

    The function takes x [batch, *event], the sizes of `smoothing_sizes` and a seed. It returns
    `entropy.Bounds` of [REPEATS, batch] in nats; the repeats are independent. In coordinates that
    whiten q, the noise has the scale `entropy.noise_scale`, and it preserves mean and covariance.

    The bounds hold in expectation over all draws. The smoothed posterior is a posterior like any
    other, so its ELBO is at most log p(x), and the lower bound is at most log p(x) in expectation.
    """

    @tf.function(reduce_retracing=True)
    def draw(x, count, seed):
        return model.encode(x, count, seed)[:, 0]

    @tf.function(reduce_retracing=True)
    def log_joint(x, z):
        return joint.log_joint(model, x, z[:, tf.newaxis])[:, 0]

    def draws(x, count, seed):
        """Draws from q(z|x), [count, latent], in calls of equal size that share one graph."""
        calls = -(-count // _DRAWS_PER_CALL)
        size = -(-count // calls)
        parts = [draw(x, tf.constant(size), tf.constant(seed + i)).numpy() for i in range(calls)]
        return np.concatenate(parts)[:count].astype(np.float64)

    def interval(x, components, points, seed):
        """Returns one repeat of both bounds for x [1, *event]."""
        pilot, z = draws(x, _MOMENT_DRAWS, seed), draws(x, points + components, seed + _SEEDS)
        noise = np.random.default_rng(seed).standard_normal((points, z.shape[1]))
        v, log_q = entropy.at_smoothed_points(pilot, z[:points], z[points:], noise)
        log_p = log_joint(x, tf.constant(v, tf.float32)).numpy().astype(np.float64)
        return np.mean(log_p - log_q.upper), np.mean(log_p - log_q.lower)

    def run(x, components: int, points: int, seed: int = 0) -> entropy.Bounds:
        lower_upper = np.empty((2, REPEATS, len(x)))
        for i, repeat in np.ndindex(len(x), REPEATS):
            key = 2 * _SEEDS * (REPEATS * (len(x) * seed + i) + repeat)
            lower_upper[:, repeat, i] = interval(
                tf.convert_to_tensor(x[i : i + 1]), components, points, key
            )
        return entropy.Bounds(*lower_upper)

    return run
