"""No more open files, no more memory, weights that explode: what runs say, and what they keep."""

import functools
import os
import resource
import shutil
import subprocess
from pathlib import Path

import numpy as np
import tensorflow as tf

from avb_tf import AVB, checkpoints
from tests.campaigns import jobs
from tests.campaigns.jobs import Job

# What a command may add to what it has at its start: open files, or MB of addresses.
LIMITS = {"files": (0, 1, 2, 3, 5, 8, 12, 20), "memory": (20, 100, 200, 300, 400, 600, 900)}


def limit(kind, more):
    """Limits this process."""
    if kind == "files":
        # Listing them takes one.
        most, number = len(os.listdir("/proc/self/fd")) - 1 + more, resource.RLIMIT_NOFILE
    else:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most, number = pages * os.sysconf("SC_PAGE_SIZE") + more * 2**20, resource.RLIMIT_AS
    resource.setrlimit(number, (most, most))


def exhausted(workdir, kind, *flags, **job):
    """Repeats a command with less of it to more, and at last without a limit.

    Yields:
      Losses. Without memory TensorFlow or the dynamic loader (status 127) may end the process.
    """
    for more in LIMITS[kind]:
        limited = functools.partial(limit, kind, more)
        run = Job(workdir, *flags, forked=True, before=limited, **job)
        try:
            status, error = run.finish(seconds=200)
        except subprocess.TimeoutExpired:
            run.process.kill()
            run.finish()
            yield f"{more} more: does not end"
            continue
        if status and not (kind == "memory" and (status < 0 or status == 127)):
            yield from (f"{more} more: {what}" for what in jobs.one_line(status, error))
    status, error = Job(workdir, *flags, forked=True, **job).finish()
    if status:
        yield f"without a limit: exit status {status}, {error[-300:]}"


def explode(at, factor):
    """Multiplies the decoder's weights once, after a step."""
    plain = AVB.train_step

    def train_step(self, data):
        logs = plain(self, data)
        here = (self.step.value == at) & (self.rollbacks.value < 1)
        for weight in self.decoder.trainable_weights:
            weight.assign(tf.where(here, factor * weight, weight))
        return logs

    AVB.train_step = train_step


def explosions(folder, whole, count, chance, **job):
    """Finite explosions in the middle of an epoch; every other run is killed and resumed then.

    A run ends with weights that have not exploded, or says that it diverged and keeps a checkpoint
    from before.
    """
    largest = _largest(checkpoints.load(whole))
    workdir = folder / "exploded"
    for trial in range(count):
        shutil.rmtree(workdir, ignore_errors=True)
        at = chance.randrange(jobs.PERIOD + 1, jobs.STEPS - jobs.PERIOD)
        exploding = functools.partial(explode, at, 10.0 ** chance.uniform(3.0, 6.0))
        run = Job(workdir, "--mode=train", forked=True, before=exploding, **job)
        what = f"after step {at}"
        if trial % 2:
            what += ", then killed"
            run.wait_for(lambda at=at: checkpoints.newest_step(workdir) >= at)
            run.process.kill()
            run.finish()
            run = Job(workdir, "--mode=train", forked=True, **job)
        status, error = run.finish()
        if status:
            yield from (f"{what}: {loss}" for loss in jobs.one_line(status, error, "diverged"))
            kept = [f for f in workdir.glob("checkpoints/*.keras") if checkpoints.step_of(f) < at]
            if not kept:
                yield f"{what}: no checkpoint from before is kept"
        elif (size := _largest(checkpoints.load(workdir))) > 10.0 * largest:
            yield f"{what}: ends with weights of {size:.3g}; expected about {largest:.3g}"


def _largest(model):
    return max(float(np.abs(weight.numpy()).max()) for weight in model.decoder.trainable_weights)
