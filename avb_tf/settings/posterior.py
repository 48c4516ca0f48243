"""Settings of `fit_posterior` with their defaults, and the fields and checks of its config."""

from typing import Any

import ml_collections

from avb_tf.errors import UserError
from avb_tf.settings import fits

METHOD = "posterior"  # config.method of a run that fits a posterior

SETTINGS: dict[str, Any] = {
    "draws": 512,  # z in each step
    "noise_dim": 0,  # extra noise dimensions; 0: as many as latents, between 8 and 32
    "chart_steps": 3,  # autoregressive steps of the chart; 0: none
    "chart_width": 0,  # units of its hidden layers; 0: twice the posterior's dimension, at least 64
    "chart_share": 0.4,  # share of the fit spent on the chart
    "chart_learning_rate": 5e-3,
    "blocks": 3,  # gated blocks of the sampler
    "width": 64,  # units of each layer in the blocks
    "adversary_width": 128,  # units of each layer of the adversary
    "adversary_depth": 2,  # number of these layers
    "adversary_steps": 3,  # dual steps for each primal step
    "adversary_warmup": 0.02,  # share of the training in which only the adversary learns
    # Share of the training in which the target moves from N(0, I) to the posterior, so that no
    # mode is lost.
    "annealing": 0.5,
    "learning_rate": 1e-3,  # of the sampler
    "adversary_learning_rate": 2e-3,
    "ema_decay": 0.995,  # decay of the sampler's averaged weights
    "clip_norm": 100.0,  # largest global norm of the gradient
}
_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("noise_dim", "chart_steps", "chart_width"), (0, 2**31)),
    **dict.fromkeys(("chart_share", "adversary_warmup", "annealing", "ema_decay"), (0.0, 1.0)),
    **dict.fromkeys(
        ("chart_learning_rate", "learning_rate", "adversary_learning_rate", "clip_norm"),
        (0.0, float("inf")),
    ),
}
SINCE: dict[str, Any] = {}  # fields that config files of earlier versions lack, with their values
LEAST_REFINED = 8  # steps of a refinement: R-hat needs four states of each chain
STEPS = 3000  # used if neither steps nor seconds are given


def resolved(dim: int, **changes: Any) -> dict[str, Any]:
    """Returns all settings for a posterior of `dim` dimensions, with `changes`.

    Args:
      dim: dimensions of the posterior.
      **changes: settings that differ from the default, by their names in `SETTINGS`.
    Raises:
      UserError: a setting is unknown or out of range.
    """
    settings = fits.resolved(SETTINGS, _RANGES, changes)
    settings["noise_dim"] = settings["noise_dim"] or max(8, min(dim, 32))
    settings["chart_width"] = settings["chart_width"] or max(64, 2 * dim)
    return settings


def config(model: str) -> ml_collections.ConfigDict:
    """Returns a config with every field of a fit.

    Args:
      model: "path.py:function", which names a function that returns the model.
    """
    fields = ml_collections.ConfigDict()
    fields.name = ""  # runs/<name> is the default workdir; "": posterior-<function>
    fields.method = METHOD
    fields.model = model
    fields.steps = 0  # 0: as many as fit into `seconds`
    fields.seconds = 60.0  # of the whole fit; 0: no limit
    fields.seed = 0
    fields.threads_per_op = 1  # threads on the CPU; 0: all cores, for models with much data
    fields.fit = SETTINGS
    fields.eval = {
        "draws": 2000,  # draws of each method in the comparison
        "refine": 100,  # steps of Hamiltonian Monte Carlo, if the verdict asks for them
        "gaussian_steps": 2000,  # steps of variational inference with a Gaussian
        "nuts_draws": 1000,  # draws of each of 4 chains; the reference has 4 times as many
        "reference": "",  # folder for the reference, shared by all seeds; "": the workdir
    }
    fields.export = {
        "max_batch": 1024,  # largest number of rows in a request
        "version": 0,  # 0: one more than the newest
    }
    return fields


def template() -> ml_collections.ConfigDict:
    """Returns a config with the fields that all fits have."""
    return config("")


def name(config: ml_collections.ConfigDict) -> str:
    """Returns the default name of a run."""
    return f"posterior-{config.model.rpartition(':')[2]}"


def validate(config: ml_collections.ConfigDict) -> None:
    """Checks a posterior's config.

    Args:
      config: the config, with all fields present and of the right types.
    Raises:
      UserError: a field is out of range.
    """
    fits.resolved(SETTINGS, _RANGES, config.fit, "config.fit.")
    least = {
        "export.max_batch": 1,
        "eval.draws": 100,
        "eval.gaussian_steps": 1,
        "eval.nuts_draws": 4,
    }
    fits.validate(config, least)
    if 0 < config.eval.refine < LEAST_REFINED:
        raise UserError(
            f"config.eval.refine is {config.eval.refine}; expected 0, for no refinement, or at "
            f"least {LEAST_REFINED} steps"
        )
