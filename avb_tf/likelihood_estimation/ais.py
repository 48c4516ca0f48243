"""Annealed importance sampling (Neal, 2001): log p(x) of any model, without the adversary.

Forward chains from a tractable start bound log p(x) from below. Reverse chains from an exact draw
of p(z|x) bound it from above; only data simulated from the model have such a draw (bidirectional
Monte Carlo: Grosse, Ghahramani and Adams, 2015). All chains of all examples run in one call.

The transitions are Hamiltonian Monte Carlo, implemented here. Along the path

    log start(z) + beta * excess(z),   excess(z) = log p(x, z) - log start(z)

neither the excess nor its gradient depends on beta. Both stay valid when the temperature changes,
so a leapfrog step costs one evaluation. TFP's kernel is not used, because it caches the density at
one beta: keeping the cache biases the chain, and renewing it costs one more evaluation per
temperature.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from tensorflow_probability import distributions as tfd

from avb_tf import proposal
from avb_tf.likelihood_estimation import joint

ROWS = 800  # chains of all examples in a call; enough to keep the processor busy
_LARGEST = 2**21  # numbers in the decoded x of all chains of a chunk, to bound the memory
PILOT_CHAINS = 8  # enough to estimate the mean acceptance rate
INITIAL_STEP = 0.3  # step size in coordinates where the start is standard normal
TARGET_ACCEPTANCE = 0.7  # acceptance rate
_ADAPTATION = 0.2  # change of the log step size per unit of acceptance rate above the target


class AnnealedChains(NamedTuple):
    """Results of annealed chains, for K temperatures."""

    log_weights: np.ndarray  # [chains, batch], in nats
    z: np.ndarray  # [chains, batch, latent], final states
    acceptance: np.ndarray  # [K, batch], acceptance rate at each temperature, mean over chains
    step_size: np.ndarray  # [K, batch], at each temperature


class Bidirectional(NamedTuple):
    """Weights of forward and reverse chains for x simulated from a model."""

    x: np.ndarray  # [batch, *event]
    forward: np.ndarray  # [chains, batch], log weights for `lower_bound`
    reverse: np.ndarray  # [chains, batch], log weights for `upper_bound`


class _State(NamedTuple):
    """States of the chains, in coordinates w that whiten the start."""

    w: tf.Tensor  # [chains, batch, latent]
    excess: tf.Tensor  # [chains, batch]
    gradient: tf.Tensor  # [chains, batch, latent], of the excess


def sigmoid_schedule(temperatures: int, width: float = 4.0) -> np.ndarray:
    """Returns inverse temperatures from 0 to 1, [temperatures + 1], dense at both ends.

    Args:
      temperatures: number of steps.
      width: the schedule is a sigmoid on [-width, width], rescaled to end at 0 and 1.
    """
    s = 1.0 / (1.0 + np.exp(-np.linspace(-width, width, temperatures + 1)))
    return ((s - s[0]) / (s[-1] - s[0])).astype(np.float32)


class Annealer:
    """Annealed chains along (1 - beta) log start(z) + beta log p(x, z), in one compiled graph.

        anneal = Annealer(log_joint)
        chains = anneal(x, start, sigmoid_schedule(100), z, step_size)  # z ~ start
        lower_bound(chains.log_weights)  # [batch], nats

    Args:
      log_joint: function of x [batch, ...] and z [chains, batch, latent] that returns log p(x, z),
        [chains, batch].
      leapfrog_steps: leapfrog steps in each transition.
    """

    def __init__(
        self, log_joint: Callable[[tf.Tensor, tf.Tensor], tf.Tensor], leapfrog_steps: int = 10
    ):
        self.log_joint = log_joint
        self.leapfrog_steps = leapfrog_steps
        # One graph serves pilot, forward and reverse chains in any number.
        self._compiled = tf.function(self._anneal, reduce_retracing=True)

    def __call__(
        self,
        x: np.ndarray | tf.Tensor,
        start: tfd.Distribution,
        betas: np.ndarray,
        z: tf.Tensor,
        step_size: np.ndarray,
        adapt: bool = False,
        seed: tuple[int, int] = (0, 0),
    ) -> AnnealedChains:
        """Runs chains from betas[0] to betas[-1].

        With ascending betas and z ~ start, the expectation of exp(log_weights) is p(x). With
        descending betas and z ~ p(z|x), it is 1 / p(x). Both hold only for fixed step sizes, so
        run the chains once with `adapt`, then again with the resulting step sizes.

        Args:
          x: [batch, ...].
          start: Gaussian with `loc` and `scale`, batch [batch], event [latent]. The chains move in
            coordinates where it is standard normal, so that one step size serves all latents of an
            example.
          betas: [K + 1], inverse temperatures, monotone.
          z: [chains, batch, latent], initial states.
          step_size: [K, batch], step size of the leapfrog integrator at each temperature.
          adapt: whether the step sizes adapt to the acceptance rate while the chains run.
          seed: seed of momenta and acceptances, two integers.
        """
        outputs = self._compiled(
            tf.convert_to_tensor(x),
            tf.convert_to_tensor(start.loc),
            start.scale.to_dense(),
            tf.constant(betas, tf.float32),
            tf.convert_to_tensor(z),
            tf.constant(step_size, tf.float32),
            tf.constant(_ADAPTATION if adapt else 0.0),
            tf.constant(seed, tf.int32),
        )
        return AnnealedChains(*(output.numpy() for output in outputs))

    def _anneal(self, x, loc, scale_tril, betas, z, step_size, adaptation, seed):
        start = tfd.MultivariateNormalTriL(loc, scale_tril)
        volume = tf.reduce_sum(tf.math.log(tf.linalg.diag_part(scale_tril)), -1)
        normal = tfd.MultivariateNormalDiag(tf.zeros_like(loc[0]))

        def to_z(w):
            return loc + tf.einsum("bij,sbj->sbi", scale_tril, w)

        def excess(w):
            return self.log_joint(x, to_z(w)) - normal.log_prob(w) + volume

        def evaluated(w):
            with tf.GradientTape() as tape:
                tape.watch(w)
                value = tf.ensure_shape(excess(w), w.shape[:-1])
            # A loop needs static shapes, and broadcasting loses the static size of a batch of 1.
            return _State(w, value, tf.ensure_shape(tape.gradient(value, w), w.shape))

        temperatures = tf.shape(step_size)[0]
        reverse = betas[0] > betas[-1]
        state = evaluated(
            tf.transpose(start.scale.solve(tf.transpose(z - loc, [1, 2, 0])), [2, 0, 1])
        )
        log_weights, log_scaling = tf.zeros_like(state.excess), tf.zeros_like(step_size[0])
        acceptances = tf.TensorArray(tf.float32, temperatures)
        sizes = tf.TensorArray(tf.float32, temperatures)
        for i in tf.range(temperatures):
            size = step_size[i] * tf.exp(log_scaling)
            before, beta = state.excess, tf.where(reverse, betas[i], betas[i + 1])
            key = tf.random.fold_in(seed, i)
            state, acceptance = _transition(evaluated, state, beta, size, self.leapfrog_steps, key)
            # A forward chain is weighted before it moves, a reverse chain after it has moved.
            log_weights += (betas[i + 1] - betas[i]) * tf.where(reverse, state.excess, before)
            log_scaling += adaptation * (acceptance - TARGET_ACCEPTANCE)
            acceptances, sizes = acceptances.write(i, acceptance), sizes.write(i, size)
        return log_weights, to_z(state.w), acceptances.stack(), sizes.stack()


def _transition(evaluated, state: _State, beta, size, leapfrog_steps: int, key):
    """Takes one HMC step on -|w|^2 / 2 + beta * excess(w).

    Returns:
      (the new state, the acceptance rate [batch], mean over chains).
    """
    step = size[tf.newaxis, :, tf.newaxis]
    momentum = tf.random.stateless_normal(tf.shape(state.w), key)
    moved, p = state, momentum + 0.5 * step * (beta * state.gradient - state.w)
    # The trajectory uses only the gradient, so the graph prunes the densities along the trajectory.
    w, gradient = state.w, state.gradient
    for _ in tf.range(leapfrog_steps - 1):
        w += step * p
        gradient = evaluated(w).gradient
        p += step * (beta * gradient - w)
    moved = evaluated(w + step * p)
    p += 0.5 * step * (beta * moved.gradient - moved.w)

    def log_density(state, p):
        return beta * state.excess - 0.5 * tf.reduce_sum(state.w**2 + p**2, -1)

    log_ratio = log_density(moved, p) - log_density(state, momentum)
    uniform = tf.random.stateless_uniform(tf.shape(log_ratio), tf.random.fold_in(key, 1))
    accepted = tf.math.log(uniform) < log_ratio  # false for a NaN energy
    probability = tf.exp(tf.minimum(log_ratio, 0.0))
    probability = tf.where(tf.math.is_nan(probability), 0.0, probability)
    new = _State(
        tf.where(accepted[..., tf.newaxis], moved.w, state.w),
        tf.where(accepted, moved.excess, state.excess),
        tf.where(accepted[..., tf.newaxis], moved.gradient, state.gradient),
    )
    return new, tf.reduce_mean(probability, 0)


class AnnealedSampler:
    """AIS of a model, which bounds log p(x) from below and, for simulated x, from above.

        sampler = AnnealedSampler(model, temperatures=100, chains=32)
        lower_bound(sampler.forward(x).log_weights)  # [batch], nats

    The chains start from a widened Gaussian with the moments of q(z|x)
    (`proposal.widened_gaussian`). A pilot run of a few chains adapts the step sizes of each
    example. Then all chains run from new starts with these step sizes, which stay fixed.

    Args:
      model: an `AVB`. Its weights may change afterwards, but its parts must not.
      temperatures: number of temperatures; more tighten the bounds.
      chains: chains for each example; more tighten the bounds.
      leapfrog_steps: leapfrog steps of Hamiltonian Monte Carlo at each temperature.
    """

    def __init__(self, model: Any, temperatures: int, chains: int, leapfrog_steps: int = 10):
        self.model, self.chains, self.leapfrog_steps = model, chains, leapfrog_steps
        self.betas = sigmoid_schedule(temperatures)
        self._anneal = Annealer(lambda x, z: joint.log_joint(model, x, z), leapfrog_steps)
        self._start = tf.function(self._moments, reduce_retracing=True)

    def forward(self, x: np.ndarray | tf.Tensor, seed: int = 0) -> AnnealedChains:
        """Runs forward chains for x [batch, *event]; their `lower_bound` bounds log p(x)."""
        return self._forward(tf.convert_to_tensor(x), seed)[0]

    def bidirectional(self, count: int, seed: int = 0) -> Bidirectional:
        """Runs forward and reverse chains for `count` x simulated from the model.

        The z that generated an x is an exact draw of p(z|x). All reverse chains of this x start
        from it.
        """
        z = self.model.prior.sample(count, seed=(seed, 10))
        outputs = self.model.averaged_decoder(z)
        x = self.model.likelihood.distribution(outputs).sample(seed=(seed, 11))
        x = tf.cast(x, tf.float32)
        forward, start = self._forward(x, seed)
        z = tf.tile(z[tf.newaxis], [self.chains, 1, 1])
        reversed_betas, step_size = self.betas[::-1], forward.step_size[::-1]
        reverse = self._anneal(x, start, reversed_betas, z, step_size, seed=(seed, 4))
        return Bidirectional(x.numpy(), forward.log_weights, reverse.log_weights)

    def _forward(self, x, seed):
        start = tfd.MultivariateNormalTriL(*self._start(x))
        step_size = np.full((len(self.betas) - 1, len(x)), INITIAL_STEP)
        pilot_z = start.sample(min(PILOT_CHAINS, self.chains), seed=(seed, 0))
        pilot = self._anneal(x, start, self.betas, pilot_z, step_size, adapt=True, seed=(seed, 1))
        z = start.sample(self.chains, seed=(seed, 2))
        chains = self._anneal(x, start, self.betas, z, pilot.step_size, seed=(seed, 3))
        return chains, start

    def _moments(self, x):
        start = proposal.widened_gaussian(self.model.averaged_encoder, x)
        return start.loc, start.scale.to_dense()


kept_sampler = joint.kept_for_the_last_model(AnnealedSampler)


def examples_at_once(model: Any, rows: int) -> int:
    """Returns the number of examples in a chunk with `rows` z for each, bounded by the memory."""
    return max(1, min(ROWS // rows, _LARGEST // (rows * int(np.prod(model.event_shape)))))


def lower_bound(log_weights: np.ndarray) -> np.ndarray:
    """Returns a lower bound on log p(x) in expectation, [batch], in nats.

    Args:
      log_weights: [chains, batch], log weights of forward chains.
    """
    return np.logaddexp.reduce(log_weights.astype(np.float64), 0) - np.log(len(log_weights))


def upper_bound(log_weights: np.ndarray) -> np.ndarray:
    """Returns an upper bound on log p(x) in expectation, [batch], in nats.

    Args:
      log_weights: [chains, batch], log weights of reverse chains.
    """
    return -lower_bound(log_weights)
