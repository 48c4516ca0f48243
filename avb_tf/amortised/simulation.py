"""A user's model as a source of simulated pairs of flat vectors: unconstrained u and data y.

The data are those parts of the model that will be observed, concatenated to [n, features]. They are
in float64, so that counts keep all their digits; the network converts them to float32.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from avb_tf.errors import UserError
from avb_tf.posteriors.target import Structure, Target, first_line

DataSet = npt.ArrayLike | Mapping[str, npt.ArrayLike]  # one array, or arrays by name
_TRIAL = 64  # pairs simulated to check a model
_ROWS = 5  # pairs whose densities are checked
_USABLE = 0.1  # smallest share of pairs that must be finite; training would take too long below


class Table(NamedTuple):
    """What is known of finished pairs."""

    u: np.ndarray  # [n, dim], parameters held out from training
    y: np.ndarray  # [n, features], their data
    count: int  # pairs for training


class Simulation:
    """Pairs of a joint distribution, or of a simulator and its prior, and their density.

        simulation = of_joint(joint, ("y",))
        u, y, usable = simulation.simulate(512, tf.constant([0, 1]))
        simulation.log_density(u, y[0])  # for many u and one y, [512]

    Attributes:
      dim: dimensions of u.
      dtype: dtype of u.
      features: dimensions of y.
      row: dimensions of each row if y consists of rows whose order does not matter, or else None.
      observed: name -> (shape, dtype) of each part of y, in their order in y.
      names: names of the parameters.
      has_density: whether `log_density` is known; it is not for a simulator.
      portable: whether `simulate` can be saved, as it uses only TensorFlow's operations.
      table: the finished pairs from which `simulate` chooses; None if it simulates new ones.
      digest: digest of these pairs; "" if there are none.
    """

    table: Table | None = None
    digest: str = ""

    def __init__(
        self,
        target: Target,
        parts: Mapping[str, tuple[tf.TensorShape, tf.DType]],
        draw: Callable[[Any, Any], tuple[Structure, list[tf.Tensor]]],
        redraw: Callable[[Structure, Any], list[tf.Tensor]],
        pin: Callable[[dict[str, tf.Tensor]], Callable[[Structure], tf.Tensor]] | None,
        terms: Callable[[Structure, dict[str, tf.Tensor]], Sequence[tf.Tensor]] | None = None,
        portable: bool = True,
        row: int | None = None,
        draw_prior: Callable[[Any, Any], Structure] | None = None,
    ):
        """Builds the simulation from functions of a model.

        Args:
          target: the posterior of some y, or the prior if there is no density.
          parts: name -> (shape, dtype) of each observed part.
          draw: function from (n, seed) to parameters in their structure and a list of the observed
            parts, [n, ...] each.
          redraw: function from (parameters [n, ...], seed) to a list of new observed parts,
            [n, ...] each.
          pin: function from observed values by name to the log density of the parameters; None if
            the density is unknown.
          terms: function from parameters and observed values by name, [n, ...] each, to the log
            prior and the log likelihood of each pair, [n]; None if the density is unknown.
          portable: whether `draw` uses only TensorFlow's operations, so that it can be saved.
          row: dimensions of each row if y consists of independent rows of one distribution. If the
            density nevertheless depends on their order, y is one whole.
          draw_prior: function from (n, seed) to parameters alone; None: those of `draw`, whose data
            are not computed if they are TensorFlow's operations.
        Raises:
          UserError: the model cannot be simulated, or its draws in a batch are not independent.
        """
        self._target, self._draw, self._redraw = target, draw, redraw
        self._pin, self._terms = pin, terms
        self._draw_prior = draw_prior or (lambda n, seed: draw(n, seed)[0])
        self.portable, self.row = portable, row
        self.dim, self.dtype, self.names = target.dim, target.dtype, target.names
        self.observed = dict(parts)
        self.sizes = [size_of(shape) for shape, _ in self.observed.values()]
        self.features, self.has_density = sum(self.sizes), pin is not None
        self._graphs: dict[int, Any] = {}
        self._check()

    def simulate(self, n: int, seed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Simulates new pairs.

        Args:
          n: number of pairs, a Python integer.
          seed: integers [2].
        Returns:
          u [n, dim], y [n, features], and whether each pair is finite, boolean [n]; u and y are 0
          where it is not. To leave these pairs out does not change the posterior of finite data.
        """
        if n not in self._graphs:
            simulate = functools.partial(self._simulate, n)
            self._graphs[n] = tf.function(simulate, autograph=False)
        return self._graphs[n](tf.cast(seed, tf.int32))

    def _simulate(self, n, seed):
        parameters, data = self._draw(n, seed)
        return usable_pairs(self._target.free(parameters), self.side_by_side(data))

    def sample_prior(self, n: int, seed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Draws parameters, whether or not their data are finite.

        Args:
          n: number of draws, a Python integer.
          seed: integers [2].
        Returns:
          u [n, dim], and whether each is finite, boolean [n]; u is 0 where it is not.
        """
        u = self._target.free(self._draw_prior(n, seed))
        u, _, usable = usable_pairs(u, tf.zeros([n, 1], tf.float64))
        return u, usable

    def data(self, u: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """Simulates new data for given parameters, u [n, dim] -> y [n, features]."""
        return self.side_by_side(self._redraw(self.constrain(u), seed))

    def side_by_side(self, data: Sequence[tf.Tensor]) -> tf.Tensor:
        """Concatenates the observed parts [n, ...], in their order, to y [n, features]."""
        flat = [
            tf.cast(tf.reshape(part, [-1, size]), tf.float64)
            for part, size in zip(data, self.sizes, strict=True)
        ]
        return tf.concat(flat, -1)

    def log_density(self, u: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
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

    def log_densities(self, u: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
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

    def terms(self, u: tf.Tensor, y: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the log prior and the log likelihood of pairs in nats; their sum is the density.

        Args:
          u: unconstrained parameters, [n, dim].
          y: data sets, [n, features].
        Returns:
          Log prior, with log |d parameters / du|, and log likelihood, [n] each.
        """
        assert self._terms is not None
        prior, likelihood = self._terms(self.constrain(u), self.parts(y))
        return tf.cast(prior, self.dtype) + self.log_volume(u), tf.cast(likelihood, self.dtype)

    def constrain(self, u: tf.Tensor) -> Structure:
        """Maps u to parameters in the model's structure and dtypes, [n, dim] -> [n, ...]."""
        return self._target.constrain(u)

    def unconstrain(self, parameters: Structure) -> tf.Tensor:
        """Applies the inverse of `constrain`, and returns a tensor [n, dim]."""
        return self._target.free(parameters)

    def log_volume(self, u: tf.Tensor) -> tf.Tensor:
        """Returns log |d parameters / du| in nats, [n, dim] -> [n]."""
        return self._target.log_volume(u)

    def coordinates(self) -> list[str]:
        """Returns a name for each entry of u."""
        return self._target.coordinates()

    def parts(self, y: np.ndarray | tf.Tensor) -> dict[str, tf.Tensor]:
        """Splits y [..., features] into parts by name, in the model's shapes and dtypes."""
        leading = tf.unstack(tf.shape(y))[:-1]
        pieces = tf.split(y, self.sizes, -1)
        return {
            name: tf.cast(tf.reshape(piece, [*leading, *shape]), dtype)
            for piece, (name, (shape, dtype)) in zip(pieces, self.observed.items(), strict=True)
        }

    @property
    def shapes(self) -> dict[str, list[int | None]]:
        """The shape of each observed part by name; that of the largest data set if sizes differ."""
        return {name: list(shape) for name, (shape, _) in self.observed.items()}

    def check_in_graph(self, y: tf.Tensor) -> None:
        """Adds an assertion to the graph that fails if y [n, features] is not finite."""
        tf.debugging.Assert(tf.reduce_all(tf.math.is_finite(y)), ["data that are not finite"])

    def outcome(self, u: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """Simulates what parameters predict, u [n, dim] -> [n, features]: a data set, or a row."""
        return self.data(u, seed)

    def features_by_name(self) -> list[str]:
        """Returns a name for each of `features`, such as "y[3]"."""
        return [
            f"{name}{list(i)}" if i else name
            for name, (shape, _) in self.observed.items()
            for i in np.ndindex(*map(int, shape))
        ]

    def like(self, y: np.ndarray) -> "Simulation":
        """Returns the simulation of data sets of the size of y [n, features]: itself."""
        del y
        return self

    def summary(self, y: np.ndarray) -> np.ndarray:
        """Returns the statistics by which data sets y [n, features] are compared: y itself."""
        return y

    def flat(self, y: DataSet) -> np.ndarray:
        """Returns a user's observed data as a row, [1, features].

        Args:
          y: a dict of arrays by name, or an array if a single part is observed.
        Raises:
          UserError: names or shapes differ from the model's, or values are not finite numbers.
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
        check_usable(usable)
        if not self.has_density:
            return
        rows = np.flatnonzero(usable)[:_ROWS]
        density: Any = tf.function(self.log_density, autograph=False)
        u, y = u[rows, np.newaxis], y[rows]
        own = np.concatenate([density(*pair) for pair in zip(u, y, strict=True)])
        if not np.isfinite(own).all():
            raise UserError(
                "the log density is not finite at the model's own draws; expected a batch of "
                "independent draws: write the model for batches, or as an AutoBatched joint"
            )
        if self.row is not None:
            turned = np.roll(y, self.row, 1)
            other = np.concatenate([density(*pair) for pair in zip(u, turned, strict=True)])
            self.row = self.row if np.allclose(own, other, rtol=1e-4) else None


def usable_pairs(u: tf.Tensor, y: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Replaces pairs that are not finite by zeros; returns u, y and where both are finite, [n]."""
    usable = tf.reduce_all(tf.math.is_finite(u), -1) & tf.reduce_all(tf.math.is_finite(y), -1)
    each = usable[:, tf.newaxis]
    return tf.where(each, u, tf.zeros([], u.dtype)), tf.where(each, y, 0.0), usable


def check_usable(usable: np.ndarray, what: str = "pairs") -> None:
    """Checks that enough of what was simulated is finite, by the flags of `simulate`.

    Raises:
      UserError: hardly any is.
    """
    if usable.mean() < _USABLE:
        raise UserError(
            f"{np.mean(~usable):.0%} of the simulated {what} are not finite; expected finite "
            "parameters and data: check the model by `sample`, or choose a prior where it works"
        )


def named(
    y: DataSet, observed: Mapping[str, tuple[tf.TensorShape, tf.DType]]
) -> dict[str, np.ndarray]:
    """Returns a user's observed data as arrays by name.

    Args:
      y: a dict of arrays by name, or an array if a single part is observed.
      observed: name -> (shape, dtype) of each part.
    Raises:
      UserError: names differ from the model's, or values are not finite numbers.
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


def size_of(shape: Iterable[Any]) -> int:
    """Returns the number of entries of a known shape."""
    return int(np.prod(tuple(shape), dtype=int))
