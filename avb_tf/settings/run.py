"""The fields of a run's config with their defaults and checks."""

from typing import Any

import ml_collections

from avb_tf.errors import UserError
from avb_tf.settings import methods

# Values that replace -1 in config.eval. `paper` follows the authors' protocol (320 examples, 8
# chains, 2000 temperatures, 30 leapfrog steps) with more examples and chains, and it needs an
# accelerator.
BUDGETS = {
    "quick": {
        "subset": 50, "repeats": 2, "simulated": 25, "gap": 25,
        "ais.temperatures": 50, "ais.chains": 32, "ais.leapfrog_steps": 10,
    },
    "standard": {
        "subset": 500, "repeats": 2, "simulated": 100, "gap": 100,
        "ais.temperatures": 100, "ais.chains": 32, "ais.leapfrog_steps": 10,
    },
    "paper": {
        "subset": 1000, "repeats": 10, "simulated": 200, "gap": 500,
        "ais.temperatures": 2000, "ais.chains": 32, "ais.leapfrog_steps": 30,
    },
}  # fmt: skip


def default(method: str, **model: Any) -> ml_collections.ConfigDict:
    """Returns a config with every field at its default.

    Args:
      method: a name in `settings.methods.METHODS`.
      **model: changes to the method's settings (`settings.methods.SETTINGS`).
    Raises:
      UserError: the method or a setting is unknown.
    """
    config = ml_collections.ConfigDict()
    config.name = ""  # name of experiment and variant; runs/<name> is the default workdir
    config.method = method
    config.model = methods.settings(method, **model)
    config.steps = 10_000
    config.batch_size = 128  # examples in a batch over all replicas
    config.data = {
        "name": "digits",  # digits, four_points, mnist, mnist_4x4, npz, table, images, tfds:<name>
        "path": "",  # file or folder; "": $AVB_TF_DATA_DIR
        "seed": 0,  # seed of splits that the source does not define
        "image_size": 64,  # images only: height and width after a centre crop
        "channels": 3,  # images only: 1 or 3
        # table only: a kind for all columns, or "visits=poisson,city=category,id=skip" (`Table.of`)
        "columns": "",
        "missing": False,  # table only: whether values may be missing
    }
    config.optimizer = {
        "learning_rate": 5e-4,  # of encoder and decoder
        "adversary_learning_rate": 1.5e-3,
        "beta_1": 0.9,
        "decay": "cosine",  # cosine, none: schedule of both learning rates
        "final": 0.02,  # share of the learning rate that remains at the end
        "adversary_final": 0.1,  # higher, so that the adversary follows the encoder to the end
        "adversary_warmup": 0,  # steps in which only the adversary learns
        "clip_norm": 100.0,  # largest global norm of the gradient; 0: no clipping
    }
    config.monitor = {  # every log_every steps, on held-out examples (`callbacks.monitor`)
        "examples": 64,
        "samples": 256,  # importance samples for each example
        "largest_gap": 3.0,  # nats by which the ELBO may exceed their bound without a warning
    }
    config.strategy = "auto"  # auto, one, mirrored, multi_worker, tpu
    config.worker_timeout = 600.0  # seconds in which all workers of TF_CONFIG must have started
    config.threads_per_op = 0  # threads on the CPU; 0: all cores. Small layers are faster with 1
    config.tf32 = True  # whether a GPU may compute float32 products with 10-bit mantissas (TF32)
    config.resident_megabytes = 4096  # training data up to this size are kept on the device
    # float32, mixed_bfloat16, mixed_float16: precision of the large products during training.
    # Weights and bounds are always float32, and so is everything outside training.
    config.precision = "float32"
    config.guard = {
        "enabled": True,  # skip steps whose loss or gradient is not finite
        "patience": 20,  # consecutive skipped steps before a rollback to the last checkpoint
        "rollbacks": 3,  # largest number of rollbacks before training stops
        "factor": 0.5,  # by which each rollback multiplies both learning rates
    }
    config.log_every = 500  # steps; also the steps shown in a line of the progress bar
    config.checkpoint_every = 1000  # steps, a multiple of log_every
    config.keep_checkpoints = 3  # the newest ones; at least two are kept
    config.figures_every = 5000  # steps, a multiple of log_every; 0: only at the end
    config.profile_steps = ()  # (first, last) to profile for TensorBoard
    config.eval = {
        "split": "test",
        "budget": "standard",  # quick, standard, paper (`BUDGETS`): replaces each -1 below
        "examples": 0,  # for the ELBO: the first examples of the split, this many; 0: all
        "posteriors": 300,  # latent_dim 2 only: posteriors that are compared with the exact ones
        "grid": 400,  # latent_dim 2 only: points along each side of the quadrature
        "subset": -1,  # for importance sampling and AIS: the first examples, this many; 0: none
        "repeats": -1,  # independent groups of 5000 importance samples each
        "ais": {  # annealed importance sampling; with latent_dim 2 only if it is set
            "temperatures": -1,  # 0: no AIS
            "chains": -1,
            "leapfrog_steps": -1,
        },
        "simulated": -1,  # examples drawn from the model, for bidirectional AIS; 0: none
        "gap": -1,  # examples for which the inference gap is split; 0: none
    }
    config.export = {
        "importance_samples": 256,  # z for each x in the signature log_likelihood
        "max_batch": 1024,  # largest number of rows in a request
        "version": 0,  # 0: one more than the newest
    }
    return config


# Fields that config files of earlier versions lack, with their values at the time.
SINCE = {
    "tf32": True, "resident_megabytes": 4096, "worker_timeout": 600.0,
    "data": {"columns": "", "missing": False},
    "model": {"hide": 0.0},
}  # fmt: skip
# Each entry holds a range in words, its test and the fields that must lie in it. The bound 2^31 is
# the limit of int32, and it excludes inf.
_RANGES = (
    (
        "above 0 and below 2^31",
        lambda value: 0 < value < 2**31,
        (
            "steps", "batch_size", "log_every", "checkpoint_every", "keep_checkpoints",
            "guard.patience", "data.image_size", "model.latent_dim",
            "model.width", "model.depth", "model.bases",
            "model.basis_width", "model.adversary_width", "model.adversary_depth",
            "model.products", "model.flow_width",
            "model.draws", "model.adversary_draws", "model.adversary_steps",
            "optimizer.learning_rate", "optimizer.adversary_learning_rate",
            "monitor.examples", "monitor.samples",
            "monitor.largest_gap", "worker_timeout",
            "export.importance_samples", "export.max_batch",
        ),
    ),
    (
        "0 or more and below 2^31",
        lambda value: 0 <= value < 2**31,
        (
            "figures_every", "model.residual_blocks", "model.noise_dim", "model.flow_steps",
            "model.kl_annealing_steps", "model.seed", "data.seed", "optimizer.adversary_warmup",
            "optimizer.clip_norm", "guard.rollbacks", "eval.examples", "eval.posteriors",
            "export.version", "threads_per_op", "resident_megabytes",
        ),
    ),
    (
        "-1, or 0 or more and below 2^31",
        lambda value: -1 <= value < 2**31,
        ("eval.subset", "eval.simulated", "eval.gap", "eval.ais.temperatures"),
    ),
    (
        "-1, or above 0 and below 2^31",
        lambda value: value == -1 or 0 < value < 2**31,
        ("eval.repeats", "eval.ais.chains", "eval.ais.leapfrog_steps"),
    ),
    (
        "0 or more and below 1",
        lambda value: 0 <= value < 1,
        ("model.ema_decay", "model.hide", "optimizer.beta_1"),
    ),
    (
        "0 to 1",
        lambda value: 0 <= value <= 1,
        ("optimizer.final", "optimizer.adversary_final"),
    ),
    ("above 0 and below 1", lambda value: 0 < value < 1, ("guard.factor",)),
    (
        "2 or more and below 2^31",  # the evaluation compares with a grid of half the size
        lambda value: 2 <= value < 2**31,
        ("eval.grid",),
    ),
)  # fmt: skip
_CHOICES = {
    "method": tuple(methods.METHODS),
    "data.channels": (1, 3),
    "optimizer.decay": ("cosine", "none"),
    "strategy": ("auto", "one", "mirrored", "multi_worker", "tpu"),
    "precision": ("float32", "mixed_bfloat16", "mixed_float16"),
    "eval.split": ("train", "validation", "test"),
    "eval.budget": tuple(BUDGETS),
}


def template() -> ml_collections.ConfigDict:
    """Returns a config with the fields that all methods share."""
    return default("vae")


def validate(config: ml_collections.ConfigDict) -> None:
    """Checks the values of a run's config.

    Args:
      config: the config, with all fields present and of the right types.
    Raises:
      UserError: a field is out of range.
    """
    for expected, fits, names in _RANGES:
        for name in names:
            if not fits(value := _get(config, name)):
                raise UserError(f"config.{name} is {value}; expected {expected}")
    for name, choices in _CHOICES.items():
        if _get(config, name) not in choices:
            known = ", ".join(map(str, choices))
            raise UserError(f"config.{name} is '{_get(config, name)}'; expected one of {known}")
    if (config.data.name == "table") != (config.model.likelihood == "table"):
        raise UserError(
            f"config.data.name is '{config.data.name}' with config.model.likelihood "
            f"'{config.model.likelihood}'; expected 'table' for both, or for none; --config=table "
            "has both"
        )
    filters, strides = config.model.filters, config.model.strides
    for name, values in (("filters", filters), ("strides", strides)):
        if not all(type(n) is int and n > 0 for n in values):
            raise UserError(f"config.model.{name} is {values}; expected whole numbers above 0")
    if not filters or len(strides) not in (0, len(filters)):
        raise UserError(
            f"config.model.filters is {filters} and strides {strides}; expected at least one "
            "filter, and as many strides or none"
        )
    profiled = config.profile_steps
    whole = all(type(n) is int for n in profiled)
    if profiled and not (whole and len(profiled) == 2 and 0 <= profiled[0] < profiled[1]):
        raise UserError(
            f"config.profile_steps is {profiled}; expected (), or the first and the last step"
        )
    for name in ("checkpoint_every", "figures_every"):
        # Both happen only at the end of a logging period, where a resumed run also starts.
        if config[name] % min(config.log_every, config.steps) and config[name] < config.steps:
            raise UserError(
                f"config.{name} is {config[name]}; expected a multiple of config.log_every, "
                f"{config.log_every}"
            )
    if config.optimizer.adversary_warmup >= config.steps:
        raise UserError(
            f"config.optimizer.adversary_warmup is {config.optimizer.adversary_warmup}; "
            f"expected less than config.steps, {config.steps}"
        )


def sizes(settings: ml_collections.ConfigDict) -> dict[str, int]:
    """Returns the sizes of an evaluation, with each -1 replaced by the budget's value.

    The names are those in `BUDGETS`.

    Args:
      settings: `config.eval`.
    """
    budget = BUDGETS[settings.budget]
    own = {name: _get(settings, name) for name in budget}
    return {name: size if own[name] == -1 else own[name] for name, size in budget.items()}


def _get(config, name) -> Any:
    for part in name.split("."):
        config = config[part]
    return config
