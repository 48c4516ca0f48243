"""A user's model as a log density over unconstrained vectors.

Whatever the model is (a TFP joint distribution, a log density), a fit sees a function of u
[..., dim] in R^dim, Jacobian included, and a map from u to the model's own parameters.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_probability as tfp
from tensorflow_probability import bijectors as tfb
from tensorflow_probability import distributions as tfd

from avb_tf.errors import UserError

_PINNED = tfp.experimental.distributions.JointDistributionPinned
RECORD = "record.json"
Structure = Any  # a tensor for each parameter: one tensor, a dict, a sequence or a named tuple


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a model file's function may return: a model, and what a comparison can use besides.

    Attributes:
      model: a joint distribution, one already pinned, or a log density.
      observed: of a joint not yet pinned: a dict by name, or a sequence with None where unknown.
      shape: of a log density's argument, or a dict or sequence of them for several.
      bijector: of a log density, from R^n to its support, in the structure of `shape`.
      dtype: of a log density's argument.
      exact: (count, seed) -> independent draws of the posterior, [count, ...] in the structure of
        its parameters, where they can be had; a comparison prefers them to NUTS.
    """

    model: Any
    observed: Any = None
    shape: Any = None
    bijector: Any = None
    dtype: Any = "float32"
    exact: Callable[[int, int], Structure] | None = None


class Target:
    """The posterior's log density, up to its normaliser, over unconstrained vectors.

    Attributes:
      dim: of u.
      dtype: of u: float64 where a parameter of the model is.
      names: of the parameters, in the order of their parts in u.
      structure: the parameters' structure, with names of dtypes in their place.
      observed: what the model was conditioned on, by name, for the record.
    """

    def __init__(self, log_prob, bijector, shapes, dtypes, observed=None):
        """From the functions of one draw.

        Args:
          log_prob: (parameters of one draw, in their structure) -> a scalar, in nats.
          bijector: from unconstrained parameters to these, in their structure.
          shapes: of the parameters, a structure of `tf.TensorShape`.
          dtypes: of the parameters, likewise.
          observed: a dict of arrays.
        Raises:
          UserError: a parameter that is discrete or whose shape is not known, or a density that
            does not give one number for a draw.
        """
        self._log_prob, self._bijector, self._dtypes = log_prob, bijector, dtypes
        self.observed = observed or {}
        self.names = _names(dtypes)
        check_continuous(dtypes)
        flat = tf.nest.flatten(dtypes)
        self.dtype = max(flat, key=lambda dtype: dtype.size)
        self._event_ranks, _ = _ranks_and_shapes(shapes, dtypes)
        self._free_ranks, self._free_shapes = _ranks_and_shapes(
            bijector.inverse_event_shape(shapes), dtypes
        )
        self.sizes = [shape.num_elements() for shape in self._free_shapes]
        self.dim = sum(self.sizes)
        self._check_one_draw()
        self._together = all(map(self._batches_like_singles, (self._log_density, self._parameters)))

    def log_density(self, u):
        """log p(data, parameters) + log |d parameters / du| in nats, [n, dim] -> [n]."""
        return self._log_density(u) if self._together else _one_by_one(self._log_density, u)

    def constrain(self, u):
        """The model's parameters, [n, dim] -> [n, ...] in the model's structure and dtypes."""
        return self._parameters(u) if self._together else _one_by_one(self._parameters, u)

    def unconstrain(self, parameters):
        """The inverse of `constrain`."""
        typed = tf.nest.map_structure(tf.cast, parameters, self._dtypes)
        flat = tf.nest.flatten(self._bijector.inverse(typed))
        parts = zip(flat, self.sizes, strict=True)
        return np.concatenate([np.reshape(part, [len(part), size]) for part, size in parts], -1)

    def coordinates(self) -> list[str]:
        """A name for each entry of u, such as "theta[3]"."""
        found = []
        for name, shape in zip(self.names, self._free_shapes, strict=True):
            found += [f"{name}{list(i)}" if i else name for i in np.ndindex(*map(int, shape))]
        return found

    def save(self, path) -> None:
        """Writes the log density and the constraint as a SavedModel, for `load`."""
        signature = [tf.TensorSpec([None, self.dim], self.dtype)]
        module = tf.Module()
        for function in (self.log_density, self.constrain):
            compiled = tf.function(function, signature, autograph=False)
            setattr(module, function.__name__, compiled)
        tf.saved_model.save(module, str(path))
        observed = {name: np.asarray(value).tolist() for name, value in self.observed.items()}
        record = {
            "dim": self.dim,
            "dtype": self.dtype.name,
            "names": self.names,
            "coordinates": self.coordinates(),
            "observed": observed,
        }
        (Path(path) / RECORD).write_text(json.dumps(record) + "\n")

    def _free(self, u):
        """u [..., dim] in the parameters' structure, still unconstrained."""
        leading = list(tf.unstack(tf.shape(u)))[:-1]
        dtypes = tf.nest.flatten(self._dtypes)
        shaped = [
            tf.cast(tf.reshape(part, [*leading, *shape]), dtype)
            for part, shape, dtype in zip(
                tf.split(u, self.sizes, -1), self._free_shapes, dtypes, strict=True
            )
        ]
        return tf.nest.pack_sequence_as(self._dtypes, shaped)

    def _parameters(self, u):
        return self._bijector.forward(self._free(u))

    def _log_density(self, u):
        free = self._free(u)
        volume = self._bijector.forward_log_det_jacobian(free, event_ndims=self._free_ranks)
        density = self._log_prob(self._bijector.forward(free))
        return tf.cast(density, self.dtype) + tf.cast(volume, self.dtype)

    def _check_one_draw(self):
        try:
            density = self._log_density(tf.zeros([self.dim], self.dtype))
        except Exception as error:  # whatever a user's code raises
            raise UserError(
                f"the log density fails at one draw ({type(error).__name__}: "
                f"{_first_line(error)}); expected a function of parameters of dtypes "
                f"{[dtype.name for dtype in tf.nest.flatten(self._dtypes)]}"
            ) from error
        if density.shape.rank:
            raise UserError(
                f"the log density of one draw has shape {tuple(density.shape)}; expected one "
                "number: sum over data and parameters (tfd.Independent, tfd.Sample), and fit "
                "several data sets one after the other"
            )

    def _batches_like_singles(self, function) -> bool:
        """Whether `function` of a batch is what it is of each draw: many models broadcast."""
        u = tf.random.stateless_normal([3, self.dim], [0, 0], dtype=self.dtype)
        singles = [tf.nest.flatten(function(one)) for one in u]
        try:
            batch = tf.nest.flatten(function(u))
        except Exception:  # whatever a user's code raises
            return False
        return all(
            part.shape == (3, *single[0].shape)
            and np.allclose(part, tf.stack(single), rtol=1e-4, atol=1e-4, equal_nan=True)
            for part, single in zip(batch, zip(*singles, strict=True), strict=True)
        )


class _Loaded:
    """What `Target.save` kept of a model; what it cannot do is `unconstrain`."""

    def __init__(self, path):
        record = json.loads((Path(path) / RECORD).read_text())
        self.dim, self.dtype = record["dim"], tf.as_dtype(record["dtype"])
        self.names = record["names"]
        self.observed = {name: np.asarray(value) for name, value in record["observed"].items()}
        self._coordinates = record["coordinates"]
        self._module = tf.saved_model.load(str(path))
        self.log_density, self.constrain = self._module.log_density, self._module.constrain

    def coordinates(self):
        return self._coordinates


load = _Loaded


def make(model, observed=None, shape=None, bijector=None, dtype="float32") -> Target:
    """The `Target` of a model; the arguments are those of `Problem`.

    Raises:
      UserError: what is not a model, or names, parameters or shapes that do not fit it.
    """
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
    return make(p.model, p.observed, p.shape, p.bijector, p.dtype)


def pin(joint, observed):
    """The joint given what was observed.

    Raises:
      UserError: names that it does not have, or nothing observed of a joint not pinned.
    """
    if observed is None and isinstance(joint, _PINNED):
        return joint
    names = list(joint._flat_resolve_names())  # TFP has no public list of names
    if not observed:
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
    try:
        return joint.experimental_pin(**observed)
    except Exception as error:  # whatever TFP or a user's joint raises
        raise UserError(f"the joint cannot be conditioned: {_first_line(error)}") from error


def of_joint(pinned) -> Target:
    """The `Target` of a pinned joint.

    Raises:
      UserError: a part without a default bijector, or one that `Target` refuses.
    """
    check_continuous(pinned.dtype)
    try:
        bijector = pinned.experimental_default_event_space_bijector()
        bijector.inverse_event_shape(pinned.event_shape)
    except Exception as error:  # TFP's own depend on what is missing
        raise UserError(
            "a part of the joint has no default bijector to its support; expected a distribution "
            "with `experimental_default_event_space_bijector`, or a log density with `bijector`"
        ) from error
    observed = {name: np.asarray(value) for name, value in pinned.pins.items()}
    return Target(
        pinned.unnormalized_log_prob, bijector, pinned.event_shape, pinned.dtype, observed
    )


def of_log_density(log_density, shape, bijector, dtype) -> Target:
    """The `Target` of a function of one tensor, or of several by name or in order.

    Raises:
      UserError: a bijector that does not fit the shape.
    """
    call = log_density
    if isinstance(shape, Mapping):
        shapes = {name: tf.TensorShape(one) for name, one in shape.items()}
        call = lambda parameters: log_density(**parameters)  # noqa: E731
    elif not isinstance(shape, tf.TensorShape) and any(not isinstance(n, int) for n in shape):
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
        raise UserError(f"`bijector` does not fit `shape`: {_first_line(error)}") from error
    return Target(call, bijector, shapes, dtypes)


def check_continuous(dtypes) -> None:
    """Refuses discrete parameters.

    Raises:
      UserError: the first of them, by name.
    """
    for name, dtype in zip(_names(dtypes), tf.nest.flatten(dtypes), strict=True):
        if not dtype.is_floating:
            raise UserError(
                f"parameter '{name}' is of type {dtype.name}; expected real numbers: sum a "
                "discrete parameter out, for example by tfd.MixtureSameFamily"
            )


def _names(structure) -> list[str]:
    """The parameters' names: "x" for a lone tensor, "x0", "x1", ... for a plain sequence."""
    if hasattr(structure, "_fields"):
        return list(structure._fields)
    if isinstance(structure, Mapping):
        return sorted(structure)  # as tf.nest orders them
    if isinstance(structure, Sequence):
        return [f"x{i}" for i in range(len(structure))]
    return ["x"]


def _ranks_and_shapes(shapes, dtypes):
    """Structure of ranks, and list of shapes."""
    flat = [tf.TensorShape(shape) for shape in tf.nest.flatten(shapes)]
    return tf.nest.pack_sequence_as(dtypes, [shape.rank for shape in flat]), flat


def _one_by_one(function, u):
    return tf.vectorized_map(function, u)


def _first_line(error) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:200]
