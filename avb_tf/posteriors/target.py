"""A posterior as a log density over unconstrained vectors.

For every kind of model (see `models`), a fit uses a log density of u [..., dim] in R^dim, which
includes the log Jacobian determinant, and a map from u to the model's own parameters.
"""

import functools
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from avb_tf.errors import UserError
from avb_tf.posteriors import cost
from avb_tf.posteriors.functions import save_functions, value_and_gradient, with_slope

RECORD = "record.json"
FLOOR = 100.0  # nats below the peak, for each dimension: a plateau has no mass in float32's range
Structure = Any  # the parameters: one tensor, or a dict, a sequence or a named tuple of tensors
LogProb = Callable[[Structure], Any]  # log density of parameters in their structure, in nats
LogDensity = Callable[[tf.Tensor], tf.Tensor]  # of u [n, dim] -> [n], in nats


class Target:
    """The posterior's log density, up to its normaliser, over unconstrained vectors.

    Attributes:
      dim: dimensions of u.
      dtype: dtype of u, the widest of the parameters' dtypes.
      names: names of the parameters, in the order of their parts in u.
      sizes: number of entries of u for each parameter, in the same order.
      observed: values on which the model was conditioned, by name, for reports.
      traced: seconds that the log density and its gradient took at the first call, with tracing.
    """

    def __init__(
        self,
        log_prob: LogProb,
        bijector: Any,
        shapes: Structure,
        dtypes: Structure,
        observed: Mapping[str, Any] | None = None,
        of_batch: Callable[[tf.random.Generator], LogProb] | None = None,
        prior: Callable[[int, int], Structure] | None = None,
    ):
        """Builds the target from a log density and the bijector to its support.

        Args:
          log_prob: function from parameters in their structure to the log density in nats. It may
            accept only one draw and return a scalar, accept only batches and return [n], or accept
            both by broadcasting.
          bijector: bijector from unconstrained to constrained parameters, in their structure.
          shapes: shapes of the parameters, a structure of `tf.TensorShape`.
          dtypes: dtypes of the parameters, in the same structure.
          observed: values on which the model was conditioned, a dict of arrays.
          of_batch: function from a random generator to a function like `log_prob` that estimates it
            without bias from a minibatch, or None.
          prior: function from (count, seed) to draws of the prior, [count, ...] in the parameters'
            structure, or None.
        Raises:
          UserError: a parameter is discrete or is itself a structure, or the density does not give
            one number for a draw.
        """
        self._log_prob, self._bijector, self._dtypes = log_prob, bijector, dtypes
        self._of_batch, self._prior = of_batch, prior
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
        if not self.dim:
            raise UserError("the parameters have no entries; expected a shape of one at least")
        self._of_one = tf.function(_with_gradient(self._log_density), autograph=False)
        self.traced = 0.0
        self._lift, self._evaluated = self._lifted()

    def log_density(self, u: tf.Tensor) -> tf.Tensor:
        """Returns log p(data, parameters) + log |d parameters / du| in nats, [n, dim] -> [n].

        It has no second derivatives.
        """
        # A tape that sees the call would derive second derivatives, which nobody needs: for a joint
        # of 30 parts that takes half a minute.
        return with_slope(lambda u: self.log_density_and_gradient(tf.stop_gradient(u)))(u)

    def log_density_and_gradient(self, u: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns `log_density` [n] and its gradient [n, dim] by a graph traced once for a fit."""
        return self._evaluated(u)

    @functools.cached_property
    def cost(self) -> cost.Cost:
        """What an evaluation of the log density and its gradient takes."""
        return cost.measured(self.log_density_and_gradient, self.dim, self.dtype)

    def log_density_by(self, log_prob: LogProb, u: tf.Tensor) -> tf.Tensor:
        """Returns `log_density` for another function `log_prob` of the same parameters."""
        return self._lift(functools.partial(self._log_density, log_prob=log_prob), u)

    def estimator(self, seed: int) -> LogDensity:
        """Returns an unbiased estimator of `log_density` that uses a new minibatch at every call.

        Without minibatches, it is `log_density` itself.
        """
        if self._of_batch is None:
            return self.log_density
        generator, of_batch = tf.random.Generator.from_seed(seed), self._of_batch

        def estimate(u):
            return self.log_density_by(of_batch(generator), u)

        return estimate

    def constrain(self, u: tf.Tensor) -> Structure:
        """Maps u to parameters in the model's structure and dtypes, [n, dim] -> [n, ...]."""
        return self._lift(self._parameters, u)

    def log_volume(self, u: tf.Tensor) -> tf.Tensor:
        """Returns log |d parameters / du| in nats, [n, dim] -> [n]."""
        return self._lift(self._log_volume, u)

    def unconstrain(self, parameters: Structure) -> np.ndarray:
        """Applies the inverse of `constrain`, and returns an array [n, dim]."""
        return self.free(parameters).numpy()

    def free(self, parameters: Structure) -> tf.Tensor:
        """Applies the inverse of `constrain`, and returns a tensor [n, dim]."""
        typed = tf.nest.map_structure(tf.cast, parameters, self._dtypes)
        flat = tf.nest.flatten(self._bijector.inverse(typed))
        parts = zip(flat, self.sizes, strict=True)
        return tf.concat(
            [tf.cast(tf.reshape(part, [-1, size]), self.dtype) for part, size in parts], -1
        )

    def prior_draws(self, count: int, seed: int) -> np.ndarray:
        """Returns unconstrained draws of the prior, [at most count, dim]; none if it is unknown."""
        if self._prior is None:
            return np.zeros([0, self.dim])
        try:
            u = np.asarray(self.unconstrain(self._prior(count, seed)), np.float64)
        except Exception:  # a part of a joint may have a density but no sampler
            return np.zeros([0, self.dim])
        return u[np.isfinite(u).all(1)]

    def coordinates(self) -> list[str]:
        """Returns a name for each entry of u, such as "theta[3]"."""
        labels = []
        for name, shape in zip(self.names, self._free_shapes, strict=True):
            labels += [f"{name}{list(i)}" if i else name for i in np.ndindex(*map(int, shape))]
        return labels

    def save(self, path: str | Path) -> None:
        """Writes the log density and the constraint as a SavedModel, for `load`."""
        signature = [tf.TensorSpec([None, self.dim], self.dtype)]
        density = functools.partial(self._lift, self._log_density)
        save_functions(
            {"log_density": (density, signature), "constrain": (self.constrain, signature)}, path
        )
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
        """Returns u [..., dim] in the parameters' structure, still unconstrained."""
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
        # In a graph, a `tf.scan` that raises leaves a device behind in the variable scope, which
        # would break all strategies of the process. A scope of its own does not outlive the error.
        scope = tf.compat.v1.get_variable_scope()
        with tf.compat.v1.variable_scope(scope, auxiliary_name_scope=False):
            density = (log_prob or self._log_prob)(self._parameters(u))
        return tf.cast(density, self.dtype) + self._log_volume(u)

    def _log_volume(self, u):
        volume = self._bijector.forward_log_det_jacobian(
            self._free(u), event_ndims=self._free_ranks
        )
        return tf.cast(volume, self.dtype)

    def _lifted(self):
        """Returns the way to apply this model to a batch, and its density with gradient as a graph.

        The way is a function (function, u [n, dim]) -> [n, ...]. It applies functions to the batch
        directly if they broadcast, and otherwise by `tf.vectorized_map` or, as the last resort, in
        a loop.

        Raises:
          UserError: the density accepts neither one draw nor a batch.
        """
        try:
            self._check_one_draw()
        except UserError:
            evaluated = self._of_batches(_directly)
            if self._takes_batches_alone(evaluated):
                return _directly, evaluated
            raise
        lifts = [_one_by_one, _in_a_loop]
        if self._parameters_broadcast():
            lifts = [_directly, *lifts]
        cause: Exception = ValueError("other values than one by one")
        for lift in lifts:
            evaluated = self._of_batches(lift)
            try:
                if self._agrees(evaluated):
                    return lift, evaluated
            except Exception as error:  # a user's code may raise anything
                cause = error
        raise UserError(
            f"the log density fails at several draws ({type(cause).__name__}: "
            f"{first_line(cause)}); expected TensorFlow's operations, with the same result for "
            "each draw as for that draw alone"
        ) from cause

    def _check_one_draw(self):
        """Checks that the density of one draw is a scalar with a gradient.

        Raises:
          UserError: it is not.
        """
        try:
            density, gradient = self._of_one(tf.zeros([self.dim], self.dtype))
        except Exception as error:  # a user's code may raise anything
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
                "the log density has no gradient; expected one that depends on the parameters, by "
                "TensorFlow's operations"
            )

    def _takes_batches_alone(self, evaluated) -> bool:
        """Returns whether the density maps [n, dim] to [n] row by row, though it refuses [dim]."""
        u = self._trial_draws()
        try:
            density, gradient = evaluated(u)
            rows = [self._log_density(row[tf.newaxis]) for row in u]
        except Exception:  # a user's code may raise anything
            return False
        alike = density.shape == (3,) and all(row.shape == (1,) for row in rows)
        return alike and gradient is not None and _close(density, tf.concat(rows, 0))

    def _parameters_broadcast(self) -> bool:
        """Returns whether the parameters of the first draw are the same in a batch as alone."""
        u = self._trial_draws()
        try:
            batch = tf.nest.flatten(self._parameters(u))
        except Exception:  # a user's bijector may raise anything
            return False
        return all(
            part.shape == (3, *alone.shape) and _close(part[0], alone)
            for part, alone in zip(batch, tf.nest.flatten(self._parameters(u[0])), strict=True)
        )

    def _of_batches(self, lift):
        """Returns the log density of u [n, dim] and its gradient as a graph for any n."""
        batch = tf.TensorSpec([None, self.dim], self.dtype)
        evaluated = _with_gradient(functools.partial(lift, self._log_density))
        return tf.function(evaluated, input_signature=[batch], autograph=False)

    def _agrees(self, evaluated) -> bool:
        """Returns whether a log density of batches and its gradient are those of single draws."""
        u = self._trial_draws()
        densities, gradients = zip(*map(self._of_one, u), strict=True)
        began = time.monotonic()
        density, gradient = evaluated(u)
        self.traced = time.monotonic() - began
        return density.shape == (3,) and _close(density, densities) and _close(gradient, gradients)

    def _trial_draws(self):
        return tf.random.stateless_normal([3, self.dim], [0, 0], dtype=self.dtype)


def _with_gradient(function):
    return functools.partial(value_and_gradient, function)


def _close(x, y) -> bool:
    return np.allclose(x, y, rtol=1e-4, atol=1e-4, equal_nan=True)


def _directly(function, u):
    return function(u)


def _one_by_one(function, u):
    return tf.vectorized_map(function, u)


def _in_a_loop(function, u):
    signature = tf.nest.map_structure(
        tf.TensorSpec.from_tensor, function(tf.zeros(u.shape[1:], u.dtype))
    )
    return tf.map_fn(function, u, fn_output_signature=signature)


class _Loaded:
    """A target that `Target.save` wrote; it has no `unconstrain`."""

    def __init__(self, path):
        record = json.loads((Path(path) / RECORD).read_text())
        self.dim, self.dtype = record["dim"], tf.as_dtype(record["dtype"])
        self.names = record["names"]
        self.observed = {name: np.asarray(value) for name, value in record["observed"].items()}
        self._coordinates, self._path = record["coordinates"], path
        self._module = tf.saved_model.load(str(path))
        self.log_density, self.constrain = self._module.log_density, self._module.constrain
        batch = tf.TensorSpec([None, self.dim], self.dtype)
        self.log_density_and_gradient = tf.function(
            _with_gradient(self.log_density), input_signature=[batch], autograph=False
        )

    @functools.cached_property
    def cost(self):
        return cost.measured(self.log_density_and_gradient, self.dim, self.dtype)

    def coordinates(self):
        return self._coordinates

    def save(self, path):
        shutil.copytree(self._path, path, dirs_exist_ok=True)

    def estimator(self, seed):
        del seed
        return self.log_density

    def prior_draws(self, count, seed):
        del count, seed
        return np.zeros([0, self.dim])


load = _Loaded


def check_continuous(dtypes: Structure) -> None:
    """Checks that no parameter is discrete.

    Raises:
      UserError: a parameter is discrete; the message names the first one.
    """
    for name, dtype in zip(_names(dtypes), tf.nest.flatten(dtypes), strict=True):
        if not dtype.is_floating:
            raise UserError(
                f"parameter '{name}' is of type {dtype.name}; expected real numbers: sum a "
                "discrete parameter out, for example by tfd.MixtureSameFamily"
            )


def _names(structure) -> list[str]:
    """Returns the parameters' names: "x" for one tensor, "x0", "x1", ... for a plain sequence.

    Raises:
      UserError: a parameter is itself a structure.
    """
    if hasattr(structure, "_fields"):
        names = list(structure._fields)
    elif isinstance(structure, Mapping):
        names = sorted(structure)  # the order of tf.nest
    elif isinstance(structure, Sequence):
        names = [f"x{i}" for i in range(len(structure))]
    else:
        names = ["x"]
    if (parts := len(tf.nest.flatten(structure))) != len(names):
        raise UserError(
            f"{', '.join(names)} have {parts} parts; expected parameters that are tensors: flatten "
            "a joint within a joint"
        )
    return names


def _ranks_and_shapes(shapes, dtypes):
    """Returns the ranks in the structure of `dtypes`, and a list of the shapes."""
    flat = [tf.TensorShape(shape) for shape in tf.nest.flatten(shapes)]
    return tf.nest.pack_sequence_as(dtypes, [shape.rank for shape in flat]), flat


def first_line(error: BaseException) -> str:
    """Returns the first line of an exception's message that says what happened, shortened."""
    lines = str(error).strip().splitlines()
    told = [line for line in lines if line.strip() and not line.startswith("Exception encountered")]
    return (told or ["no message"])[0][:200]
