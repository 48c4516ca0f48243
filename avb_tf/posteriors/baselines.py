"""Baselines on the same target: Gaussian variational inference and NUTS, both from TFP.

Both work in the coordinates of a `Start`, so that they need not find location and scale, and heavy
tails are Gaussian. XLA runs long chains several times faster than TensorFlow, if it supports all
ops of the model.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import numpy as np
import tensorflow as tf
import tensorflow_probability as tfp
import tf_keras
from tensorflow_probability import bijectors as tfb
from tensorflow_probability import distributions as tfd

from avb_tf import diagnostics
from avb_tf.posteriors.coordinates import Start
from avb_tf.posteriors.target import Target

R_HAT_LIMIT = 1.01  # chains with a larger R-hat have not mixed (Vehtari et al., 2021)
_VI_DRAWS = 32  # draws in each step of variational inference
_Result = TypeVar("_Result")


class NutsDraws(NamedTuple):
    """Draws of NUTS and their convergence diagnostics."""

    u: np.ndarray  # [draws, dim], unconstrained, all chains one after the other
    r_hat: float  # the largest of any coordinate
    effective_sample_size: float  # the smallest of any coordinate


def gaussian(
    target: Target, start: Start, full_rank: bool, draws: int, steps: int = 2000, seed: int = 0
) -> np.ndarray:
    """Returns draws [draws, dim] of the Gaussian that minimises KL(q || posterior).

    The Gaussian is fitted in the coordinates of `start`; its draws are unconstrained parameters.

    Args:
      target: the posterior.
      start: coordinates of the Gaussian; a mean-field one uses its scales, not its correlations.
      full_rank: whether the Gaussian has a full covariance; if not, a diagonal one (mean-field).
      draws: number of draws returned.
      steps: number of Adam steps; the learning rate falls from 0.05 to 0.
      seed: seed of the optimisation and of the draws.
    """
    if not full_rank:
        start = start._replace(scale_tril=np.diag(start.deviations))

    def fitted(jit_compile):
        tf.random.set_seed(seed)  # TFP initialises the surrogate from the global seed
        surrogate = tfp.experimental.vi.build_affine_surrogate_posterior(
            [target.dim], "tril" if full_rank else "diag", dtype=target.dtype
        )
        tfp.vi.fit_surrogate_posterior(
            _standardised(target, start),
            surrogate,
            tf_keras.optimizers.Adam(tf_keras.optimizers.schedules.CosineDecay(0.05, steps)),
            steps,
            sample_size=_VI_DRAWS,
            seed=tf.constant([seed, 0]),  # XLA would ignore an integer seed
            jit_compile=jit_compile,
        )
        return surrogate

    z = _by_xla(fitted).sample(draws, seed=seed)
    return np.asarray(start.place(z, target.dtype)[0], np.float64)


def nuts(
    target: Target, start: Start, draws: int, chains: int = 4, adaptation: int = 500, seed: int = 0
) -> NutsDraws:
    """Runs NUTS after windowed adaptation of the step size and the mass matrix.

    Args:
      target: the posterior.
      start: coordinates in which the chains move; each chain starts at a draw of N(0, I).
      draws: number of draws of each chain.
      chains: number of parallel chains.
      adaptation: number of warm-up transitions before the draws.
      seed: seed of the initial states and of the transitions.
    """
    log_density = _standardised(target, start)

    def run():
        return tfp.experimental.mcmc.windowed_adaptive_nuts(
            draws,
            tfd.JointDistributionSequential([_Density(log_density, target)]),
            n_chains=chains,
            num_adaptation_steps=adaptation,
            current_state=[
                tf.random.stateless_normal([chains, target.dim], [seed, 0], dtype=target.dtype)
            ],
            max_tree_depth=8,
            seed=tf.constant([seed, 1]),
        )

    states, _ = _by_xla(lambda jit: tf.function(run, autograph=False, jit_compile=jit)())
    z = np.asarray(states[0], np.float64)  # [draws, chains, dim]
    r_hat, size = diagnostics.convergence(np.moveaxis(z, 0, 1))
    flat = tf.constant(np.moveaxis(z, 0, 1).reshape(-1, target.dim), target.dtype)
    u = np.asarray(start.place(flat, target.dtype)[0], np.float64)
    return NutsDraws(u, float(np.max(r_hat)), float(np.min(size)))


def _by_xla(run: Callable[[bool], _Result]) -> _Result:
    """Calls `run(jit_compile)` with XLA, or without it if XLA does not support an op."""
    try:
        return run(True)
    except (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError):
        return run(False)


class _Density(tfd.Distribution):
    """A log density as a TFP distribution, which TFP's windowed adaptation requires."""

    def __init__(self, log_density, target):
        super().__init__(target.dtype, tfd.NOT_REPARAMETERIZED, False, True, parameters={})
        self._density, self._dim = log_density, target.dim

    def _log_prob(self, value):
        return self._density(value)

    def _event_shape(self):
        return tf.TensorShape([self._dim])

    def _event_shape_tensor(self):
        return tf.constant([self._dim])

    def _batch_shape(self):
        return tf.TensorShape([])

    def _batch_shape_tensor(self):
        return tf.constant([], tf.int32)

    def _sample_n(self, n, seed=None):
        return tf.random.stateless_normal([n, self._dim], [0, 0], dtype=self.dtype)

    def _default_event_space_bijector(self):
        return tfb.Identity()


def _standardised(target, start):
    """Returns the target's log density as a function of standardised z [..., dim]."""

    def log_density(z):
        u, volume = start.place(tf.reshape(z, [-1, target.dim]), target.dtype)
        return tf.reshape(target.log_density(u) + volume, tf.shape(z)[:-1])

    return log_density
