"""The command line: absl flags, and nothing that needs TensorFlow before they are parsed."""

import contextlib
import hashlib
import importlib
import importlib.metadata
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import ml_collections
from absl import flags
from ml_collections.config_flags import config_flags

from avb_tf import configs, configuration
from avb_tf.errors import UserError, WorkerLostError
from avb_tf.settings import posterior
from avb_tf.version import __version__

USAGE = """Adversarial Variational Bayes.

  avb-tf --config=digits:avb_ac --mode=train_and_evaluate
  avb-tf --workdir=runs/digits-avb_ac --mode=evaluate
  avb-tf --workdir=runs --mode=compare

Any field of the config is a flag too, such as --config.steps=2000; `avb_tf/settings/` lists them.
Once a run has been started its workdir knows its config. The same command again resumes it.
"""

# Mode -> the function that runs it, called with (config, workdir).
MODES = {
    "train": "avb_tf.commands.train:train",
    "evaluate": "avb_tf.commands.evaluate:evaluate",
    "train_and_evaluate": "avb_tf.commands.evaluate:train_and_evaluate",
    "sample": "avb_tf.commands.sample:sample",
    "compare": "avb_tf.commands.compare:compare",
    "benchmark": "avb_tf.benchmarks.step:benchmark",
    "scaling": "avb_tf.benchmarks.scaling:scaling",
    "figures": "avb_tf.commands.draw:draw",
    "explore": "avb_tf.commands.explore:explore",
    "export": "avb_tf.commands.export:export",
    "serve_check": "avb_tf.serving.check:serve_check",
}
POSTERIOR_MODES = {
    "train": "avb_tf.posteriors.experiment:train",
    "evaluate": "avb_tf.posteriors.experiment:evaluate",
    "train_and_evaluate": "avb_tf.posteriors.experiment:train_and_evaluate",
    "sample": "avb_tf.posteriors.experiment:sample",
    "export": "avb_tf.posteriors.experiment:export",
    "serve_check": "avb_tf.serving.check:serve_check",
}

_DRIVER = Path("/proc/driver/nvidia/gpus")  # of NVIDIA's driver: a folder for each GPU


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line; a user's mistake is one line on stderr and exit status 2."""
    argv = list(sys.argv if argv is None else argv)
    values = _define_flags()
    if {"--help", "-h", "-help"} & set(argv[1:]):
        print(USAGE + values.get_help())
        return
    if "--version" in argv[1:]:
        print(f"avb-tf {__version__}")
        return
    try:
        config, workdir = _parse(values, argv)
        of_posterior = configuration.kind(config) is posterior
        modes = POSTERIOR_MODES if of_posterior else MODES
        if values.mode not in modes:
            raise UserError(f"--mode={values.mode} is of no use here; expected {', '.join(modes)}")
        module, function = modes[values.mode].split(":")
        extra = {"baseline": values.baseline} if values.baseline else {}
        if threads := config and config.get("threads_per_op"):
            # TensorFlow reads it once, when it starts.
            os.environ.setdefault("TF_NUM_INTRAOP_THREADS", str(threads))
        _cache_programs()
        alone = of_posterior or values.mode not in ("train", "train_and_evaluate")
        if alone and "TF_CONFIG" in os.environ and not _imported("avb_tf.replicas").is_chief():
            print(f"--mode={values.mode} is left to the first worker of TF_CONFIG")
            return
        getattr(_imported(module), function)(config, workdir, **extra)
    except (UserError, OSError) as error:
        if "--debug" in argv:
            raise
        status = 2
        if isinstance(error, WorkerLostError):
            error, status = UserError(f"{error}; start all workers again to go on"), os.EX_TEMPFAIL
        elif isinstance(error, OSError):
            error = UserError(f"{error}; check that path, and the space on its disk")
        print(f"avb-tf: {error}", file=sys.stderr)
        raise SystemExit(status) from error


def _cache_programs() -> None:
    """Lets XLA keep what it compiles for a GPU: later commands start in half the time.

    A program is for one version of TensorFlow and one kind of GPU, which the driver tells before
    TensorFlow is imported.
    """
    gpus = [file.read_text() for file in sorted(_DRIVER.glob("*/information"))]
    if not gpus or "TF_XLA_FLAGS" in os.environ:
        return
    models = [line for text in gpus for line in text.splitlines() if line.startswith("Model:")]
    kind = f"{importlib.metadata.version('tensorflow')}\n" + "\n".join(models)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = home / "avb_tf" / f"xla-{hashlib.sha256(kind.encode()).hexdigest()[:12]}"
    with contextlib.suppress(OSError):  # a home that cannot be written to
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.environ["TF_XLA_FLAGS"] = f"--tf_xla_persistent_cache_directory={cache}"


def _imported(module: str) -> ModuleType:
    """The module. TensorFlow logs nothing that would bury a mistake's one line, unless asked to."""
    if os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3") != "3":
        return importlib.import_module(module)
    # What TensorFlow 2.21 logs while it is imported heeds no setting (tensorflow#100442).
    stderr = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        return importlib.import_module(module)
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def _define_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    values.set_gnu_getopt(True)  # in --config.steps 5 the 5 ends no flags, see `_parse`
    flags.DEFINE_string(
        "config",
        None,
        f"Experiment ({', '.join(configs.names())}, or a path of yours), with its method after a "
        "colon. Default: the config of --workdir.",
        flag_values=values,
    )
    flags.DEFINE_enum("mode", "train", list(MODES), "What to do.", flag_values=values)
    flags.DEFINE_string(
        "workdir",
        None,
        "Directory of the run: config, checkpoints, logs, figures and results. "
        "Default: runs/<config>-<method>.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "baseline", None, "A benchmark.json to compare with, for benchmark.", flag_values=values
    )
    flags.DEFINE_bool("version", False, "Print the version and leave.", flag_values=values)
    flags.DEFINE_bool("debug", False, "Show the traceback of a mistake.", flag_values=values)
    return values


def _parse(
    values: flags.FlagValues, argv: list[str]
) -> tuple[ml_collections.ConfigDict | None, Path]:
    """The config, None for the runs that `compare` finds, and the workdir that the flags name.

    Raises:
      UserError: flags or a config that do not exist or do not fit.
    """
    names = [argument.partition("=")[0].lstrip("-") for argument in argv[1:]]
    early = names[: names.index("config")] if "config" in names else []
    if early := [name for name in early if name.startswith("config.")]:
        raise UserError(f"--{early[0]} stands before --config; put --config=FILE first")
    try:
        rest = values(argv, known_only=True)  # all but --config.FIELD, which the config defines
        if values.baseline and values.mode != "benchmark":
            raise UserError(f"--baseline is for --mode=benchmark, found --mode={values.mode}")
        if values.mode == "compare":
            return None, _compared(values, rest[1:])
        config = _config(values.config, values.workdir)
        method = config.get("method")
        config_flags.DEFINE_config_dict(
            "config", config, flag_values=values, sys_argv=rest, allow_override=True
        )
        stray = values(rest)[1:]
    except (UserError, OSError):
        raise
    except Exception as error:  # whatever the flag libraries raise
        raise UserError(_explain(error)) from error
    if stray:
        raise UserError(f"stray argument '{stray[0]}'; settings look like --config.steps=2000")
    if config.get("method") != method:  # the settings stay those of the other one
        raise UserError(
            f"--config.method is '{config.method}', and the config is one of '{method}'; "
            "expected the method after --config=FILE and a colon"
        )
    configuration.validate(config)
    if configuration.kind(config) is posterior and not config.name:
        config.name = posterior.name(config)
    if not (values.workdir or config.name):
        raise UserError("config.name is empty; expected a name, or a --workdir")
    workdir = Path(values.workdir or Path("runs") / config.name).resolve()
    configuration.check_same_run(config, workdir)
    return config, workdir


def _compared(values: flags.FlagValues, rest: list[str]) -> Path:
    """The directory of the runs to compare; they bring their own configs."""
    if rest or values.config or not values.workdir:
        found = rest[0] if rest else f"--config={values.config}" if values.config else "neither"
        raise UserError(
            f"--mode=compare takes --workdir=DIR, the directory of the runs, alone; found {found}"
        )
    return Path(values.workdir).resolve()


def _config(argument: str | None, workdir: str | None) -> ml_collections.ConfigDict:
    """The config of `argument`, FILE or FILE:METHOD, or else of a workdir."""
    if argument is None and workdir is not None:
        return configuration.load(Path(workdir))
    if argument is None:
        raise UserError(
            "no --config and no --workdir; expected an experiment, such as "
            "--config=digits:avb_ac, or the workdir of a run"
        )
    name, _, method = argument.partition(":")
    file = configs.file(name)
    if file is None:
        raise UserError(
            f"--config names '{name}', which is neither a file nor an experiment; expected one of "
            f"{', '.join(configs.names())}, or a path"
        )
    try:
        get_config = runpy.run_path(str(file))["get_config"]
        config = get_config(method) if method else get_config()
    except UserError:
        raise
    except Exception as error:  # whatever a user's code raises
        raise UserError(
            f"{file} raised {type(error).__name__}: {error}; "
            "expected Python with a function get_config, see configs/"
        ) from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(
            f"get_config of {file} returned {config!r:.50}; expected it to start from "
            "configuration.default"
        )
    return config


def _explain(error: BaseException) -> str:
    """One line from what the flag libraries raised."""
    while error.args and isinstance(error.args[0], Exception):  # a KeyError in an AttributeError
        error = error.args[0]
    # The message itself where there is one: str of a KeyError would quote it.
    text = "; ".join(str(error.args[0] if error.args else error).splitlines())
    if isinstance(error, LookupError):
        return f"unknown field of the config: {text}; `avb_tf/settings/` lists them"
    return f"{text}; see --help"
