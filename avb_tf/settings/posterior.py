"""Every setting of a fit, with its default, and the fields of its config; no TensorFlow."""

from typing import Any

import ml_collections

from avb_tf.errors import UserError

METHOD = "posterior"  # in a config's place of one

SETTINGS: dict[str, Any] = {
    "draws": 512,  # z in a step
    "noise_dim": 0,  # beside one for each latent; 0: as many again, 8 to 32
    "chart_steps": 3,  # autoregressive steps of the chart; 0: none
    "chart_width": 0,  # of their networks; 0: twice the dimension, at least 64
    "chart_share": 0.4,  # of the fit, spent on the chart
    "chart_learning_rate": 5e-3,
    "blocks": 3,  # gated blocks of the sampler
    "width": 64,  # of their layers
    "adversary_width": 128,
    "adversary_depth": 2,
    "adversary_steps": 3,  # dual steps for each primal step
    "adversary_warmup": 0.02,  # share of the training in which only the adversary learns
    "annealing": 0.5,  # share in which the posterior emerges from N(0, I), so that no mode is lost
    "learning_rate": 1e-3,
    "adversary_learning_rate": 2e-3,
    "ema_decay": 0.995,
    "clip_norm": 100.0,
}
SINCE: dict[str, Any] = {}  # fields that the files of earlier versions lack
STEPS = 3000  # where neither steps nor seconds are given


def resolved(dim: int, **changes: Any) -> dict[str, Any]:
    """All settings for a posterior of `dim` dimensions, with `changes`.

    Raises:
      UserError: an unknown setting.
    """
    if unknown := sorted(set(changes) - set(SETTINGS)):
        raise UserError(f"unknown setting '{unknown[0]}'; expected one of {', '.join(SETTINGS)}")
    settings = {**SETTINGS, **changes}
    settings["noise_dim"] = settings["noise_dim"] or max(8, min(dim, 32))
    settings["chart_width"] = settings["chart_width"] or max(64, 2 * dim)
    return settings


def config(model: str) -> ml_collections.ConfigDict:
    """Every field of the config of a posterior, `model` a "path.py:function" that returns it."""
    found = ml_collections.ConfigDict()
    found.name = ""  # runs/<name> is the default workdir; "": posterior-<function>
    found.method = METHOD
    found.model = model
    found.steps = 0  # 0: as many as fit `seconds`
    found.seconds = 60.0  # of the whole fit; 0: no limit
    found.seed = 0
    found.threads_per_op = 1  # of the CPU; 0: all cores, for models of much data
    found.fit = SETTINGS
    found.eval = {
        "draws": 2000,  # of each method in the comparison
        "refine": 100,  # steps of Hamiltonian Monte Carlo where the verdict asks for them
        "gaussian_steps": 2000,  # of variational inference with a Gaussian
        "nuts_draws": 1000,  # of each of 4 chains; the reference's are 4 times as many
        "reference": "",  # folder for what fits are compared with, for all seeds; "": the workdir
    }
    found.export = {
        "max_batch": 1024,  # rows that a request may have
        "version": 0,  # 0: one more than the newest
    }
    return found


def template() -> ml_collections.ConfigDict:
    """A config with the fields that all fits have."""
    return config("")


def name(config) -> str:
    """Of a run, where its config has none."""
    return f"posterior-{config.model.rpartition(':')[2]}"


def validate(config) -> None:
    """Checks a posterior's config.

    Raises:
      UserError: the first field out of range.
    """
    fields = {**config, **{f"fit.{k}": v for k, v in config.fit.items()}}
    for part in ("eval", "export"):
        fields |= {f"{part}.{k}": v for k, v in config[part].items()}
    least = {
        "export.max_batch": 1,
        "eval.draws": 100,
        "eval.gaussian_steps": 1,
        "eval.nuts_draws": 4,
    }
    least |= dict.fromkeys(("fit.draws", "fit.blocks", "fit.width"), 1)
    for key, value in fields.items():
        if isinstance(value, int | float) and not least.get(key, 0) <= value < 2**31:
            expected = f"{least.get(key, 0)} or more and below 2^31"
            raise UserError(f"config.{key} is {value}; expected {expected}")
    if not config.steps and not config.seconds:
        raise UserError("config.steps and config.seconds are both 0; expected one above 0")
    if not config.model.rpartition(":")[0]:
        raise UserError(f"config.model is '{config.model}'; expected path.py:function")
