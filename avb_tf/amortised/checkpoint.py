"""What a training leaves behind: a checkpoint to go on from, and scalars for TensorBoard."""

import io
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from avb_tf import archives, files
from avb_tf.errors import UserError

FILE, LOGS = "training.npz", "logs/train"
SECONDS = 30.0  # between checkpoints
_RECORD = "record"
_ARRAYS = ("weights", "moments", "average", "kept")  # of a `State`


class State(NamedTuple):
    """The state of a training."""

    stage: int
    step: int
    elapsed: float  # seconds
    since: float  # progress at which the stage began
    history: list[float]
    weights: list[np.ndarray]  # variables of the network
    moments: list[np.ndarray]  # variables of the stage's optimizer
    held_out: list[float]  # log densities of pairs held out from training, if there are any
    average: list[np.ndarray]  # the stage's variables, averaged over the last steps, for these
    kept: list[np.ndarray]  # this average when the log density was largest


class Workdir:
    """The directory of a training, or no directory, where nothing is kept.

        workdir = Workdir(Path("runs/fit"), {"seed": 0})
        state = workdir.state()  # None, or what `save` wrote last

    Args:
      path: directory, created if missing; None: no directory.
      identity: JSON values that identify the training.
    Raises:
      UserError: the directory cannot be created.
    """

    def __init__(self, path: Path | None, identity: Mapping[str, Any]):
        self.path, self._saved = path, time.monotonic()
        self._identity = json.loads(json.dumps(identity))
        self._writer = None
        if path is not None:
            try:
                files.make_directory(path)
            except OSError as error:
                raise UserError(f"cannot write {path}: {error}; choose another workdir") from error
            self._writer = tf.summary.create_file_writer(str(path / LOGS))

    def state(self) -> State | None:
        """Returns the state of the last checkpoint, or None if there is none.

        Raises:
          UserError: the checkpoint is damaged, or belongs to another training.
        """
        if self.path is None or not (self.path / FILE).exists():
            return None
        try:
            arrays = archives.read_arrays(self.path / FILE)
            record = json.loads(arrays.pop(_RECORD).tobytes())
            values = iter([arrays[str(i)] for i in range(len(arrays))])
            counts = {name: record["state"].pop(name) for name in _ARRAYS}
            groups = {name: list(itertools.islice(values, n)) for name, n in counts.items()}
            state = State(**record["state"], **groups)
        except Exception as error:  # whatever JSON, zipfile and numpy raise on a damaged file
            raise UserError(
                f"{self.path / FILE} cannot be read ({error!s:.200}); remove it to train anew"
            ) from error
        for name, value in self._identity.items():
            if (other := record["identity"].get(name)) != value:
                raise UserError(
                    f"{self.path} holds a training with {name} = {other}, found {value}; choose "
                    "another workdir, or make the same call to resume it"
                )
        return state

    def save(self, state: State) -> None:
        """Replaces the checkpoint.

        Raises:
          UserError: the checkpoint cannot be written.
        """
        if self.path is None:
            return
        groups = {name: getattr(state, name) for name in _ARRAYS}
        known = state._asdict() | {name: len(arrays) for name, arrays in groups.items()}
        record = json.dumps({"identity": self._identity, "state": known}).encode()
        named = {str(i): array for i, array in enumerate(itertools.chain(*groups.values()))}
        named[_RECORD] = np.frombuffer(record, np.uint8)
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **named)
        try:
            files.write_atomically(self.path / FILE, buffer.getvalue())
        except OSError as error:
            raise UserError(f"{error}; choose another workdir, or make room") from error
        self._saved = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether it is time for a checkpoint."""
        return self.path is not None and time.monotonic() - self._saved >= SECONDS

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Writes scalars for TensorBoard."""
        if self._writer is None:
            return
        with self._writer.as_default(step):
            for name, value in values.items():
                tf.summary.scalar(name, value)
        self._writer.flush()


def assign(variables: Sequence[Any], values: Sequence[np.ndarray]) -> None:
    """Sets variables to the values of a checkpoint.

    Raises:
      UserError: their shapes differ.
    """
    shapes, expected = ([tuple(x.shape) for x in group] for group in (values, variables))
    if shapes != expected:
        raise UserError(
            f"the checkpoint has variables of shapes {shapes!s:.80}, expected {expected!s:.80}; "
            "remove it to train anew"
        )
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
