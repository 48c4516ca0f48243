"""The simulation of a simulator that has already run: a table of the pairs that it left."""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging
from scipy import stats

from avb_tf.amortised import sources
from avb_tf.amortised.simulation import Simulation, Table, check_usable
from avb_tf.errors import UserError
from avb_tf.posteriors.target import Structure, first_line

_FEWEST = 500  # different parameters of finite pairs
_HELD_OUT, _MOST_HELD_OUT = 0.1, 5000  # share of them that training does not use, and its limit
_PRIOR_DRAWS = 10_000  # with which the parameters are compared
_UNLIKE = 1e-6  # p-value below which they are not taken for draws of the prior


def of_pairs(parameters: Structure, data: Any, prior: Any, observed: Sequence[str]) -> Simulation:
    """Returns the simulation that chooses from finished pairs.

    A tenth of the pairs is held out from training, those of equal parameters together.

    Args:
      parameters: draws of the prior in its structure, [n, ...].
      data: what the simulator returned for them, [n, ...]: an array, or a dict by name. Where it
        failed, they are not finite.
      prior: TFP distribution of the parameters.
      observed: names of the data.
    Raises:
      UserError: the arrays do not belong together, are no draws of the prior, or are too few.
    """
    observed = sources.names_of(observed)
    target = sources.target_of(prior)
    flat, parts = _parameters(parameters, prior), _data(data, observed)
    counts = [len(array) for array in (*flat, *parts)]
    if len(set(counts)) > 1:
        raise UserError(f"parameters and data have {counts} rows; expected as many of each")
    u, known = _unconstrained(flat, prior, target)
    _compare(u[known], prior, target)
    usable = known & _finite(parts)
    check_usable(usable)
    training, held_out = _split(u, np.flatnonzero(usable))
    if not usable.all():
        logging.warning("%.3g%% of the pairs fail and are left out", 100 * np.mean(~usable))
    own_u, own_y = ([tf.constant(a[training]) for a in arrays] for arrays in (flat, parts))

    def draw(n, seed):
        place = tf.random.stateless_uniform([n], seed, 0, len(training), tf.int32)
        chosen = [tf.gather(values, place) for values in own_u]
        return tf.nest.pack_sequence_as(prior.dtype, chosen), [tf.gather(y, place) for y in own_y]

    def redraw(parameters, seed):
        raise UserError("the model is a table of finished pairs; expected a simulator for new data")

    shapes = {name: (y.shape[1:], y.dtype) for name, y in zip(observed, own_y, strict=True)}
    simulation = Simulation(target, shapes, draw, redraw, None, portable=False)
    y = simulation.side_by_side([tf.constant(part[held_out]) for part in parts])
    digest = 0
    for array in (*flat, *parts):
        digest = zlib.crc32(np.ascontiguousarray(array).data, digest)
    simulation.table = Table(u[held_out], y.numpy(), len(training), f"{digest:08x}")
    return simulation


def _parameters(parameters, prior) -> list[np.ndarray]:
    """Returns the parameters as a flat list of arrays [n, ...], in the prior's dtypes."""
    expected = sources.draws_of(prior, 1, 0)
    try:
        tf.nest.assert_same_structure(parameters, expected)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"the parameters are of type {type(parameters).__name__}; expected the structure of "
            f"the prior's draws, a {type(expected).__name__}: {first_line(error)}"
        ) from error
    pairs = zip(tf.nest.flatten(parameters), tf.nest.flatten(expected), strict=True)
    return [_numbers("parameters", v, e.shape[1:], e.dtype.as_numpy_dtype) for v, e in pairs]


def _data(data, observed) -> list[np.ndarray]:
    """Returns the observed parts as arrays [n, ...], in the order of `observed`."""
    if not isinstance(data, Mapping) and len(observed) == 1:
        data = {observed[0]: data}
    if not isinstance(data, Mapping) or set(data) != set(observed):
        found = ", ".join(map(str, data)) if isinstance(data, Mapping) else type(data).__name__
        raise UserError(
            f"the data are {found}; expected a dict with {', '.join(observed)}, as `observed` says"
        )
    return [_numbers(f"'{name}'", data[name]) for name in observed]


def _numbers(name, values, shape=None, dtype=None) -> np.ndarray:
    """Returns numbers as an array [n, *shape]."""
    array = np.asarray(values)
    if array.dtype.kind not in "fiub" or not array.ndim:
        raise UserError(
            f"{name} is {array.dtype} of shape {array.shape}; expected numbers [n, ...]"
        )
    if shape is not None and array.shape[1:] != tuple(shape):
        raise UserError(
            f"{name} has shape {list(array.shape)}; expected {['n', *shape]}, a draw of the prior "
            "in each row"
        )
    return array if dtype is None else array.astype(dtype)


def _finite(arrays) -> np.ndarray:
    """Returns where the rows of all arrays are finite, [n]."""
    flat = [np.isfinite(array).reshape(len(array), -1).all(1) for array in arrays]
    return np.all(flat, 0)


def _unconstrained(flat, prior, target) -> tuple[np.ndarray, np.ndarray]:
    """Returns unconstrained parameters, [n, dim], and where they are finite, [n].

    Raises:
      UserError: parameters lie outside the prior's support.
    """
    parameters = tf.nest.pack_sequence_as(prior.dtype, [tf.constant(array) for array in flat])
    free: Any = tf.function(target.free, autograph=False)
    u = np.asarray(free(parameters), np.float64)
    finite: Any = np.isfinite(u).all(1)
    if not finite.all():  # the boundary of the support is possible, but has no finite u
        density = np.asarray(prior.log_prob(parameters))
        outside = _finite(flat) & ~finite & ~np.isfinite(density)
        if outside.any():
            raise UserError(
                f"{outside.sum()} of {len(u)} parameters lie outside the prior's support, the "
                f"first in row {np.argmax(outside)}; expected draws of the prior"
            )
    return u, finite


def _compare(u, prior, target):
    """Warns if parameters u [n, dim] are not distributed as the prior."""
    u = np.unique(u, axis=0)  # several data sets may have the same parameters
    draws: Any = tf.function(
        lambda: target.free(sources.draws_of(prior, _PRIOR_DRAWS, 1)), autograph=False
    )
    drawn = np.asarray(draws(), np.float64)
    kolmogorov: Any = stats.ks_2samp
    p_values = [kolmogorov(*pair).pvalue for pair in zip(u.T, drawn.T, strict=True)]
    if p_values and min(p_values) < _UNLIKE / len(p_values):
        logging.warning(
            "the parameters of the pairs are not draws of the prior (%s, Kolmogorov-Smirnov p "
            "%.1g); the posteriors will have their distribution in place of the prior",
            target.coordinates()[int(np.argmin(p_values))],
            min(p_values),
        )


def _split(u, usable) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows for training and those held out; equal parameters stay together."""
    _, owner = np.unique(u[usable], axis=0, return_inverse=True)
    sizes = np.bincount(owner.ravel())
    if len(sizes) < _FEWEST:
        raise UserError(
            f"{len(usable)} pairs are finite, with {len(sizes)} different parameters; expected "
            f"{_FEWEST} at least"
        )
    order = np.random.default_rng(0).permutation(len(sizes))
    count = min(_HELD_OUT * len(usable), _MOST_HELD_OUT)
    held_out = np.isin(owner.ravel(), order[np.cumsum(sizes[order]) <= count])
    return usable[~held_out], usable[held_out]
