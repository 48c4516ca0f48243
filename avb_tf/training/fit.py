"""Keras's methods for data, such as `fit`, for a model with its own training and test step.

The methods check their arguments, keep examples on the device and call the graphs of `loops`.
"""

import inspect
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from avb_tf.data import checks, pipeline, resident
from avb_tf.data.source import Split, array_split
from avb_tf.data.table import Table
from avb_tf.errors import UserError
from avb_tf.training import epochs, loops


class Trained(keras.Model):
    """Keras model that trains on x alone: it ignores labels, but it uses weights of examples.

    Subclasses set `event_shape`, `likelihood`, `seed` and the counter `step`.
    """

    event_shape: tuple[int, ...]
    likelihood: Any  # a `Likelihood` or a `TableLikelihood`
    seed: int
    step: Any  # integer variable, the number of training steps so far

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.training_calls, self.test_calls = loops.Calls(), loops.Calls()
        self.resident: resident.Resident | None = None  # the examples that `fit` keeps on devices
        self.resident_megabytes: float = resident.MEGABYTES  # the most memory that these may take

    @property
    def table(self) -> Table | None:
        """The columns of x, or None if x is not the rows of a table."""
        return getattr(self.likelihood, "table", None)

    def checked(self, x: Any, place: str = "x") -> np.ndarray:
        """Checks that x fits the model and returns it as an array.

        Args:
          x: the examples, an array or a data frame.
          place: name of x for the error message.
        Raises:
          UserError: x has another shape, type or range, or holds NaN.
        """
        return checks.examples(x, self.event_shape, place, self.likelihood.support, self.table)

    def fit(self, x: Any = None, *args: Any, **kwargs: Any) -> keras.callbacks.History:
        """Trains the model as `keras.Model.fit` does; x may also be a `data.Split`.

        `sample_weight` multiplies the terms of the bound and the adversary's loss alike: an example
        of weight 2 contributes to the gradient as two examples would. As in Keras, the sum over a
        batch is divided by the number of its examples.

        An array or a split of at most `resident_megabytes` is copied to the device once. Each call
        of the graph, which runs `steps_per_execution` steps, gathers its batches there. Their order
        is a function of `seed` and the step, so that a resumed run continues with the same batches
        as an uninterrupted one. All batches are full: a batch may continue into the next epoch.

        Args:
          x: examples as an array, a data frame, a `data.Split` or a `tf.data.Dataset`.
          *args: further arguments of `keras.Model.fit`; labels y are ignored.
          **kwargs: further arguments of `keras.Model.fit`.
        Returns:
          Keras's `History`.
        Raises:
          UserError: x or the weights do not fit the model, or `class_weight` is given.
        """
        arguments = inspect.signature(keras.Model.fit).bind(self, x, *args, **kwargs).arguments
        del arguments["self"]
        _refuse_class_weight(arguments)
        arguments["x"] = checks.inputs(x, self.checked)
        held_out = arguments.get("validation_data")
        if checks.is_array(held_out) and not isinstance(held_out, (tuple, list)):
            held_out = (held_out,)
        if isinstance(held_out, (tuple, list)):
            x_held_out = checks.inputs(held_out[0], lambda x: self.checked(x, "validation_data"))
            arguments["validation_data"] = (x_held_out, *held_out[1:])
        before, self.resident = self.resident, None
        if isinstance(arguments["x"], (np.ndarray, Split)):
            arguments = self._put(arguments)
        elif isinstance(x, tf.data.Dataset):
            arguments["shuffle"] = False  # Keras does not shuffle a dataset, and would warn
        if isinstance(callbacks := arguments.get("callbacks") or [], keras.callbacks.Callback):
            callbacks = [callbacks]
        if not isinstance(callbacks, keras.callbacks.CallbackList):
            arguments["callbacks"] = [*callbacks, epochs.Rates(), epochs.Skipped()]
        self.training_calls.begin(arguments.get("steps_per_epoch"))
        self.test_calls.begin(arguments.get("validation_steps"))
        compiled = self.loop_is_compiled
        if resident.traced(before, compiled) != resident.traced(self.resident, compiled):
            self.train_function = None
        try:
            return super().fit(**arguments)
        finally:
            if self.resident is not None:  # frees the examples
                self.resident = self.resident._replace(rows=None, calls=None)

    def _put(self, arguments):
        """Returns the arguments of `fit` with the array or the split replaced by its batches."""
        data, validation_split = arguments.pop("x"), arguments.pop("validation_split", 0.0)
        x = data
        weights = arguments.pop("sample_weight", None)
        arguments.pop("y", None)
        if not isinstance(x, Split):
            weights = None if weights is None else checks.weights(weights, len(x))
            if validation_split and arguments.get("validation_data") is None:
                size = int(len(x) * (1.0 - validation_split))
                x, held_out = x[:size], x[size:]
                arguments["validation_data"] = (held_out,)
                if weights is not None:
                    arguments["validation_data"] += (None, weights[size:])
                    weights = weights[:size]
            x = array_split(x, weights=weights)
        elif weights is not None:
            raise UserError("sample_weight goes with an array x; expected none with a Split")
        elif validation_split:
            raise UserError(
                "validation_split goes with an array x; expected none with a Split: pass "
                "validation_data"
            )
        batch_size = arguments.pop("batch_size", None) or 32
        if not isinstance(data, Split):  # as in Keras; a split's batches may repeat its examples
            batch_size = min(batch_size, x.size)
        steps = arguments.pop("steps_per_epoch", None) or -(-x.size // batch_size)
        order = {
            "seed": self.seed,
            "first_step": int(self.step.numpy()),
            "shuffle": arguments.pop("shuffle", True),
        }
        strategy = self.distribute_strategy
        if resident.fits(x, self.resident_megabytes):
            self.resident = resident.put(
                x, strategy, batch_size, **order, steps_per_epoch=steps,
                steps_per_call=self.steps_per_execution,
            )  # fmt: skip
            batches = self.resident.calls
        else:
            batches = strategy.distribute_datasets_from_function(
                lambda context: pipeline.training_batches(x, batch_size, **order, context=context)
            )
        return arguments | {"x": batches, "steps_per_epoch": steps, "shuffle": False}

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        """Does nothing, because all weights exist.

        Keras's method would also average a batch of indices over replicas.
        """

    def make_train_function(self, force: bool = False) -> Callable[[Any], loops.Logs]:
        """Returns the graph of `steps_per_execution` steps that `fit` calls (`loops`)."""
        if self.train_function is None or force:
            make = loops.of_stream if self.resident is None else loops.of_resident
            self.train_function = make(self, self.train_step)
        return self.train_function

    def make_test_function(self, force: bool = False) -> Callable[[Any], loops.Logs]:
        """Returns the graph that `evaluate` calls; unlike in `fit`, the data may end in a call."""
        if self.test_function is None or force:
            self.test_function = loops.of_finite(self, self.test_step)
        return self.test_function

    def evaluate(self, x: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Computes the bound, its terms and the adversary's loss and accuracy, in nats.

        Args:
          x: examples, as in `fit`.
          *args: further arguments of `keras.Model.evaluate`.
          **kwargs: further arguments of `keras.Model.evaluate`.
        """
        if not kwargs.get("_use_cached_eval_dataset"):  # `fit` has checked these
            x = checks.inputs(x, self.checked)
            arguments = inspect.signature(keras.Model.evaluate).bind(self, x, *args, **kwargs)
            self.test_calls.begin(arguments.arguments.get("steps"))
        return super().evaluate(x, *args, **kwargs)

    def predict(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Returns reconstructions of x, [examples, *event].

        Args:
          x: examples, as in `fit`.
          *args: further arguments of `keras.Model.predict`.
          **kwargs: further arguments of `keras.Model.predict`.
        """
        return super().predict(checks.inputs(x, self.checked), *args, **kwargs)

    def train_on_batch(
        self,
        x: Any,
        y: Any = None,
        sample_weight: npt.ArrayLike | None = None,
        class_weight: None = None,
        return_dict: bool = False,
    ) -> Any:
        """Runs one training step on one batch.

        Args:
          x: [batch, *event].
          y: ignored.
          sample_weight: [batch], weights of the examples, or None.
          class_weight: must be None, because there are no classes.
          return_dict: whether to return the metrics by name.
        """
        del y
        _refuse_class_weight({"class_weight": class_weight})
        if self.resident is not None:  # the graph reads examples on the device
            self.resident = self.train_function = None
        return super().train_on_batch(*self._batch(x, sample_weight), return_dict=return_dict)

    def test_on_batch(
        self,
        x: Any,
        y: Any = None,
        sample_weight: npt.ArrayLike | None = None,
        return_dict: bool = False,
    ) -> Any:
        """Computes the metrics of one batch.

        Args:
          x: [batch, *event].
          y: ignored.
          sample_weight: [batch], weights of the examples, or None.
          return_dict: whether to return the metrics by name.
        """
        del y
        return super().test_on_batch(*self._batch(x, sample_weight), return_dict=return_dict)

    def predict_on_batch(self, x: Any) -> Any:
        """Returns reconstructions of x [batch, *event]."""
        return super().predict_on_batch(self.checked(x))

    def _batch(self, x, sample_weight):
        x = self.checked(x)
        return x, None, None if sample_weight is None else checks.weights(sample_weight, len(x))


def _refuse_class_weight(arguments):
    if arguments.pop("class_weight", None) is not None:
        raise UserError("class_weight has no use without classes; pass sample_weight instead")
