"""Annealed importance sampling (Neal, 2001): log p(x) of any model, without the adversary.

Forward chains from a tractable start bound log p(x) from below. Reverse chains from an exact draw
of p(z|x) bound it from above; only data simulated from the model have such a draw (bidirectional
Monte Carlo: Grosse, Ghahramani and Adams, 2015). All chains of all examples run in one call.

The transitions are our own Hamiltonian Monte Carlo. Along the path

    log start(z) + beta * excess(z),   excess(z) = log p(x, z) - log start(z)

neither the excess nor its gradient depends on beta. Both stay valid when the temperature changes,
so a leapfrog step costs one evaluation. TFP's kernel caches the density at one beta: keeping the
cache biases the chain, and renewing it costs one more evaluation per temperature.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from tensorflow_probability import distributions as tfd

from avb_tf import proposal
from avb_tf.likelihood_estimation import joint

ROWS = 800  # chains of all examples in a call, which keep the processor busy
_LARGEST = 2**21  # numbers of x for all chains of a chunk, to bound the memory
PILOT_CHAINS = 8  # enough to estimate the mean acceptance
INITIAL_STEP = 0.3  # in coordinates where the start is standard normal
TARGET_ACCEPTANCE = 0.7
_ADAPTATION = 0.2  # change of the log step size per unit of excess acceptance


class Chains(NamedTuple):
    """Results of annealed chains, for K temperatures."""

    log_weights: np.ndarray  # [chains, batch], in nats
    z: np.ndarray  # [chains, batch, latent], final states
    acceptance: np.ndarray  # [K, batch], mean over chains at each temperature
    step_size: np.ndarray  # [K, batch], at each temperature


class Bidirectional(NamedTuple):
    """Weights of chains for x simulated from a model."""

    x: np.ndarray  # [batch, *event]
    forward: np.ndarray  # [chains, batch], log weights for `lower_bound`
    reverse: np.ndarray  # [chains, batch], log weights for `upper_bound`


class _State(NamedTuple):
    """States of the chains, in coordinates w that whiten the start."""

    w: tf.Tensor  # [chains, batch, latent]
    excess: tf.Tensor  # [chains, batch]
    gradient: tf.Tensor  # [chains, batch, latent], of the excess


def sigmoid_schedule(temperatures: int, width: float = 4.0) -> np.ndarray:
    """Inverse temperatures from 0 to 1, [temperatures + 1], dense at both ends."""
    s = 1.0 / (1.0 + np.exp(-np.linspace(-width, width, temperatures + 1)))
    return ((s - s[0]) / (s[-1] - s[0])).astype(np.float32)


class Annealer:
    """Chains along (1 - beta) log start(z) + beta log p(x, z), in one compiled graph.

        anneal = Annealer(log_joint)
        chains = anneal(x, start, sigmoid_schedule(100), z, step_size)  # z ~ start
        lower_bound(chains.log_weights)  # [batch], nats

    Args:
      log_joint: x [batch, ...], z [chains, batch, latent] -> log p(x, z), [chains, batch].
      leapfrog_steps: in each transition.
    """

    def __init__(self, log_joint: Callable, leapfrog_steps: int = 10):
        self.log_joint = log_joint
        self.leapfrog_steps = leapfrog_steps
        # One graph serves pilot, forward and reverse chains of any number.
        self._compiled = tf.function(self._anneal, reduce_retracing=True)

    def __call__(self, x, start, betas, z, step_size, adapt: bool = False, seed=(0, 0)) -> Chains:
        """Chains from betas[0] to betas[-1].

        With ascending betas and z ~ start, the mean of exp(log_weights) is p(x) in expectation;
        with descending ones and z ~ p(z|x) it is 1 / p(x). This holds for fixed step sizes, not
        while they adapt: run once with `adapt`, then again with the resulting step sizes.

        Args:
          x: [batch, ...].
          start: Gaussian with `loc` and `scale`, batch [batch], event [latent]; chains move in the
            coordinates that it whitens, so that one step size serves all latents of an example.
          betas: [K + 1], monotone.
          z: [chains, batch, latent], initial states.
          step_size: of the leapfrog integrator, [K, batch].
          adapt: whether step sizes adapt to the acceptance along the way.
          seed: of momenta and acceptances, two integers.
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
        return Chains(*(output.numpy() for output in outputs))

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
            # A loop needs static shapes, and broadcasting loses the one of a batch of 1.
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
            # A forward chain is weighted before it moves, a reverse one after.
            log_weights += (betas[i + 1] - betas[i]) * tf.where(reverse, state.excess, before)
            log_scaling += adaptation * (acceptance - TARGET_ACCEPTANCE)
            acceptances, sizes = acceptances.write(i, acceptance), sizes.write(i, size)
        return log_weights, to_z(state.w), acceptances.stack(), sizes.stack()


def _transition(evaluated, state: _State, beta, size, leapfrog_steps: int, key):
    """One HMC step on -|w|^2 / 2 + beta * excess(w): the new state and the mean acceptance."""
    step = size[tf.newaxis, :, tf.newaxis]
    momentum = tf.random.stateless_normal(tf.shape(state.w), key)
    moved, p = state, momentum + 0.5 * step * (beta * state.gradient - state.w)
    # The trajectory uses the gradient alone, so the graph prunes the energies inside it.
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
    """AIS of a model: bounds on log p(x) from below and, for simulated x, from above.

        sampler = AnnealedSampler(model, temperatures=100, chains=32)
        lower_bound(sampler.forward(x).log_weights)  # [batch], nats

    The start is a Gaussian with the moments of q(z|x), widened (`proposal.widened_gaussian`). A
    pilot run of a few chains adapts the step sizes of each example; they are then fixed and all
    chains run anew.

    Args:
      model: an `AVB`; its weights may change afterwards, its parts may not.
      temperatures, chains, leapfrog_steps: sizes; the bounds tighten with the first two.
    """

    def __init__(self, model: Any, temperatures: int, chains: int, leapfrog_steps: int = 10):
        self.model, self.chains, self.leapfrog_steps = model, chains, leapfrog_steps
        self.betas = sigmoid_schedule(temperatures)
        self._anneal = Annealer(lambda x, z: joint.log_joint(model, x, z), leapfrog_steps)
        self._start = tf.function(self._moments, reduce_retracing=True)

    def forward(self, x, seed: int = 0) -> Chains:
        """Forward chains for x [batch, *event]; their `lower_bound` bounds log p(x)."""
        return self._forward(tf.convert_to_tensor(x), seed)[0]

    def bidirectional(self, count: int, seed: int = 0) -> Bidirectional:
        """Forward and reverse chains for `count` x simulated from the model.

        The z that generated an x is an exact draw of p(z|x). All reverse chains of the x start
        there.
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
    """Examples in a chunk with `rows` z for each, as the memory allows."""
    return max(1, min(ROWS // rows, _LARGEST // (rows * int(np.prod(model.event_shape)))))


def lower_bound(log_weights) -> np.ndarray:
    """log p(x), [batch], from forward weights [chains, batch]: a lower bound in expectation."""
    return np.logaddexp.reduce(log_weights.astype(np.float64), 0) - np.log(len(log_weights))


def upper_bound(log_weights) -> np.ndarray:
    """log p(x), [batch], from reverse weights [chains, batch]: an upper bound in expectation."""
    return -lower_bound(log_weights)
