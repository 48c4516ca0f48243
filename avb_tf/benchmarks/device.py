"""Reads TensorFlow's profiler and the allocator of a device."""

import re
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import tensorflow as tf


def gpu() -> str:
    """Returns the name of the first GPU, or '' if there is none."""
    devices = tf.config.list_physical_devices("GPU")
    return tf.config.experimental.get_device_details(devices[0])["device_name"] if devices else ""


def peak_megabytes() -> float:
    """Returns the peak memory use of the first GPU in MB, as its allocator counts it."""
    return tf.config.experimental.get_memory_info("GPU:0")["peak"] / 2**20


def kernels(function: Callable[[], object]) -> dict[str, tuple[int, float]]:
    """Returns the kernels that a call starts on the GPU: kind -> (their number, total seconds).

    A kind is a kernel's name without its number. The result is empty if there is no GPU.
    """
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    function()
    with tempfile.TemporaryDirectory() as directory:
        with tf.profiler.experimental.Profile(directory):
            function()
            tf.test.experimental.sync_devices()
        space = xplane_pb2.XSpace()  # pyright: ignore[reportAttributeAccessIssue]
        for file in Path(directory).rglob("*.xplane.pb"):
            space.MergeFromString(file.read_bytes())
    counts, picoseconds = Counter(), Counter()
    for plane in (plane for plane in space.planes if plane.name.startswith("/device:GPU")):
        for event in (e for line in plane.lines if "Stream" in line.name for e in line.events):
            kind = re.sub(r"[_.\d]+$", "", plane.event_metadata[event.metadata_id].name)
            counts[kind] += 1
            picoseconds[kind] += event.duration_ps
    return {kind: (counts[kind], picoseconds[kind] * 1e-12) for kind in counts}
