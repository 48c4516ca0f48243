"""The simulation of a simulator that has already run: a table of the pairs that it left."""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging
from scipy import stats

from avb_tf.amortised import sources
from avb_tf.amortised.simulation import Simulation, Table
from avb_tf.errors import UserError
from avb_tf.posteriors.target import Structure, first_line

_FEWEST = 500  # different parameters of finite pairs
_HELD_OUT, _MOST_HELD_OUT = 0.1, 5000  # share of them that training does not use, and its limit
_PRIOR_DRAWS = 10_000  # with which the parameters are compared
_COMBINATIONS = 8  # of the parameters that are compared, beside each alone
_UNLIKE = 1e-6  # p-value below which they are not taken for draws of the prior
_LARGEST = np.finfo(np.float32).max


def of_pairs(parameters: Structure, data: Any, prior: Any, observed: Sequence[str]) -> Simulation:
    """Returns the simulation that chooses from finished pairs.

    The pairs of a tenth of the parameters are held out from training, 5,000 pairs at most.

    Args:
      parameters: draws of the prior in its structure, [n, ...].
      data: what the simulator returned for them, [n, ...]: an array, or a dict by name. Where it
        failed, they are not finite.
      prior: TFP distribution of the parameters.
      observed: names of the data.
    Raises:
      UserError: the arrays do not belong together, lie outside the prior, or are too few.
    """
    observed = sources.names_of(observed)
    target = sources.target_of(prior)
    flat, parts = _parameters(parameters, prior), _data(data, observed)
    counts = [len(array) for array in (*flat, *parts)]
    if len(set(counts)) > 1:
        raise UserError(f"parameters and data have {counts} rows; expected as many of each")
    u = _unconstrained(flat, prior, target)
    known = np.isfinite(u).all(1)
    usable = known & _finite(parts)
    training, held_out = _split(u, np.flatnonzero(usable))
    _compare(u[known], prior, target)
    if not usable.all():
        logging.warning(
            "%d of %d pairs are left out: their data or parameters are not finite, or lie on the "
            "edge of the prior's support",
            np.sum(~usable),
            len(usable),
        )
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
    simulation.table = Table(u[held_out], y.numpy(), len(training))
    digest = 0
    for array in (u, *parts):  # u also depends on the prior's support
        digest = zlib.crc32(np.ascontiguousarray(array).data, digest)
    simulation.digest = f"{digest:08x}"
    return simulation


def _parameters(parameters, prior) -> list[np.ndarray]:
    """Returns the parameters as a flat list of arrays [n, ...], in the prior's dtypes."""
    expected = sources.draws_of(prior, 1, 0)
    if isinstance(expected, Mapping):
        names = sorted(expected)  # in the order of `tf.nest.flatten`
        values = _by_name(parameters, names, "the parameters")
    elif isinstance(expected, tuple | list):
        names = [str(n) for n in getattr(expected, "_fields", range(len(expected)))]
        values = parameters
        if not isinstance(values, tuple | list) or len(values) != len(names):
            values = _by_name(parameters, names, "the parameters")
    else:
        values = [parameters]
    arrays = []
    for value, part in zip(values, tf.nest.flatten(expected), strict=True):
        array = _numbers(value, "the parameters")
        if array.shape[1:] != tuple(part.shape[1:]):
            raise UserError(
                f"the parameters have shape {list(array.shape)}; expected "
                f"{['n', *part.shape[1:]]}, a draw of the prior in each row"
            )
        with np.errstate(over="ignore"):
            arrays.append(array.astype(part.dtype.as_numpy_dtype))
    return arrays


def _data(data, observed) -> list[np.ndarray]:
    """Returns the observed parts as arrays [n, ...], in the order of `observed`."""
    if len(observed) == 1 and not isinstance(data, Mapping):
        data = {observed[0]: data}
    values = _by_name(data, list(observed), "the data")
    return [_numbers(v, f"'{name}'") for v, name in zip(values, observed, strict=True)]


def _by_name(values, names, what) -> list[Any]:
    """Returns the values of a dict, or of the columns of a frame, in the order of `names`."""
    found = set(values.keys()) if hasattr(values, "keys") else None
    if found != set(names):
        kind = type(values).__name__ if found is None else ", ".join(sorted(map(str, found)))
        raise UserError(f"{what} are {kind}; expected a dict with {', '.join(names)}")
    return [values[name] for name in names]


def _numbers(values, name) -> np.ndarray:
    """Returns numbers as an array [n, ...]; what a masked array hides is NaN."""
    if isinstance(values, np.ma.MaskedArray):
        values = np.where(np.ma.getmaskarray(values), np.nan, np.ma.getdata(values))
    try:
        array = np.asarray(values)
    except Exception as error:  # whatever a list or another library's array raises
        raise UserError(
            f"{name} cannot be read ({type(error).__name__}: {first_line(error)}); expected an "
            "array of numbers [n, ...]"
        ) from error
    if array.dtype.kind not in "fiub" or not array.ndim or not array.size:
        raise UserError(
            f"{name} is {array.dtype} of shape {array.shape}; expected numbers [n, ...]"
        )
    return array.astype(np.float64) if array.dtype.itemsize > 8 else array


def _finite(arrays) -> np.ndarray:
    """Returns where float32 can hold the rows of all arrays, [n]."""
    return np.all([
        (np.abs(array.astype(np.float64)) <= _LARGEST).reshape(len(array), -1).all(1)
        for array in arrays
    ], 0)  # fmt: skip


def _unconstrained(flat, prior, target) -> np.ndarray:
    """Returns unconstrained parameters, [n, dim]; NaN if missing, infinite on the support's edge.

    Raises:
      UserError: parameters lie outside the prior's support.
    """
    known = np.flatnonzero(_finite(flat))
    u = np.full([len(flat[0]), target.dim], np.nan)
    if not len(known):
        return u

    @tf.function(autograph=False)
    def inverse(*parts):
        parameters = tf.nest.pack_sequence_as(prior.dtype, parts)
        free = target.free(parameters)
        return free, tf.nest.flatten(target.constrain(free)), prior.log_prob(parameters)

    try:
        free, again, density = inverse(*[tf.constant(array[known]) for array in flat])
    except tf.errors.InvalidArgumentError as error:  # a prior with validate_args
        raise UserError(
            f"parameters lie outside the prior's support ({first_line(error)}); expected draws of "
            "the prior"
        ) from error
    u[known] = free
    same = [
        np.isclose(one, array[known], rtol=1e-2, atol=1e-3).reshape(len(known), -1).all(1)
        for one, array in zip(again, flat, strict=True)
    ]
    edge = np.isinf(u[known]).any(1) | np.isposinf(density)
    outside = ~edge & ~np.all(same, 0)
    if outside.any():
        raise UserError(
            f"{outside.sum()} of {len(u)} parameters lie outside the prior's support, the first in "
            f"row {known[np.argmax(outside)]}; expected draws of the prior"
        )
    return u


def _compare(u, prior, target):
    """Warns if parameters u [n, dim], or combinations of them, are not distributed as the prior."""
    u = np.unique(u, axis=0)  # several data sets may have the same parameters
    draws: Any = tf.function(
        lambda: target.free(sources.draws_of(prior, _PRIOR_DRAWS, 1)), autograph=False
    )
    drawn = np.asarray(draws(), np.float64)
    drawn = drawn[np.isfinite(drawn).all(1)]
    middle, scale = np.median(drawn, 0), drawn.std(0) + 1e-30
    directions, names = np.eye(target.dim), target.coordinates()
    if target.dim > 1:
        others = np.random.default_rng(0).normal(size=[_COMBINATIONS, target.dim])
        directions = np.concatenate([directions, others])
        names = names + ["a combination of parameters"] * _COMBINATIONS
    kolmogorov: Any = stats.ks_2samp
    projected = ((x - middle) / scale @ directions.T for x in (u, drawn))
    p_values = [kolmogorov(*pair).pvalue for pair in zip(*(p.T for p in projected), strict=True)]
    least = int(np.argmin(p_values))
    if p_values[least] < _UNLIKE / len(p_values):
        logging.warning(
            "the parameters of the pairs are clearly not draws of the prior (%s, Kolmogorov-Smirnov"
            " p %.1g); the posteriors will have their distribution in place of the prior",
            names[least],
            p_values[least],
        )


def _split(u, usable) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows for training and those held out, which have other parameters."""
    _, owner = np.unique(u[usable], axis=0, return_inverse=True)
    count = int(owner.max()) + 1 if len(owner) else 0
    if count < _FEWEST:
        raise UserError(
            f"{len(usable)} of {len(u)} pairs are finite, with {count} different parameters; "
            f"expected {_FEWEST} at least"
        )
    rng = np.random.default_rng(0)
    chosen = rng.permutation(count)[: min(round(_HELD_OUT * count), _MOST_HELD_OUT)]
    is_held_out = np.isin(owner.ravel(), chosen)
    held_out = rng.permutation(usable[is_held_out])[:_MOST_HELD_OUT]
    return usable[~is_held_out], held_out
