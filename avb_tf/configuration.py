"""Everything that shapes a run: a config's fields, their checks, and its file in the workdir."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import ml_collections

from avb_tf import methods
from avb_tf.errors import UserError
from avb_tf.posteriors import settings

FILE = "config.json"
# Fields that may differ between training and a later command: data may move, and so may the run.
LATER = (
    "eval", "export", "profile_steps", "data.path", "strategy", "threads_per_op", "tf32",
    "resident_megabytes",
)  # fmt: skip
# Fields that the files of earlier versions lack, which had these values.
_SINCE = {"tf32": True, "resident_megabytes": 4096}
# What -1 in config.eval stands for. `paper` is the authors' protocol (320 examples, 8 chains, 2000
# temperatures, 30 leapfrog steps) on more examples with more chains: for an accelerator.
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


def default(method: str, **model) -> ml_collections.ConfigDict:
    """Every field there is.

    Args:
      method: a name in `methods.METHODS`.
      **model: changes to the method's settings (`methods.SETTINGS`).
    Raises:
      UserError: an unknown method or setting.
    """
    config = ml_collections.ConfigDict()
    config.name = ""  # of the experiment and variant; runs/<name> is the default workdir
    config.method = method
    config.model = methods.settings(method, **model)
    config.steps = 10_000
    config.batch_size = 128  # over all replicas
    config.data = {
        "name": "digits",  # digits, four_points, mnist, mnist_4x4, npz, images, tfds:<name>
        "path": "",  # file or folder; "" looks in $AVB_TF_DATA_DIR
        "seed": 0,  # of splits that the source does not fix
        "image_size": 64,  # of `images`, after a centre crop
        "channels": 3,  # of `images`: 1 or 3
    }
    config.optimizer = {
        "learning_rate": 5e-4,  # of encoder and decoder
        "adversary_learning_rate": 1.5e-3,
        "beta_1": 0.9,
        "decay": "cosine",  # cosine, none: of both learning rates, to `final` times their start
        "final": 0.02,
        "adversary_final": 0.1,  # the adversary keeps moving until the encoder rests
        "adversary_warmup": 0,  # steps in which only the adversary learns
        "clip_norm": 100.0,  # of each gradient as a whole; 0: none
    }
    config.monitor = {  # every log_every steps, on held-out examples (`monitoring.Monitor`)
        "examples": 64,
        "samples": 256,  # importance samples for each
        "largest_gap": 3.0,  # nats that the ELBO may lie above their bound without a warning
    }
    config.strategy = "auto"  # auto, one, mirrored, multi_worker, tpu
    config.threads_per_op = 0  # of the CPU; 0: all cores. Small layers are faster with 1
    config.tf32 = True  # whether a GPU may take float32 products with 10 bits of mantissa
    config.resident_megabytes = 4096  # of training data, up to which they stay on the device
    # float32, mixed_bfloat16, mixed_float16: of the large products while training. Weights and
    # bounds are float32, and so is all that is done with a trained model.
    config.precision = "float32"
    config.guard = {
        "enabled": True,  # skip steps whose loss or gradient is no number
        "patience": 20,  # skipped steps in a row before training goes back to its last checkpoint
        "rollbacks": 3,  # times it may, before it stops
        "factor": 0.5,  # of both learning rates, at each rollback
    }
    config.log_every = 500  # steps; also the length of a line of the progress bar
    config.checkpoint_every = 1000  # steps, a multiple of log_every
    config.keep_checkpoints = 3
    config.figures_every = 5000  # steps, a multiple of log_every; 0: only at the end
    config.profile_steps = ()  # (first, last) to profile, for TensorBoard
    config.eval = {
        "split": "test",
        "budget": "standard",  # quick, standard, paper (`BUDGETS`): all that is -1 below
        "examples": 0,  # of the split, for the bound; 0: all
        "posteriors": 300,  # examples whose posterior is compared with the exact one, latent_dim 2
        "grid": 400,  # points along each side of the quadrature, latent_dim 2
        "subset": -1,  # examples, the first so many, with importance sampling and AIS; 0: none
        "repeats": -1,  # of 5000 importance samples
        "ais": {  # annealed importance sampling; with two latents only where it is set
            "temperatures": -1,  # 0: none
            "chains": -1,
            "leapfrog_steps": -1,
        },
        "simulated": -1,  # examples drawn from the model, for AIS from both sides; 0: none
        "gap": -1,  # examples whose inference gap is split; 0: none
    }
    config.export = {
        "importance_samples": 256,  # z for each x in the signature log_likelihood
        "max_batch": 1024,  # rows that a request may have
        "version": 0,  # 0: one more than the newest
    }
    return config


# What is expected, the test for it, and the fields. The limit is that of int32, and excludes inf.
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
            "monitor.largest_gap",
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
        ("model.ema_decay", "optimizer.beta_1"),
    ),
    (
        "0 to 1",
        lambda value: 0 <= value <= 1,
        ("optimizer.final", "optimizer.adversary_final"),
    ),
    ("above 0 and below 1", lambda value: 0 < value < 1, ("guard.factor",)),
    (
        "2 or more and below 2^31",  # evaluation compares with half the grid
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


def validate(config: ml_collections.ConfigDict) -> None:
    """Checks what can be checked without data.

    Raises:
      UserError: the first field that is missing, unknown, of another type or out of range.
    """
    _check_fields(config.to_dict(), _template(config).to_dict())
    if config.method == settings.METHOD:
        settings.validate(config)
        return
    for expected, fits, names in _RANGES:
        for name in names:
            if not fits(value := _get(config, name)):
                raise UserError(f"config.{name} is {value}; expected {expected}")
    for name, choices in _CHOICES.items():
        if _get(config, name) not in choices:
            known = ", ".join(map(str, choices))
            raise UserError(f"config.{name} is '{_get(config, name)}'; expected one of {known}")
    filters, strides = config.model.filters, config.model.strides
    for name, values in (("filters", filters), ("strides", strides)):
        if not all(type(n) is int and n > 0 for n in values):
            raise UserError(f"config.model.{name} is {values}; expected whole numbers above 0")
    if not filters or len(strides) not in (0, len(filters)):
        raise UserError(
            f"config.model.filters is {filters} and strides {strides}; expected filters, and as "
            "many strides or none"
        )
    profiled = config.profile_steps
    whole = all(type(n) is int for n in profiled)
    if profiled and not (whole and len(profiled) == 2 and 0 <= profiled[0] < profiled[1]):
        raise UserError(
            f"config.profile_steps is {profiled}; expected nothing, or the first and the last step"
        )
    for name in ("checkpoint_every", "figures_every"):
        # Both happen where a logging period ends, and a resumed run starts where one begins.
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


def _template(config) -> ml_collections.ConfigDict:
    """The fields that a config of its kind has."""
    posterior = isinstance(config, Mapping | ml_collections.ConfigDict) and (
        config.get("method") == settings.METHOD
    )
    return settings.config("") if posterior else default("vae")


def _check_fields(found, expected: dict, name: str = "config") -> None:
    """Compares names and types; an int may stand for a float, and a list for a tuple."""
    if not isinstance(found, dict):
        raise UserError(f"{name} is {found!r:.50}; expected the fields {', '.join(expected)}")
    for key in sorted(found.keys() ^ expected.keys()):
        has = "no" if key in expected else "an unknown"
        raise UserError(f"{name} has {has} field '{key}'; expected those of configuration.default")
    for key, value in expected.items():
        stand_in = {float: int, tuple: list}.get(type(value))
        if isinstance(value, dict):
            _check_fields(found[key], value, f"{name}.{key}")
        elif type(found[key]) not in (type(value), stand_in):
            raise UserError(
                f"{name}.{key} is {found[key]!r:.50}; expected a value of type "
                f"{type(value).__name__}"
            )


def _get(config, name):
    for part in name.split("."):
        config = config[part]
    return config


def sizes(settings: ml_collections.ConfigDict) -> dict[str, int]:
    """The sizes in `config.eval`, by names as in `BUDGETS`: its own, or else its budget's."""
    budget = BUDGETS[settings.budget]
    own = flat(settings.to_dict())
    return {name: size if own[name] == -1 else own[name] for name, size in budget.items()}


def resolve(config: ml_collections.ConfigDict) -> dict:
    """The config as plain JSON values."""
    return json.loads(config.to_json_best_effort())


def digest(config: dict, without: tuple[str, ...] = ()) -> str:
    """Names a run by all that shaped its training, but for the fields in `without`."""
    kept = sorted(
        item for item in flat(config).items() if not _later(item[0]) and item[0] not in without
    )
    return hashlib.sha256(json.dumps(kept).encode()).hexdigest()[:12]


def flat(config: dict, prefix: str = "") -> dict:
    """{"data.name": ...} of {"data": {"name": ...}}."""
    found = {}
    for key, value in config.items():
        nested = isinstance(value, dict)
        found |= flat(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return found


def _later(name: str) -> bool:
    return any(name == field or name.startswith(f"{field}.") for field in LATER)


def check_same_run(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Compares `config` with the workdir's, if it has one.

    Raises:
      UserError: the workdir holds another run.
    """
    if not (workdir / FILE).exists():
        return
    plain, found = flat(resolve(config)), flat(read(workdir))
    for name in ("method", *sorted(plain)):  # first: the fields depend on it
        if plain[name] != found.get(name) and not _later(name):
            raise UserError(
                f"{workdir} holds a run with config.{name} = {found[name]}, found {plain[name]}; "
                "choose another --workdir, or the run's own config to resume it"
            )


def save(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Writes `config.json`.

    Raises:
      UserError: the workdir holds another run, or cannot be written.
    """
    check_same_run(config, workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_atomically(workdir / FILE, json.dumps(resolve(config), indent=2) + "\n")
    except OSError as error:
        raise UserError(
            f"cannot write to workdir {workdir}: {error.strerror or error}; choose another "
            "--workdir"
        ) from error


def read(workdir: Path) -> dict:
    """The plain values of the workdir's config.

    Raises:
      UserError: there is none, or it is damaged.
    """
    file = workdir / FILE
    try:
        config = json.loads(file.read_text())
        if isinstance(config, dict) and config.get("method") in methods.METHODS:
            config = _SINCE | config
        _check_fields(config, _template(config).to_dict())
    except FileNotFoundError as error:
        raise UserError(
            f"{workdir} has no {FILE}; expected the workdir of a run, train one first"
        ) from error
    except (OSError, ValueError) as error:  # UserError, JSON's and Unicode's are ValueErrors
        raise UserError(f"cannot use {file}: {error}; restore it or train anew") from error
    return config


def load(workdir: Path) -> ml_collections.ConfigDict:
    """The workdir's config (see `read`), as a ConfigDict."""
    found = read(workdir)
    config = _template(found)
    config.update(found)  # in place of its own values; lists become tuples again
    return config


def write_atomically(file: Path, content: str | bytes) -> None:
    """Replaces what `file` holds by `content`, whole or not at all."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, file)
    except OSError as error:  # of a full disk it does not say where
        raise OSError(f"cannot write {file} ({error.strerror or error})") from error
    finally:
        # There may be others, of processes that were killed while they wrote.
        for left in file.parent.glob(f".{file.name}.*"):
            if left == temporary or not _runs(left.suffix[1:]):
                left.unlink(missing_ok=True)


def _runs(process: str) -> bool:
    """Whether this machine runs a process of that id."""
    try:
        os.kill(int(process), 0)
    except PermissionError:
        return True  # somebody else's
    except (ValueError, OSError, OverflowError):
        return False
    return True
