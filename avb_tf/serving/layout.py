"""Where an export's files lie: `<directory>/<version>/` and the server's configs beside it."""

import re
from pathlib import Path

DIRECTORY = "export"  # in the workdir
MODELS, BATCHING = "models.config", "batching_parameters.txt"
EXTRA = "assets.extra"  # in a version; the loader ignores what is in it
WARMUP, METADATA = "tf_serving_warmup_requests", "metadata.json"
MAX_WARMUP = 1000  # requests that TensorFlow Serving replays


def versions(directory: Path) -> list[int]:
    """All there are, the oldest first."""
    if not directory.is_dir():
        return []
    return sorted(int(p.name) for p in directory.iterdir() if re.fullmatch(r"[1-9]\d*", p.name))
