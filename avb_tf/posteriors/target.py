"""A posterior as a log density over unconstrained vectors.

Whatever the model is (see `models`), a fit sees a function of u [..., dim] in R^dim, Jacobian
included, and a map from u to the model's own parameters.
"""

import functools
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from avb_tf.errors import UserError

RECORD = "record.json"
Structure = Any  # a tensor for each parameter: one tensor, a dict, a sequence or a named tuple


class Target:
    """The posterior's log density, up to its normaliser, over unconstrained vectors.

    Attributes:
      dim: of u.
      dtype: of u: float64 where a parameter of the model is.
      names: of the parameters, in the order of their parts in u.
      structure: the parameters' structure, with names of dtypes in their place.
      observed: what the model was conditioned on, by name, for the record.
    """

    def __init__(self, log_prob, bijector, shapes, dtypes, observed=None, of_batch=None):
        """From the functions of one draw.

        Args:
          log_prob: (parameters of one draw, in their structure) -> a scalar, in nats.
          bijector: from unconstrained parameters to these, in their structure.
          shapes: of the parameters, a structure of `tf.TensorShape`.
          dtypes: of the parameters, likewise.
          observed: a dict of arrays.
          of_batch: generator of random numbers -> a function like `log_prob`, unbiased for it.
        Raises:
          UserError: a parameter that is discrete or whose shape is not known, or a density that
            does not give one number for a draw.
        """
        self._log_prob, self._bijector, self._dtypes = log_prob, bijector, dtypes
        self._of_batch = of_batch
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

    def estimator(self, seed: int):
        """A function like `log_density`, unbiased for it, of a new minibatch at every call."""
        if self._of_batch is None:
            return self.log_density
        generator, of_batch = tf.random.Generator.from_seed(seed), self._of_batch

        def estimate(u):
            density = functools.partial(self._log_density, log_prob=of_batch(generator))
            return density(u) if self._together else _one_by_one(density, u)

        return estimate

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

    def _log_density(self, u, log_prob=None):
        free = self._free(u)
        volume = self._bijector.forward_log_det_jacobian(free, event_ndims=self._free_ranks)
        density = (log_prob or self._log_prob)(self._bijector.forward(free))
        return tf.cast(density, self.dtype) + tf.cast(volume, self.dtype)

    def _check_one_draw(self):
        @tf.function(autograph=False)
        def with_gradient(u):
            with tf.GradientTape() as tape:
                tape.watch(u)
                density = self._log_density(u)
            return density, tape.gradient(density, u)

        try:
            density, gradient = with_gradient(tf.zeros([self.dim], self.dtype))
        except Exception as error:  # whatever a user's code raises
            raise UserError(
                f"the log density fails at one draw ({type(error).__name__}: "
                f"{first_line(error)}); expected TensorFlow's operations on parameters of dtypes "
                f"{[dtype.name for dtype in tf.nest.flatten(self._dtypes)]}"
            ) from error
        if density.shape.rank:
            raise UserError(
                f"the log density of one draw has shape {tuple(density.shape)}; expected one "
                "number: sum over data and parameters (tfd.Independent, tfd.Sample), and fit "
                "several data sets one after the other"
            )

        if gradient is None:
            raise UserError(
                "the log density has no gradient; expected TensorFlow's operations on the "
                "parameters, which it depends on"
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
        self._coordinates, self._path = record["coordinates"], path
        self._module = tf.saved_model.load(str(path))
        self.log_density, self.constrain = self._module.log_density, self._module.constrain

    def coordinates(self):
        return self._coordinates

    def save(self, path):
        shutil.copytree(self._path, path, dirs_exist_ok=True)

    def estimator(self, seed):
        del seed
        return self.log_density


load = _Loaded


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
    """The parameters' names: "x" for a lone tensor, "x0", "x1", ... for a plain sequence.

    Raises:
      UserError: a parameter that is itself a structure.
    """
    if hasattr(structure, "_fields"):
        names = list(structure._fields)
    elif isinstance(structure, Mapping):
        names = sorted(structure)  # as tf.nest orders them
    elif isinstance(structure, Sequence):
        names = [f"x{i}" for i in range(len(structure))]
    else:
        names = ["x"]
    if (parts := len(tf.nest.flatten(structure))) != len(names):
        raise UserError(
            f"{', '.join(names)} have {parts} parts; expected parameters that are tensors: take a "
            "joint within a joint apart"
        )
    return names


def _ranks_and_shapes(shapes, dtypes):
    """Structure of ranks, and list of shapes."""
    flat = [tf.TensorShape(shape) for shape in tf.nest.flatten(shapes)]
    return tf.nest.pack_sequence_as(dtypes, [shape.rank for shape in flat]), flat


def _one_by_one(function, u):
    return tf.vectorized_map(function, u)


def first_line(error) -> str:
    """Of what somebody else's code raised."""
    return (str(error).strip().splitlines() or ["no message"])[0][:200]
