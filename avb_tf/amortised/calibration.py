"""Whether a fit is calibrated over all data sets, and whether one is like those simulated."""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from avb_tf import tables
from avb_tf.amortised.judging import Compiled
from avb_tf.amortised.simulation import Simulation
from avb_tf.figures import calibration

LEVELS = (0.5, 0.8, 0.9)
_NULL = 4000  # uniform ranks drawn for the distribution of a largest deviation
_TYPICAL = 1000  # simulated data sets that an observed one is compared with
_EVIDENCE_DRAWS = 64  # of q, for the log evidence of each data set
_ROWS = 2**14  # draws at a time
_TWO_SIDED = "log evidence"
FALSE_ALARMS = 0.05  # rate of the tests


class Check(NamedTuple):
    """Calibration of a fit over simulated data sets. Printed, it is a table and a sentence.

    Attributes:
      coordinates: names of the unconstrained parameters.
      draws: of q for each data set.
      ranks: [pairs, dim], how many draws are below the parameters that made the data.
      ranks_of_density: [pairs], how many draws have a lower log q than these parameters.
      ranks_of_distance: [pairs], how many draws are closer than these parameters to a random
        reference point: TARP.
      features: names of what is predicted: the numbers of a data set, or of a row of it.
      ranks_of_outcomes: [pairs, features], how many draws of the posterior predictive are below new
        data of these parameters.
      parameters: [pairs, dim], that made the data, unconstrained.
      means: [pairs, dim], of the draws.
      sds: [pairs, dim], of the draws.
    """

    coordinates: list[str]
    draws: int
    ranks: np.ndarray
    ranks_of_density: np.ndarray
    ranks_of_distance: np.ndarray
    features: list[str]
    ranks_of_outcomes: np.ndarray
    parameters: np.ndarray
    means: np.ndarray
    sds: np.ndarray

    def coverage(self, level: float) -> np.ndarray:
        """Share of parameters within their central interval of q, by coordinate, [dim]."""
        low, high = (0.5 * (1.0 + sign * level) * (self.draws + 1) for sign in (-1.0, 1.0))
        return ((self.ranks + 0.5 > low) & (self.ranks + 0.5 < high)).mean(0)

    @property
    def p_values(self) -> dict[str, float]:
        """That all ranks of a kind are uniform, by name; each is uniform if q is exact."""
        null = _null(len(self.ranks), self.draws)
        return {
            name: float((1 + (null >= deviation(ranks, self.draws)).sum()) / (1 + len(null)))
            for name, ranks in self.named_ranks().items()
        }

    def named_ranks(self) -> dict[str, np.ndarray]:
        """All ranks [pairs] by name."""
        ranks = dict(zip(self.coordinates, self.ranks.T, strict=True))
        return ranks | {"log density": self.ranks_of_density, "distance": self.ranks_of_distance}

    def plot(self):
        """Ranks, coverage, posterior predictive and recovery: a matplotlib figure.

        Ranks are drawn as their distribution function less the uniform one, in a band: an arch
        says that the parameters lie lower than the draws, an S that the draws are too narrow or
        too wide. Ranks of new data among predicted ones are drawn likewise.
        """
        null = _null(len(self.ranks), self.draws)
        outcomes = dict(zip(self.features, self.ranks_of_outcomes.T, strict=True))
        levels = np.arange(1, 20) / 20.0
        return calibration.check(
            {name: _shares(ranks, self.draws) for name, ranks in self.named_ranks().items()},
            {name: _shares(ranks, self.draws) for name, ranks in outcomes.items()},
            float(np.quantile(null, 1.0 - FALSE_ALARMS)),
            levels,
            np.stack([self.coverage(level) for level in levels]),
            self.coordinates,
            calibration.Recovery(self.parameters, self.means, self.sds),
        )

    @property
    def calibrated(self) -> bool:
        """Whether no rank deviates, at a false alarm rate of 5% for all together (Bonferroni)."""
        p_values = self.p_values
        return min(p_values.values()) >= FALSE_ALARMS / len(p_values)

    def __str__(self):
        p_values = self.p_values
        columns = [["ranks of", *p_values], ["p", *(f"{p:.3f}" for p in p_values.values())]]
        for level in LEVELS:
            covered = [f"{c:.3f}" for c in self.coverage(level)]
            columns.append([f"in {level:.0%}", *covered, "", ""])
        verdict = "calibrated" if self.calibrated else "not calibrated"
        count = len(self.ranks)
        return f"{tables.aligned(columns)}\n\n{verdict}, over {count} simulated data sets"


class Surprise(NamedTuple):
    """Whether a data set looks like those that the model simulates.

    Attributes:
      p_value: share of simulated data sets at least as unusual, with this one among them. It is
        uniform for data of the model, so that `flagged` is a false alarm in one of 20.
      statistics: name -> p of each statistic by itself.
    """

    p_value: float
    statistics: dict[str, float]

    @property
    def flagged(self) -> bool:
        """Whether the data are unlike the model's, at a false alarm rate of 5%."""
        return self.p_value <= FALSE_ALARMS

    def __str__(self):
        if not self.flagged:
            return f"like the model's own data (p {self.p_value:.3f})"
        name = min(self.statistics, key=lambda name: self.statistics[name])
        return f"unlike the model's own data (p {self.p_value:.3f}), by its {name}"


def check(compiled: Compiled, simulation: Simulation, pairs: int, draws: int, seed: int) -> Check:
    """Ranks of parameters that a `simulation` has drawn among draws of q given their data.

    Source: Talts, Betancourt, Simpson, Vehtari and Gelman (2018); for the reference points, Lemos,
    Coogan, Hezaveh and Perreault-Levasseur (2023).
    """
    u, y = simulated(simulation, pairs, seed)
    q = drawn(compiled, y, draws, seed)
    own = np.asarray(compiled.log_prob_given(tf.constant(u, tf.float32), compiled.given(y)))
    scale = u.std(0) + 1e-12
    rng = np.random.default_rng(seed)
    reference = u[rng.permutation(pairs)] + 0.1 * scale * rng.normal(size=u.shape)

    def distance(x):
        return np.linalg.norm((x - reference) / scale, axis=-1)

    return Check(
        compiled.simulation.coordinates(),
        draws,
        (q.u < u).sum(0),
        (q.log_q < own).sum(0),
        (distance(q.u) < distance(u)).sum(0),
        simulation.features_by_name(),
        _ranks_of_outcomes(compiled, u, q.u, seed),
        u,
        q.u.mean(0),
        q.u.std(0, ddof=1),
    )


def _ranks_of_outcomes(compiled: Compiled, u, drawn, seed) -> np.ndarray:
    """Ranks of new data of u [pairs, dim] among those of draws [draws, pairs, dim].

    New data, independent of those that q was given, have uniform ranks if q is exact. Equal ones,
    as of counts, are ranked at random.
    """

    def outcome(u, number):
        seeds = tf.constant([seed, number], tf.int32)
        return np.asarray(compiled.outcome(tf.constant(u, compiled.dtype), seeds))

    truth = outcome(u, 0)
    below, equal = np.zeros(truth.shape, int), np.zeros(truth.shape, int)
    for number, one in enumerate(drawn, 1):
        predicted = outcome(one, number)
        below += predicted < truth
        equal += predicted == truth
    return below + np.random.default_rng(seed).integers(0, equal + 1)


class Drawn(NamedTuple):
    """Draws of q for many data sets."""

    u: np.ndarray  # [draws, pairs, dim]
    log_q: np.ndarray  # [draws, pairs]


def drawn(compiled: Compiled, y: np.ndarray, draws: int, seed: int) -> Drawn:
    """Draws of q for each y [pairs, features]."""
    pairs, context = len(y), compiled.given(tf.constant(y))
    each = min(draws, max(1, _ROWS // pairs))
    u, log_q = [], []
    for first in range(0, draws, each):
        count = min(each, draws - first)
        repeated = context.repeated(count)
        seeds = tf.constant([seed, first])
        x = compiled.sample_given(repeated, tf.constant(count * pairs), seeds)
        log_q.append(np.reshape(compiled.log_prob_given(x, repeated), [pairs, count]).T)
        u.append(np.swapaxes(np.reshape(x, [pairs, count, -1]), 0, 1))
    return Drawn(np.concatenate(u), np.concatenate(log_q))


def simulated(simulation: Simulation, pairs: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """u [pairs, dim] in float64, and y [pairs, features]."""
    u, y, usable = simulation.simulate(pairs, tf.constant([seed, -2]))
    rows = np.resize(np.flatnonzero(usable), pairs)
    return np.asarray(u, np.float64)[rows], np.asarray(y)[rows]


def deviation(ranks: np.ndarray, draws: int) -> float:
    """Largest distance of the ranks' distribution function from that of uniform ones."""
    uniform = np.arange(1, draws + 2) / (draws + 1)
    return float(np.abs(_shares(ranks, draws) - uniform).max())


def _shares(ranks, draws) -> np.ndarray:
    """Share of the ranks up to each of 0 .. draws."""
    return np.cumsum(np.bincount(ranks, minlength=draws + 1)) / len(ranks)


def _null(pairs: int, draws: int) -> np.ndarray:
    """`deviation` of uniform ranks."""
    rng = np.random.default_rng(0)
    return np.array([
        deviation(rng.integers(0, draws + 1, pairs), draws) for _ in range(_NULL)
    ])  # fmt: skip


class Typical(NamedTuple):
    """Simulated data sets that an observed one is compared with."""

    y: np.ndarray  # [n, features]
    log_evidence: np.ndarray | None  # [n], where the density is known


def typical(compiled: Compiled, simulation: Simulation, seed: int) -> Typical:
    """Data sets of a `simulation`, with what `surprise` has to know of them."""
    _, y = simulated(simulation, _TYPICAL, seed)
    return Typical(y, _log_evidence(compiled, y, seed))


def surprise(compiled: Compiled, y: np.ndarray, others: Typical, seed: int) -> Surprise:
    """Ranks statistics of y [1, features] among those of simulated data sets.

    The statistics are the distance from the mean in the simulated data's covariance, the distance
    to the nearest, and, where the density is known, the log evidence. Unusual are long distances,
    and an evidence that is low or high, as that of data with less noise than the model's. The
    smallest of their p is ranked once more among those of the simulated data sets, so that the
    false alarm rate is exact.
    """
    together = np.concatenate([y, others.y])
    statistics = _distances(compiled.simulation.summary(together))
    if others.log_evidence is not None:
        own = _log_evidence(compiled, y, seed)
        assert own is not None
        statistics[_TWO_SIDED] = np.concatenate([own, others.log_evidence])
    count = len(together)
    p_values = {}
    for name, value in statistics.items():
        order = np.argsort(np.argsort(value, kind="stable"), kind="stable")
        p_values[name] = (count - order) / count
        if name == _TWO_SIDED:
            p_values[name] = np.minimum(1.0, 2.0 * np.minimum(order + 1, count - order) / count)
    smallest = np.min(list(p_values.values()), axis=0)
    return Surprise(
        float((smallest <= smallest[0]).mean()), {k: float(p[0]) for k, p in p_values.items()}
    )


def _distances(y) -> dict[str, np.ndarray]:
    """From the mean and from the nearest other, of each row of y [n, statistics], by name."""
    z = standardised(y)
    covariance = np.atleast_2d(np.cov(z.T)) + 1e-9 * np.eye(z.shape[1])
    white = np.linalg.solve(np.linalg.cholesky(covariance), (z - z.mean(0)).T).T
    squares = (white**2).sum(1)
    between = squares[:, np.newaxis] + squares - 2.0 * white @ white.T
    np.fill_diagonal(between, np.inf)
    return {"distance from the mean": squares, "distance from the nearest": between.min(1)}


def standardised(y) -> np.ndarray:
    """y [n, statistics] by its median and quantiles, tails drawn in."""
    low, middle, high = np.quantile(y, [0.16, 0.5, 0.84], axis=0)
    scale = np.where(high > low, 0.5 * (high - low), y.std(0) + 1e-12)
    return np.arcsinh((y - middle) / scale)


def _log_evidence(compiled, y, seed) -> np.ndarray | None:
    """log p(y) in nats by a few draws of q, of each row of y [n, features]."""
    if not compiled.simulation.has_density:
        return None
    q = drawn(compiled, y, _EVIDENCE_DRAWS, seed)
    densities = compiled.densities(tf.constant(np.swapaxes(q.u, 0, 1)), tf.constant(y))
    log_weights = np.asarray(densities, np.float64).T - q.log_q
    log_weights = np.where(np.isnan(log_weights), -np.inf, log_weights)
    return np.logaddexp.reduce(log_weights) - np.log(len(log_weights))
