"""Computes long estimates in chunks of examples and saves each finished chunk to disk."""

import hashlib
import io
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import keras
import numpy as np

from avb_tf import archives, files

EXAMPLES = 25  # in a chunk
_Item = TypeVar("_Item")


def fingerprint(model: Any, x: np.ndarray, settings: dict[str, Any]) -> str:
    """Returns a hash of everything that an estimate depends on.

    Args:
      model: an `AVB`, of which the averaged weights count.
      x: [count, *event], the examples.
      settings: settings of the estimate, as plain JSON values.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    weights = model.averaged_encoder.weights + model.averaged_decoder.weights
    for array in (*weights, x):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:12]


def run(
    record: Any,
    compute: Callable[[int, slice], Any],
    count: int,
    directory: Path,
    label: str,
    size: int,
) -> tuple[Any, float]:
    """Returns the results of `compute` for `count` examples, and its seconds over all calls.

    Chunks that an earlier call finished in `directory` are read instead of computed again. An
    interrupted evaluation therefore continues where it stopped, with the same results.

    Args:
      record: class of the results, a NamedTuple of arrays with the examples on the last axis.
      compute: function of (index of the chunk, slice of its examples) that returns a `record`; the
        result must depend only on these two.
      count: number of examples.
      directory: folder of the chunks of this estimate, not shared with others (`fingerprint`). The
        parent of its parent must exist.
      label: description of the estimate, printed above the progress bar.
      size: examples in a chunk.
    """
    files.make_directory(directory, inside=directory.parent.parent)
    slices = [slice(i, min(i + size, count)) for i in range(0, count, size)]
    paths = [directory / f"chunk_{i:03d}.npz" for i in range(len(slices))]
    finished = {}
    for i, (file, part) in enumerate(zip(paths, slices, strict=True)):
        if (done := _read(file, record, part.stop - part.start)) is not None:
            finished[i] = done
    for i in tracked([i for i in range(len(slices)) if i not in finished], label):
        began = time.perf_counter()
        arrays = compute(i, slices[i])._asdict()
        arrays["seconds"] = np.array([time.perf_counter() - began])
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, **arrays)
        files.write_atomically(paths[i], buffer.getvalue())
        finished[i] = arrays
    ordered = [finished[i] for i in range(len(slices))]
    whole = [np.concatenate([part[name] for part in ordered], -1) for name in record._fields]
    return record(*whole), float(sum(part["seconds"][0] for part in ordered))


def tracked(items: Sequence[_Item], label: str) -> Iterator[_Item]:
    """Yields the items and shows `label` with a progress bar of the remaining time."""
    if not items:
        return
    print(label)
    progress = keras.utils.Progbar(len(items), unit_name="part")
    for item in items:
        yield item
        progress.add(1)


def _read(file: Path, record: Any, count: int) -> dict[str, np.ndarray] | None:
    """Returns the arrays of a finished chunk, or None if it is missing or damaged."""
    try:
        arrays = archives.read_arrays(file)
    except Exception:  # zipfile, zlib and numpy raise many types on a damaged file
        return None
    whole = arrays.keys() == {*record._fields, "seconds"} and arrays["seconds"].shape == (1,)
    fits = whole and all(arrays[name].shape[-1:] == (count,) for name in record._fields)
    return arrays if fits else None
