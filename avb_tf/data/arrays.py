"""Checks the arrays in users' files, and cuts missing splits off the training data."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from avb_tf.data.source import Source, array_split, cut
from avb_tf.errors import UserError

SPLITS = ("train", "validation", "test")


class Examples(NamedTuple):
    """The arrays of one split."""

    x: np.ndarray  # [n, *event], values as `check_values` allows them
    labels: np.ndarray | None  # integer [n]


def check(
    place: str, arrays: Mapping[str, np.ndarray], support: str = "unit"
) -> dict[str, Examples]:
    """Checks arrays named x_train, y_train, x_validation, ... and pairs x with its labels.

    Args:
      place: where the arrays came from, for error messages.
      arrays: x_* are examples [n, d], [n, h, w] or [n, h, w, c], with values that `check_values`
        allows; y_* are their labels, integer [n]. Only x_train is required.
      support: kind of values in x, as in `Likelihood.support`.

    Returns:
      Name of the split -> its arrays; [n, h, w] is reshaped to [n, h, w, 1].

    Raises:
      UserError: an array is missing, unknown, or not as described.
    """
    if "x_train" not in arrays:
        raise UserError(f"{place} holds {_listed(arrays)}; expected x_train; rename or add it")
    known = {f"y_{split}" for split in SPLITS if f"x_{split}" in arrays}
    known |= {f"x_{split}" for split in SPLITS}
    if unknown := arrays.keys() - known:
        raise UserError(
            f"{place} holds {_listed(unknown)}; expected only x_train, x_validation, x_test and "
            "their labels y_*; rename or remove the rest"
        )
    examples = {}
    for split in SPLITS:
        if f"x_{split}" in arrays:
            x = _checked_x(f"{place}: x_{split}", arrays[f"x_{split}"], support)
            labels = arrays.get(f"y_{split}")
            if labels is not None:
                _check_labels(f"{place}: y_{split}", labels, len(x))
            examples[split] = Examples(x, labels)
    event_shape = examples["train"].x.shape[1:]
    for split, (x, _) in examples.items():
        if x.shape[1:] != event_shape:
            raise UserError(
                f"{place}: x_{split} has examples of shape {x.shape[1:]}; "
                f"expected {event_shape} as in x_train"
            )
    return examples


def source(name: str, place: str, examples: dict[str, Examples], seed: int = 0) -> Source:
    """Returns a source of checked arrays; cuts a tenth off train for each missing split.

    Args:
      name: name of the source.
      place: where the arrays came from, for error messages.
      examples: name of the split -> its arrays, as `check` returns them.
      seed: seed of the cut.
    Raises:
      UserError: train is too small to be cut.
    """
    missing = [split for split in SPLITS if split not in examples]
    x, labels = examples["train"]
    if missing:
        parts = cut(len(x), len(missing), seed, place)
        pieces = [Examples(x[part], None if labels is None else labels[part]) for part in parts]
        examples = examples | dict(zip(["train", *missing], pieces, strict=True))
    splits = {split: array_split(*examples[split]) for split in SPLITS}
    return Source(name, x.shape[1:], **splits)


def check_values(place: str, x: np.ndarray, support: str = "unit") -> None:
    """Checks that x holds only values that a likelihood with this support can model.

    Args:
      place: name of x in error messages.
      x: [n, *event].
      support: "unit": bytes of 0..255, or floats in [0, 1]; "real": finite floats; "count": whole
        numbers of at least 0.
    Raises:
      UserError: x has another type, is empty, or holds NaN or values outside the support.
    """
    unit = support == "unit"
    byte = unit and x.dtype == np.uint8
    whole = support == "count" and np.issubdtype(x.dtype, np.integer)
    if not byte and not whole and not np.issubdtype(x.dtype, np.floating):
        expected = {"unit": "uint8, or float in [0, 1]", "real": "float"}
        expected = expected.get(support, "integers, or whole numbers as float")
        raise UserError(f"{place} is of type {x.dtype}; expected {expected}; convert it")
    if x.size == 0:
        raise UserError(f"{place} has shape {x.shape}; expected at least one example and value")
    low, high = x.min(), x.max()
    if byte:
        if len(x) > 1 and high == 1:
            raise UserError(
                f"{place} is of type uint8 and runs from {low} to 1; expected bytes of 0..255, "
                "which are divided by 255; convert x of 0 and 1 to float32"
            )
    elif np.isnan(low):
        expected = "values in [0, 1]" if unit else "finite values"
        raise UserError(f"{place} contains NaN; expected {expected}; remove or fill them")
    elif not unit and not np.isfinite([low, high]).all():
        raise UserError(f"{place} runs from {low} to {high}; expected finite values; correct them")
    elif support == "count" and (low < 0 or (x != np.rint(x)).any()):
        odd = low if low < 0 else x[x != np.rint(x)][0]
        raise UserError(f"{place} holds {odd}; expected counts 0, 1, 2, ...; correct it")
    elif unit and (low < 0 or high > 1):
        raise UserError(
            f"{place} runs from {low} to {high}; expected [0, 1]; rescale it, or use the "
            "likelihood 'gaussian' for real numbers, 'poisson' for counts"
        )


def _checked_x(place: str, x: np.ndarray, support: str) -> np.ndarray:
    if x.ndim not in (2, 3, 4):
        raise UserError(
            f"{place} has shape {x.shape}; expected [n, d], [n, height, width] or "
            "[n, height, width, channels]; reshape it"
        )
    check_values(place, x, support)
    return x[..., np.newaxis] if x.ndim == 3 else x


def _check_labels(place: str, labels: np.ndarray, size: int) -> None:
    if labels.shape != (size,):
        raise UserError(
            f"{place} has shape {labels.shape}; expected ({size},), one label per example"
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"{place} is of type {labels.dtype}; expected integers; convert them")


def _listed(names) -> str:
    return ", ".join(sorted(names)) or "no arrays"
