"""Injects faults of long jobs into short jobs, and prints a table of trials and losses.

  python -m tests.campaigns.faults [--kills=20] [--terms=6] [--workers=5] [--damages=10]
    [--steps=20000] [--evaluations=200]

Each of the following counts as a loss: a difference between a finished run and the undisturbed one
(weights, files, logs, results), a wrong exit status, an error message that is not exactly one line,
an exit that takes too long, or memory that grows.
"""

import argparse
import itertools
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np

from avb_tf import checkpoints
from tests.campaigns import jobs, memory
from tests.campaigns.jobs import Job

PREEMPTED, LOST = 143, 75


def disturbed(folder, whole, sent, chance, **job):
    """Sends signals to one run, pairs (signal, moment), and repeats the command after each."""
    workdir = folder / "disturbed"
    for number, moment in sent:
        run = Job(workdir, **job)
        if not jobs.disturb(run, moment, number, chance):
            yield f"missed the {moment}"
        if number == signal.SIGTERM:
            yield from _terminated(run, f"in {moment}")
        else:
            run.finish()
    yield from _completed(Job(workdir, **job), whole)
    shutil.rmtree(workdir)


def _terminated(job, where):
    status, error = job.finish()
    if status != PREEMPTED:
        yield f"exit status {status} {where}: {error[-200:]}"
    if (seconds := time.time() - job.told) > 30:
        yield f"took {seconds:.0f} s {where}"
    if not jobs.saved_when_told(job):
        yield f"nothing saved {where}"


def _completed(job, whole):
    status, error = job.finish()
    yield from jobs.losses(job.workdir, whole) if status == 0 else [f"status {status}: {error}"]


def pair(workdir, *flags, **job):
    """Starts two workers of one job; the chief comes first."""
    cluster = [f"127.0.0.1:{port}" for port in free_ports(2)]
    return [Job(workdir, *flags, cluster=cluster, task=i, **job) for i in range(2)]


def lost_workers(folder, whole, count, chance):
    """Kills one of two workers and restarts the job until it finishes."""
    workdir = folder / "pair"
    for trial in range(count):
        yield from lost_worker(workdir, trial % 2, chance)
    yield from _pair_completed(workdir, whole)


def terminated_workers(folder, whole, count, chance):
    """Terminates one of two workers; both exit, and the job resumes from their checkpoint."""
    workdir = folder / "terminated_pair"
    for trial in range(count):
        workers = pair(workdir)
        told, other = workers[trial % 2], workers[1 - trial % 2]
        if not jobs.disturb(told, "step", signal.SIGTERM, chance):
            yield "missed the step"
        other.told = told.told
        yield from _terminated(told, "of the one told")
        yield from _terminated(other, "of the other")
    yield from _pair_completed(workdir, whole)


def _pair_completed(workdir, whole):
    chief, other = pair(workdir)
    yield from _completed(chief, whole)
    if (status := other.finish()[0]) != 0:
        yield f"exit status {status} at the end"


def lost_worker(workdir, victim, chance, **job):
    """Kills the worker `victim` (0 is the chief); the other worker must report it and exit."""
    workers = pair(workdir, **job)
    other = workers[1 - victim]
    if not jobs.disturb(workers[victim], "step", signal.SIGKILL, chance):
        yield "no progress after a restart"
    began = time.monotonic()
    status, error = other.finish()
    workers[victim].finish()
    if status != LOST:
        yield f"exit status {status} of the other: {error[-200:]}"
    if len(_told(error)) != 1:
        yield f"told {error[-200:]}"
    if (seconds := time.monotonic() - began) > 60:
        yield f"took {seconds:.0f} s"


def _told(error):
    """Returns the program's own error lines, without those of the runtime about lost workers."""
    return [line for line in error.splitlines() if line.startswith("avb-tf: ")]


def free_ports(count):
    """Returns unused ports."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _flip(file, chance):
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


def _without_weights(file, chance):
    with zipfile.ZipFile(file) as archive:
        config = archive.read("config.json")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("config.json", config)


DAMAGES = {
    "truncated": lambda file, chance: os.truncate(file, chance.randrange(file.stat().st_size)),
    "a flipped bit": _flip,
    "a missing part": _without_weights,
    "an empty index": lambda file, chance: file.write_bytes(b"PK\5\6" + bytes(18)),
    "empty": lambda file, chance: os.truncate(file, 0),
    "zeros": lambda file, chance: file.write_bytes(bytes(file.stat().st_size)),
    "missing": lambda file, chance: file.unlink(),
}


def damaged(folder, whole, kinds, chance):
    """Damages the newest checkpoint; the run must use the one before."""
    for trial, kind in enumerate(kinds):
        workdir = shutil.copytree(whole, folder / f"damaged_{trial}")
        files = sorted((workdir / checkpoints.DIRECTORY).glob("*.keras"))
        DAMAGES[kind](files[-1], chance)
        model = checkpoints.load(workdir)
        before = int(model.step.value) == checkpoints.step_of(files[-2])
        # A flipped bit may hit a field that zip does not check, such as a date.
        unread = kind == "a flipped bit" and all(
            np.array_equal(a, b)
            for a, b in zip(
                jobs.variables(checkpoints.load(whole)), jobs.variables(model), strict=True
            )
        )
        if not (before or unread):
            yield f"{kind}: step {int(model.step.value)}"


# Directory that is full -> flags of the command that writes there, free bytes on a small disk, and
# the largest size of a file in bytes under a quota.
PLACES = {
    "checkpoints": ((), 40_000, 40_000),
    "logs": ((), 8_192, 64),
    "export": (("--mode=export",), 40_000, 40_000),
}
# Runs the command line and executes a statement at the end of each save, before logs are written.
AFTER_SAVE = """
import os, resource, shutil, subprocess, sys
from avb_tf import checkpoints, command_line

save, statement = checkpoints.save, sys.argv.pop(1)

def save_and_execute(model, workdir, keep):
    path = save(model, workdir, keep)
    exec(statement)
    return path

checkpoints.save = save_and_execute
command_line.main()
"""


def full_disks(folder, whole, places, mounted, **job):
    """Fills a small tmpfs, or reaches a quota on files; the run must resume once there is space."""
    for place in places:
        flags, space, quota = PLACES[place]
        workdir = shutil.copytree(whole, folder / f"full_disk_{list(PLACES).index(place)}")
        for checkpoint in sorted((workdir / checkpoints.DIRECTORY).glob("*.keras"))[1:]:
            if place != "export":  # so that steps are left to train
                checkpoint.unlink()
        before = _checkpoints(workdir)
        disk = workdir / place
        if mounted:
            mount(disk, space)
        limited = place == "logs" and not mounted
        limit = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({quota}, {quota}))"
        program = ("-c", AFTER_SAVE, limit) if limited else jobs.MAIN
        # The quota would also apply to a file for the output, so there is none.
        run = Job(workdir, *flags, output=Path(os.devnull), program=program, **job)
        if not (mounted or limited):
            resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (quota, quota))
        status, error = run.finish()
        lines = [line.replace(str(folder), "") for line in _told(error)]
        if status != 2 or len(lines) != 1 or place not in lines[0] or "Traceback" in error:
            yield f"{place}: exit status {status}, {error[-300:]}"
        if not before.items() <= _checkpoints(workdir).items():
            yield f"{place}: an older checkpoint is lost"
        if mounted:
            subprocess.run(["umount", disk], check=True)
        status, error = Job(workdir, *flags, **job).finish()
        if status:
            yield f"{place}, with space again: exit status {status}, {error[-300:]}"
        elif place != "export":
            yield from jobs.losses(workdir, whole)
        shutil.rmtree(workdir)


def mount(disk, space):
    """Mounts a small disk and copies the existing checkpoints to it."""
    disk.mkdir(exist_ok=True)
    kept = {file: file.read_bytes() for file in disk.glob("*.keras")}
    size = space + sum(map(len, kept.values()))
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], check=True)
    for file, content in kept.items():
        file.write_bytes(content)


def _checkpoints(workdir):
    """Returns {name: content} of all checkpoints."""
    files = (workdir / checkpoints.DIRECTORY).glob("*.keras")
    return {file.name: file.read_bytes() for file in files}


def _grown(megabytes):
    before, after = megabytes
    return [f"grew to {after:.0f} MB"] if after > memory.GROWTH * before else []


def campaign(folder, kills, terms, workers, damages, steps, evaluations, seed=0):
    """Yields (kind of fault, trials, losses, note).

    Args:
      folder: directory for all runs.
      kills: SIGKILLs of one run.
      terms: SIGTERMs of one run.
      workers: SIGKILLs of one of two workers.
      damages: damaged checkpoints.
      steps: training steps over which memory is measured.
      evaluations: evaluations over which memory is measured.
      seed: seed of the moments and of the damages.
    """
    chance, whole = random.Random(seed), folder / "whole"
    status, error = Job(whole).finish()
    assert status == 0, error

    in_training = list(
        itertools.islice(itertools.cycle(("step", "save", "compile")), kills * 7 // 10)
    )
    chance.shuffle(in_training)
    moments = in_training + ["evaluation"] * (kills - len(in_training))
    lost = list(disturbed(folder, whole, [(signal.SIGKILL, m) for m in moments], chance))
    yield "SIGKILL of one run", kills, lost, _counted(moments)

    moments = list(itertools.islice(itertools.cycle(("compile", "step", "save")), terms))
    lost = list(disturbed(folder, whole, [(signal.SIGTERM, m) for m in moments], chance))
    yield "SIGTERM of one run", terms, lost, _counted(moments)

    whole_pair = folder / "whole_pair"
    for job in pair(whole_pair):
        status, error = job.finish()
        assert status == 0, error
    for sent, harm, count in (
        ("SIGKILL", lost_workers, workers),
        ("SIGTERM", terminated_workers, 2),
    ):
        lost = list(harm(folder, whole_pair, count, chance))
        victims = _counted(["other" if trial % 2 else "chief" for trial in range(count)])
        yield f"{sent} of a worker of two", count, lost, victims

    kinds = list(itertools.islice(itertools.cycle(DAMAGES), damages))
    lost = list(damaged(folder, whole, kinds, chance))
    yield "damaged checkpoint", damages, lost, _counted(kinds)

    for mounted in (False, True)[: 1 + (os.geteuid() == 0)]:
        lost = list(full_disks(folder, whole, PLACES, mounted))
        what = "disk full, a small tmpfs" if mounted else "disk full, by a quota"
        yield what, len(PLACES), lost, _counted(list(PLACES))

    megabytes = memory.of_training(folder, steps)
    yield (
        f"memory of {steps:,} steps",
        1,
        _grown(megabytes),
        "MB: {:.0f}, then {:.0f}".format(*megabytes),
    )
    megabytes = memory.of_evaluations(whole, evaluations)
    yield (
        f"memory of {evaluations} evaluations",
        1,
        _grown(megabytes),
        "MB: {:.0f}, then {:.0f}".format(*megabytes),
    )


def _counted(names):
    return ", ".join(f"{count} {name}" for name, count in Counter(names).items())


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    counts = {"kills": 20, "terms": 6, "workers": 5, "damages": 10}
    for name, count in {**counts, "steps": 20_000, "evaluations": 200}.items():
        parser.add_argument(f"--{name}", type=int, default=count)
    options = parser.parse_args()
    total = 0
    with tempfile.TemporaryDirectory() as folder:
        print(f"{'what':28} {'trials':>6} {'losses':>6}")
        for what, trials, lost, note in campaign(Path(folder), **vars(options)):
            print(f"{what:28} {trials:6} {len(lost):6}  {'; '.join([note, *lost])}", flush=True)
            total += len(lost)
    raise SystemExit(bool(total))


if __name__ == "__main__":
    main()
