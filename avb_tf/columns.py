"""The likelihood of a table's rows, group by group of columns, and the layer that reads the rows.

Rows x [batch, columns] are in the user's units, with NaN for a missing value (`data.table`). The
log density refers to the same units: for a real column with standard deviation s it is the log
density of the standardised value minus log s. Missing values do not contribute to the log density.
The encoder reads each missing value as 0 together with a flag.
"""

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from tensorflow_probability import distributions as tfd

from avb_tf.data.table import COUNTS, REAL, Table
from avb_tf.likelihoods import LIKELIHOODS, Likelihood
from avb_tf.networks import DenseStack, Restorable

# Keeps the density finite. Only requests to a server can have smaller exposures.
_LEAST_EXPOSURE = 1e-6


class Group(NamedTuple):
    """Columns of one kind, or a single categorical column.

    Attributes:
      kind: one of `data.table.KINDS`.
      indices: positions of the n columns in x.
      shift: [n], as in `data.table.Column`.
      scale: [n], as in `data.table.Column`.
      parameters: numbers in the decoder's output for each column.
    """

    kind: str
    indices: list[int]
    shift: np.ndarray
    scale: np.ndarray
    parameters: int

    @property
    def size(self) -> int:
        """Numbers in the decoder's output for the whole group."""
        return len(self.indices) * self.parameters

    def of(self, x: tf.Tensor) -> tf.Tensor:
        """Returns the group's columns of x, [..., n]."""
        return tf.gather(x, self.indices, axis=-1)


def _groups(table: Table) -> list[Group]:
    kinds = {}
    for i, column in enumerate(table.columns):
        key = (column.kind, i if column.kind == "category" else 0)
        kinds.setdefault(key, []).append((i, column))
    groups = []
    for (kind, _), members in kinds.items():
        indices, columns = zip(*members, strict=True)
        own = {"category": len(columns[0].categories), "exposure": 0}
        parameters = own[kind] if kind in own else LIKELIHOODS[kind].parameters
        shift, scale = (
            np.array([getattr(c, name) for c in columns], np.float32) for name in ("shift", "scale")
        )
        groups.append(Group(kind, list(indices), shift, scale, parameters))
    return groups


@dataclass(frozen=True)
class TableLikelihood:
    """Likelihood p(x|z) of a table's rows, given the decoder's output [..., outputs].

    It has the interface of a `likelihoods.Likelihood`. x and the means are in the user's units.

    Args:
      table: the columns.
    """

    table: Table
    binary = bits_per_dim = False
    support = "table"

    @functools.cached_property
    def groups(self) -> list[Group]:
        """The table's columns by kind."""
        return _groups(self.table)

    @property
    def parameters(self) -> int:
        """0, because the decoder's output does not have x's shape."""
        return 0

    @property
    def outputs(self) -> int:
        """Length of the decoder's output."""
        return sum(group.size for group in self.groups)

    def distribution(self, outputs: tf.Tensor) -> "_Rows":
        """Returns the distribution of rows, with `log_prob` and `sample`."""
        return _Rows(self, outputs)

    def mean(self, outputs: tf.Tensor) -> tf.Tensor:
        """Returns E[x|z], [..., columns]: for a category its likeliest code, for an exposure 1."""
        return self.joined(self._means(outputs))

    def predictive_mean(
        self, outputs: tf.Tensor, x: tf.Tensor, weights: tf.Tensor | None = None
    ) -> tf.Tensor:
        """Returns E[x'|x], [batch, columns], the mean over draws of z.

        The exposures are those of x. For a category it is the code of the largest mean probability.

        Args:
          outputs: [samples, batch, outputs], the decoder's output for the draws.
          x: [batch, columns].
          weights: [samples, batch], weights of the draws with sum 1; equal ones by default.
        """
        if weights is None:
            weights = tf.ones(tf.shape(outputs)[:2]) / tf.cast(tf.shape(outputs)[0], tf.float32)
        return self.joined(self._means(outputs, x, weights))

    def split(
        self, outputs: tf.Tensor, x: tf.Tensor | None = None
    ) -> Iterator[tuple[Group, tf.Tensor]]:
        """Yields pairs (group, its part of the decoder's output [..., n, parameters]).

        The first parameter of a count is the log of its mean. The logs of the table's mean and of
        x's exposure are added to it, so that the decoder learns rates relative to these.
        """
        parts = tf.split(outputs, [group.size for group in self.groups], axis=-1)
        for group, part in zip(self.groups, parts, strict=True):
            shape = [len(group.indices), group.parameters]
            part = tf.reshape(part, tf.concat([tf.shape(part)[:-1], shape], 0))
            if group.kind in COUNTS:
                log_rate = tf.math.log(group.shift) + (0.0 if x is None else self._log_exposure(x))
                part = tf.concat([part[..., :1] + log_rate[..., tf.newaxis], part[..., 1:]], -1)
            yield group, part

    def _log_exposure(self, x):
        """Returns the log of x's exposure, [..., 1], or 0 if the table has no exposure."""
        for group in self.groups:
            if group.kind == "exposure":
                return tf.math.log(tf.maximum(group.of(x), _LEAST_EXPOSURE))
        return tf.zeros([1])

    def _means(self, outputs, x=None, weights=None):
        """Yields the mean of each group, [..., n]; `weights` also averages over the first axis."""
        over = tf.identity
        if weights is not None:
            over = functools.partial(tf.einsum, "sb,sb...->b...", weights)
        for group, part in self.split(outputs, x):
            if group.kind == "exposure":
                ones = tf.ones_like(over(outputs)[..., :1])
                yield ones if x is None else group.of(x)
            elif group.kind == "category":
                probabilities = over(tf.nn.softmax(part))
                yield tf.cast(tf.argmax(probabilities, -1), tf.float32)
            else:
                mean = over(LIKELIHOODS[group.kind].mean(part))
                yield group.shift + group.scale * mean if group.kind in REAL else mean

    def joined(self, parts: Iterable[tf.Tensor]) -> tf.Tensor:
        """Joins the groups' columns in the order of the table."""
        order = np.argsort(np.concatenate([group.indices for group in self.groups]))
        return tf.gather(tf.concat(list(parts), -1), order, axis=-1)

    def hidden(self, x: tf.Tensor, chosen: tf.Tensor) -> tf.Tensor:
        """Returns x [batch, columns] with NaN where `chosen`, except for exposures."""
        modelled = [column.kind != "exposure" for column in self.table.columns]
        return tf.where(chosen & modelled, np.nan, x)

    def valid(self, x: tf.Tensor) -> tf.Tensor:
        """Returns whether x [batch, columns] holds only values that the columns can have."""
        valid = []
        for group in self.groups:
            part = group.of(x)
            fits = tf.math.is_finite(part)
            if group.kind in (*COUNTS, "bernoulli", "category"):
                fits &= (part >= 0.0) & (part == tf.round(part))
            if group.kind in ("bernoulli", "category"):
                fits &= part < (2.0 if group.kind == "bernoulli" else group.parameters)
            if group.kind == "exposure":
                fits &= part > 0.0
            elif self.table.missing:
                fits |= tf.math.is_nan(part)
            valid.append(tf.reduce_all(fits))
        return tf.reduce_all(valid)


class _Rows:
    """Distribution of a table's rows given the decoder's output."""

    def __init__(self, likelihood: TableLikelihood, outputs: tf.Tensor):
        self.likelihood, self.outputs = likelihood, outputs

    def log_prob(self, x):
        """Returns log p(x|z) in nats, [..., modelled columns], 0 where a value is missing."""
        parts = []
        for group, outputs in self.likelihood.split(self.outputs, x):
            if group.kind == "exposure":
                continue
            column = group.of(x)
            known = tf.math.logical_not(tf.math.is_nan(column))
            # `where` passes a NaN on to the gradient even from the branch that it does not select.
            column = tf.where(known, column, group.shift if group.kind in REAL else 0.0)
            volume = 0.0
            if group.kind in REAL:
                column, volume = (column - group.shift) / group.scale, np.log(group.scale)
            log_prob = _distribution(group, outputs).log_prob(column) - volume
            parts.append(tf.where(known, log_prob, 0.0))
        return tf.concat(parts, -1)

    def sample(self, seed):
        """Draws rows [..., columns] without missing values, for exposures of 1."""
        parts = []
        for i, (group, outputs) in enumerate(self.likelihood.split(self.outputs)):
            if group.kind == "exposure":
                parts.append(tf.ones_like(self.outputs[..., :1]))
                continue
            key = tf.random.fold_in(tf.constant(seed, tf.int32), i)
            draws = tf.cast(_distribution(group, outputs).sample(seed=key), tf.float32)
            parts.append(group.shift + group.scale * draws if group.kind in REAL else draws)
        return self.likelihood.joined(parts)


def _distribution(group: Group, outputs) -> Any:
    """Returns the distribution of the group's columns; real columns are standardised."""
    if group.kind == "category":
        return tfd.Categorical(outputs)
    return LIKELIHOODS[group.kind].distribution(outputs)


@keras.saving.register_keras_serializable("avb_tf")
class TableTrunk(Restorable, keras.layers.Layer):
    """Features of a table's rows by dense layers: [batch, columns] -> [batch, width].

        trunk = TableTrunk(table, width=256, depth=2)

    The layers read real columns standardised, student_t columns as arsinh of the standardised value
    (because of their outliers), counts as log(1 + count), exposures as logs and categories one-hot.
    Counts and exposures are standardised too. A missing value is read as 0. If the table may have
    missing values, the layers also read a flag for each column, 1 where its value is missing.

    Args:
      table: the columns.
      width: units of each layer.
      depth: number of layers; 0 returns the layers' inputs.
      activation: of every layer, a Keras name.
      linear: whether the features end with the layers' inputs, so that a linear function of the
        features can be one of the inputs.
    """

    def __init__(
        self,
        table: Table,
        width: int,
        depth: int,
        activation: str = "relu",
        linear: bool = False,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.missing, self.groups = table.missing, _groups(table)
        self.linear = linear and depth > 0
        self.stack = DenseStack(width, depth, activation)

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """Maps x [batch, columns] to features [batch, width], or more if `linear`."""
        parts = []
        for group in self.groups:
            column = group.of(x)
            absent = tf.math.is_nan(column)
            read = _read(group, tf.where(absent, 1.0, column))
            parts.append(tf.where(absent, 0.0, read))
            if self.missing and group.kind != "exposure":
                parts.append(tf.cast(absent, tf.float32))
        inputs = tf.concat(parts, -1)
        features = self.stack(inputs)
        if not self.linear:
            return features
        return tf.concat([features, tf.cast(inputs, features.dtype)], -1)


def _read(group: Group, column):
    """Transforms a group's columns into the values that the encoder reads."""
    if group.kind == "category":
        return tf.one_hot(tf.cast(column[..., 0], tf.int32), group.parameters)
    if group.kind == "bernoulli":
        return 2.0 * column - 1.0
    if group.kind in REAL:
        standard = (column - group.shift) / group.scale
        return tf.asinh(standard) if group.kind == "student_t" else standard
    if group.kind == "exposure":
        logs = tf.math.log(tf.maximum(column, _LEAST_EXPOSURE))
        return (logs - group.shift) / group.scale
    return (tf.math.log1p(column) - np.log1p(group.shift)) / group.scale


def likelihood_of(likelihood: str | Likelihood | Table) -> Likelihood | TableLikelihood:
    """Returns the likelihood of a name or of a table; returns a `Likelihood` unchanged."""
    if isinstance(likelihood, Table):
        return TableLikelihood(likelihood)
    return LIKELIHOODS[likelihood] if isinstance(likelihood, str) else likelihood
