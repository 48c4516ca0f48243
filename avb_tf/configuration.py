"""Configs of models and of posteriors: their checks, their hashes and the file in the workdir."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_collections

from avb_tf import files
from avb_tf.errors import UserError
from avb_tf.settings import amortised, posterior, run

FILE = "config.json"
# Fields that may differ between training and a later command, which may run on another machine.
LATER = (
    "eval", "export", "profile_steps", "data.path", "strategy", "threads_per_op", "tf32",
    "resident_megabytes", "worker_timeout",
)  # fmt: skip
_CHECKSUM = "sha256"  # field of the file that holds the hash of all other fields
default = run.default  # the starting point of a config file


def kind(config: Mapping[str, Any] | ml_collections.ConfigDict | None) -> ModuleType:
    """Returns the module of `settings` with the config's fields and checks; `run` by default."""
    has_method = isinstance(config, Mapping | ml_collections.ConfigDict)
    modules = {module.METHOD: module for module in (posterior, amortised)}
    return modules.get(config.get("method"), run) if has_method else run


def validate(config: ml_collections.ConfigDict) -> None:
    """Checks a config as far as possible without data.

    Args:
      config: the config of a model or of a posterior.
    Raises:
      UserError: a field is missing, unknown, of the wrong type or out of range.
    """
    _check_fields(config.to_dict(), kind(config).template().to_dict())
    kind(config).validate(config)


def _check_fields(fields: Any, expected: dict[str, Any], name: str = "config") -> None:
    """Compares names and types; an int is accepted as a float, and a list as a tuple."""
    if not isinstance(fields, dict):
        raise UserError(f"{name} is {fields!r:.50}; expected the fields {', '.join(expected)}")
    for key in sorted(fields.keys() ^ expected.keys()):
        has = "no" if key in expected else "an unknown"
        raise UserError(f"{name} has {has} field '{key}'; expected those of configuration.default")
    for key, value in expected.items():
        stand_in = {float: int, tuple: list}.get(type(value))
        if isinstance(value, dict):
            _check_fields(fields[key], value, f"{name}.{key}")
        elif type(fields[key]) not in (type(value), stand_in):
            raise UserError(
                f"{name}.{key} is {fields[key]!r:.50}; expected a value of type "
                f"{type(value).__name__}"
            )


def resolve(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns the config as plain JSON values."""
    return json.loads(config.to_json_best_effort())


def digest(config: dict[str, Any], without: tuple[str, ...] = ()) -> str:
    """Returns a hash of all fields that affect training, except those in `without`.

    Args:
      config: plain values, as `resolve` returns them.
      without: names of fields to leave out, such as "model.seed".
    """
    # A new field at its value in `SINCE` is left out, so that configs of earlier versions, which
    # lack the field, keep their hash.
    earlier = flat(kind(config).SINCE)
    kept = sorted(
        (name, value)
        for name, value in flat(config).items()
        if not _later(name) and name not in without and (name, value) not in earlier.items()
    )
    return hashlib.sha256(json.dumps(kept).encode()).hexdigest()[:12]


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens a nested config: {"data": {"name": ...}} -> {"data.name": ...}."""
    fields = {}
    for key, value in config.items():
        nested = isinstance(value, dict)
        fields |= flat(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return fields


def _later(name: str) -> bool:
    return any(name == field or name.startswith(f"{field}.") for field in LATER)


def check_same_run(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Compares `config` with the workdir's config, if there is one.

    Args:
      config: the config of the run to start or to resume.
      workdir: the run's directory.
    Raises:
      UserError: the workdir holds another run.
    """
    if not (workdir / FILE).exists():
        return
    plain, saved = flat(resolve(config)), flat(read(workdir))
    for name in ("method", *sorted(plain)):  # the method first, because the fields depend on it
        if plain[name] != saved.get(name) and not _later(name):
            raise UserError(
                f"{workdir} holds a run with config.{name} = {saved[name]}, found {plain[name]}; "
                "choose another --workdir, or the run's own config to resume it"
            )


def save(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Writes `config.json`.

    Args:
      config: the run's config.
      workdir: the run's directory; created if missing.
    Raises:
      UserError: the workdir holds another run, or cannot be written.
    """
    check_same_run(config, workdir)
    try:
        files.make_directory(workdir)
        files.write_atomically(workdir / FILE, text(resolve(config)))
    except OSError as error:
        raise UserError(
            f"cannot write to workdir {workdir}: {error.strerror or error}; choose another "
            "--workdir"
        ) from error


def read(workdir: Path) -> dict[str, Any]:
    """Returns the plain values of the workdir's config.

    Raises:
      UserError: the file is missing or damaged.
    """
    file = workdir / FILE
    try:
        saved = json.loads(file.read_text())
        expected = saved.pop(_CHECKSUM, None) if isinstance(saved, dict) else None
        config = _completed(saved, kind(saved).SINCE) if isinstance(saved, dict) else saved
        _check_fields(config, kind(config).template().to_dict())
        if expected not in (None, _checksum(saved)):  # None: written by an earlier version
            raise ValueError(
                f"a field was changed or damaged since it was written; if you changed it, remove "
                f"the line {_CHECKSUM}"
            )
    except FileNotFoundError as error:
        raise UserError(
            f"{workdir} has no {FILE}; expected the workdir of a run, train one first"
        ) from error
    except (
        OSError,
        ValueError,
        RecursionError,
    ) as error:  # UserError and the errors of JSON and Unicode are ValueErrors
        raise UserError(f"cannot use {file}: {error}; restore it or train anew") from error
    return config


def text(config: dict[str, Any]) -> str:
    """Returns the content of `config.json` for plain values, with their checksum."""
    return json.dumps(config | {_CHECKSUM: _checksum(config)}, indent=2) + "\n"


def _checksum(config: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def _completed(config: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Returns the config with its missing fields taken from `defaults`, also in nested dicts."""
    known = {k: v for k, v in defaults.items() if k not in config}
    nested = {
        k: _completed(config[k], v)
        for k, v in defaults.items()
        if isinstance(v, dict) and isinstance(config.get(k), dict)
    }
    return config | known | nested


def load(workdir: Path) -> ml_collections.ConfigDict:
    """Returns the workdir's config as a ConfigDict.

    Raises:
      UserError: the file is missing or damaged.
    """
    saved = read(workdir)
    config = kind(saved).template()
    config.update(saved)  # converts JSON's lists back to tuples
    return config
