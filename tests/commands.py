"""Runs command lines in this process, and provides a small finished run for them."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

from avb_tf.command_line import main

REPOSITORY = Path(__file__).parents[1]
TINY = (
    "--config.steps=20 --config.log_every=10 --config.checkpoint_every=10 "
    "--config.model.width=16 --config.model.adversary_width=16 --config.model.basis_width=8 "
    "--config.model.bases=4 --config.eval.examples=20 --config.eval.grid=40 "
    "--config.eval.posteriors=2 --config.eval.repeats=1 --config.eval.gap=2"
)


def run(line):
    main(["avb-tf", *line.split()])


def content(folder):
    """Returns {path: bytes, or None for a folder} of everything below `folder` except locks."""
    paths = (path for path in folder.rglob("*") if path.suffix != ".lock")
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


def trained(root):
    """Puts the configs and a finished run, `run`, into `root`, which is the working directory."""
    shutil.copytree(REPOSITORY / "configs", root / "configs")
    shutil.copytree(_finished_run(), root / "run")


@functools.cache
def _finished_run():
    """Trains the run once in this process, and returns its workdir."""
    workdir = Path(tempfile.mkdtemp()) / "run"
    atexit.register(shutil.rmtree, workdir.parent, ignore_errors=True)
    run(f"--config={REPOSITORY}/configs/digits.py:vae --workdir={workdir} {TINY}")
    return workdir
