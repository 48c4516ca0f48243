"""Simulations of a user's model: a TFP joint distribution, or a simulator with a prior."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow_probability import distributions as tfd
from tensorflow_probability.python.distributions import joint_distribution

from avb_tf.amortised.simulation import Simulation, size_of
from avb_tf.errors import UserError
from avb_tf.posteriors import constraints, models
from avb_tf.posteriors.target import Target, first_line

_TRIAL = 5  # parameters in the first call of a simulator
_MOST_ROWS = 500  # draws of a `tfd.Sample`; the network of the rows would take too long for more
_SEEDS = 20  # seeds for which a simulator may return the same data by chance


def of_joint(joint: tfd.JointDistribution, observed: Sequence[str]) -> Simulation:
    """Returns the simulation of a TFP joint distribution.

    Args:
      joint: the joint distribution.
      observed: names of its parts that will be observed.
    Raises:
      UserError: the joint has no part of such a name, or `posteriors.models` refuses the model.
    """
    observed = names_of(observed)
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
        # A part that depends on no parameter is drawn without a batch. Each pair needs its own.
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
    return Simulation(target, parts, draw, redraw, pin, terms, row=_row(joint, observed))


def of_simulator(
    simulator: Callable[[Any, Any], Any], prior: Any, observed: Sequence[str]
) -> Simulation:
    """Returns the simulation of a simulator, a function without a density.

    Args:
      simulator: function from parameters [n, ...], in the prior's structure, and a seed, int32 [2],
        to data [n, ...], one array or a dict by name. It may use TensorFlow or numpy.
      prior: a TFP distribution of the parameters.
      observed: names of the data.
    Raises:
      UserError: the prior is not a TFP distribution, or the simulator fails.
    """
    observed = names_of(observed)
    target = target_of(prior)
    data_of = _listed(simulator, observed)
    trial = prior.sample(_TRIAL, seed=_seed(prior, 0))
    parts = _tried(data_of, trial, observed)
    portable = _traces(data_of, trial)
    dtypes = [dtype for _, dtype in parts.values()]
    compute = data_of if portable else _by_numpy(data_of, prior.dtype, dtypes)

    def draw_prior(n, seed):
        return prior.sample(n, seed=_seed(prior, seed))

    def draw(n, seed):
        seeds = tf.random.split(tf.cast(seed, tf.int32), 2)
        parameters = draw_prior(n, seeds[0])
        return parameters, redraw(parameters, seeds[1])

    def redraw(parameters, seed):
        # numpy refuses negative seeds, so the sign bit is cleared.
        return compute(parameters, tf.bitwise.bitwise_and(tf.cast(seed, tf.int32), 2**31 - 1))

    return Simulation(target, parts, draw, redraw, None, portable=portable, draw_prior=draw_prior)


def target_of(prior: Any) -> Target:
    """Returns the prior of a simulator's parameters as a density of unconstrained vectors.

    Raises:
      UserError: it is not a TFP distribution, or its bijector is wrong.
    """
    if not isinstance(prior, tfd.Distribution):
        raise UserError(
            f"prior is of type {type(prior).__name__}; expected a TFP distribution of the "
            "parameters, which a simulator or its pairs cannot give"
        )
    return Target(prior.log_prob, _bijector(prior), prior.event_shape, prior.dtype)


def draws_of(prior: Any, n: int, seed: int) -> Any:
    """Returns `n` draws of a prior in its structure, [n, ...]."""
    return prior.sample(n, seed=_seed(prior, seed))


def _row(joint, observed) -> int | None:
    """Returns the dimensions of one draw if all that is observed is a `tfd.Sample`."""
    distributions = joint._get_single_sample_distributions()
    part = dict(zip(joint._flat_resolve_names(), distributions, strict=True))[observed[0]]
    if len(observed) > 1 or not isinstance(part, tfd.Sample) or part.batch_shape.rank:
        return None
    size = size_of(part.distribution.event_shape)
    return size if size_of(part.event_shape) <= _MOST_ROWS * size else None


def _bijector(prior):
    """Returns the checked bijector of a prior, part by part if it is a joint distribution."""
    if not isinstance(prior, tfd.JointDistribution):
        return constraints.checked("parameters", prior)
    for name, part in zip(
        prior._flat_resolve_names(), prior._get_single_sample_distributions(), strict=True
    ):
        constraints.checked(name, part)
    joints: Any = joint_distribution  # TFP has no public way to choose the parts' bijectors
    kind = (
        joints._DefaultJointBijectorAutoBatched
        if prior.use_vectorized_map
        else joints._DefaultJointBijector
    )
    return kind(prior, bijector_fn=constraints.of_distribution)


def _listed(simulator, observed):
    """Wraps a simulator so that it returns a list of the observed parts, in their order."""

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

    return data_of


def _tried(data_of, trial, observed):
    """Calls a simulator a few times; returns shape and dtype of each observed part, by name."""

    def called(seed):
        return [np.asarray(v) for v in data_of(trial, tf.constant([0, seed]))]

    try:
        values, again = called(0), called(0)
        noisy = not any(np.isfinite(value).any() for value in values) or any(
            _differ(value, other)  # most often already for the first of the other seeds
            for seed in range(1, _SEEDS)
            for value, other in zip(values, called(seed), strict=True)
        )
    except UserError:
        raise
    except Exception as error:  # a user's code may raise anything
        raise UserError(
            f"the simulator fails ({type(error).__name__}: {first_line(error)}); expected a "
            "function of a batch of parameters [n, ...] and a seed [2]"
        ) from error
    for name, value, other in zip(observed, values, again, strict=True):
        if value.shape[:1] != (_TRIAL,) or value.dtype.kind not in "fiub":
            raise UserError(
                f"'{name}' of the simulator is {value.dtype} of shape {value.shape} for {_TRIAL} "
                f"parameters; expected numbers [{_TRIAL}, ...]"
            )
        # A graph would hold the noise of a generator without this seed as a constant.
        if not np.array_equal(value, other, equal_nan=True):
            raise UserError(
                f"the simulator returned different '{name}' for the same parameters and seed; "
                "expected equal ones: draw the noise from `seed`, for example by "
                "np.random.default_rng(np.asarray(seed))"
            )
    if not noisy:
        raise UserError(
            f"the simulator returned the same data for {_SEEDS} seeds; expected noise drawn from "
            "`seed`, since a posterior given exact data has no density: add the measurement's error"
        )
    return {
        name: (tf.TensorShape(value.shape[1:]), tf.as_dtype(value.dtype))
        for name, value in zip(observed, values, strict=True)
    }


def _differ(value, other) -> bool:
    """Returns whether entries that are finite in both arrays differ, or their shapes."""
    if value.shape != other.shape:
        return True
    known = np.isfinite(value) & np.isfinite(other)
    return not np.array_equal(value[known], other[known])


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


def names_of(observed: Any) -> tuple[str, ...]:
    """Returns the names of the observed parts as a tuple.

    Raises:
      UserError: they are not one or more names.
    """
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
