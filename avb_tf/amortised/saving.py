"""Saves a model's functions as a SavedModel, so that a fit works without the model's own code."""

import functools
import json
from pathlib import Path

import tensorflow as tf

from avb_tf.amortised.rows import Rows
from avb_tf.amortised.simulation import Simulation, size_of
from avb_tf.errors import UserError
from avb_tf.posteriors.functions import save_functions
from avb_tf.posteriors.target import Structure

RECORD = "record.json"
SAVED = 1000  # number of pairs in each call of a saved model's `simulate`


class Loaded(Simulation):
    """A model that `save` wrote, without its code; of one row if data sets have several."""

    def __init__(self, path: str | Path):
        path = Path(path)
        record = json.loads((path / RECORD).read_text())
        self._module = tf.saved_model.load(str(path))
        self.dim, self.dtype = record["dim"], tf.as_dtype(record["dtype"])
        self.names, self._coordinates = record["names"], record["coordinates"]
        self.observed = {
            name: (tf.TensorShape(shape), tf.as_dtype(dtype))
            for name, shape, dtype in record["observed"]
        }
        self.sizes = [size_of(shape) for shape, _ in self.observed.values()]
        self.features, self.has_density = sum(self.sizes), record["has_density"]
        self.row = record.get("row")
        self.rows = record.get("rows")  # smallest and largest number, if there are several
        self.portable = hasattr(self._module, "simulate")
        self.digest = record.get("digest", "")
        signature = self._module.unconstrain.input_signature
        self._dtypes = [spec.dtype for spec in tf.nest.flatten(signature)]

    def simulate(self, n: int, seed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Simulates `n` new pairs; see `Simulation.simulate`.

        Raises:
          UserError: the simulator was not saved, because it is not made of TensorFlow's operations.
        """
        u, y, usable = self._in_parts("simulate", n, seed)
        return u, y, usable

    def sample_prior(self, n: int, seed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Draws `n` parameters; see `Simulation.sample_prior`.

        Raises:
          UserError: the simulator was not saved.
        """
        u, finite = self._in_parts("sample_prior", n, seed)
        return u, finite

    def _in_parts(self, name, n, seed):
        """Calls a saved function of a fixed number of draws until there are n."""
        self._check_portable()
        seeds = tf.unstack(tf.random.split(tf.cast(seed, tf.int32), -(-n // SAVED)))
        parts = [getattr(self._module, name)(one) for one in seeds]
        return [tf.concat(part, 0)[:n] for part in zip(*parts, strict=True)]

    def data(self, u: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """See `Simulation.data`.

        Raises:
          UserError: the simulator was not saved.
        """
        self._check_portable()
        return self._module.data(u, tf.cast(seed, tf.int32))

    def log_density(self, u: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        """See `Simulation.log_density`."""
        return self._module.log_density(u, tf.cast(y, tf.float64))

    def terms(self, u: tf.Tensor, y: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """See `Simulation.terms`."""
        return self._module.terms(u, tf.cast(y, tf.float64))

    def _check_portable(self):
        if not self.portable:
            lost = "simulator, which is not of TensorFlow's operations"
            raise UserError(
                f"the fit was saved without its {'table of pairs' if self.digest else lost}; "
                "expected the original fit where pairs are simulated: check it before it is saved"
            )

    def constrain(self, u: tf.Tensor) -> Structure:
        """See `Simulation.constrain`."""
        return self._module.constrain(u)

    def unconstrain(self, parameters: Structure) -> tf.Tensor:
        """See `Simulation.unconstrain`."""
        return self._module.unconstrain(
            [tf.cast(p, d) for p, d in zip(tf.nest.flatten(parameters), self._dtypes, strict=True)]
        )

    def log_volume(self, u: tf.Tensor) -> tf.Tensor:
        """See `Simulation.log_volume`."""
        return self._module.log_volume(u)

    def coordinates(self) -> list[str]:
        """See `Simulation.coordinates`."""
        return self._coordinates


def load(path: str | Path) -> Simulation:
    """Returns the model that `save` wrote."""
    model = Loaded(path)
    return model if model.rows is None else Rows(model, *model.rows)


def save(simulation: Simulation, path: str | Path) -> None:
    """Writes a model's functions as a SavedModel; `load` reads it."""
    rows = None
    if isinstance(simulation, Rows):
        simulation, rows = simulation.one, (simulation.smallest, simulation.largest)
    u, y, seed = (
        tf.TensorSpec([None, simulation.dim], simulation.dtype),
        tf.TensorSpec([simulation.features], tf.float64),
        tf.TensorSpec([2], tf.int32),
    )
    example = simulation.constrain(tf.zeros([2, simulation.dim], simulation.dtype))
    flat = [tf.TensorSpec([None, *v.shape[1:]], v.dtype) for v in tf.nest.flatten(example)]

    def unconstrain(values):
        return simulation.unconstrain(tf.nest.pack_sequence_as(example, values))

    functions = {
        "constrain": (simulation.constrain, [u]),
        "log_volume": (simulation.log_volume, [u]),
        "unconstrain": (unconstrain, [flat]),
    }
    if simulation.portable:
        for draw in (simulation.simulate, simulation.sample_prior):
            functions[draw.__name__] = (functools.partial(draw, SAVED), [seed])
        functions["data"] = (simulation.data, [u, seed])
    if simulation.has_density:
        several = tf.TensorSpec([None, simulation.features], tf.float64)
        functions["terms"] = (simulation.terms, [u, several])
        functions["log_density"] = (simulation.log_density, [u, y])
    save_functions(functions, path)
    record = {
        "dim": simulation.dim,
        "dtype": simulation.dtype.name,
        "names": simulation.names,
        "coordinates": simulation.coordinates(),
        "observed": [[k, list(s), d.name] for k, (s, d) in simulation.observed.items()],
        "has_density": simulation.has_density,
        "row": simulation.row,
        "rows": rows,
        "digest": simulation.digest,
    }
    (Path(path) / RECORD).write_text(json.dumps(record) + "\n")
