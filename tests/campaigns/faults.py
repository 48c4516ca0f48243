"""Everything that happens to long jobs, done to short ones: a table of trials and losses.

  python -m tests.campaigns.faults [--kills=20] [--workers=5] [--folder=DIR]

A loss is a final state other than the undisturbed run's, a file left half-written, logs that
cannot be read, a wrong exit status, more than one line of an error, or an exit that takes too long.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from avb_tf import checkpoints

ROOT = Path(__file__).parents[2]
FLAGS = [
    "--config.steps=400", "--config.log_every=20", "--config.checkpoint_every=40",
    "--config.figures_every=80", "--config.model.width=16", "--config.model.bases=4",
    "--config.model.basis_width=8", "--config.model.adversary_width=16",
    "--config.eval.grid=40", "--config.eval.posteriors=2", "--mode=train_and_evaluate",
]  # fmt: skip
PREEMPTED, LOST = 143, 75


def start(workdir, *flags, cluster=None, task=0):
    """The run as a process of its own."""
    environment = dict(os.environ)
    if cluster:
        config = {"cluster": {"worker": cluster}, "task": {"type": "worker", "index": task}}
        environment["TF_CONFIG"] = json.dumps(config)
    command = [
        sys.executable, str(ROOT / "main.py"), f"--config={ROOT}/configs/digits.py:avb_ac",
        f"--workdir={workdir}", *FLAGS, *flags,
    ]  # fmt: skip
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def finish(*processes, seconds=900):
    """Waits for all; returns their exit statuses and errors."""
    ended = [process.communicate(timeout=seconds)[1] for process in processes]
    return [process.returncode for process in processes], ended


def state(workdir):
    """All that the newest checkpoint holds."""
    model = checkpoints.load(workdir)
    optimizers = [o for o in (model.optimizer, model.adversary_optimizer) if o]
    variables = model.weights + [v for o in optimizers for v in o.variables]
    return [v.numpy() for v in variables]


def newest(workdir):
    """The step of the newest checkpoint, -1 where there is none."""
    names = sorted((workdir / checkpoints.DIRECTORY).glob("step_*.keras"))
    return checkpoints.step_of(names[-1]) if names else -1


def losses(workdir, expected, exact=True):
    """What is wrong with a finished run, in words."""
    found = state(workdir)
    pairs = list(zip(expected, found, strict=True))
    if exact and not all(np.array_equal(a, b) for a, b in pairs):
        yield f"weights differ by {max(np.abs(a - b).max() for a, b in pairs):.2g}"
    if not exact and not all(np.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in pairs):
        yield "weights differ"
    for file in workdir.rglob("*"):
        if file.name.startswith((".", "partial_")) and not file.name.endswith(".damaged"):
            yield f"{file.name} is left over"
    for side in ("train", "validation"):
        events = EventAccumulator(str(workdir / "logs" / side)).Reload()
        if "elbo" not in events.Tags()["tensors"]:
            yield f"logs of {side} cannot be read"
    if not json.loads((workdir / "results.json").read_text())["estimates"]:
        yield "results.json is empty"


def killed(folder, expected, duration, count, chance):
    """SIGKILLs at random moments of one run, each followed by the same command."""
    workdir = folder / "killed"
    trials = 0
    while trials < count:
        process = start(workdir)
        try:
            process.wait(timeout=chance.uniform(0.2, 1.0) * duration)
        except subprocess.TimeoutExpired:
            process.kill()
            trials += 1
        process.communicate()
        if process.returncode == 0:  # it came to its end: the next begins a new run
            yield from losses(workdir, expected)
            shutil.rmtree(workdir)
    statuses, _ = finish(start(workdir))
    if statuses != [0]:
        yield f"exit status {statuses[0]}"
    else:
        yield from losses(workdir, expected)


def terminated(folder, expected, count, chance):
    """SIGTERM during compilation, steps and saves."""
    workdir = folder / "terminated"
    for trial in range(count):
        process, before = start(workdir), newest(workdir)
        deadline = time.monotonic() + 300
        while newest(workdir) <= before + 20 * (trial > 0) and process.poll() is None:
            if time.monotonic() > deadline:
                break
            time.sleep(0.01)
        time.sleep(chance.uniform(0.0, 3.0))
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        (status,), _ = finish(process)
        if status not in (PREEMPTED, -signal.SIGTERM, 0):  # -15: before there is a step to save
            yield f"exit status {status}"
        if time.monotonic() - began > 30:
            yield f"took {time.monotonic() - began:.0f} s"
    statuses, _ = finish(start(workdir))
    yield from losses(workdir, expected) if statuses == [0] else [f"exit status {statuses[0]}"]


def lost_workers(folder, expected, count, chance):
    """One of two workers is killed, and the job started again."""
    workdir = folder / "workers"
    for trial in range(count + 1):
        cluster, before = [f"127.0.0.1:{port}" for port in free_ports(2)], newest(workdir)
        pair = [start(workdir, "--config.steps=4000", cluster=cluster, task=i) for i in range(2)]
        victim = trial % 2
        deadline = time.monotonic() + 300
        while newest(workdir) <= before and all(p.poll() is None for p in pair):
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        if newest(workdir) <= before:
            yield f"no progress after restart {trial}"
        if trial == count:
            for process in pair:
                process.send_signal(signal.SIGTERM)
            statuses, _ = finish(*pair)
            if statuses != [PREEMPTED] * 2:
                yield f"exit statuses {statuses}"
            return
        time.sleep(chance.uniform(0.0, 3.0))
        pair[victim].kill()
        began = time.monotonic()
        (status,), (error,) = finish(pair[1 - victim], seconds=120)
        pair[victim].communicate()
        if status != LOST:
            yield f"exit status {status} of the other"
        if error.strip().splitlines()[-1:] and not error.strip().splitlines()[-1].startswith(
            "avb-tf: "
        ):
            yield "no line that tells"
        if time.monotonic() - began > 60:
            yield f"took {time.monotonic() - began:.0f} s"


def free_ports(count):
    """Ports that nobody listens on."""
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


DAMAGES = {
    "truncated": lambda file, chance: os.truncate(file, chance.randrange(file.stat().st_size)),
    "a flipped bit": _flip,
    "empty": lambda file, chance: os.truncate(file, 0),
    "zeros": lambda file, chance: file.write_bytes(bytes(file.stat().st_size)),
    "missing": lambda file, chance: file.unlink(),
}


def damaged(folder, whole, count, chance):
    """The newest checkpoint is damaged; the one before takes its place."""
    for trial in range(count):
        workdir = shutil.copytree(whole, folder / f"damaged_{trial}")
        name = list(DAMAGES)[trial % len(DAMAGES)]
        files = sorted((workdir / checkpoints.DIRECTORY).glob("*.keras"))
        content = files[-1].read_bytes()
        while files[-1].exists() and files[-1].read_bytes() == content:
            DAMAGES[name](files[-1], chance)
        # A flipped bit may lie where zip keeps what nobody reads, such as a date.
        step = int(checkpoints.load(workdir).step.value)
        kept = state(workdir)
        right = (
            step == checkpoints.step_of(files[-2])
            if name != "a flipped bit"
            else all(np.array_equal(a, b) for a, b in zip(state(whole), kept, strict=True))
            or step == checkpoints.step_of(files[-2])
        )
        if not right:
            yield f"{name}: step {step}"


def full_disks(folder, mounted):
    """No space left, on a small tmpfs or by a quota on files, at a checkpoint and at a log."""
    sizes = ("300k", "700k", "1m") if mounted else ()
    for size in sizes:
        place = folder / f"full_{size}"
        place.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=True)
        try:
            (status,), (error,) = finish(start(place / "run"))
            lines = [line for line in error.splitlines() if line.startswith("avb-tf: ")]
            if status != 2 or len(lines) != 1 or "Traceback" in error:
                yield f"tmpfs of {size}: exit status {status}, {lines or error[-200:]}"
            if newest(place / "run") >= 0:
                state(place / "run")
        finally:
            subprocess.run(["umount", place], check=True)


def campaign(folder, kills, terms, workers, damages, seed=0):
    """Yields (what, trials, losses)."""
    chance = random.Random(seed)
    whole = folder / "whole"
    began = time.monotonic()
    statuses, errors = finish(start(whole))
    assert statuses == [0], errors
    duration, expected = time.monotonic() - began, state(whole)
    mounted = os.geteuid() == 0
    yield (
        "SIGKILL, then the same command",
        kills,
        list(killed(folder, expected, duration, kills, chance)),
    )
    yield "SIGTERM, then the same command", terms, list(terminated(folder, expected, terms, chance))
    yield (
        "a worker of two killed, the job restarted",
        workers,
        list(lost_workers(folder, expected, workers, chance)),
    )
    yield "damaged checkpoint", damages, list(damaged(folder, whole, damages, chance))
    yield "disk full", 3 * mounted, list(full_disks(folder, mounted))


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, count in {"kills": 20, "terms": 6, "workers": 5, "damages": 10}.items():
        parser.add_argument(f"--{name}", type=int, default=count)
    options = parser.parse_args()
    total = 0
    with tempfile.TemporaryDirectory() as folder:
        print(f"{'what':45} {'trials':>6} {'losses':>6}")
        for what, trials, found in campaign(Path(folder), **vars(options)):
            print(f"{what:45} {trials:6} {len(found):6}  {'; '.join(found)}", flush=True)
            total += len(found)
    raise SystemExit(bool(total))


if __name__ == "__main__":
    main()
