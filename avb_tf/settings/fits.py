"""Checks that the configs of `fit_posterior` and of `fit_amortised` share."""

from collections.abc import Mapping
from typing import Any

import ml_collections
import numpy as np

from avb_tf.errors import UserError

LEAST_SECONDS = 1e-3  # of a fit; the shortest fits take seconds, whatever they are given


def resolved(
    defaults: Mapping[str, Any],
    ranges: Mapping[str, tuple[float, float]],
    changes: Mapping[str, Any],
    prefix: str = "",
) -> dict[str, Any]:
    """Returns all settings with `changes`, after a check of their names, types and ranges.

    Args:
      defaults: the settings by name.
      ranges: the lowest value, and what a value must be below; a whole number that is not named is
        at least 1 and below 2^31.
      changes: settings that differ from the default.
      prefix: what precedes a name in the error.
    Raises:
      UserError: a setting is unknown or out of range.
    """
    if unknown := sorted(set(changes) - set(defaults)):
        raise UserError(f"unknown setting '{unknown[0]}'; expected one of {', '.join(defaults)}")
    for name, value in changes.items():
        low, high = ranges.get(name, (1, 2**31))
        check_number(prefix + name, value, isinstance(defaults[name], int), low, high)
    return {**defaults, **changes}


def check_number(
    name: str, value: Any, whole: bool = True, low: float = 1, high: float = 2**31
) -> None:
    """Checks that a value is a number, a whole one if `whole`, of at least `low` and below `high`.

    Raises:
      UserError: it is not.
    """
    kind = int | np.integer if whole else float | int | np.floating | np.integer
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value < high:
        below = "" if high == float("inf") else f" and below {high:g}"
        expected = f"{'a whole number' if whole else 'a number'} of at least {low}{below}"
        raise UserError(f"{name} is {value!r}; expected {expected}")


def check_effort(steps: Any, seconds: Any, seed: Any) -> None:
    """Checks the number of steps and the seconds, either of which may be None, and the seed.

    Raises:
      UserError: one of them is no such number.
    """
    if steps is not None:
        check_number("steps", steps)
    if seconds is not None:
        check_number("seconds", seconds, whole=False, low=LEAST_SECONDS, high=1e9)
    check_number("seed", seed, low=0)


def validate(config: ml_collections.ConfigDict, least: Mapping[str, int]) -> None:
    """Checks the fields of a fit's config outside `config.fit`.

    Args:
      config: the config, with all fields present and of the right types.
      least: the lowest value of a number, by its name such as "eval.draws"; 0 if it is not named.
    Raises:
      UserError: a field is out of range.
    """
    fields = config.to_dict()
    for part in ("eval", "export"):
        fields |= {f"{part}.{name}": value for name, value in config[part].items()}
    for name, value in fields.items():
        lowest = least.get(name, 0)
        if isinstance(value, int | float) and not lowest <= value < 2**31:
            raise UserError(f"config.{name} is {value}; expected {lowest} or more and below 2^31")
    if not config.steps and not config.seconds:
        raise UserError("config.steps and config.seconds are both 0; expected one above 0")
    if not config.model.rpartition(":")[0]:
        raise UserError(f"config.model is '{config.model}'; expected path.py:function")
