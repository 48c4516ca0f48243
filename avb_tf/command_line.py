"""The command line: parses absl flags before it imports anything that needs TensorFlow."""

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
from typing import Any

import ml_collections
from absl import flags
from ml_collections.config_flags import config_flags

from avb_tf import configs, configuration
from avb_tf.errors import UserError, WorkerLostError
from avb_tf.settings import amortised, posterior, run
from avb_tf.version import __version__

USAGE = """Adversarial Variational Bayes.

  avb-tf --config=digits:avb_ac --mode=train_and_evaluate
  avb-tf --workdir=runs/digits-avb_ac --mode=evaluate
  avb-tf --workdir=runs --mode=compare

Every field of the config is also a flag, such as --config.steps=2000; `avb_tf/settings/` lists
them. A started run keeps its config in its workdir. Repeating the same command resumes the run.
"""

# Mode -> its function, called with (config, workdir).
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


def _modes_of_fits(package: str) -> dict[str, str]:
    modes = ("train", "evaluate", "train_and_evaluate", "sample", "export")
    own = {mode: f"avb_tf.{package}.experiment:{mode}" for mode in modes}
    return own | {"serve_check": MODES["serve_check"]}


POSTERIOR_MODES = _modes_of_fits("posteriors")
AMORTISED_MODES = _modes_of_fits("amortised")
_DRIVER = Path("/proc/driver/nvidia/gpus")  # NVIDIA's driver has a folder here for each GPU


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line; a user's mistake prints one line on stderr and exits with status 2.

    Args:
      argv: program name and arguments; sys.argv by default.
    Raises:
      SystemExit: with status 2 after a user's mistake, 75 if another worker stopped, and 143
        after SIGTERM.
    """
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
        modes = {posterior: POSTERIOR_MODES, amortised: AMORTISED_MODES}.get(
            configuration.kind(config), MODES
        )
        if values.mode not in modes:
            raise UserError(
                f"--mode={values.mode} does not apply to method '{config and config.method}'; "
                f"expected one of {', '.join(modes)}"
            )
        module, function = modes[values.mode].split(":")
        extra: dict[str, Any] = {"baseline": values.baseline} if values.baseline else {}
        extra |= {"images": values.image} if values.image else {}
        if threads := config and config.get("threads_per_op"):
            # TensorFlow reads the variable only when it starts.
            os.environ.setdefault("TF_NUM_INTRAOP_THREADS", str(threads))
        _cache_programs()
        alone = modes is not MODES or values.mode not in ("train", "train_and_evaluate")
        if alone and "TF_CONFIG" in os.environ and not _imported("avb_tf.replicas").is_chief():
            print(f"--mode={values.mode} runs only on the first worker of TF_CONFIG")
            return
        getattr(_imported(module), function)(config, workdir, **extra)
    except Exception as error:
        known = _known(error)
        if known is None or "--debug" in argv:
            raise
        print(f"avb-tf: {known}", file=sys.stderr)
        status = os.EX_TEMPFAIL if isinstance(error, WorkerLostError) else 2
        raise SystemExit(status) from error


def _known(error: Exception) -> UserError | None:
    """Returns one line about a user's mistake, a lost worker, a disk or memory, or else None."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, WorkerLostError):
        return UserError(f"{error}; restart all workers to resume")
    if isinstance(error, OSError):
        return UserError(f"{error}; check that path, and the space on its disk")
    cause: BaseException | None = error
    while cause is not None:
        # The others are TensorFlow's, which may not have been imported, and protobuf's.
        exhausted = type(cause).__name__ == "ResourceExhaustedError"
        if isinstance(cause, MemoryError) or exhausted or "Arena alloc failed" in str(cause):
            return UserError(
                f"not enough memory: {str(cause) or type(cause).__name__:.150}; free some, or use "
                "a smaller config.batch_size or smaller networks; a run resumes where it was saved"
            )
        cause = cause.__cause__ or cause.__context__
    return None


def _cache_programs() -> None:
    """Makes XLA cache the programs that it compiles for a GPU, so that later commands start faster.

    A cached program is valid for one version of TensorFlow and one GPU model, so each pair has its
    own cache. The model is read from the driver, because TensorFlow must not be imported yet.
    """
    gpus = [file.read_text() for file in sorted(_DRIVER.glob("*/information"))]
    if not gpus or "TF_XLA_FLAGS" in os.environ:
        return
    models = [line for text in gpus for line in text.splitlines() if line.startswith("Model:")]
    kind = f"{importlib.metadata.version('tensorflow')}\n" + "\n".join(models)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = home / "avb_tf" / f"xla-{hashlib.sha256(kind.encode()).hexdigest()[:12]}"
    with contextlib.suppress(OSError):  # the home directory is not writable
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.environ["TF_XLA_FLAGS"] = f"--tf_xla_persistent_cache_directory={cache}"


def _imported(module: str) -> ModuleType:
    """Imports a module and silences TensorFlow's log, unless TF_CPP_MIN_LOG_LEVEL asks for it."""
    if os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3") != "3":
        return importlib.import_module(module)
    # TensorFlow 2.21 ignores the variable while it is imported (tensorflow#100442).
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
    values.set_gnu_getopt(True)  # flags may follow the 5 of `--config.steps 5`
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
    flags.DEFINE_multi_string(
        "image", None, "An image of yours, for explore; several --image are allowed.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_bool("version", False, "Print the version and leave.", flag_values=values)
    flags.DEFINE_bool("debug", False, "Show the traceback of a mistake.", flag_values=values)
    return values


def _parse(
    values: flags.FlagValues, argv: list[str]
) -> tuple[ml_collections.ConfigDict | None, Path]:
    """Returns the config, or None for --mode=compare, and the workdir.

    Raises:
      UserError: a flag or a config is unknown or invalid.
    """
    names = [argument.partition("=")[0].lstrip("-") for argument in argv[1:]]
    early = names[: names.index("config")] if "config" in names else []
    if early := [name for name in early if name.startswith("config.")]:
        raise UserError(f"--{early[0]} stands before --config; put --config=FILE first")
    try:
        rest = values(argv, known_only=True)  # the flags --config.FIELD are not yet defined
        if values.baseline and values.mode != "benchmark":
            raise UserError(f"--baseline is for --mode=benchmark, found --mode={values.mode}")
        if values.image and values.mode != "explore":
            raise UserError(f"--image is for --mode=explore, found --mode={values.mode}")
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
    except Exception as error:  # the flag libraries raise many types of exceptions
        raise UserError(_explain(error)) from error
    if stray:
        raise UserError(f"stray argument '{stray[0]}'; settings look like --config.steps=2000")
    if config.get("method") != method:  # the other settings would still be the old method's
        raise UserError(
            f"--config.method is '{config.method}', but the config is for '{method}'; "
            "expected the method after a colon, --config=FILE:METHOD"
        )
    configuration.validate(config)
    if configuration.kind(config) is not run and not config.name:
        config.name = configuration.kind(config).name(config)
    if not (values.workdir or config.name):
        raise UserError("config.name is empty; expected a name, or a --workdir")
    workdir = Path(values.workdir or Path("runs") / config.name).resolve()
    configuration.check_same_run(config, workdir)
    return config, workdir


def _compared(values: flags.FlagValues, rest: list[str]) -> Path:
    """Returns the directory of the runs to compare; each run has its own config."""
    if rest or values.config or not values.workdir:
        other = rest[0] if rest else f"--config={values.config}" if values.config else "neither"
        raise UserError(
            f"--mode=compare takes only --workdir=DIR, the directory of the runs; found {other}"
        )
    return Path(values.workdir).resolve()


def _config(argument: str | None, workdir: str | None) -> ml_collections.ConfigDict:
    """Returns the config that `argument` names, FILE or FILE:METHOD, or else the workdir's."""
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
    except Exception as error:  # a user's code may raise anything
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
    """Returns one line about an error of the flag libraries."""
    while error.args and isinstance(error.args[0], Exception):  # a KeyError in an AttributeError
        error = error.args[0]
    # `str` of a KeyError would quote the message.
    text = "; ".join(str(error.args[0] if error.args else error).splitlines())
    if isinstance(error, LookupError):
        return f"unknown field of the config: {text}; `avb_tf/settings/` lists them"
    return f"{text}; see --help"
