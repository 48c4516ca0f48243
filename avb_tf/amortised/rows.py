"""Data sets of any number of rows, which are independent draws of a model of one row.

A data set y [rows * features] has its rows side by side. In a batch of different sizes, absent rows
are NaN.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from avb_tf.amortised.simulation import DataSet, Simulation, check_usable, named, usable_pairs
from avb_tf.errors import UserError

_TRIAL = 64  # pairs in the check of a model
_SETS = 64  # data sets of the largest size, some of which have to be finite
_DENSITIES = 3  # pairs whose log density is compared with that of a batch
_QUANTILES = np.linspace(0.0, 1.0, 5)  # quantiles of each feature in a data set's summary


class Rows(Simulation):
    """Pairs of parameters and data sets of several rows, independent given the parameters.

        sets = Rows(of_joint(joint, ("y",)), smallest=1, largest=50)
        u, y, usable = sets.simulate(512, tf.constant([0, 1]))  # y [512, 50 * features]

    Args:
      one: simulation of a single row.
      smallest: smallest number of rows.
      largest: largest number of rows. Sizes are log-uniform between the two.
    """

    def __init__(self, one: Simulation, smallest: int, largest: int):
        self.one, self.smallest, self.largest = one, smallest, largest
        self.dim, self.dtype, self.names = one.dim, one.dtype, one.names
        self.observed, self.sizes, self.features = one.observed, one.sizes, one.features
        self.row = one.features
        self.has_density, self.portable = one.has_density, one.portable
        self.constrain, self.unconstrain = one.constrain, one.unconstrain
        self.log_volume, self.coordinates = one.log_volume, one.coordinates
        self._graphs = {}

    def _simulate(self, n, seed):
        seeds = tf.random.split(seed, 3)
        u, finite = self.one.sample_prior(n, seeds[0])
        y = self.data(u, seeds[1])
        # 1 + largest, so that the largest size is as likely as its neighbours.
        low, high = np.log([self.smallest, self.largest + 1.0])
        share = tf.random.stateless_uniform([n, 1], seeds[2], dtype=tf.float64)
        sizes = tf.floor(tf.exp(low + (high - low) * share))
        row = tf.cast(tf.range(self.largest), tf.float64)
        absent = row >= tf.maximum(sizes, float(self.smallest))
        absent = tf.repeat(absent, self.features, 1)
        # Absent rows do not count: parameters whose rows often fail would be too rare otherwise.
        u, y, usable = usable_pairs(u, tf.where(absent, tf.zeros([], tf.float64), y))
        return u, tf.where(absent, tf.constant(np.nan, tf.float64), y), usable & finite

    def data(self, u: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """Simulates new data sets of the largest size, u [n, dim] -> y [n, largest * features]."""
        y = self.one.data(tf.repeat(u, self.largest, 0), seed)
        return tf.reshape(y, [-1, self.largest * self.features])

    def log_density(self, u: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        """See `Simulation.log_density`; y is one data set, [rows * features]."""
        y = tf.reshape(y, [-1, self.features])
        count, rows = tf.shape(u)[0], tf.shape(y)[0]
        prior, likelihood = self.one.terms(tf.repeat(u, rows, 0), tf.tile(y, [count, 1]))
        likelihood = tf.reduce_sum(tf.reshape(likelihood, [count, rows]), 1)
        density = tf.reshape(prior, [count, rows])[:, 0] + likelihood
        return tf.where(tf.math.is_nan(density), tf.constant(-np.inf, density.dtype), density)

    def outcome(self, u: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """See `Simulation.outcome`: a row."""
        return self.one.data(u, seed)

    def side_by_side(self, data: Sequence[tf.Tensor]) -> tf.Tensor:
        """Concatenates the observed parts [n, rows, ...] to y [n, rows * features]."""
        n = tf.shape(data[0])[0]
        return tf.reshape(self.one.side_by_side(data), [n, -1])

    @property
    def shapes(self) -> dict[str, list[int | None]]:
        """See `Simulation.shapes`: [largest, ...]."""
        return {name: [self.largest, *shape] for name, shape in self.one.shapes.items()}

    def check_in_graph(self, y: tf.Tensor) -> None:
        """See `Simulation.check_in_graph`; absent rows of y [n, largest * features] are NaN."""
        y = tf.reshape(y, [-1, self.largest, self.features])
        present = tf.reduce_all(tf.math.is_finite(y), -1)
        clean = present | tf.reduce_all(tf.math.is_nan(y), -1)
        tf.debugging.Assert(tf.reduce_all(clean), ["rows that are neither finite nor all NaN"])
        rows = tf.reduce_sum(tf.cast(present, tf.int32), 1)
        enough = tf.reduce_all(rows >= self.smallest)
        tf.debugging.Assert(enough, [f"fewer rows than {self.smallest} in a data set:", rows])

    def parts(self, y: np.ndarray | tf.Tensor) -> dict[str, tf.Tensor]:
        """Splits y [rows * features] into the observed parts by name, [rows, ...] each."""
        return self.one.parts(tf.reshape(y, [-1, self.features]))

    def like(self, y: np.ndarray) -> "Rows":
        """Returns the simulation of data sets of the size of y [n, rows * features]."""
        return self.of(y.shape[1] // self.features)

    def of(self, rows: int) -> "Rows":
        """Returns the simulation of data sets of `rows` rows.

        Raises:
          UserError: `rows` is outside the range of sizes.
        """
        self._check_size(rows)
        return Rows(self.one, rows, rows)

    def _check_size(self, rows):
        if not self.smallest <= rows <= self.largest:
            raise UserError(
                f"the data set has {rows} rows; expected {self.smallest} to {self.largest}, as "
                "the fit was trained for: train another one with other `rows`"
            )

    def summary(self, y: np.ndarray) -> np.ndarray:
        """Returns quantiles, means and covariances over each data set's rows, [n, statistics]."""
        y = np.reshape(y, [len(y), -1, self.features])
        quantiles = np.moveaxis(np.quantile(y, _QUANTILES, axis=1), 0, 1)
        mean = y.mean(1, keepdims=True)
        covariance = np.einsum("nri,nrj->nij", y - mean, y - mean) / y.shape[1]
        upper = np.triu_indices(self.features)
        return np.concatenate(
            [quantiles.reshape(len(y), -1), mean[:, 0], covariance[:, *upper]], axis=1
        )

    def flat(self, y: DataSet) -> np.ndarray:
        """Returns a user's observed data with the rows side by side, [1, rows * features].

        Args:
          y: a dict of arrays [rows, ...] by name, or an array if a single part is observed.
        Raises:
          UserError: names, shapes or the number of rows differ from the model's, or values are not
            finite numbers.
        """
        values = named(y, self.observed)
        for name, (shape, _) in self.observed.items():
            if values[name].ndim != 1 + len(shape) or values[name].shape[1:] != tuple(shape):
                expected = ", ".join(map(str, ["rows", *shape]))
                raise UserError(
                    f"observed '{name}' has shape {values[name].shape}; expected [{expected}], a "
                    "single data set: call once for each"
                )
        rows = {name: len(value) for name, value in values.items()}
        if len(set(rows.values())) > 1:
            raise UserError(f"observed parts have rows {rows}; expected as many of each")
        count = next(iter(rows.values()))
        self._check_size(count)
        return np.concatenate([v.reshape(count, -1) for v in values.values()], 1).reshape(1, -1)


def check_sizes(rows: Any) -> None:
    """Checks the smallest and largest number of rows.

    Raises:
      UserError: they are not a pair of integers, 1 or more, in this order.
    """
    pair = isinstance(rows, tuple | list) and len(rows) == 2
    if not pair or not all(isinstance(n, int) for n in rows) or not 1 <= rows[0] <= rows[1]:
        raise UserError(
            f"rows is {rows!r}; expected the smallest and largest number of rows, such as (1, 50)"
        )


def of(one: Simulation, smallest: int, largest: int) -> Rows:
    """Checks a user's model of one row and returns its `Rows`.

    Args:
      one: simulation of a single row.
      smallest: smallest number of rows.
      largest: largest number of rows.
    Raises:
      UserError: rows are not independent draws given the parameters, or hardly any data set of the
        largest size is finite.
    """
    u, y, usable = (np.asarray(part) for part in one.simulate(_TRIAL, tf.constant([0, 2])))
    check_usable(usable)
    u, y = u[usable], y[usable]
    twins = np.asarray(one.data(tf.constant(np.repeat(u, 2, 0)), tf.constant([0, 3])))
    twins = twins.reshape(len(u), 2, -1)
    twins = twins[np.isfinite(twins).all((1, 2))]
    if len(twins) and ((twins[:, 0] == twins[:, 1]).all() or (twins == twins[0, 0]).all()):
        raise UserError(
            "rows of the same parameters are all equal; expected an independent draw for each: "
            "write the model for batches, or as an AutoBatched joint"
        )
    if one.has_density:
        prior, likelihood = (np.asarray(part) for part in one.terms(u, y))
        elsewhere, _ = one.terms(u, np.roll(y, 1, 0))
        few = range(min(_DENSITIES, len(u)))
        whole = np.concatenate([one.log_density(u[[i]], y[i]) for i in few])
        if not np.allclose(prior, elsewhere, rtol=1e-3, atol=1e-3):
            raise UserError(
                "a parameter's distribution depends on observed parts; expected rows that depend "
                "on the parameters alone: turn the model around"
            )
        if not np.allclose((prior + likelihood)[:_DENSITIES], whole, rtol=1e-3, atol=1e-2):
            raise UserError(
                "log densities of a batch of pairs differ from those of each; expected a model "
                "written for batches, or an AutoBatched joint"
            )
    if not usable.all():
        sets = Rows(one, largest, largest).simulate(_SETS, tf.constant([0, 4]))
        check_usable(np.asarray(sets[2]), f"data sets of {largest} rows")
    return Rows(one, smallest, largest)
