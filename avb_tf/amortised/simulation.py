"""A user's model as a source of simulated pairs of flat vectors: unconstrained u and data y.

The data are those parts of the model that will be observed, concatenated to [n, features]. They are
in float64, so that counts keep all their digits; the network converts them to float32.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow_probability import distributions as tfd
from tensorflow_probability.python.distributions import joint_distribution

from avb_tf.errors import UserError
from avb_tf.posteriors import constraints, models
from avb_tf.posteriors.target import Target, first_line

_TRIAL = 64  # pairs simulated to check a model
_ROWS = 5  # rows used to check densities, and to try a simulator
_UNUSABLE = 0.01  # largest share of pairs that may be infinite or NaN


class Simulation:
    """Pairs of a joint distribution, or of a simulator and its prior, and their density.

        simulation = of_joint(joint, ("y",))
        u, y, usable = simulation.simulate(512, tf.constant([0, 1]))
        simulation.log_density(u, y[0])  # for many u and one y, [512]

    Attributes:
      dim: dimensions of u.
      dtype: dtype of u.
      features: dimensions of y.
      observed: name -> (shape, dtype) of each part of y, in their order in y.
      names: names of the parameters.
      has_density: whether `log_density` is known; it is not for a simulator.
      portable: whether `simulate` can be saved, as it uses only TensorFlow's operations.
    """

    def __init__(
        self,
        target: Target,
        parts: Mapping[str, tuple[tf.TensorShape, tf.DType]],
        draw: Callable[[Any, Any], tuple[Any, list]],
        pin: Callable[[dict], Any] | None,
        portable: bool = True,
    ):
        """Builds the simulation from functions of a model.

        Args:
          target: the posterior of some y, or the prior if there is no density.
          parts: name -> (shape, dtype) of each observed part.
          draw: function from (n, seed) to parameters in their structure and a list of the observed
            parts, [n, ...] each.
          pin: function from observed values by name to the log density of the parameters; None if
            the density is unknown.
          portable: whether `draw` uses only TensorFlow's operations, so that it can be saved.
        Raises:
          UserError: the model cannot be simulated, or its draws in a batch are not independent.
        """
        self._target, self._draw, self._pin = target, draw, pin
        self.portable = portable
        self.dim, self.dtype, self.names = target.dim, target.dtype, target.names
        self.observed = dict(parts)
        self.sizes = [size_of(shape) for shape, _ in self.observed.values()]
        self.features, self.has_density = sum(self.sizes), pin is not None
        self._graphs: dict[int, Any] = {}
        self._check()

    def simulate(self, n: int, seed):
        """Simulates new pairs.

        Args:
          n: number of pairs, a Python integer.
          seed: integers [2].
        Returns:
          u [n, dim], y [n, features], and whether each pair is finite, boolean [n]; u and y are 0
          where it is not.
        """
        if n not in self._graphs:
            simulate = functools.partial(self._simulate, n)
            self._graphs[n] = tf.function(simulate, autograph=False)
        return self._graphs[n](tf.cast(seed, tf.int32))

    def _simulate(self, n, seed):
        parameters, data = self._draw(n, seed)
        u = self._target.free(parameters)
        flat = [
            tf.cast(tf.reshape(part, [n, size]), tf.float64)
            for part, size in zip(data, self.sizes, strict=True)
        ]
        y = tf.concat(flat, -1)
        usable = tf.reduce_all(tf.math.is_finite(u), -1) & tf.reduce_all(tf.math.is_finite(y), -1)
        zero = tf.zeros([], tf.float64)
        return (
            tf.where(usable[:, tf.newaxis], u, tf.cast(zero, u.dtype)),
            tf.where(usable[:, tf.newaxis], y, zero),
            usable,
        )

    def log_density(self, u, y):
        """Returns log p(y, parameters) + log |d parameters / du| in nats.

        Args:
          u: unconstrained parameters, [n, dim].
          y: one data set, [features].
        Returns:
          Log densities, [n]; minus infinity where the model's density is NaN.
        """
        assert self._pin is not None
        density = self._target.log_density_by(self._pin(self.parts(y)), u)
        return tf.where(tf.math.is_nan(density), tf.constant(-np.inf, density.dtype), density)

    def log_densities(self, u, y):
        """Returns `log_density` for several y.

        Args:
          u: unconstrained parameters, [batch, n, dim].
          y: data sets, [batch, features].
        Returns:
          Log densities, [batch, n].
        """
        return tf.map_fn(
            lambda pair: self.log_density(*pair), (u, y), fn_output_signature=self.dtype
        )

    def constrain(self, u):
        """Maps u to parameters in the model's structure and dtypes, [n, dim] -> [n, ...]."""
        return self._target.constrain(u)

    def unconstrain(self, parameters):
        """Applies the inverse of `constrain`, and returns a tensor [n, dim]."""
        return self._target.free(parameters)

    def log_volume(self, u):
        """Returns log |d parameters / du| in nats, [n, dim] -> [n]."""
        return self._target.log_volume(u)

    def coordinates(self) -> list[str]:
        """Returns a name for each entry of u."""
        return self._target.coordinates()

    def parts(self, y) -> dict[str, Any]:
        """Splits y [features] into the observed parts by name, in the model's shapes and dtypes."""
        pieces = tf.split(y, self.sizes)
        return {
            name: tf.cast(tf.reshape(piece, shape), dtype)
            for piece, (name, (shape, dtype)) in zip(pieces, self.observed.items(), strict=True)
        }

    def flat(self, y) -> np.ndarray:
        """Returns a user's observed data as a row, [1, features].

        Args:
          y: a dict of arrays by name, or an array if a single part is observed.
        Raises:
          UserError: names or shapes differ from the model's, or values are not finite numbers.
        """
        if not isinstance(y, Mapping) and len(self.observed) == 1:
            y = {next(iter(self.observed)): y}
        if not isinstance(y, Mapping) or set(y) != set(self.observed):
            names = sorted(y) if isinstance(y, Mapping) else f"a {type(y).__name__}"
            raise UserError(f"y is {names}; expected a dict with {', '.join(self.observed)}")
        row = []
        for name, (shape, dtype) in self.observed.items():
            try:
                value = np.asarray(y[name], np.float64)
            except (TypeError, ValueError) as error:
                raise UserError(
                    f"observed '{name}' is not numeric ({first_line(error)}); expected an array of "
                    f"{dtype.name}"
                ) from error
            if value.shape != tuple(shape):
                raise UserError(
                    f"observed '{name}' has shape {value.shape}; expected {tuple(shape)}, a single "
                    "data set: call once for each"
                )
            if not np.isfinite(value).all():
                place = list(map(int, np.argwhere(~np.isfinite(value))[0]))
                raise UserError(
                    f"observed '{name}' is {value[tuple(place)]} at {place}; expected finite "
                    "numbers: leave missing values out of data and model"
                )
            row.append(value.ravel())
        return np.concatenate(row)[np.newaxis]

    def _check(self):
        """Simulates a few pairs, and checks that the log density of each pair alone is finite.

        Raises:
          UserError: the check fails; the message says why.
        """
        try:
            pairs = self.simulate(_TRIAL, tf.constant([0, 1]))
        except UserError:
            raise
        except Exception as error:  # TFP or a user's model may raise anything
            raise UserError(
                f"the model cannot be simulated ({type(error).__name__}: {first_line(error)}); "
                f"expected {_TRIAL} draws of shapes [{_TRIAL}, ...] at once: write it for batches, "
                "with [..., i] instead of [i], or as an AutoBatched joint"
            ) from error
        u, y, usable = (np.asarray(part) for part in pairs)
        if usable.mean() < 1.0 - _UNUSABLE:
            raise UserError(
                f"{np.mean(~usable):.0%} of the simulated pairs are not finite; expected finite "
                "parameters and data: check the model by `sample`"
            )
        if not self.has_density:
            return
        rows = np.flatnonzero(usable)[:_ROWS]
        density: Any = tf.function(self.log_density, autograph=False)
        own = np.concatenate([density(tf.constant(u[i : i + 1]), tf.constant(y[i])) for i in rows])
        if not np.isfinite(own).all():
            raise UserError(
                "the log density is not finite at the model's own draws; expected a batch of "
                "independent draws: write the model for batches, or as an AutoBatched joint"
            )


def of_joint(joint, observed: Sequence[str]) -> Simulation:
    """Returns the simulation of a TFP joint distribution.

    Args:
      joint: the joint distribution.
      observed: names of its parts that will be observed.
    Raises:
      UserError: the joint has no part of such a name, or `posteriors.models` refuses the model.
    """
    observed = _names(observed)
    names = list(joint._flat_resolve_names())  # TFP has no public list of names
    if unknown := [name for name in observed if name not in names]:
        raise UserError(
            f"observed '{unknown[0]}' is no part of the joint; expected some of {', '.join(names)}"
        )
    drawn = _by_name(joint, joint.sample(seed=_seed(joint, 0)))
    pinned = models.pin(joint, {name: drawn[name] for name in observed})
    target = models.of_joint(pinned)

    def draw(n, seed):
        values = _by_name(joint, joint.sample(n, seed=_seed(joint, seed)))
        return models.structured(pinned, values), [values[name] for name in observed]

    def pin(values):
        return joint.experimental_pin(**values).unnormalized_log_prob

    parts = {name: (drawn[name].shape, drawn[name].dtype) for name in observed}
    return Simulation(target, parts, draw, pin)


def of_simulator(simulator, prior, observed: Sequence[str]) -> Simulation:
    """Returns the simulation of a simulator, a function without a density.

    Args:
      simulator: function from parameters [n, ...], in the prior's structure, and a seed, int32 [2],
        to data [n, ...], one array or a dict by name. It may use TensorFlow or numpy.
      prior: a TFP distribution of the parameters.
      observed: names of the data.
    Raises:
      UserError: the prior is not a TFP distribution, or the simulator fails.
    """
    observed = _names(observed)
    if not isinstance(prior, tfd.Distribution):
        raise UserError(
            f"prior is of type {type(prior).__name__}; expected a TFP distribution of the "
            "parameters, as the model is a function"
        )
    if isinstance(prior, tfd.JointDistribution):
        for name, part in zip(
            prior._flat_resolve_names(), prior._get_single_sample_distributions(), strict=True
        ):
            constraints.checked(name, part)
        kind = (
            joint_distribution._DefaultJointBijectorAutoBatched
            if prior.use_vectorized_map
            else joint_distribution._DefaultJointBijector
        )
        bijector = kind(prior, bijector_fn=constraints.of_distribution)
    else:
        bijector = constraints.checked("parameters", prior)
    target = Target(prior.log_prob, bijector, prior.event_shape, prior.dtype)

    def data_of(parameters, seed):
        values = simulator(parameters, seed)
        if isinstance(values, Mapping):
            if set(values) != set(observed):
                raise UserError(
                    f"the simulator returned {', '.join(map(str, values))}; expected "
                    f"{', '.join(observed)}, as `observed` says"
                )
            return [values[name] for name in observed]
        if len(observed) > 1:
            raise UserError(
                f"the simulator returned a {type(values).__name__}; expected a dict with "
                f"{', '.join(observed)}"
            )
        return [values]

    trial = prior.sample(_ROWS, seed=_seed(prior, 0))
    try:
        values = [np.asarray(v) for v in data_of(trial, tf.constant([0, 0]))]
    except UserError:
        raise
    except Exception as error:  # a user's code may raise anything
        raise UserError(
            f"the simulator fails ({type(error).__name__}: {first_line(error)}); expected a "
            "function of a batch of parameters [n, ...] and a seed [2]"
        ) from error
    for name, value in zip(observed, values, strict=True):
        if value.shape[:1] != (_ROWS,) or value.dtype.kind not in "fiub":
            raise UserError(
                f"'{name}' of the simulator is {value.dtype} of shape {value.shape} for {_ROWS} "
                f"parameters; expected numbers [{_ROWS}, ...]"
            )
    parts = {
        name: (tf.TensorShape(value.shape[1:]), tf.as_dtype(value.dtype))
        for name, value in zip(observed, values, strict=True)
    }
    dtypes = [dtype for _, dtype in parts.values()]
    portable = _traces(data_of, trial)
    compute = data_of if portable else _by_numpy(data_of, prior.dtype, dtypes)

    def draw(n, seed):
        # numpy refuses negative seeds, so the sign bit is cleared.
        seeds = tf.bitwise.bitwise_and(tf.random.split(tf.cast(seed, tf.int32), 2), 2**31 - 1)
        parameters = prior.sample(n, seed=_seed(prior, seeds[0]))
        return parameters, compute(parameters, seeds[1])

    return Simulation(target, parts, draw, None, portable)


def _traces(data_of, trial) -> bool:
    """Returns whether a simulator consists of TensorFlow's operations, so that it can be traced."""
    try:
        tf.function(data_of, autograph=False).get_concrete_function(trial, tf.constant([0, 0]))
    except Exception:  # a user's code may raise anything when it gets symbolic tensors
        return False
    return True


def _by_numpy(data_of, structure, dtypes):
    """Wraps a numpy simulator so that graphs can call it."""

    def call(seed, *flat):
        parameters = tf.nest.pack_sequence_as(structure, list(flat))
        values = data_of(parameters, seed)
        return [np.asarray(v, d.as_numpy_dtype) for v, d in zip(values, dtypes, strict=True)]

    def compute(parameters, seed):
        values = tf.numpy_function(call, [seed, *tf.nest.flatten(parameters)], dtypes)
        return tf.nest.flatten(values)  # `numpy_function` returns a single value without a list

    return compute


def _names(observed) -> tuple[str, ...]:
    if isinstance(observed, str):
        observed = (observed,)
    names = isinstance(observed, Sequence) and all(isinstance(name, str) for name in observed)
    if not observed or not names:
        raise UserError(
            f"observed is {observed!r}; expected names of the parts that will be observed, such "
            'as ("y",)'
        )
    return tuple(observed)


def _by_name(joint, drawn) -> dict[str, Any]:
    return dict(zip(joint._flat_resolve_names(), joint._model_flatten(drawn), strict=True))


def _seed(distribution, seed):
    """Returns the seed for a distribution's `sample`, or 0 for an AutoBatched joint.

    With a stateless seed, an AutoBatched joint would loop over the draws. Without one, its random
    numbers depend on TensorFlow's global seed and on the order of the calls.
    """
    if getattr(distribution, "use_vectorized_map", False):
        return 0
    return tf.constant([0, seed]) if isinstance(seed, int) else tf.cast(seed, tf.int32)


def size_of(shape) -> int:
    """Returns the number of entries of a known shape."""
    return int(np.prod(tuple(shape), dtype=int))
