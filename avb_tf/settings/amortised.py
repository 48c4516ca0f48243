"""Settings of `fit_amortised` with their defaults, and its config's fields and checks."""

from typing import Any

import ml_collections

from avb_tf.settings import fits

METHOD = "amortised"  # config.method of such a run

SETTINGS: dict[str, Any] = {
    "batch_size": 512,  # pairs simulated in each step
    "components": 8,  # Gaussians in the mixture of each factor
    "width": 64,  # units of each parameter's residual network, half as many inside its blocks
    "depth": 3,  # residual blocks of each of these networks
    "trunk_width": 128,  # units of each layer in the residual networks of y
    "trunk_depth": 6,  # residual blocks of the networks of y
    # Filters of the first of two convolutions, instead of the residual networks of y, if y is an
    # image or a series; the second has twice as many. 0: none
    "filters": 0,
    "whitening_share": 0.12,  # share of the training in which location and scale are learned
    "learning_rate": 2e-3,
    "clip_norm": 10.0,  # largest global norm of the gradient
}
_RANGES: dict[str, tuple[float, float]] = {
    "whitening_share": (0.0, 1.0),
    **dict.fromkeys(("learning_rate", "clip_norm"), (0.0, float("inf"))),
    "filters": (0, 2**31),
}
# Fields that config files of earlier versions lack, with their values at the time.
SINCE: dict[str, Any] = {"fit": {"filters": 0}}
STEPS = 10_000  # used if neither steps nor seconds are given


def resolved(**changes: Any) -> dict[str, Any]:
    """Returns all settings with `changes`.

    Args:
      **changes: settings that differ from the default, by their names in `SETTINGS`.
    Raises:
      UserError: a setting is unknown or out of range.
    """
    return fits.resolved(SETTINGS, _RANGES, changes)


def config(model: str) -> ml_collections.ConfigDict:
    """Returns a config with every field of a fit.

    Args:
      model: "path.py:function", a function that returns the model.
    """
    fields = ml_collections.ConfigDict()
    fields.name = ""  # runs/<name> is the default workdir; "": amortised-<function>
    fields.method = METHOD
    fields.model = model
    fields.steps = 0  # 0: as many as fit into `seconds`
    fields.seconds = 300.0  # of the whole fit; 0: no limit
    fields.seed = 0
    fields.threads_per_op = 1  # of the CPU; 0: all cores
    fields.fit = SETTINGS
    fields.eval = {
        "pairs": 1000,  # simulated data sets of the calibration
        "draws": 2000,  # of the posterior of each observed data set
    }
    fields.export = {
        "draws": 1000,  # of the posterior of each data set in a request
        "max_batch": 64,  # most data sets in a request
        "version": 0,  # 0: one more than the newest
    }
    return fields


def template() -> ml_collections.ConfigDict:
    """Returns a config with the fields that all fits have."""
    return config("")


def name(config: ml_collections.ConfigDict) -> str:
    """Returns the default name of a run."""
    return f"amortised-{config.model.rpartition(':')[2]}"


def validate(config: ml_collections.ConfigDict) -> None:
    """Checks an amortised fit's config.

    Args:
      config: the config, with all fields present and of the right types.
    Raises:
      UserError: a field is out of range.
    """
    fits.resolved(SETTINGS, _RANGES, config.fit, "config.fit.")
    least = {"eval.pairs": 20, "eval.draws": 1, "export.draws": 1, "export.max_batch": 1}
    fits.validate(config, least)
