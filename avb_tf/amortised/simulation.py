"""A user's model as a source of pairs: unconstrained parameters u and data y, flat vectors.

The data are the model's parts that will be observed, side by side in float64 [n, features], so that
counts keep their digits; the network reads them as float32.
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

_TRIAL = 64  # pairs that check a model
_ROWS = 5  # rows of a batch that are compared with rows by themselves
_UNUSABLE = 0.01  # share of pairs that may be at the edge of a float


class Simulation:
    """Pairs of a joint distribution, or of a simulator and its prior, and their density.

        simulation = of_joint(joint, ("y",))
        u, y, usable = simulation.simulate(512, tf.constant([0, 1]))
        simulation.log_density(u, y[0])  # of many u and one y, [512]

    Attributes:
      dim: of u.
      dtype: of u.
      features: of y.
      observed: name -> (shape, dtype) of each part of y, in their order.
      names: of the parameters.
      has_density: whether `log_density` is known; if not, it is a simulator's.
    """

    def __init__(
        self,
        target: Target,
        parts: Mapping[str, tuple[tf.TensorShape, tf.DType]],
        draw: Callable[[Any, Any], tuple[Any, list]],
        redraw: Callable[[Any, Any], list],
        pin: Callable[[dict], Any] | None,
        terms: Callable[[Any, dict], tuple[Any, Any]] | None = None,
        portable: bool = True,
    ):
        """From functions of a model.

        Args:
          target: the posterior of one y, or the prior where there is no density.
          parts: name -> (shape, dtype) of what is observed.
          draw: (n, seed) -> parameters in their structure, and the observed parts [n, ...].
          redraw: (parameters [n, ...], seed) -> new observed parts [n, ...].
          pin: observed values by name -> log density of the parameters, or None.
          terms: (parameters, observed values by name), each [n, ...] -> log prior and log
            likelihood of each pair, [n]; or None.
          portable: whether `draw` is of TensorFlow's operations alone, so that it can be saved.
        Raises:
          UserError: a model that gives no pairs, or whose batches are not what its draws are.
        """
        self._target, self._draw, self._redraw = target, draw, redraw
        self._pin, self._terms = pin, terms
        self.portable = portable
        self.dim, self.dtype, self.names = target.dim, target.dtype, target.names
        self.observed = dict(parts)
        self.sizes = [size_of(shape) for shape, _ in self.observed.values()]
        self.features, self.has_density = sum(self.sizes), pin is not None
        self._graphs: dict[int, Any] = {}
        self._check()

    def simulate(self, n: int, seed):
        """`n` new pairs of the joint.

        Args:
          n: their number, a Python integer.
          seed: integers [2].
        Returns:
          u [n, dim], y [n, features], and whether each u is finite, boolean [n]; where it is not,
          u is 0.
        """
        if n not in self._graphs:
            simulate = functools.partial(self._simulate, n)
            self._graphs[n] = tf.function(simulate, autograph=False)
        return self._graphs[n](tf.cast(seed, tf.int32))

    def _simulate(self, n, seed):
        parameters, data = self._draw(n, seed)
        return usable_pairs(self._target.free(parameters), self.side_by_side(data))

    def data(self, u, seed):
        """New data of given parameters, u [n, dim] -> y [n, features]."""
        return self.side_by_side(self._redraw(self.constrain(u), seed))

    def side_by_side(self, data):
        """Observed parts [n, ...] in their order as y [n, features]."""
        flat = [
            tf.cast(tf.reshape(part, [-1, size]), tf.float64)
            for part, size in zip(data, self.sizes, strict=True)
        ]
        return tf.concat(flat, -1)

    def log_density(self, u, y):
        """log p(y, parameters) + log |d parameters / du| in nats.

        Args:
          u: [n, dim].
          y: [features], one data set.
        Returns:
          [n]; minus infinity where the model's density is NaN.
        """
        assert self._pin is not None
        density = self._target.log_density_by(self._pin(self.parts(y)), u)
        return tf.where(tf.math.is_nan(density), tf.constant(-np.inf, density.dtype), density)

    def log_densities(self, u, y):
        """The same for several y: u [batch, n, dim] and y [batch, features] -> [batch, n]."""
        return tf.map_fn(
            lambda pair: self.log_density(*pair), (u, y), fn_output_signature=self.dtype
        )

    def terms(self, u, y):
        """Log prior of u and log likelihood of pairs in nats, [n, dim], [n, features] -> [n] each.

        Their sum is `log_density`.
        """
        assert self._terms is not None
        prior, likelihood = self._terms(self.constrain(u), self.parts(y))
        return tf.cast(prior, self.dtype) + self.log_volume(u), tf.cast(likelihood, self.dtype)

    def constrain(self, u):
        """The model's parameters, [n, dim] -> [n, ...] in the model's structure and dtypes."""
        return self._target.constrain(u)

    def unconstrain(self, parameters):
        """The inverse of `constrain`, a tensor."""
        return self._target.free(parameters)

    def log_volume(self, u):
        """log |d parameters / du| in nats, [n, dim] -> [n]."""
        return self._target.log_volume(u)

    def coordinates(self) -> list[str]:
        """A name for each entry of u."""
        return self._target.coordinates()

    def parts(self, y) -> dict[str, Any]:
        """y [..., features] as the observed parts by name, in the model's shapes and dtypes."""
        leading = tf.unstack(tf.shape(y))[:-1]
        pieces = tf.split(y, self.sizes, -1)
        return {
            name: tf.cast(tf.reshape(piece, [*leading, *shape]), dtype)
            for piece, (name, (shape, dtype)) in zip(pieces, self.observed.items(), strict=True)
        }

    @property
    def shapes(self) -> dict[str, list]:
        """Name -> shape of each observed part of a data set, of the largest if they differ."""
        return {name: list(shape) for name, (shape, _) in self.observed.items()}

    def check_in_graph(self, y) -> None:
        """Raises an error in the graph for y [n, features] that no data sets could be."""
        tf.debugging.Assert(tf.reduce_all(tf.math.is_finite(y)), ["data that are not finite"])

    def outcome(self, u, seed):
        """New data that parameters predict, u [n, dim] -> [n, features]: a data set, or a row."""
        return self.data(u, seed)

    def features_by_name(self) -> list[str]:
        """A name for each of `features`, such as "y[3]"."""
        return [
            f"{name}{list(i)}" if i else name
            for name, (shape, _) in self.observed.items()
            for i in np.ndindex(*map(int, shape))
        ]

    def like(self, y) -> "Simulation":
        """The model as a source of data sets of the size of y [n, features]: itself."""
        del y
        return self

    def summary(self, y) -> np.ndarray:
        """Numbers by which data sets y [n, features] are compared with each other: y itself."""
        return y

    def flat(self, y) -> np.ndarray:
        """What a user observed as a row, [1, features].

        Args:
          y: a dict of arrays by name, or the array alone where one part is observed.
        Raises:
          UserError: other names or shapes than the model's, or values that are not finite.
        """
        values = named(y, self.observed)
        for name, (shape, _) in self.observed.items():
            if values[name].shape != tuple(shape):
                raise UserError(
                    f"observed '{name}' has shape {values[name].shape}; expected {tuple(shape)}, a "
                    "single data set: call once for each"
                )
        return np.concatenate([value.ravel() for value in values.values()])[np.newaxis]

    def _check(self):
        """Simulates a few pairs, and compares their densities with each by itself.

        Raises:
          UserError: what is wrong, in one line.
        """
        try:
            pairs = self.simulate(_TRIAL, tf.constant([0, 1]))
        except UserError:
            raise
        except Exception as error:  # whatever TFP or a user's model raises
            raise UserError(
                f"the model cannot be simulated ({type(error).__name__}: {first_line(error)}); "
                f"expected {_TRIAL} draws of shapes [{_TRIAL}, ...] at once: write it for batches, "
                "with [..., i] in place of [i], or as an AutoBatched joint"
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
                "the log density is not finite at the model's own draws; expected that their batch "
                "is of independent draws: write the model for batches, or as an AutoBatched joint"
            )


def of_joint(joint, observed: Sequence[str]) -> Simulation:
    """The pairs of a TFP joint distribution.

    Args:
      joint: the joint distribution.
      observed: names of its parts that will be observed.
    Raises:
      UserError: names that it does not have, or a model that `posteriors.models` refuses.
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

    def redraw(parameters, seed):
        known = dict(zip(target.names, tf.nest.flatten(parameters), strict=True))
        seeds = tf.random.split(tf.cast(seed, tf.int32), 2)
        values = _by_name(joint, joint.sample(seed=_seed(joint, seeds[0]), **known))
        # A part that depends on no parameter comes without a batch: there each pair needs its own.
        single = [name for name in observed if values[name].shape.rank == drawn[name].shape.rank]
        if single:
            count = tf.shape(next(iter(known.values())))[0]
            others = _by_name(joint, joint.sample(count, seed=_seed(joint, seeds[1])))
            known |= {name: others[name] for name in single}
            values = _by_name(joint, joint.sample(seed=_seed(joint, seeds[0]), **known))
        return [values[name] for name in observed]

    def pin(values):
        return joint.experimental_pin(**values).unnormalized_log_prob

    def terms(parameters, values):
        known = dict(zip(target.names, tf.nest.flatten(parameters), strict=True))
        densities = _by_name(joint, joint.log_prob_parts(**known, **values))
        return [tf.add_n([densities[name] for name in part]) for part in (known, observed)]

    parts = {name: (drawn[name].shape, drawn[name].dtype) for name in observed}
    return Simulation(target, parts, draw, redraw, pin, terms)


def of_simulator(simulator, prior, observed: Sequence[str]) -> Simulation:
    """The pairs of a function without a density.

    Args:
      simulator: (parameters [n, ...] in the prior's structure, seed int32 [2]) -> data [n, ...],
        one array or a dict by name; of TensorFlow's operations or of numpy's.
      prior: a TFP distribution of the parameters.
      observed: names of the data.
    Raises:
      UserError: a prior that is none, or a simulator that fails.
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
    except Exception as error:  # whatever a user's code raises
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
        # numpy takes no negative seeds
        seeds = tf.bitwise.bitwise_and(tf.random.split(tf.cast(seed, tf.int32), 2), 2**31 - 1)
        parameters = prior.sample(n, seed=_seed(prior, seeds[0]))
        return parameters, compute(parameters, seeds[1])

    def redraw(parameters, seed):
        return compute(parameters, tf.bitwise.bitwise_and(tf.cast(seed, tf.int32), 2**31 - 1))

    return Simulation(target, parts, draw, redraw, None, portable=portable)


def _traces(data_of, trial) -> bool:
    """Whether a simulator is of TensorFlow's operations."""
    try:
        tf.function(data_of, autograph=False).get_concrete_function(trial, tf.constant([0, 0]))
    except Exception:  # whatever a user's code raises of symbolic tensors
        return False
    return True


def _by_numpy(data_of, structure, dtypes):
    """A simulator of numpy within a graph."""

    def call(seed, *flat):
        parameters = tf.nest.pack_sequence_as(structure, list(flat))
        values = data_of(parameters, seed)
        return [np.asarray(v, d.as_numpy_dtype) for v, d in zip(values, dtypes, strict=True)]

    def compute(parameters, seed):
        values = tf.numpy_function(call, [seed, *tf.nest.flatten(parameters)], dtypes)
        return tf.nest.flatten(values)  # of a single one it is no list

    return compute


def usable_pairs(u, y):
    """u and y with zeros where either is not finite, and where both are, boolean [n]."""
    usable = tf.reduce_all(tf.math.is_finite(u), -1) & tf.reduce_all(tf.math.is_finite(y), -1)
    each = usable[:, tf.newaxis]
    return tf.where(each, u, tf.zeros([], u.dtype)), tf.where(each, y, 0.0), usable


def named(y, observed: Mapping) -> dict[str, np.ndarray]:
    """What a user observed as arrays by name.

    Args:
      y: a dict of arrays by name, or the array alone where one part is observed.
      observed: name -> (shape, dtype).
    Raises:
      UserError: other names than the model's, or values that are not finite numbers.
    """
    if not isinstance(y, Mapping) and len(observed) == 1:
        y = {next(iter(observed)): y}
    if not isinstance(y, Mapping) or set(y) != set(observed):
        names = sorted(y) if isinstance(y, Mapping) else f"a {type(y).__name__}"
        raise UserError(f"y is {names}; expected a dict with {', '.join(observed)}")
    values = {}
    for name, (_, dtype) in observed.items():
        try:
            value = values[name] = np.asarray(y[name], np.float64)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"observed '{name}' is not numeric ({first_line(error)}); expected an array of "
                f"{dtype.name}"
            ) from error
        if not np.isfinite(value).all():
            place = list(map(int, np.argwhere(~np.isfinite(value))[0]))
            raise UserError(
                f"observed '{name}' is {value[tuple(place)]} at {place}; expected finite numbers: "
                "leave missing values out of data and model"
            )
    return values


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
    """Stateless where TFP vectorises it; an AutoBatched joint would loop over draws.

    Its numbers are then those of TensorFlow's global seed and the call's turn.
    """
    if getattr(distribution, "use_vectorized_map", False):
        return 0
    return tf.constant([0, seed]) if isinstance(seed, int) else tf.cast(seed, tf.int32)


def size_of(shape) -> int:
    """Number of entries of a known shape."""
    return int(np.prod(tuple(shape), dtype=int))
