"""Checkpoints: `.keras` files of the weights, their averages and the state of both optimizers."""

import contextlib
import os
import re
import zipfile
from pathlib import Path

import keras
import numpy as np
from absl import logging

from avb_tf import archives, configuration, files, model_card, results
from avb_tf.errors import DivergenceError, UserError
from avb_tf.model import AVB

DIRECTORY = "checkpoints"
_MEMBERS = {"config.json", "model.weights.h5"}  # files in the archive or the unzipped folder
_USAGE = """\
import avb_tf

model = avb_tf.load_model("{name}")
z = model.encode(x, samples=100)  # draws from q(z|x), [100, batch, latent]
x_new = model.sample(64)"""


def save(model: AVB, workdir: Path, keep: int) -> Path:
    """Writes a checkpoint atomically, with a model card, and deletes all but the newest `keep`.

    At least two are kept, because the newest may hold weights from which training diverges. Only
    the steps after a checkpoint show whether it is good.

    Args:
      model: a compiled model.
      workdir: the run's directory, which must exist.
      keep: number of checkpoints to keep.
    Returns:
      The checkpoint's path.
    Raises:
      DivergenceError: a weight is not finite; nothing is written.
      OSError: the disk is full or not writable; the older checkpoints stay.
    """
    optimizers = [o for o in (model.optimizer, model.adversary_optimizer) if o is not None]
    for variable in [*model.variables, *(v for o in optimizers for v in o.variables)]:
        if not np.isfinite(variable.numpy()).all():
            step = int(model.step.numpy())
            raise DivergenceError(f"{variable.path} is not finite at step {step}")
    path = path_of(workdir, int(model.step.numpy()))
    # The name is fixed, so that the next checkpoint removes what a killed process left behind.
    temporary = path.with_name("partial.keras")
    try:
        if not workdir.is_dir():
            raise FileNotFoundError(f"{workdir} is gone")
        files.make_directory(path.parent)
        temporary.unlink(missing_ok=True)  # `save` would follow a link
        model.save(temporary)
        files.replace(temporary, path)
        write_card(model, workdir)
    except OSError as error:
        raise OSError(f"cannot write {path} ({error.strerror or error})") from error
    finally:
        temporary.unlink(missing_ok=True)
    for old in _paths(workdir)[max(keep, 2) :]:
        old.unlink()
    return path


def write_card(model: AVB, workdir: Path) -> None:
    """Writes the model card next to the workdir's checkpoints."""
    text = card(model, workdir, path_of(workdir, int(model.step.numpy())).name)
    files.write_atomically(workdir / DIRECTORY / model_card.FILE, text)


def card(model: AVB, workdir: Path, name: str) -> str:
    """Returns a model card with the config and results of `workdir`, as far as they exist.

    Args:
      model: the model that the card describes.
      workdir: the run's directory.
      name: file or address to load, for the card's example of use.
    """
    # A folder that Keras wrote has a `config.json` of its own.
    is_run = (workdir / DIRECTORY).is_dir() and (workdir / configuration.FILE).exists()
    config = configuration.read(workdir) if is_run else None
    return model_card.text(
        workdir.absolute().name,
        model_card.facts(model, config),
        _USAGE.format(name=name),
        config,
        results.read(workdir / results.FILE),
    )


def newest_step(workdir: Path) -> int:
    """Returns the step in the newest checkpoint's name, even if it is damaged; -1 without any."""
    return max(map(step_of, _paths(workdir)), default=-1)


def latest(workdir: Path) -> Path | None:
    """Returns the newest intact checkpoint, or None if there are no checkpoints.

    Damaged checkpoints that are newer are renamed, with a warning.

    Raises:
      UserError: all checkpoints are damaged; they are not renamed.
    """
    damaged, intact = {}, None
    for path in _paths(workdir):
        if (defect := _defect(path)) is None:
            intact = path
            break
        damaged[path] = defect
    if damaged and intact is None:
        raise UserError(
            f"{workdir / DIRECTORY} holds only damaged checkpoints; expected an intact one; "
            "restore it, or remove the directory to train anew"
        )
    for path, defect in damaged.items():
        _set_aside(path, f"is damaged ({defect})")
    return intact


def set_diverged_aside(workdir: Path, since: int) -> None:
    """Renames the newest checkpoint if it is of step `since` or later and not the only one.

    A checkpoint may hold weights that have exploded but are still finite.

    Args:
      workdir: the run's directory.
      since: checkpoints of this step and later have not yet been shown to be good.
    """
    paths = _paths(workdir)
    if len(paths) > 1 and step_of(paths[0]) >= since:
        _set_aside(paths[0], "is not good, because training diverged right after it")


def _set_aside(path: Path, why: str) -> None:
    aside = path.with_suffix(".damaged")
    os.replace(path, aside)
    logging.warning("%s %s; renamed it to %s, using an older one", path, why, aside.name)


def restore(model: AVB, path: Path) -> None:
    """Loads the state in `path` into `model`.

    Args:
      model: a compiled model with the same parts.
      path: the checkpoint's path.
    Raises:
      UserError: the file is missing, is damaged or holds another model.
    """
    with _explained(path):
        model.load_weights(path)


def load(workdir: Path) -> AVB:
    """Loads the model of the workdir's newest checkpoint.

    Raises:
      UserError: there is no checkpoint, or it cannot be loaded.
    """
    while (path := latest(workdir)) is not None:
        try:
            return _loaded(path)
        except UserError:
            if path.exists():
                raise  # if the path is gone, a training process has replaced it with a newer one
    raise UserError(f"{workdir} has no checkpoint; train the model first")


def load_model(path: str | Path) -> AVB:
    """Loads a trained model, ready to use or to train further.

        model = avb_tf.load_model("runs/digits-avb_ac")  # of its newest checkpoint
        model = avb_tf.load_model("model.keras")
        z = model.encode(x, samples=100)  # x [batch, *event] in [0, 1] -> [100, batch, latent]

    Args:
      path: a `.keras` file, the workdir of a run, or a folder written by
        `model.save(folder, zipped=False)`. Loading never runs code from the file.
    Returns:
      The model with the saved state of both optimizers.
    Raises:
      UserError: there is no model, or it is damaged or not an `AVB`.
    """
    path = Path(path)
    unpacked = path.is_dir() and _MEMBERS.issubset(file.name for file in path.iterdir())
    return load(path) if path.is_dir() and not unpacked else _loaded(path)


def _loaded(path: Path) -> AVB:
    with _explained(path):
        if path.is_file() and (defect := _defect(path)):
            raise ValueError(defect)
        model = keras.models.load_model(path, safe_mode=True)  # never runs code from the file
        if not isinstance(model, AVB):
            raise TypeError(f"it holds a {type(model).__name__}")
    return model


@contextlib.contextmanager
def _explained(path: Path):
    try:
        yield
    except Exception as error:  # Keras raises many types of exceptions
        raise UserError(
            f"{path} cannot be loaded ({error!s:.200}); expected a checkpoint of this program; "
            "remove it to use the one before"
        ) from error


def path_of(workdir: Path, step: int) -> Path:
    """Returns the path of the checkpoint of a step."""
    return workdir / DIRECTORY / f"step_{step:09d}.keras"


def step_of(path: Path) -> int:
    """Returns the step in a checkpoint's name."""
    return int(path.stem.removeprefix("step_"))


def _paths(workdir: Path) -> list[Path]:
    """Returns the paths of all checkpoints, the newest first."""
    paths = (workdir / DIRECTORY).glob("step_*.keras")
    named = (p for p in paths if re.fullmatch(r"step_\d+\.keras", p.name))
    return sorted(named, key=step_of, reverse=True)


def _defect(path: Path) -> str | None:
    """Describes what is wrong with a checkpoint's archive; None if it is intact."""
    try:
        with zipfile.ZipFile(path) as archive:
            archives.check(archive)
            # `testzip` verifies the content's checksums, which do not cover the file names.
            if (member := archive.testzip()) is not None:
                return f"the checksum of {member} differs"
            missing = _MEMBERS.difference(archive.namelist())
            return f"{', '.join(sorted(missing))} is missing" if missing else None
    except Exception as error:  # zipfile and zlib raise many types on a damaged header
        return f"{error!s:.200}" or type(error).__name__
