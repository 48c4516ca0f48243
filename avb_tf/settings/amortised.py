"""Settings of `fit_amortised` with their defaults."""

from typing import Any

from avb_tf.errors import UserError

SETTINGS: dict[str, Any] = {
    "batch_size": 512,  # pairs simulated in each step
    "components": 8,  # Gaussians in each factor
    "width": 64,  # of each parameter's residual network
    "trunk_width": 128,  # of the residual networks of y
    "depth": 3,  # residual blocks of each network
    "whitening_share": 0.12,  # share of the training in which location and scale are learned
    "learning_rate": 2e-3,
    "clip_norm": 10.0,
}
STEPS = 10_000  # used if neither steps nor seconds are given


def resolved(**changes: Any) -> dict[str, Any]:
    """All settings, with `changes`.

    Raises:
      UserError: a setting that is unknown or out of range.
    """
    if unknown := sorted(set(changes) - set(SETTINGS)):
        raise UserError(f"unknown setting '{unknown[0]}'; expected one of {', '.join(SETTINGS)}")
    settings = {**SETTINGS, **changes}
    for name, value in settings.items():
        kind = type(SETTINGS[name])
        whole = kind is int and not isinstance(value, bool) and isinstance(value, int)
        number = kind is float and isinstance(value, int | float)
        if not (whole or number) or value <= 0:
            raise UserError(f"{name} is {value!r}; expected a {kind.__name__} above 0")
    if not settings["whitening_share"] < 1.0:
        raise UserError(f"whitening_share is {settings['whitening_share']}; expected less than 1")
    return settings
