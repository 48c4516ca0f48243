"""Tests crash states, kills, corruption and other faults; prints a table of trials and losses.

  python -m tests.campaigns.durability DIR [--kills=300] [--flips=1000] [--resumed=10]
    [--fuzz=600] [--only=PART ...]

The campaign is resumable: DIR/table.jsonl has a line for each finished part, which is not run
again. `tests/campaigns/faults.py` covers faults of workers, full disks and memory.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from avb_tf import archives, checkpoints, configuration, files, results
from avb_tf.errors import UserError
from avb_tf.posteriors.fit import load_posterior
from avb_tf.serving import layout
from avb_tf.serving.saved_model import SavedModel
from tests import serving_fuzz
from tests.campaigns import crashes, faults, jobs
from tests.campaigns.jobs import Job

BATCH = 20  # kills in one part
# Phases of a training run in which it is killed, in turn.
PHASES = ("step", "save", "prune", "compile", "evaluation", "chunks")
EXPORT = "--mode=export"
TWO_DEVICES = """
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from avb_tf import command_line
command_line.main()
"""
# Fault -> statement that causes it at the end of a save, and words that the error must contain.
LIMITS = {
    "the workdir vanishes": ("shutil.rmtree(workdir)", "is gone"),
    "no more open files": (
        "count = len(os.listdir('/proc/self/fd')); "
        "resource.setrlimit(resource.RLIMIT_NOFILE, (count, count))",
        "open files",
    ),
    "the checkpoints' disk becomes read-only": (
        "subprocess.run(['mount', '-o', 'remount,ro', workdir / 'checkpoints'], check=True)",
        "Read-only file system",
    ),
}


# Crash states.


def recorded(folder, *flags, **job):
    """Runs a job in `folder`/root under strace; returns the recording."""
    root = folder / "root"
    root.mkdir(parents=True)
    log = folder / "strace.txt"
    process = Job(
        root / "whole", *flags, under=crashes.under(log), output=folder / "out.txt", **job
    )
    status, error = process.finish()
    assert status == 0, error
    return crashes.Recording(log, root)


def crashed(recording, chance, every=1):
    """Simulates a crash after every operation; reads every `every`th state as the program would.

    Yields:
      (tree, losses)
    """
    states = crashes.crash(recording.operations, recording.directories, chance)
    for count, (number, tree, losses) in enumerate(states):
        lost = [f"operation {number}: {path} is not as saved" for path in losses]
        if count % every == 0:
            with tempfile.TemporaryDirectory() as folder:
                crashes.write(tree, Path(folder))
                lost += [
                    f"operation {number}: {what}" for what in unreadable(Path(folder, "whole"))
                ]
        yield tree, lost


def unreadable(workdir):
    """Yields the files in a workdir that a crash has left unreadable or incomplete."""
    if any(workdir.glob("checkpoints/step_*.keras")):
        before = sorted(workdir.glob("checkpoints/*.keras"))
        checkpoints.latest(workdir)
        if sorted(workdir.glob("checkpoints/*.keras")) != before:
            yield "a damaged checkpoint"
        if not (workdir / configuration.FILE).exists():
            yield "a checkpoint without its config"
    if (workdir / configuration.FILE).exists():
        configuration.read(workdir)
    if (workdir / results.FILE).exists() and "estimates" in (workdir / results.FILE).read_text():
        json.loads((workdir / results.FILE).read_text())
    for file in workdir.glob("evaluation/**/*.npz"):
        archives.read_arrays(file)
    for version in layout.versions(workdir / layout.DIRECTORY):
        files.verify(workdir / layout.DIRECTORY / str(version))
    if (workdir / "fit/fit.json").exists():  # written last, except for the checksums
        files.verify(workdir / "fit")
        missing = {"fit.weights.h5", "model", "start.npz"} - {
            path.name for path in (workdir / "fit").iterdir()
        }
        if missing:
            yield f"a fit without {', '.join(missing)}"


def resumed(trees, folder, whole, **job):
    """Resumes from each tree; yields differences from the undisturbed run."""
    for tree in trees:
        with tempfile.TemporaryDirectory(dir=folder) as root:
            crashes.write(tree, Path(root))
            status, error = Job(Path(root, "whole"), **job).finish()
            if status:
                yield f"exit status {status}: {error[-200:]}"
            else:
                yield from jobs.losses(Path(root, "whole"), whole, logged=False)


def crash_part(folder, chance, resumes, *flags, **job):
    """Records a job, crashes it, and resumes it from `resumes` of the states."""
    shutil.rmtree(folder, ignore_errors=True)
    recording = recorded(folder, *flags, **job)
    lost, trees = [], []
    for tree, losses in crashed(recording, chance):
        lost += losses
        trees.append(tree)
    again = chance.sample(trees, min(resumes, len(trees)))
    lost += resumed(again, folder, folder / "root/whole", **job)
    note = f"{len(recording.operations)} operations, {len(again)} states resumed to the end"
    return len(trees), lost, note


# Kills.


def kills(folder, whole, count, chance):
    """Sends SIGKILLs to training runs, one after another; returns the losses."""
    moments = [PHASES[i % len(PHASES)] for i in range(count)]
    # Kills during evaluation come last, because a run that is evaluating has finished training.
    moments.sort(key=lambda moment: moment in jobs.AFTER_TRAINING)
    return list(faults.disturbed(folder, whole, [(signal.SIGKILL, m) for m in moments], chance))


def killed_exports(folder, whole, count, chance):
    """Kills exports while they are written: no incomplete version may remain; the next succeeds."""
    workdir = shutil.copytree(whole, folder / "exports", dirs_exist_ok=True)
    for _ in range(count):
        job = Job(workdir, EXPORT)
        seen = job.wait_for(lambda: any((workdir / layout.DIRECTORY).glob(".[0-9]*.*")))
        if not seen:
            yield "missed the export"
        time.sleep(chance.uniform(0.0, 3.0))
        job.process.kill()
        job.finish()
    status, error = Job(workdir, EXPORT).finish()
    if status:
        yield f"exit status {status}: {error[-200:]}"
    for version in layout.versions(workdir / layout.DIRECTORY):
        files.verify(workdir / layout.DIRECTORY / str(version))
        SavedModel(workdir / layout.DIRECTORY / str(version)).close()
    if left := [p.name for p in (workdir / layout.DIRECTORY).iterdir() if p.name[0] == "."]:
        yield f"{', '.join(left)} is left"
    shutil.rmtree(workdir)


def killed_fits(folder, count, chance):
    """Kills fits while they run and are written: the last fit must equal an undisturbed one."""
    fit = {"posterior": True, "method": "banana"}
    whole, workdir = folder / "fit_whole", folder / "fit_killed"
    began = time.monotonic()
    if not (whole / "fit/checksums.json").exists():
        status, error = Job(whole, **fit).finish()
        assert status == 0, error
    seconds = time.monotonic() - began
    for trial in range(count):
        job = Job(workdir, **fit)
        if trial % 2:
            job.wait_for((workdir / "fit").exists)
            time.sleep(chance.uniform(0.0, 1.0))
        else:
            job.wait_for(lambda: False, chance.uniform(0.2, 0.9) * seconds)
        job.process.kill()
        job.finish()
        if (workdir / "fit/checksums.json").exists():  # finished before it was killed
            shutil.rmtree(workdir)
    status, error = Job(workdir, **fit).finish()
    if status:
        yield f"exit status {status}: {error[-200:]}"
    elif (
        load_posterior(workdir / "fit").unconstrained(5)
        != load_posterior(whole / "fit").unconstrained(5)
    ).any():
        yield "other draws"
    shutil.rmtree(workdir)


# Faults of a workdir.


def one_line(status, error, words):
    """Yields a loss unless a command ended with status 2 and one line that contains the words."""
    lines = [line for line in error.splitlines() if line.startswith("avb-tf: ")]
    if status != 2 or len(lines) != 1 or words not in lines[0] or "Traceback" in error:
        yield f"exit status {status}, {error[-300:]}"


def two_at_once(folder, whole, **job):
    """Starts two training commands in one workdir: one must be refused, the other must finish."""
    workdir = folder / "shared"
    both = [Job(workdir, output=folder / f"shared_{i}.txt", **job) for i in range(2)]
    ends = sorted((j.finish() for j in both), key=lambda end: end[0])
    if ends[0][0]:
        yield f"exit status {ends[0]}"
    yield from one_line(*ends[1], "is in use by process")
    yield from jobs.losses(workdir, whole)
    shutil.rmtree(workdir)


def limited(folder, whole, names, **job):
    """Causes faults of `LIMITS` at the end of the first save; later the run must resume."""
    for name in names:
        statement, words = LIMITS[name]
        workdir = shutil.copytree(whole, folder / "limited")
        for checkpoint in sorted(workdir.glob("checkpoints/*.keras"))[1:]:
            checkpoint.unlink()
        mounted = "mount" in statement
        if mounted:
            faults.mount(workdir / checkpoints.DIRECTORY, 10**7)
        program = ("-c", faults.AFTER_SAVE, statement)
        # Standard output would be one more open file.
        status, error = Job(workdir, program=program, output=Path(os.devnull), **job).finish()
        yield from (f"{name}: {what}" for what in one_line(status, error, words))
        if mounted:
            subprocess.run(["umount", workdir / checkpoints.DIRECTORY], check=True)
        status, error = Job(workdir, **job).finish()
        if status:
            yield f"{name}, mended: exit status {status}, {error[-300:]}"
        else:
            # Without its workdir a run trains from the beginning.
            yield from jobs.losses(workdir, whole, logged="vanishes" not in name)
        shutil.rmtree(workdir)


def clock_goes_back(folder, whole, **job):
    """Dates all files of a run in the future; the run must resume all the same."""
    workdir = shutil.copytree(whole, folder / "future")
    for checkpoint in sorted(workdir.glob("checkpoints/*.keras"))[1:]:
        checkpoint.unlink()
    future = time.time() + 1e6
    for file in [*workdir.rglob("*"), workdir]:
        os.utime(file, (future, future))
        if ".tfevents." in file.name:
            parts = file.name.split(".")
            parts[3] = str(int(parts[3]) + 10**6)
            file.rename(file.with_name(".".join(parts)))
    status, error = Job(workdir, **job).finish()
    yield from [f"exit status {status}: {error}"] if status else jobs.losses(workdir, whole)
    shutil.rmtree(workdir)


def late_worker(folder, seconds=5):
    """Starts only one of two workers; it must wait as long as `config.worker_timeout` says."""
    cluster = [f"127.0.0.1:{port}" for port in faults.free_ports(2)]
    for task in range(2):
        began = time.monotonic()
        job = Job(folder / "late", f"--config.worker_timeout={seconds}", cluster=cluster, task=task)
        status, error = job.finish()
        told = [line for line in error.splitlines() if line.startswith("avb-tf: ")]
        if status != faults.LOST or len(told) != 1 or "config.worker_timeout" not in told[0]:
            yield f"task {task}: exit status {status}, {error[-300:]}"
        if (waited := time.monotonic() - began) > seconds + 60:
            yield f"task {task}: waited {waited:.0f} s"


def elastic(folder, whole, chance, **job):
    """Moves a run from one device to two and back to one, each time in the middle of training."""
    workdir = folder / "elastic"
    two = {"program": ("-c", TWO_DEVICES)}
    for devices, flags in (({}, ()), (two, ("--config.strategy=mirrored",))):
        run = Job(workdir, *flags, **devices, **job)
        if not jobs.disturb(run, "step", signal.SIGTERM, chance):
            yield "missed the step"
        if (status := run.finish()[0]) != faults.PREEMPTED:
            yield f"exit status {status}"
    status, error = Job(workdir, **job).finish()
    if status:
        yield f"exit status {status}: {error[-200:]}"
    elif (apart := jobs.difference(workdir, whole)) > 1e-6:
        yield f"weights differ by {apart:.2g}"
    shutil.rmtree(workdir)


# Corruption.


def flip(file, chance):
    """Flips a random bit of a file."""
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


def _same_checkpoint(file, other):
    """Returns whether weights and config are equal; a flip may have hit a date in the archive."""
    with zipfile.ZipFile(file) as one, zipfile.ZipFile(other) as two:
        return all(one.read(n) == two.read(n) for n in ("config.json", "model.weights.h5"))


def flipped_checkpoints(folder, whole, count, chance):
    """Flips bits of the newest checkpoint; the one before it must be loaded."""
    originals = sorted(whole.glob("checkpoints/*.keras"))[-2:]
    for trial in range(count):
        with tempfile.TemporaryDirectory(dir=folder) as root:
            (Path(root) / checkpoints.DIRECTORY).mkdir()
            for file in originals:
                shutil.copy(file, Path(root) / checkpoints.DIRECTORY)
            flip(Path(root) / checkpoints.DIRECTORY / originals[-1].name, chance)
            latest = checkpoints.latest(Path(root))
            noticed = latest.name == originals[0].name
            if not (noticed or _same_checkpoint(latest, originals[1])):
                yield f"checkpoint, flip {trial}"


def flipped_chunks(folder, whole, count, chance):
    """Flips bits of finished chunks and of the values of each example."""
    originals = sorted(whole.glob("evaluation/**/*.npz"))
    for trial in range(count):
        original = originals[trial % len(originals)]
        copy = Path(shutil.copy(original, folder / "flipped.npz"))
        flip(copy, chance)
        try:
            arrays = archives.read_arrays(copy)
        except Exception:  # zipfile, zlib and numpy raise many kinds
            continue
        expected = archives.read_arrays(original)
        named = arrays.keys() != expected.keys()  # a chunk with other names counts as damaged
        if not named and any((arrays[n] != expected[n]).any() for n in expected):
            yield f"{original.name}, flip {trial}"


def flipped_configs(folder, whole, count, chance):
    """Flips bits of config.json."""
    expected = configuration.read(whole)
    for trial in range(count):
        copy = Path(shutil.copy(whole / configuration.FILE, folder / configuration.FILE))
        flip(copy, chance)
        try:
            if configuration.read(folder) != expected:
                yield f"config.json, flip {trial}"
        except UserError:
            pass
    (folder / configuration.FILE).unlink()


def flipped_directories(directory, count, chance):
    """Flips bits of files with checksums, in an export or a saved posterior."""
    originals = sorted(path for path in directory.rglob("*") if path.is_file())
    for trial in range(count):
        file = originals[trial % len(originals)]
        content = file.read_bytes()
        flip(file, chance)
        try:
            files.verify(directory)
            yield f"{file.relative_to(directory)}, flip {trial}"
        except UserError:
            pass
        file.write_bytes(content)


# The table.


def parts(folder, whole, options):
    """Returns {name of a part: function of a generator that returns (trials, losses, note)}."""

    def part(function, trials, *arguments, note=""):
        def run(chance):
            return trials, list(function(folder, *arguments, chance)), note

        return run

    root = os.geteuid() == 0
    limits = [name for name in LIMITS if root or "read-only" not in name]
    tables = {
        "crash states of a run": lambda chance: crash_part(
            folder / "crash_run", chance, options.resumed, method="vae"
        ),
        "crash states of a posterior's fit": lambda chance: crash_part(
            folder / "crash_fit", chance, 0, posterior=True, method="banana"
        ),
        "crash states of an export": lambda chance: crash_export(folder, whole, chance),
    }
    for batch in range(-(-options.kills // BATCH)):
        count = min(BATCH, options.kills - batch * BATCH)
        note = ", ".join(f"{count // len(PHASES)}+ {phase}" for phase in PHASES)
        tables[f"SIGKILL of a run, {batch}"] = part(kills, count, whole, count, note=note)
    few, flips = max(1, options.kills // 15), options.flips
    tables |= {
        "SIGKILL of an export": part(killed_exports, few, whole, few),
        "SIGKILL of a posterior's fit": part(killed_fits, few, few),
        "two commands at once": lambda chance: (1, list(two_at_once(folder, whole)), ""),
        "limits": lambda chance: (
            len(limits), list(limited(folder, whole, limits)), "; ".join(limits)
        ),
        "the clock goes back": lambda chance: (1, list(clock_goes_back(folder, whole)), ""),
        "a worker never comes": lambda chance: (2, list(late_worker(folder)), ""),
        "one device to two to one": part(elastic, 1, whole),
        "flipped bits in checkpoints": part(flipped_checkpoints, flips, whole, flips),
        "flipped bits in chunks": part(flipped_chunks, flips, whole, flips),
        "flipped bits in config.json": part(flipped_configs, flips, whole, flips),
        "flipped bits in an export": lambda chance: (
            flips, list(flipped_directories(_exported(folder, whole), flips, chance)), "",
        ),
        "flipped bits in a posterior": lambda chance: (
            flips, list(flipped_directories(_fitted(folder), flips, chance)), "",
        ),
        "fuzzed requests": lambda chance: fuzzed(_exported(folder, whole), options.fuzz, chance),
    }  # fmt: skip
    return tables


def crash_export(folder, whole, chance):
    """Simulates crashes while an export is written; returns (states, losses, note)."""
    place = folder / "crash_export"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    root, log = place / "root", place / "strace.txt"
    root.mkdir()
    code = "import sys, avb_tf; avb_tf.load_model(sys.argv[1]).export(sys.argv[2])"
    command = [*crashes.under(log), sys.executable, "-c", code, whole, root / "whole" / "export"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=jobs.ROOT)
    recording = crashes.Recording(log, root)
    lost, count = [], 0
    for _, losses in crashed(recording, chance):
        lost += losses
        count += 1
    return count, lost, f"{len(recording.operations)} operations"


def _exported(folder, whole):
    directory = folder / "export"
    if not layout.versions(directory):
        checkpoints.load(whole).export(directory)
    return directory / "1"


def _fitted(folder):
    workdir = folder / "fit_whole"
    if not (workdir / "fit" / files.CHECKSUMS).exists():
        status, error = Job(workdir, posterior=True, method="banana").finish()
        assert status == 0, error
    return workdir / "fit"


def fuzzed(servable, seconds, chance):
    """Sends fuzzed requests for `seconds`; returns (requests, losses, note)."""
    model, end, count, examples = SavedModel(servable), time.monotonic() + seconds, 0, 500
    lost = []
    while time.monotonic() < end:
        number = chance.randrange(2**31)
        try:
            serving_fuzz.check(model, examples, number)
        except AssertionError as error:
            lost.append(f"seed {number}: {error!s:.200}")
        count += 3 * examples
    return count, lost, f"{seconds} s"


def main():
    """Runs everything that is not finished yet, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    for name, count in {"kills": 300, "flips": 1000, "resumed": 10, "fuzz": 600}.items():
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--only", nargs="*", help="beginnings of the names of parts")
    options = parser.parse_args()
    folder = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    whole, table = folder / "whole", folder / "table.jsonl"
    if not (whole / results.FILE).exists():
        status, error = Job(whole).finish()
        assert status == 0, error
    lines = [json.loads(line) for line in table.read_text().splitlines()] if table.exists() else []
    for number, (name, run) in enumerate(parts(folder, whole, options).items()):
        wanted = options.only is None or any(name.startswith(only) for only in options.only)
        if wanted and name not in {line["what"] for line in lines}:
            trials, lost, note = run(random.Random(number))
            lines.append({"what": name, "trials": trials, "losses": lost, "note": note})
            with table.open("a") as file:
                file.write(json.dumps(lines[-1]) + "\n")
    print(f"{'what':34} {'trials':>7} {'losses':>6}")
    for line in lines:
        note = "; ".join([line["note"], *line["losses"]])
        print(f"{line['what']:34} {line['trials']:7} {len(line['losses']):6}  {note}")
    raise SystemExit(any(line["losses"] for line in lines))


if __name__ == "__main__":
    main()
