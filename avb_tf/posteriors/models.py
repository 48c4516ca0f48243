"""Converts users' models to a `Target`: TFP joint distributions, log densities and minibatches."""

import dataclasses
import functools
import numbers
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_probability as tfp
from tensorflow_probability import bijectors as tfb
from tensorflow_probability import distributions as tfd
from tensorflow_probability.python.distributions import joint_distribution
from tensorflow_probability.python.experimental.distributions import joint_distribution_pinned

from avb_tf.errors import UserError
from avb_tf.posteriors import constraints
from avb_tf.posteriors.target import (
    FLOOR,
    LogProb,
    Structure,
    Target,
    check_continuous,
    first_line,
)

_PINNED = tfp.experimental.distributions.JointDistributionPinned


@dataclasses.dataclass(frozen=True)
class Problem:
    """A model with optional facts for a comparison; a model file's function may return it.

    Attributes:
      model: a joint distribution, a pinned joint distribution, or a log density; with `batch_size`,
        a function from rows of `observed` to the joint distribution pinned on them.
      observed: observed values of a joint distribution that is not pinned: a dict by name, or a
        sequence with None for unobserved parts; with `batch_size`, a dict of arrays [rows, ...].
      shape: shape of a log density's argument, or a dict or sequence of shapes for several.
      bijector: bijector from R^n to a log density's support, in the structure of `shape`.
      dtype: dtype of a log density's argument.
      exact: function from (count, seed) to independent draws of the posterior, [count, ...] in the
        structure of its parameters, or None; a comparison uses them as reference instead of NUTS.
      statistics: function from the parameters of draws, [count, ...], to numbers by name that a
        comparison shows, or None.
      log_evidence: log p(data) in nats, or None if it is not known.
      batch_size: number of rows in each training step; None: all.
    """

    model: Any
    observed: Any = None
    shape: Any = None
    bijector: Any = None
    dtype: Any = "float32"
    exact: Callable[[int, int], Structure] | None = None
    statistics: Callable[[Structure], dict[str, float]] | None = None
    log_evidence: float | None = None
    batch_size: int | None = None


def make(
    model: Any,
    observed: Any = None,
    shape: Any = None,
    bijector: Any = None,
    dtype: Any = "float32",
    batch_size: int | None = None,
) -> Target:
    """Returns the `Target` of a model.

    Args:
      model: a joint distribution, a pinned joint distribution, or a log density; with `batch_size`,
        a function from rows of `observed` to the joint distribution pinned on them.
      observed: observed values of a joint distribution that is not pinned: a dict by name, or a
        sequence with None for unobserved parts; with `batch_size`, a dict of arrays [rows, ...].
      shape: shape of a log density's argument, or a dict or sequence of shapes for several.
      bijector: bijector from R^n to a log density's support, in the structure of `shape`.
      dtype: dtype of a log density's argument.
      batch_size: number of rows in each training step; None: all.
    Raises:
      UserError: `model` is not a model, or names, parameters or shapes do not fit it.
    """
    if batch_size is not None:
        return of_batches(model, observed, batch_size)
    if isinstance(model, tfd.JointDistribution | _PINNED):
        if shape is not None or bijector is not None:
            raise UserError(
                "a joint distribution knows its shapes and bijectors; expected `shape` and "
                "`bijector` with a log density only"
            )
        return of_joint(pin(model, observed))
    if not callable(model):
        raise UserError(
            f"the model is of type {type(model).__name__}; expected a TFP joint distribution or a "
            "log density, a function of the parameters"
        )
    if observed is not None:
        raise UserError("a log density takes no `observed`; expected it to hold its data itself")
    if shape is None:
        raise UserError(
            "a log density came without `shape`; expected the shape of its argument, such as [2]"
        )
    return of_log_density(model, shape, bijector, tf.as_dtype(dtype))


def of_problem(problem: Problem) -> Target:
    """Returns the `Target` of a `Problem`; raises the same errors as `make`."""
    p = problem
    return make(p.model, p.observed, p.shape, p.bijector, p.dtype, p.batch_size)


def pin(joint: Any, observed: Any) -> Any:
    """Returns the joint distribution pinned on the observed values.

    Raises:
      UserError: the joint lacks an observed name, or all or none of its parts are observed, or a
        value does not fit its part.
    """
    if observed is None and isinstance(joint, _PINNED):
        return joint
    names = list(joint._flat_resolve_names())  # TFP has no public list of names
    if observed is None or (isinstance(observed, Mapping | Sequence) and not observed):
        raise UserError(
            f"nothing is observed; expected `observed`, values of some of {', '.join(names)}, or "
            "a pinned joint"
        )
    if isinstance(observed, Mapping):
        if unknown := sorted(set(observed) - set(names)):
            raise UserError(
                f"observed '{unknown[0]}' is no part of the joint; expected some of "
                f"{', '.join(names)}"
            )
    elif isinstance(observed, Sequence) and len(observed) == len(names):
        observed = {n: v for n, v in zip(names, observed, strict=True) if v is not None}
    else:
        raise UserError(
            f"observed is of type {type(observed).__name__}; expected a dict by name, or a "
            f"sequence of {len(names)} with None where unknown"
        )
    if set(observed) == set(names):
        raise UserError(
            f"all parts are observed, {', '.join(names)}; expected at least one that is not: the "
            "fit is for its posterior"
        )
    _check_observed(joint, observed)
    try:
        return joint.experimental_pin(**observed)
    except Exception as error:  # TFP or a user's joint may raise anything
        raise UserError(
            f"the joint cannot be conditioned ({type(error).__name__}: {first_line(error)}); "
            "expected values that fit it: check the joint by itself, such as by `joint.sample()`"
        ) from error


def _check_observed(joint, observed):
    """Checks that observed values are numbers, without NaN, and of shapes that fit their parts.

    Raises:
      UserError: a value fails the check; the message names the first one.
    """
    for name, value in observed.items():
        value = np.asarray(value)
        if value.dtype.kind in "cOSUMm":
            raise UserError(
                f"observed '{name}' is of type {value.dtype}; expected real numbers: leave missing "
                "values out of data and model, and encode categories"
            )
        if value.dtype.kind == "f" and (missing := np.argwhere(np.isnan(value))).size:
            place = list(map(int, missing[0]))
            raise UserError(
                f"observed '{name}' is NaN at {place} and {len(missing)} of {value.size} values "
                "are; expected numbers: leave missing values out of data and model"
            )
        try:
            shapes = joint._model_flatten(joint.event_shape)
        except Exception:  # `of_joint` reports a joint that fails here
            return
        shape = dict(zip(joint._flat_resolve_names(), shapes, strict=True))[name]
        if not isinstance(shape, tf.TensorShape) or shape.rank is None:  # pyright: ignore[reportUnnecessaryComparison]
            continue
        rank = shape.rank
        if value.ndim < rank or not shape.is_compatible_with(value.shape[value.ndim - rank :]):
            raise UserError(
                f"observed '{name}' has shape {value.shape}; expected {tuple(shape)}, that of "
                "a draw of it"
            )


def of_joint(
    pinned: Any, of_batch: Callable[[tf.random.Generator], LogProb] | None = None
) -> Target:
    """Returns the `Target` of a pinned joint.

    Args:
      pinned: the pinned joint distribution.
      of_batch: function from a random generator to the log density of a minibatch, or None.
    Raises:
      UserError: a part has no default bijector, or `Target` refuses a parameter.
    """
    try:
        check_continuous(pinned.dtype)
        bijector = _bijector(pinned)
        shapes, dtypes = pinned.event_shape, pinned.dtype
        bijector.inverse_event_shape(shapes)
    except UserError:
        raise
    except Exception as error:  # TFP or a user's joint may raise anything
        raise UserError(
            f"the joint cannot be read ({type(error).__name__}: {first_line(error)}); expected "
            "distributions of known shapes: check them one by one, such as by `joint.sample()`"
        ) from error
    observed = {name: np.asarray(value) for name, value in pinned.pins.items()}
    target = Target(
        pinned.unnormalized_log_prob,
        bijector,
        shapes,
        dtypes,
        observed,
        of_batch,
        functools.partial(_prior, pinned),
    )
    if not isinstance(pinned.dtype, Mapping):
        target.names = list(pinned._flat_resolve_names())  # the names that `observed` uses
    return target


def _bijector(pinned):
    """Returns the bijector from unconstrained parameters to those of a joint, after checks.

    TFP composes the bijectors of the parts, since a part's support may depend on another part; each
    of them comes from `constraints.of_distribution`.
    """
    parts = pinned._get_single_sample_distributions()
    for name, part in zip(pinned._flat_resolve_names(), parts, strict=True):
        if not isinstance(part, tfd.JointDistribution):  # `Target` refuses nested joints
            constraints.checked(name, part)
    joints: Any = joint_distribution  # TFP has no public way to choose the parts' bijectors
    of_pinned: Any = joint_distribution_pinned
    kind = (
        of_pinned._DefaultJointBijectorAutoBatchedWithPins
        if pinned.use_vectorized_map
        else joints._DefaultJointBijector
    )
    return kind(pinned, bijector_fn=constraints.of_distribution)


def _prior(pinned, count, seed):
    """Returns draws of the prior, [count, ...], in the structure of the pinned parameters."""
    joint = pinned.distribution
    with warnings.catch_warnings():
        # Seeds that are tensors are slow for joints that TFP vectorizes, but determine the draws.
        warnings.filterwarnings("ignore", "Saw Tensor seed")
        drawn = joint._model_flatten(joint.sample(count, seed=(seed, 0)))
    by_name = dict(zip(joint._flat_resolve_names(), drawn, strict=True))
    return structured(pinned, by_name)


def structured(pinned: Any, values: Mapping[str, Any]) -> Structure:
    """Packs values by name into the structure of a pinned joint's parameters.

    A dict keeps the joint's order, in which parts follow those that they depend on; `tf.nest` would
    sort its keys.
    """
    if isinstance(pinned.dtype, Mapping):
        return {name: values[name] for name in pinned.dtype}
    names = getattr(pinned.dtype, "_fields", None) or pinned._flat_resolve_names()
    return tf.nest.pack_sequence_as(pinned.dtype, [values[name] for name in names])


def of_batches(model: Any, data: Any, batch_size: int) -> Target:
    """Returns the `Target` of all rows of `data`; its `estimator` uses a minibatch at each call.

    The rows of a minibatch are drawn independently with replacement, and their likelihood is scaled
    by rows / batch_size.

    Args:
      model: a function from rows of `data` to the joint distribution pinned on them.
      data: a dict of arrays [rows, ...].
      batch_size: number of rows in a minibatch.
    Raises:
      UserError: an argument does not fit this description, or the parameters depend on the number
        of rows.
    """
    if not isinstance(data, Mapping) or not callable(model) or batch_size < 1:
        raise UserError(
            f"batch_size is {batch_size}, the model of type {type(model).__name__} and observed of "
            f"type {type(data).__name__}; expected 1 or more, a function from rows of observed to "
            "a pinned joint, and a dict of arrays"
        )
    data = {name: tf.convert_to_tensor(value) for name, value in data.items()}
    lengths = {name: value.shape[0] if value.shape.rank else 0 for name, value in data.items()}
    rows = next(iter(lengths.values()), 0)
    if not rows or set(lengths.values()) != {rows}:
        raise UserError(
            f"observed has rows {lengths}; expected as many of each part, and at least one"
        )
    few = {name: value[:1] for name, value in data.items()}
    whole: Any
    one: Any
    try:
        whole, one = model(data), model(few)
    except Exception as error:  # a user's code may raise anything
        dtypes = {name: value.dtype.name for name, value in data.items()}
        raise UserError(
            f"the model fails on rows of observed ({type(error).__name__}: {first_line(error)}); "
            f"found dtypes {dtypes}, expected those that the model computes in"
        ) from error
    if not all(isinstance(joint, _PINNED) for joint in (whole, one)):
        raise UserError(
            f"the model returned a {type(whole).__name__}; expected a joint pinned on the rows it "
            "was given, by experimental_pin"
        )
    if whole.event_shape != one.event_shape:
        raise UserError(
            f"the parameters' shapes are {whole.event_shape} with all rows and {one.event_shape} "
            "with one; expected parameters that all rows share: minibatches support no others"
        )

    sizes = {name: np.shape(pin)[:1] for name, pin in whole.pins.items()}
    if other := [name for name, size in sizes.items() if size != (rows,)]:
        raise UserError(
            f"'{other[0]}' is pinned to shape {np.shape(whole.pins[other[0]])}; expected {rows} "
            "rows, as the likelihood of every observed part is scaled by rows / batch_size"
        )

    def of_batch(generator):
        index = generator.uniform([batch_size], 0, rows, tf.int64)
        joint: Any = model({name: tf.gather(value, index) for name, value in data.items()})

        def log_prob(parameters):
            likelihood, prior = (
                tf.add_n(tf.nest.flatten(part))
                for part in joint.unnormalized_log_prob_parts(parameters)
            )
            return prior + rows / batch_size * likelihood

        return log_prob

    return of_joint(whole, of_batch)


def of_log_density(
    log_density: Callable[..., Any], shape: Any, bijector: Any, dtype: tf.DType
) -> Target:
    """Returns the `Target` of a log density, a function of one tensor or of several.

    Args:
      log_density: function of the parameters; several are passed by name if `shape` is a dict, and
        in order if it is a sequence of shapes.
      shape: shape of the parameter, or a dict or sequence of shapes for several.
      bijector: bijector from R^n to the support, in the structure of `shape`; a dict may leave out
        unconstrained parameters. None: all are unconstrained.
      dtype: `tf.DType` of the parameters.
    Raises:
      UserError: the bijector does not fit the shape.
    """
    call = log_density
    if isinstance(shape, numbers.Integral):
        shape = [shape]
    if isinstance(shape, Mapping):
        shapes = {name: tf.TensorShape(one) for name, one in shape.items()}
        call = lambda parameters: log_density(**parameters)  # noqa: E731
    elif not isinstance(shape, tf.TensorShape) and any(
        not isinstance(n, numbers.Integral) for n in shape
    ):
        shapes = tuple(map(tf.TensorShape, shape))
        call = lambda parameters: log_density(*parameters)  # noqa: E731
    else:
        shapes = tf.TensorShape(shape)
    dtypes = tf.nest.map_structure(lambda _: dtype, shapes)
    if isinstance(bijector, Mapping) and isinstance(shapes, dict):
        if unknown := sorted(set(bijector) - set(shapes)):
            raise UserError(
                f"bijector '{unknown[0]}' is for no parameter; expected some of {', '.join(shapes)}"
            )
        bijector = {name: bijector.get(name, tfb.Identity()) for name in shapes}
    if bijector is None:
        bijector = tf.nest.map_structure(lambda _: tfb.Identity(), shapes)
    if isinstance(bijector, Mapping | list | tuple):
        bijector = tfb.JointMap(bijector)
    try:
        bijector.inverse_event_shape(shapes)
    except Exception as error:  # bijectors raise exceptions of any type
        raise UserError(f"`bijector` does not fit `shape`: {first_line(error)}") from error
    target = Target(call, bijector, shapes, dtypes)
    if (floor := _floor(target)) is None:
        return target

    def without_floor(parameters):
        density = call(parameters)
        return tf.where(density > floor, density, -np.inf)

    return Target(without_floor, bijector, shapes, dtypes)


def _floor(target) -> float | None:
    """Returns the log density outside the support where it is written as a number such as -1e10.

    A plateau so low has no mass, but chains that start on it do not leave it.
    """
    rng, widths = np.random.default_rng(0), np.geomspace(0.5, 50.0, 5)
    each = int(np.clip(target.cost.rows // len(widths), 4, 200))
    wide = [width * rng.normal(size=[each, target.dim]) for width in widths]
    u = tf.constant(np.concatenate(wide), target.dtype)
    try:
        density = np.asarray(target.log_density(u) - target.log_volume(u), np.float64)
    except tf.errors.InvalidArgumentError:  # the fit reports operations that fail
        return None
    density = density[np.isfinite(density)]
    spread = np.ptp(density) if len(density) else 0.0
    if spread < FLOOR * target.dim:
        return None
    floor = float(density.min() + 1e-6 * spread)  # a prior may be added to the number
    return floor if np.sum(density < floor) > 2 else None
