"""Checkpoints: one `.keras` file each, with the weights, their averages and both optimizers."""

import contextlib
import itertools
import os
import re
import zipfile
from pathlib import Path

import keras
import numpy as np
from absl import logging

from avb_tf import configuration, files, model_card, results
from avb_tf.errors import DivergenceError, UserError
from avb_tf.model import AVB

DIRECTORY = "checkpoints"
_MEMBERS = {"config.json", "model.weights.h5"}  # of the archive, or of a folder of its parts
_USAGE = """\
import avb_tf

model = avb_tf.load_model("{name}")
z = model.encode(x, samples=100)  # draws from q(z|x), [100, batch, latent]
x_new = model.sample(64)"""


def save(model: AVB, workdir: Path, keep: int) -> Path:
    """Writes the model at its step, whole or not at all, and keeps the newest `keep`.

    Beside them lies a model card.

    Raises:
      DivergenceError: a weight is no number; nothing is written.
      OSError: there is no space, or no permission; the older ones stay.
    """
    optimizers = [o for o in (model.optimizer, model.adversary_optimizer) if o is not None]
    for variable in [*model.variables, *(v for o in optimizers for v in o.variables)]:
        if not np.isfinite(variable.numpy()).all():
            raise DivergenceError(f"{variable.path} is no number at step {int(model.step.numpy())}")
    directory = workdir / DIRECTORY
    directory.mkdir(parents=True, exist_ok=True)
    path = path_of(workdir, int(model.step.numpy()))
    # One name: what a process left that was killed while it wrote is overwritten.
    temporary = directory / "partial.keras"
    try:
        model.save(temporary)
        with open(temporary, "rb") as written:
            os.fsync(written)  # a name may reach the disk before what it names
        os.replace(temporary, path)
        write_card(model, workdir)
    except OSError as error:
        raise OSError(f"cannot write {path} ({error.strerror or error})") from error
    finally:
        temporary.unlink(missing_ok=True)
    for old in _paths(workdir)[keep:]:
        old.unlink()
    return path


def write_card(model: AVB, workdir: Path) -> None:
    """Writes the model card of the workdir's checkpoints, with its config and its results."""
    text = card(model, workdir, path_of(workdir, int(model.step.numpy())).name)
    files.write_atomically(workdir / DIRECTORY / model_card.FILE, text)


def card(model: AVB, workdir: Path, name: str) -> str:
    """A model card, with the config and the results of `workdir` where it has them.

    Args:
      name: what the card tells readers to load.
    """
    config = configuration.read(workdir) if (workdir / configuration.FILE).exists() else None
    return model_card.text(
        workdir.absolute().name,
        model_card.facts(model, config),
        _USAGE.format(name=name),
        config,
        results.read(workdir / results.FILE),
    )


def newest_step(workdir: Path) -> int:
    """The step that the newest checkpoint's name has, whole or not; -1 where there is none."""
    return max(map(step_of, _paths(workdir)), default=-1)


def latest(workdir: Path) -> Path | None:
    """The newest whole checkpoint, or None. Damaged ones are set aside for it, with a warning.

    Raises:
      UserError: all are damaged; they stay where they are.
    """
    paths = _paths(workdir)
    damaged = list(itertools.takewhile(lambda path: not _whole(path), paths))
    if paths and damaged == paths:
        raise UserError(
            f"{workdir / DIRECTORY} holds only damaged checkpoints; expected a whole one; restore "
            "it, or remove the directory to train anew"
        )
    for path in damaged:
        aside = path.with_suffix(".damaged")
        os.replace(path, aside)
        logging.warning("%s is damaged; set aside as %s, trying the one before", path, aside.name)
    return paths[len(damaged)] if paths else None


def restore(model: AVB, path: Path) -> None:
    """Gives `model` the state in `path`.

    Raises:
      UserError: it is not there, not this program's, or of another model.
    """
    with _explained(path):
        model.load_weights(path)


def load(workdir: Path) -> AVB:
    """The model of the newest checkpoint.

    Raises:
      UserError: there is none, or it is not this program's.
    """
    path = latest(workdir)
    if path is None:
        raise UserError(f"{workdir} has no checkpoint; train the model first")
    return _loaded(path)


def load_model(path: str | Path) -> AVB:
    """A trained model, ready to use and to train on.

        model = avb_tf.load_model("runs/digits-avb_ac")  # of its newest checkpoint
        model = avb_tf.load_model("model.keras")
        z = model.encode(x, samples=100)  # x [batch, *event] in [0, 1] -> [100, batch, latent]

    Args:
      path: a `.keras` file, the workdir of a run, or a folder written by
        `model.save(folder, zipped=False)`. Loading runs no code that the file brings.
    Returns:
      The model with both optimizers in the state in which they were saved.
    Raises:
      UserError: there is no model, or it is damaged or not of this program.
    """
    path = Path(path)
    unpacked = path.is_dir() and _MEMBERS.issubset(file.name for file in path.iterdir())
    return load(path) if path.is_dir() and not unpacked else _loaded(path)


def _loaded(path: Path) -> AVB:
    with _explained(path):
        model = keras.models.load_model(path, safe_mode=True)  # runs nothing that the file brings
        if not isinstance(model, AVB):
            raise TypeError(f"it holds a {type(model).__name__}")
    return model


@contextlib.contextmanager
def _explained(path: Path):
    try:
        yield
    except Exception as error:  # Keras raises what it meets
        raise UserError(
            f"{path} cannot be loaded ({error!s:.200}); expected a checkpoint of this program; "
            "remove it to use the one before"
        ) from error


def path_of(workdir: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return workdir / DIRECTORY / f"step_{step:09d}.keras"


def step_of(path: Path) -> int:
    """The step of a checkpoint."""
    return int(path.stem.removeprefix("step_"))


def _paths(workdir: Path) -> list[Path]:
    """All checkpoints, the newest first."""
    paths = (workdir / DIRECTORY).glob("step_*.keras")
    return sorted((p for p in paths if re.fullmatch(r"step_\d+\.keras", p.name)), reverse=True)


def _whole(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            # Reads all, against the checksums within, which do not cover the names.
            return archive.testzip() is None and _MEMBERS.issubset(archive.namelist())
    except Exception:  # zipfile and zlib raise many kinds on a damaged header
        return False
