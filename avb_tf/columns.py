"""A table's likelihood, one of groups of its columns, and the layer that reads its rows.

Rows x [batch, columns] are in the user's units, with NaN for a missing value (`data.table`). The
log density is that of these numbers: for a real column with standard deviation s it is the density
of the standardised value less log s. Missing values have no part in it, and the encoder reads 0 in
their place, with a flag.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from tensorflow_probability import distributions as tfd

from avb_tf.data.table import COUNTS, REAL, Table
from avb_tf.likelihoods import LIKELIHOODS, Likelihood
from avb_tf.networks import DenseStack, Restorable

_LEAST_EXPOSURE = 1e-6  # only requests to a server have smaller ones; their density stays finite


class Group(NamedTuple):
    """Columns of one kind, or a single category.

    Attributes:
      kind: one of `data.table.KINDS`.
      indices: of the columns in x.
      shift: [n], as in `data.table.Column`.
      scale: [n].
      parameters: the decoder's numbers for each column.
    """

    kind: str
    indices: list[int]
    shift: np.ndarray
    scale: np.ndarray
    parameters: int

    @property
    def size(self) -> int:
        """The decoder's numbers for the group."""
        return len(self.indices) * self.parameters

    def of(self, x: tf.Tensor):
        """The group's columns of x, [..., n]."""
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
    """p(x|z) of a table's rows, given the decoder's output [..., outputs].

    Has what a `likelihoods.Likelihood` has; x and means are in the user's units.
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
        """0: the decoder's output is not of x's shape."""
        return 0

    @property
    def outputs(self) -> int:
        """Length of the decoder's output."""
        return sum(group.size for group in self.groups)

    def distribution(self, outputs: tf.Tensor):
        """The distribution of rows, with `log_prob` [..., modelled columns] and `sample`."""
        return _Rows(self, outputs)

    def mean(self, outputs: tf.Tensor):
        """E[x|z], [..., columns]; the likeliest code of a category, and exposures of 1."""
        return self._joined(self._means(outputs))

    def predictive_mean(self, outputs: tf.Tensor, x: tf.Tensor):
        """E[x'|x], [batch, columns], from the decoder's output [samples, batch, outputs].

        The exposures are those of x. A category is the likeliest by its mean probability.
        """
        return self._joined(self._means(outputs, x, draws=True), x)

    def split(self, outputs: tf.Tensor, x: tf.Tensor | None = None):
        """Pairs (group, its part of the decoder's output [..., n, parameters]).

        The first parameter of a count is the log of its mean: there the mean of the table and
        the exposure of x are added.
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
        """[..., 1], 0 without exposures."""
        for group in self.groups:
            if group.kind == "exposure":
                return tf.math.log(tf.maximum(group.of(x), _LEAST_EXPOSURE))
        return tf.zeros([1])

    def _means(self, outputs, x=None, draws=False):
        """The mean of each group, [..., n], over the draws, too, if they are the first axis."""
        over = functools.partial(tf.reduce_mean, axis=0) if draws else tf.identity
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

    def _joined(self, parts, x=None):
        """The groups' columns in the order of the table."""
        order = np.argsort(np.concatenate([group.indices for group in self.groups]))
        return tf.gather(tf.concat(list(parts), -1), order, axis=-1)

    def valid(self, x: tf.Tensor):
        """Whether x [batch, columns] holds only values that the columns can have."""
        valid = []
        for group in self.groups:
            part = group.of(x)
            fits = tf.math.is_finite(part)
            if group.kind in (*COUNTS, "bernoulli", "category"):
                fits &= (part >= 0.0) & (part == tf.round(part))
            if group.kind in ("bernoulli", "category"):
                fits &= part < (2.0 if group.kind == "bernoulli" else group.parameters)
            if group.kind == "exposure":
                fits &= part >= 0.0
            elif self.table.missing:
                fits |= tf.math.is_nan(part)
            valid.append(tf.reduce_all(fits))
        return tf.reduce_all(valid)


class _Rows:
    """The distribution of a table's rows given the decoder's output."""

    def __init__(self, likelihood: TableLikelihood, outputs: tf.Tensor):
        self.likelihood, self.outputs = likelihood, outputs

    def log_prob(self, x):
        """[..., modelled columns] in nats, 0 where a value is missing."""
        parts = []
        for group, outputs in self.likelihood.split(self.outputs, x):
            if group.kind == "exposure":
                continue
            column = group.of(x)
            known = ~tf.math.is_nan(column)
            # A NaN would reach the gradient even through a branch that is not taken.
            column = tf.where(known, column, group.shift if group.kind in REAL else 0.0)
            volume = 0.0
            if group.kind in REAL:
                column, volume = (column - group.shift) / group.scale, np.log(group.scale)
            log_prob = _distribution(group, outputs).log_prob(column) - volume
            parts.append(tf.where(known, log_prob, 0.0))
        return tf.concat(parts, -1)

    def sample(self, seed):
        """Rows [..., columns] without missing values, for exposures of 1."""
        parts = []
        for i, (group, outputs) in enumerate(self.likelihood.split(self.outputs)):
            if group.kind == "exposure":
                parts.append(tf.ones_like(self.outputs[..., :1]))
                continue
            key = tf.random.fold_in(tf.constant(seed, tf.int32), i)
            draws = tf.cast(_distribution(group, outputs).sample(seed=key), tf.float32)
            parts.append(group.shift + group.scale * draws if group.kind in REAL else draws)
        return self.likelihood._joined(parts)


def _distribution(group: Group, outputs) -> Any:
    """Of the group's columns; real ones standardised."""
    if group.kind == "category":
        return tfd.Categorical(outputs)
    return LIKELIHOODS[group.kind].distribution(outputs)


@keras.saving.register_keras_serializable("avb_tf")
class TableTrunk(Restorable, keras.layers.Layer):
    """Features of a table's rows by dense layers: [batch, columns] -> [batch, width].

        trunk = TableTrunk(table, width=256, depth=2)

    It reads real columns standardised (of student_t arsinh of them, for their outliers), the log of
    1 + a count and of an exposure, categories one-hot, and 0 for a missing value. Where the table
    may have missing values, a column of flags for each column says which they are.

    Args:
      table: the columns.
      width: units of each layer.
      depth: number of layers; 0 returns what is read.
      activation: of every layer, a Keras name.
    """

    def __init__(self, table: Table, width: int, depth: int, activation: str = "relu", **kwargs):
        super().__init__(**kwargs)
        self.missing, self.groups = table.missing, _groups(table)
        self.stack = DenseStack(width, depth, activation)

    def call(self, x: tf.Tensor):
        """[batch, columns] -> [batch, width]."""
        parts = []
        for group in self.groups:
            column = group.of(x)
            absent = tf.math.is_nan(column)
            read = _read(group, tf.where(absent, 1.0, column))
            parts.append(tf.where(absent, 0.0, read))
            if self.missing and group.kind != "exposure":
                parts.append(tf.cast(absent, tf.float32))
        return self.stack(tf.concat(parts, -1))


def _read(group: Group, column):
    """What the encoder reads of known values."""
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
    """The likelihood that is named, or made of a table's columns."""
    if isinstance(likelihood, Table):
        return TableLikelihood(likelihood)
    return LIKELIHOODS[likelihood] if isinstance(likelihood, str) else likelihood
