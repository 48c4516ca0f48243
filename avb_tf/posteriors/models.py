"""What a user may hand in, as a `Target`: a TFP joint distribution, a log density, minibatches."""

import dataclasses
import functools
import numbers
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
from avb_tf.posteriors.target import Structure, Target, check_continuous, first_line

_PINNED = tfp.experimental.distributions.JointDistributionPinned


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a model file's function may return: a model, and what a comparison can use besides.

    Attributes:
      model: a joint distribution, one already pinned, or a log density; with `batch_size`, a
        function from rows of `observed` to the joint pinned on them.
      observed: of a joint not yet pinned: a dict by name, or a sequence with None where unknown;
        with `batch_size`, a dict of arrays [rows, ...].
      shape: of a log density's argument, or a dict or sequence of them for several.
      bijector: of a log density, from R^n to its support, in the structure of `shape`.
      dtype: of a log density's argument.
      exact: (count, seed) -> independent draws of the posterior, [count, ...] in the structure of
        its parameters, where they can be had; a comparison prefers them to NUTS.
      statistics: (parameters of draws, [count, ...]) -> numbers by name that a comparison shows.
      log_evidence: log p(data) in nats, where it is known.
      batch_size: rows in each step of training; None: all.
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
    model, observed=None, shape=None, bijector=None, dtype="float32", batch_size=None
) -> Target:
    """The `Target` of a model; the arguments are those of `Problem`.

    Raises:
      UserError: what is not a model, or names, parameters or shapes that do not fit it.
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
        raise UserError("a log density came without `shape`; expected its argument's, such as [2]")
    return of_log_density(model, shape, bijector, tf.as_dtype(dtype))


def of_problem(problem: Problem) -> Target:
    """The `Target` of a `Problem`; raises as `make` does."""
    p = problem
    return make(p.model, p.observed, p.shape, p.bijector, p.dtype, p.batch_size)


def pin(joint, observed):
    """The joint given what was observed.

    Raises:
      UserError: names that it does not have, or nothing observed of a joint not pinned.
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
            f"all parts are observed, {', '.join(names)}; expected one at least that is not: it is "
            "what the posterior is of"
        )
    _check_observed(joint, observed)
    try:
        return joint.experimental_pin(**observed)
    except Exception as error:  # whatever TFP or a user's joint raises
        raise UserError(
            f"the joint cannot be conditioned ({type(error).__name__}: {first_line(error)}); "
            "expected values that fit it: check the joint by itself, such as by `joint.sample()`"
        ) from error


def _check_observed(joint, observed):
    """Refuses an observed value that has a NaN or lacks dimensions of its part.

    Raises:
      UserError: the first of them, by name.
    """
    for name, value in observed.items():
        value = np.asarray(value)
        if value.dtype.kind == "f" and (missing := np.argwhere(np.isnan(value))).size:
            place = list(map(int, missing[0]))
            raise UserError(
                f"observed '{name}' is NaN at {place} and {len(missing)} of {value.size} values "
                "are; expected numbers: leave missing values out of data and model"
            )
        try:
            shapes = joint._model_flatten(joint.event_shape)
        except Exception:  # a joint that fails here is told where it is read
            return
        shape = dict(zip(joint._flat_resolve_names(), shapes, strict=True))[name]
        if not isinstance(shape, tf.TensorShape) or shape.rank is None:
            continue
        rank = shape.rank
        if value.ndim < rank or not shape.is_compatible_with(value.shape[value.ndim - rank :]):
            raise UserError(
                f"observed '{name}' has shape {value.shape}; expected {tuple(shape)}, that of "
                "a draw of it"
            )


def of_joint(pinned, of_batch=None) -> Target:
    """The `Target` of a pinned joint, and of its minibatches if they are given.

    Raises:
      UserError: a part without a default bijector, or one that `Target` refuses.
    """
    try:
        check_continuous(pinned.dtype)
        bijector = _bijector(pinned)
        shapes, dtypes = pinned.event_shape, pinned.dtype
        bijector.inverse_event_shape(shapes)
    except UserError:
        raise
    except Exception as error:  # whatever TFP or a user's joint raises
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
        target.names = list(pinned._flat_resolve_names())  # as `observed` has them
    return target


def _bijector(pinned):
    """From unconstrained parameters to those of a joint, pinned or not, each part's checked.

    TFP's composition of the parts' bijectors, with `constraints.of_distribution` for each: a part's
    support may depend on another part.
    """
    parts = pinned._get_single_sample_distributions()
    for name, part in zip(pinned._flat_resolve_names(), parts, strict=True):
        if not isinstance(part, tfd.JointDistribution):  # one within another is told by `Target`
            constraints.checked(name, part)
    if pinned.use_vectorized_map:
        return joint_distribution_pinned._DefaultJointBijectorAutoBatchedWithPins(
            pinned, bijector_fn=constraints.of_distribution
        )
    return joint_distribution._DefaultJointBijector(pinned, bijector_fn=constraints.of_distribution)


def _prior(pinned, count, seed):
    """Draws of the prior in the structure of the pinned joint's parameters, [count, ...]."""
    joint = pinned.distribution
    drawn = joint._model_flatten(joint.sample(count, seed=(seed, 0)))
    by_name = dict(zip(joint._flat_resolve_names(), drawn, strict=True))
    return structured(pinned, by_name)


def structured(pinned, values: Mapping[str, Any]) -> Structure:
    """Values by name in the structure of a pinned joint's parameters.

    `tf.nest` sorts the keys of a dict, which the joint has in the order of their dependence.
    """
    if isinstance(pinned.dtype, Mapping):
        return {name: values[name] for name in pinned.dtype}
    names = getattr(pinned.dtype, "_fields", None) or pinned._flat_resolve_names()
    return tf.nest.pack_sequence_as(pinned.dtype, [values[name] for name in names])


def of_batches(model: Any, data, batch_size: int) -> Target:
    """The `Target` of all rows of `data`, whose `estimator` sees `batch_size` of them at a time.

    Rows are drawn independently and their likelihood is scaled by all over `batch_size`.

    Args:
      model: a function from rows of `data` to the joint pinned on them.
      data: a dict of arrays [rows, ...].
      batch_size: rows of a minibatch.
    Raises:
      UserError: what is not this, or parameters that depend on how many rows there are.
    """
    if not isinstance(data, Mapping) or not callable(model) or batch_size < 1:
        raise UserError(
            f"batch_size is {batch_size}, the model of type {type(model).__name__} and observed of "
            f"type {type(data).__name__}; expected 1 or more, a function from rows of observed to "
            "a pinned joint, and a dict of arrays"
        )
    data = {name: tf.convert_to_tensor(value) for name, value in data.items()}
    lengths = {name: len(value) for name, value in data.items()}
    rows = next(iter(lengths.values()), 0)
    if not rows or set(lengths.values()) != {rows}:
        raise UserError(f"observed has rows {lengths}; expected as many of each, and at least one")
    few = {name: value[:1] for name, value in data.items()}
    whole: Any
    one: Any
    try:
        whole, one = model(data), model(few)
    except Exception as error:  # whatever a user's code raises
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
            "with one; expected parameters that all rows share: minibatches know no others"
        )

    sizes = {name: np.shape(pin)[:1] for name, pin in whole.pins.items()}
    if other := [name for name, size in sizes.items() if size != (rows,)]:
        raise UserError(
            f"'{other[0]}' is pinned to {np.shape(whole.pins[other[0]])} of {rows} rows; expected "
            "all that is observed to have them, for it is scaled by rows / batch_size"
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


def of_log_density(log_density, shape, bijector, dtype) -> Target:
    """The `Target` of a function of one tensor, or of several by name or in order.

    Raises:
      UserError: a bijector that does not fit the shape.
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
                f"bijector '{unknown[0]}' is of no parameter; expected some of {', '.join(shapes)}"
            )
        bijector = {name: bijector.get(name, tfb.Identity()) for name in shapes}
    if bijector is None:
        bijector = tf.nest.map_structure(lambda _: tfb.Identity(), shapes)
    if isinstance(bijector, Mapping | list | tuple):
        bijector = tfb.JointMap(bijector)
    try:
        bijector.inverse_event_shape(shapes)
    except Exception as error:  # bijectors raise many kinds
        raise UserError(f"`bijector` does not fit `shape`: {first_line(error)}") from error
    return Target(call, bijector, shapes, dtypes)
