"""Runs each part of a campaign in its own process, because TensorFlow never frees its graphs."""

import concurrent.futures
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def unfinished(module: str, names: Sequence[str], jobs: int = 1) -> list[str]:
    """Runs this command again for each name, with `--here --only NAME`; returns those that failed.

    Args:
      module: module of the campaign, such as "tests.campaigns.verdicts".
      names: names of the parts.
      jobs: processes at a time.
    """

    def succeeds(name):
        command = [sys.executable, "-m", module, *sys.argv[1:], "--here", "--only", name]
        return subprocess.run(command, check=False).returncode == 0

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        done = list(pool.map(succeeds, names))
    return [name for name, one in zip(names, done, strict=True) if not one]


def report(directory: Path, text: str, left: Sequence[str]) -> None:
    """Writes and prints the table; exits with status 1 if parts are not finished."""
    (directory / "table.md").write_text(text)
    print(text)
    if left:
        sys.exit(f"not finished: {', '.join(left)}")
