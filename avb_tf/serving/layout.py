"""The paths of an export: `<directory>/<version>/`, and the server's configs in `<directory>`."""

import re
from pathlib import Path

DIRECTORY = "export"  # folder in the workdir
MODELS, BATCHING = "models.config", "batching_parameters.txt"
EXTRA = "assets.extra"  # folder in a version, which the loader ignores
WARMUP, METADATA = "tf_serving_warmup_requests", "metadata.json"
MAX_WARMUP = 1000  # most requests that TensorFlow Serving replays


def versions(directory: Path) -> list[int]:
    """Returns the numbers of all versions in `directory`, in ascending order."""
    if not directory.is_dir():
        return []
    return sorted(int(p.name) for p in directory.iterdir() if re.fullmatch(r"[1-9]\d*", p.name))
