"""The distance between q(u|y) and the posterior for one y, with a search for modes that q lacks.

q's density is exact, and so are its importance weights, but they do not show a mode that q has
lost. Lost modes are sought by Newton's method from the simulated parameters whose data are nearest
to y, from the prior, and from q's draws. Chains then start from q and from the lost modes in
proportion to their mass, and jump between them. The overlap of q and the posterior is estimated
from draws of both (`posteriors.verdict`).
"""

from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from avb_tf import diagnostics as weighing
from avb_tf.amortised.network import ConditionalMixture
from avb_tf.amortised.simulation import Simulation
from avb_tf.posteriors import evidence, hmc, mixture, sampling, search, verdict
from avb_tf.posteriors.evidence import Evidence
from avb_tf.posteriors.functions import value_and_gradient
from avb_tf.posteriors.mixture import Mixture
from avb_tf.posteriors.verdict import Diagnostics

DRAWS = 4096  # draws of q
# Numbers of points from which modes are sought: simulated parameters, draws of the prior and of q.
_NEAR, _PRIOR, _OWN = 64, 32, 16
_LOST = 1e-3  # smallest mass of a lost mode that counts
# Warm-up transitions, states kept of each chain, and transitions from one kept state to the next.
_ADAPTING, _KEPT, _THINNED = 24, 16, 2
_SHARE = 0.2  # share of a proposal's draws that come from the lost modes


class Given:
    """q(u|y) for one y in numpy, with the methods `draw` and `log_density` of a `Mixture`.

    given = Given(compiled, y)  # y [1, features]
    given.log_density(given.draw(10, np.random.default_rng(0)))  # [10], in nats
    """

    def __init__(self, compiled: "Compiled", y: np.ndarray):
        self.compiled, self.y = compiled, y
        self.context = compiled.given(tf.constant(y))

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Returns independent draws, [count, dim]."""
        seed = tf.constant(rng.integers(0, 2**31, 2), tf.int32)
        drawn = self.compiled.sample_given(self.context, tf.constant(count), seed)
        return np.asarray(drawn, np.float64)

    def log_density(self, u: np.ndarray) -> np.ndarray:
        """Returns log q(u|y) in nats, [n, dim] -> [n]."""
        with np.errstate(over="ignore"):  # u far out overflows float32
            u = np.asarray(u, np.float32)
        log_q = np.asarray(self.compiled.log_prob_given(tf.constant(u), self.context), np.float64)
        return _finite(log_q)

    def scores(self, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns log p(y, u) in nats and its gradient, [n, dim] -> [n] and [n, dim].

        If the model's density raises, the batch is halved until single draws fail; their log
        density is minus infinity.
        """
        with np.errstate(over="ignore"):
            u = np.asarray(u, self.compiled.dtype.as_numpy_dtype)
        try:
            scores = self.compiled.scores(tf.constant(u), tf.constant(self.y[0]))
        except tf.errors.InvalidArgumentError:  # for example, rounding made a matrix singular
            if len(u) == 1:
                return np.full(1, -np.inf), np.zeros(u.shape)
            first, second = (self.scores(part) for part in np.array_split(u, 2))
            return np.concatenate([first[0], second[0]]), np.concatenate([first[1], second[1]])
        density, gradient = (np.asarray(part, np.float64) for part in scores)
        return density, gradient


class Compiled:
    """The compiled functions of a fit, traced once for all y."""

    def __init__(self, q: ConditionalMixture, simulation: Simulation):
        compile_: Any = tf.function(autograph=False, reduce_retracing=True)
        self.dtype, self.simulation = simulation.dtype, simulation
        self.given = compile_(q.given)
        self.sample_given = compile_(q.sample_given)
        self.log_prob_given = compile_(q.log_prob_given)
        self.parameters = compile_(self._parameters)
        self.outcome = compile_(simulation.outcome)
        self.densities = compile_(simulation.log_densities)
        self.scores = compile_(
            lambda u, y: value_and_gradient(lambda u: simulation.log_density(u, y), u)
        )
        self._q = q

    def _parameters(self, y, n, seed):
        u = self._q.sample_given(self._q.given(y), n, seed)
        return self.simulation.constrain(tf.cast(u, self.dtype))


class Proposal(NamedTuple):
    """A mixture of q(u|y) for one y and of components at the modes that q lacks, if any."""

    given: Given
    lost: Mixture | None

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Returns independent draws, [count, dim]."""
        if self.lost is None:
            return self.given.draw(count, rng)
        other = rng.random(count) < _SHARE
        drawn = self.given.draw(count, rng)
        drawn[other] = self.lost.draw(int(other.sum()), rng)
        return drawn

    def log_density(self, u: np.ndarray) -> np.ndarray:
        """Returns the log density in nats, [n, dim] -> [n]."""
        log_q = self.given.log_density(u)
        if self.lost is None:
            return log_q
        return np.logaddexp(np.log1p(-_SHARE) + log_q, np.log(_SHARE) + self.lost.log_density(u))


class Judgement(NamedTuple):
    """A verdict, the evidence, and the chains on which both are based."""

    diagnostics: Diagnostics
    log_evidence: Evidence
    proposal: Proposal
    states: np.ndarray  # [chains, kept, dim], states of chains of the posterior
    root: np.ndarray  # [dim, dim], symmetric root of the chains' covariance
    step_size: np.ndarray  # [chains, 1], adapted step sizes


def judge(given: Given, near: np.ndarray, prior: np.ndarray, seed: int = 0) -> Judgement:
    """Returns the verdict on q(u|y) for one y.

    Args:
      given: q(u|y) for this y.
      near: simulated parameters in ascending order of their data's distance from y, [n, dim].
      prior: draws of the prior, [m, dim].
      seed: seed of all random numbers.
    """
    rng = np.random.default_rng(seed)
    u = given.draw(DRAWS, rng)
    at_q = _finite(given.scores(u)[0]) - given.log_density(u)
    points = np.concatenate([near[:_NEAR], prior[:_PRIOR], u[:_OWN]])
    lost = _lost_modes(given, points, _log_mean_exp(at_q), rng)
    proposal = Proposal(given, lost)
    jumps: Any = proposal  # the chains use only a mixture's methods draw and log_density
    x = sampling.weighed(given.scores, jumps, rng, sampling.CHAINS[1])
    root = hmc.root(np.cov(x.T))
    leapfrogs = sampling.LEAPFROGS
    first = hmc.run_chains(
        given.scores, x, root, _ADAPTING, leapfrogs, 0.3, rng, adapt=True, jumps=jumps
    )
    root = hmc.root(np.cov(first.states[_ADAPTING // 2 :: 4].reshape(-1, x.shape[1]).T))
    kept = hmc.run_chains(
        given.scores, first.states[-1], root, _KEPT * _THINNED, leapfrogs, first.step_size, rng,
        jumps=jumps,
    )  # fmt: skip
    states = np.swapaxes(kept.states[_THINNED - 1 :: _THINNED], 0, 1)
    density = kept.log_density[_THINNED - 1 :: _THINNED].T
    flat = states.reshape(-1, x.shape[1])
    at_p = density.ravel() - given.log_density(flat)
    r_hat = weighing.largest_r_hat(states)
    diagnostics = verdict.diagnose(at_q, at_p, float("nan"), r_hat=r_hat)
    at_states = density - proposal.log_density(flat).reshape(density.shape)
    x = proposal.draw(DRAWS, rng)
    at_proposal = _finite(given.scores(x)[0]) - proposal.log_density(x)
    log_evidence = evidence.bridge(at_proposal, at_states)
    return Judgement(diagnostics, log_evidence, proposal, states, root, kept.step_size)


def _lost_modes(given: Given, points: np.ndarray, log_evidence: float, rng) -> Mixture | None:
    """Returns a mixture at the modes where q has less than a tenth of the density, or None."""
    points = points[np.isfinite(given.scores(points)[0])]
    maxima = search.climb(given.scores, points) if len(points) else points
    if not len(maxima):
        return None
    modes = search.modes(given.scores, maxima)
    excess = given.scores(modes.x)[0] - log_evidence - given.log_density(modes.x)
    mass = search.unseen(given.scores, modes, log_evidence, rng)
    lost = (excess > np.log(10.0)) & (mass > _LOST)
    if not lost.any():
        return None
    gaussians = list(zip(modes.x[lost], modes.roots[lost], strict=True))
    return mixture.of_gaussians(gaussians, mixture.DEGREES)


def _finite(density):
    return np.where(np.isnan(density), -np.inf, density)


def _log_mean_exp(x):
    return float(np.logaddexp.reduce(x) - np.log(len(x)))
