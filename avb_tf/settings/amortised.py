"""Settings of `fit_amortised` with their defaults."""

from typing import Any

from avb_tf.errors import UserError

SETTINGS: dict[str, Any] = {
    "batch_size": 512,  # pairs simulated in each step
    "components": 8,  # Gaussians in the mixture of each factor
    "width": 64,  # units of each layer in each parameter's residual network
    "trunk_width": 128,  # units of each layer in the residual networks of y
    "depth": 3,  # residual blocks of each network
    "whitening_share": 0.12,  # share of the training in which location and scale are learned
    "learning_rate": 2e-3,
    "clip_norm": 10.0,  # largest global norm of the gradient
}
STEPS = 10_000  # used if neither steps nor seconds are given


def resolved(**changes: Any) -> dict[str, Any]:
    """Returns all settings with `changes`.

    Args:
      **changes: settings that differ from the default, by their names in `SETTINGS`.
    Raises:
      UserError: a setting is unknown or out of range.
    """
    if unknown := sorted(set(changes) - set(SETTINGS)):
        raise UserError(f"unknown setting '{unknown[0]}'; expected one of {', '.join(SETTINGS)}")
    settings = {**SETTINGS, **changes}
    for name, value in settings.items():
        kind = type(SETTINGS[name])
        number = isinstance(value, int | float if kind is float else int)
        if isinstance(value, bool) or not number or not 0 < value < float("inf"):
            raise UserError(f"{name} is {value!r}; expected a {kind.__name__} above 0")
    if not settings["whitening_share"] < 1.0:
        raise UserError(f"whitening_share is {settings['whitening_share']}; expected less than 1")
    return settings
