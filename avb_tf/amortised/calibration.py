"""Calibration of a fit over simulated data sets, and a test whether data fit the model."""

from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from avb_tf import tables
from avb_tf.amortised.judging import Compiled
from avb_tf.amortised.network import floors, logged, robust
from avb_tf.amortised.simulation import Simulation
from avb_tf.errors import UserError
from avb_tf.figures import calibration

LEVELS = (0.5, 0.8, 0.9)
_NULL = 4000  # simulated sets of uniform ranks, for the null distribution of `deviation`
_TRIES = 100  # calls of the simulator, each for as many pairs as are needed
_TYPICAL = 1000  # simulated data sets with which an observed one is compared
_EVIDENCE_DRAWS = 64  # draws of q for the log evidence of each data set
_ROWS = 2**14  # most draws in a batch
_TWO_SIDED = "log evidence"  # the statistic that is unusual at both ends
FALSE_ALARMS = 0.05  # false alarm rate of each test


class Check(NamedTuple):
    """Calibration of a fit over simulated data sets. `print` shows a table and a verdict.

    Attributes:
      coordinates: names of the unconstrained parameters.
      draws: number of draws of q for each data set.
      ranks: number of draws below the parameters that generated the data, [pairs, dim].
      ranks_of_density: number of draws with a lower log q than these parameters, [pairs].
      ranks_of_distance: number of draws closer than these parameters to a random reference point,
        [pairs]: TARP.
      features: names of the predicted numbers: those of a data set, or of one row.
      ranks_of_outcomes: number of draws of the posterior predictive below new data of these
        parameters, [pairs, features].
      parameters: unconstrained parameters that generated the data, [pairs, dim].
      means: means of the draws, [pairs, dim].
      sds: standard deviations of the draws, [pairs, dim].
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
        """Returns the share of parameters within q's central interval, by coordinate, [dim]."""
        low, high = (0.5 * (1.0 + sign * level) * (self.draws + 1) for sign in (-1.0, 1.0))
        return ((self.ranks + 0.5 > low) & (self.ranks + 0.5 < high)).mean(0)

    @property
    def p_values(self) -> dict[str, float]:
        """P-values of the hypothesis that ranks are uniform, by name; they are if q is exact."""
        null = _null(len(self.ranks), self.draws)
        return {
            name: float((1 + (null >= deviation(ranks, self.draws)).sum()) / (1 + len(null)))
            for name, ranks in self.named_ranks().items()
        }

    def named_ranks(self) -> dict[str, np.ndarray]:
        """Returns all ranks [pairs] by name."""
        ranks = dict(zip(self.coordinates, self.ranks.T, strict=True))
        return ranks | {"log density": self.ranks_of_density, "distance": self.ranks_of_distance}

    def plot(self) -> Any:
        """Plots ranks, posterior predictive, coverage and recovery, as a matplotlib figure.

        Ranks are shown as their distribution functions minus the uniform one. A band shows the
        deviations that are expected by chance. An arch means that the parameters lie lower than the
        draws, an S-shape that the draws are too narrow or too wide. Ranks of new data among
        predicted data are shown in the same way.
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
        """Whether all ranks look uniform, at a joint false alarm rate of 5% (Bonferroni)."""
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
    """A test whether a data set looks like those that the model simulates.

    Attributes:
      p_value: share of data sets that are at least as unusual, among the simulated ones and this
        one. It is uniform for data from the model, so `flagged` has a false alarm rate of 5%.
      statistics: p-value of each statistic alone, by name.
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
    """Ranks parameters of a `simulation` among draws of q given their data.

    Args:
      compiled: the fit's graphs.
      pairs: number of simulated data sets.
      draws: number of draws of q for each data set.
      seed: seed of the pairs, the draws and the reference points.
    Source: Talts, Betancourt, Simpson, Vehtari and Gelman (2018); for the reference points, Lemos,
    Coogan, Hezaveh and Perreault-Levasseur (2023).
    """
    u, y = simulated(simulation, pairs, seed)
    pairs, q = len(u), drawn(compiled, y, draws, seed)
    own = np.asarray(compiled.log_prob_given(tf.constant(u, tf.float32), compiled.given(y)))
    predicts = simulation.table is None  # a table has no simulator
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
        simulation.features_by_name() if predicts else [],
        _ranks_of_outcomes(compiled, u, q.u, seed) if predicts else np.zeros([pairs, 0], int),
        u,
        q.u.mean(0),
        q.u.std(0, ddof=1),
    )


def _ranks_of_outcomes(compiled: Compiled, u, drawn, seed) -> np.ndarray:
    """Ranks new data of u [pairs, dim] among data predicted from draws [draws, pairs, dim].

    If q is exact, new data that are independent of those given to q have uniform ranks. Ties, as
    between counts, are broken at random. NaN counts as infinity.
    """

    def outcome(u, number):
        seeds = tf.constant([seed, number], tf.int32)
        y = np.asarray(compiled.outcome(tf.constant(u, compiled.dtype), seeds))
        return np.where(np.isnan(y), np.inf, y)

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
    """Returns draws of q for each data set.

    Args:
      compiled: the fit's graphs.
      y: data sets, [pairs, features].
      draws: number of draws for each data set.
      seed: seed of the draws.
    """
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
    """Returns pairs that training has not used: u [pairs, dim], y [pairs, features], in float64.

    Args:
      simulation: source of the pairs. Of finished ones there may be fewer than asked.
      pairs: number of pairs.
      seed: seed of the pairs.
    Raises:
      UserError: hardly any pair is finite.
    """
    if (table := simulation.table) is not None:
        order = np.random.default_rng(seed).permutation(len(table.u))
        # Ranks of several data sets of the same parameters would depend on each other.
        _, first = np.unique(table.u[order], axis=0, return_index=True)
        order = order[np.sort(first)][:pairs]
        return table.u[order], table.y[order]
    parts, found, tries = [], 0, 0
    while found < pairs:
        if tries == _TRIES:
            raise UserError(
                f"{found} of {tries * pairs} simulated data sets are finite; expected {pairs}: "
                "check the model by `sample`, or train for smaller sets of rows"
            )
        u, y, usable = simulation.simulate(pairs, tf.constant([seed, -2 - tries]))
        parts.append((np.asarray(u, np.float64)[usable], np.asarray(y)[usable]))
        found, tries = found + len(parts[-1][0]), tries + 1
    u, y = (np.concatenate(part)[:pairs] for part in zip(*parts, strict=True))
    return u, y


def deviation(ranks: np.ndarray, draws: int) -> float:
    """Returns the largest difference of the ranks' distribution function from a uniform one."""
    uniform = np.arange(1, draws + 2) / (draws + 1)
    return float(np.abs(_shares(ranks, draws) - uniform).max())


def _shares(ranks, draws) -> np.ndarray:
    """Returns the share of ranks that are at most k, for each k in 0 .. draws."""
    return np.cumsum(np.bincount(ranks, minlength=draws + 1)) / len(ranks)


def _null(pairs: int, draws: int) -> np.ndarray:
    """Returns `deviation` of many sets of uniform ranks."""
    rng = np.random.default_rng(0)
    return np.array([
        deviation(rng.integers(0, draws + 1, pairs), draws) for _ in range(_NULL)
    ])  # fmt: skip


class Typical(NamedTuple):
    """Simulated data sets with which an observed one is compared."""

    y: np.ndarray  # [n, features]
    log_evidence: np.ndarray | None  # [n], in nats, or None if the model has no density


def typical(compiled: Compiled, simulation: Simulation, seed: int) -> Typical:
    """Simulates data sets, with their log evidence, for `surprise`."""
    _, y = simulated(simulation, _TYPICAL, seed)
    return Typical(y, _log_evidence(compiled, y, seed))


def surprise(compiled: Compiled, y: np.ndarray, others: Typical, seed: int) -> Surprise:
    """Ranks statistics of an observed data set among those of simulated data sets.

    The statistics are the Mahalanobis distance from the mean, the distance to the nearest data set,
    and, if the density is known, the log evidence. Large distances are unusual. A log evidence is
    unusual if it is low or high; data with less noise than the model's have a high one. The
    smallest p-value of a data set is ranked among those of all data sets, so that the false alarm
    rate is exact.

    Args:
      compiled: the fit's graphs.
      y: the observed data set, [1, features].
      others: simulated data sets, from `typical`.
      seed: seed of the draws for the log evidence.
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
    """Returns the distances of each row of y [n, statistics] from the mean and the nearest other.

    They are squared, in robustly scaled coordinates where the rows have roughly covariance I. The
    covariance is shrunk towards a multiple of I, because that of few rows is singular.
    """
    z = standardised(y)
    covariance = np.atleast_2d(np.cov(z.T))
    covariance += (np.trace(covariance) / len(z) + 1e-9) * np.eye(len(covariance))
    white = np.linalg.solve(np.linalg.cholesky(covariance), (z - z.mean(0)).T).T
    squares = (white**2).sum(1)
    between = squares[:, np.newaxis] + squares - 2.0 * white @ white.T
    np.fill_diagonal(between, np.inf)
    return {"distance from the mean": squares, "distance from the nearest": between.min(1)}


def standardised(y: np.ndarray) -> np.ndarray:
    """Standardises y [n, statistics] by the network's rules, with tails compressed more."""
    y = logged(y, floors(y)).numpy()
    middle, scale = robust(y)
    return np.arcsinh((y - middle) / scale)


def _log_evidence(compiled, y, seed) -> np.ndarray | None:
    """Returns log p(y) in nats for each row of y [n, features], from a few draws of q.

    The result is None if the model has no density.
    """
    if not compiled.simulation.has_density:
        return None
    q = drawn(compiled, y, _EVIDENCE_DRAWS, seed)
    densities = compiled.densities(tf.constant(np.swapaxes(q.u, 0, 1)), tf.constant(y))
    log_weights = np.asarray(densities, np.float64).T - q.log_q
    log_weights = np.where(np.isnan(log_weights), -np.inf, log_weights)
    return np.logaddexp.reduce(log_weights) - np.log(len(log_weights))
