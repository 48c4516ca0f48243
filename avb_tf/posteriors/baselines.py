"""What a user would reach for otherwise, on the same target: Gaussian VI and NUTS, both TFP's.

All work in the coordinates of a `Start`, which spares them the search for location and scale and
makes heavy tails Gaussian. XLA
runs long chains several times faster than TensorFlow, where it knows all ops of the model.
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
from avb_tf.posteriors.start import Start
from avb_tf.posteriors.target import Target

R_HAT_LIMIT = 1.01  # above it chains have not mixed (Vehtari et al., 2021)
_VI_DRAWS = 32  # of a step
_Result = TypeVar("_Result")


class Chains(NamedTuple):
    """What NUTS found."""

    u: np.ndarray  # [draws, dim], unconstrained, all chains one after the other
    r_hat: float  # the largest of any coordinate
    effective_sample_size: float  # the smallest


def gaussian(
    target: Target, start: Start, full_rank: bool, draws: int, steps: int = 2000, seed: int = 0
) -> np.ndarray:
    """Draws [draws, dim] of the Gaussian of least KL(q || posterior) in unconstrained space.

    Args:
      target: the posterior.
      start: where the Gaussian begins; a mean-field one takes its scales, not its correlations.
      full_rank: with every correlation, or with none (mean-field).
      draws: of the result.
      steps: of Adam, its rate falling from 0.05 to 0.
      seed: of everything.
    """
    if not full_rank:
        start = start._replace(scale_tril=np.diag(start.deviations))

    def fitted(jit_compile):
        tf.random.set_seed(seed)  # the surrogate starts anywhere
        surrogate = tfp.experimental.vi.build_affine_surrogate_posterior(
            [target.dim], "tril" if full_rank else "diag", dtype=target.dtype
        )
        tfp.vi.fit_surrogate_posterior(
            _standardised(target, start),
            surrogate,
            tf_keras.optimizers.Adam(tf_keras.optimizers.schedules.CosineDecay(0.05, steps)),
            steps,
            sample_size=_VI_DRAWS,
            seed=tf.constant([seed, 0]),  # a whole number would be without effect in XLA
            jit_compile=jit_compile,
        )
        return surrogate

    z = _by_xla(fitted).sample(draws, seed=seed)
    return np.asarray(start.place(z, target.dtype)[0], np.float64)


def nuts(
    target: Target, start: Start, draws: int, chains: int = 4, adaptation: int = 500, seed: int = 0
) -> Chains:
    """`draws` of each chain after windowed adaptation of step size and mass matrix.

    Args:
      target: the posterior.
      start: whose coordinates the chains move in, from N(0, 1) each.
      draws: of each chain.
      chains: that run side by side.
      adaptation: transitions before the draws.
      seed: of everything.
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
    return Chains(u, float(np.max(r_hat)), float(np.min(size)))


def _by_xla(run: Callable[[bool], _Result]) -> _Result:
    """`run(jit_compile)` with XLA, or without where the model has an op that XLA does not know."""
    try:
        return run(True)
    except (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError):
        return run(False)


class _Density(tfd.Distribution):
    """A log density as the distribution that TFP's windowed adaptation asks for."""

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
    def log_density(z):
        u, volume = start.place(tf.reshape(z, [-1, target.dim]), target.dtype)
        return tf.reshape(target.log_density(u) + volume, tf.shape(z)[:-1])

    return log_density
