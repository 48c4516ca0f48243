"""Tests crash states, kills, corruption and other faults; prints a table of trials and losses.

  python -m tests.campaigns.durability DIR [--kills=300] [--flips=1000] [--resumed=10]
    [--fuzz=600] [--explosions=10] [--requests=200000] [--versions=10] [--only=PART ...]

The campaign is resumable: DIR/table.jsonl has a line for each finished part, which is not run
again. `tests/campaigns/faults.py` covers faults of workers, full disks and memory.
"""

import argparse
import functools
import json
import math
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

import tensorflow as tf
import tensorflow_probability as tfp

from avb_tf import archives, checkpoints, configuration, files, fit_amortised, results
from avb_tf.amortised.result import AmortisedFit
from avb_tf.errors import UserError
from avb_tf.posteriors.fit import load_posterior
from avb_tf.serving import layout
from avb_tf.serving.saved_model import SavedModel
from tests import serving_fuzz
from tests.campaigns import crashes, exhaustion, faults, jobs, reloading
from tests.campaigns.jobs import Job

BATCH = 18  # kills in one part
# Phases of a training run in which it is killed, in turn.
PHASES = ("step", "save", "prune", "compile", "evaluation", "chunks")
METHODS = ("vae", "avb_ac")  # of killed runs
EXPORT = "--mode=export"
# Runs that change devices are so short because two devices add in another order than one, and the
# roundings of more steps exceed 1e-6. They end after the saves at 10 and 20 steps, in turn.
SHORT = ("--config.steps=30", "--config.log_every=10", "--config.checkpoint_every=10")
TERMINATE = "checkpoints.newest_step(workdir) in (10, 20) and os.kill(os.getpid(), signal.SIGTERM)"
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
    renames = [i for i, o in enumerate(recording.operations) if o.new == files.COMMITTED]
    fitted = renames[0] + 1 if renames else math.inf  # the directory is synced then
    for count, (number, tree, losses) in enumerate(states):
        lost = [f"operation {number}: {path} is not as saved" for path in losses]
        if count % every == 0:
            with tempfile.TemporaryDirectory() as folder:
                crashes.write(tree, Path(folder))
                workdir = Path(folder, "whole")
                lost += [f"operation {number}: {what}" for what in unreadable(workdir)]
                if number >= fitted and not (workdir / "fit/fit.json").exists():
                    lost.append(f"operation {number}: no fit")
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
    files.settle(workdir / "fit")
    if (workdir / "fit/fit.json").exists():
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


def kills(folder, method, count, chance):
    """Sends SIGKILLs to one run, which is resumed after each; returns (kills, losses, note).

    A phase that was over before the signal arrived is neither a kill nor a loss.
    """
    moments = [PHASES[i % len(PHASES)] for i in range(count)]
    # Kills during evaluation come last, because a run that is evaluating has finished training.
    moments.sort(key=lambda moment: moment in jobs.AFTER_TRAINING)
    sent = [(signal.SIGKILL, moment) for moment in moments]
    whole = undisturbed(folder, method)
    lost = list(faults.disturbed(folder, whole, sent, chance, method=method, forked=True))
    missed = [what for what in lost if what.startswith("missed")]
    note = f"{method}: {', '.join([f'{count // len(PHASES)} or more in each phase', *missed])}"
    return count - len(missed), [what for what in lost if what not in missed], note


def killed_exports(folder, whole, count, chance):
    """Kills exports while they are written: no incomplete version may remain; the next succeeds."""
    workdir = shutil.copytree(whole, folder / "exports", dirs_exist_ok=True)
    for _ in range(count):
        job = Job(workdir, EXPORT, forked=True)
        seen = job.wait_for(lambda: any((workdir / layout.DIRECTORY).glob(".[0-9]*.*")))
        if not seen:
            yield "missed the export"
        time.sleep(chance.uniform(0.0, 1.0))
        job.process.kill()
        job.finish()
    status, error = Job(workdir, EXPORT, forked=True).finish()
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
    fit = {"posterior": True, "method": "banana", "forked": True}
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


def fit_and_save(path, seed):
    """Fits amortised posteriors of a tiny model and saves them."""
    model = tfp.distributions.JointDistributionNamed({
        "mu": tfp.distributions.Normal(0.0, 1.0),
        "y": lambda mu: tfp.distributions.Normal(mu, 1.0),
    })  # fmt: skip
    sizes = {"batch_size": 16, "components": 2, "width": 4, "trunk_width": 4}
    sizes |= {"depth": 1, "trunk_depth": 1}
    fit_amortised(model, steps=1, seed=seed, verbose=False, **sizes).save(path)


def killed_amortised_fits(folder, count, chance):
    """Kills amortised fits while they run and are saved: the old or the new fit must load."""
    path, output = folder / "amortised/fit", folder / "amortised.txt"
    began = time.monotonic()
    first = jobs.Fork(output, functools.partial(fit_and_save, path, 0))
    errors = first.communicate(600)[1]
    assert first.returncode == 0, errors
    seconds, saved = time.monotonic() - began, 0
    for trial in range(1, count + 1):
        process = jobs.Fork(output, functools.partial(fit_and_save, path, trial))
        while trial % 2 and process.poll() is None and not any(path.glob(".[pn]*")):
            time.sleep(0.002)
        end = 0.5 if trial % 2 else seconds  # while it is saved, and at any time
        time.sleep(chance.uniform(0.0, end))
        process.kill()
        process.communicate(60)
        try:
            seed = AmortisedFit.load(path).seed
        except UserError as error:
            yield f"{error!s:.200}"
        else:
            if seed not in (saved, trial):
                yield f"the fit of trial {seed}; expected that of {saved} or {trial}"
            saved = seed


# Faults of a workdir.


def two_at_once(folder, whole):
    """Starts two training commands in one workdir: one must be refused, the other must finish."""
    workdir = folder / "shared"
    both = [Job(workdir, output=folder / f"shared_{i}.txt", forked=True) for i in range(2)]
    ends = sorted((j.finish() for j in both), key=lambda end: end[0])
    if ends[0][0]:
        yield f"exit status {ends[0]}"
    yield from jobs.one_line(*ends[1], "is in use by process")
    yield from jobs.losses(workdir, whole)
    shutil.rmtree(workdir)


def limited(folder, whole, names):
    """Causes faults of `LIMITS` at the end of the first save; later the run must resume."""
    for name in names:
        statement, words = LIMITS[name]
        workdir = shutil.copytree(whole, folder / "limited")
        for checkpoint in sorted(workdir.glob("checkpoints/*.keras"))[1:]:
            checkpoint.unlink()
        mounted = "mount" in statement
        if mounted:
            faults.mount(workdir / checkpoints.DIRECTORY, 10**7)
        before = functools.partial(faults.after_save, statement)
        # Standard output would be one more open file.
        output = folder / "limited.txt"
        status, error = Job(workdir, forked=True, before=before, output=output).finish()
        yield from (f"{name}: {what}" for what in jobs.one_line(status, error, words))
        if mounted:
            subprocess.run(["umount", workdir / checkpoints.DIRECTORY], check=True)
        status, error = Job(workdir, forked=True).finish()
        if status:
            yield f"{name}, mended: exit status {status}, {error[-300:]}"
        else:
            # Without its workdir a run trains from the beginning.
            yield from jobs.losses(workdir, whole, logged="vanishes" not in name)
        shutil.rmtree(workdir)


def clock_goes_back(folder, whole):
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
    status, error = Job(workdir, forked=True).finish()
    yield from [f"exit status {status}: {error}"] if status else jobs.losses(workdir, whole)
    shutil.rmtree(workdir)


def late_worker(folder, seconds=5):
    """Starts only one of two workers; it must wait as long as `config.worker_timeout` says."""
    cluster = [f"127.0.0.1:{port}" for port in faults.free_ports(2)]
    for task in range(2):
        began = time.monotonic()
        wait = f"--config.worker_timeout={seconds}"
        job = Job(folder / "late", wait, cluster=cluster, task=task, forked=True)
        status, error = job.finish()
        told = [line for line in error.splitlines() if line.startswith("avb-tf: ")]
        if status != faults.LOST or len(told) != 1 or "config.worker_timeout" not in told[0]:
            yield f"task {task}: exit status {status}, {error[-300:]}"
        if (waited := time.monotonic() - began) > seconds + 60:
            yield f"task {task}: waited {waited:.0f} s"


def one(workdir, *before):
    """Starts a run on one device; it calls the functions `before` first."""
    return [Job(workdir, *SHORT, forked=True, before=functools.partial(_all, before))]


def two_devices(workdir, *before):
    """Starts a run on two devices of one worker."""
    before = functools.partial(_all, (split_device, *before))
    return [Job(workdir, *SHORT, "--config.strategy=mirrored", forked=True, before=before)]


def two_workers(workdir, *before):
    """Starts a run on two workers, the chief first."""
    return faults.pair(workdir, *SHORT, forked=True, before=functools.partial(_all, before))


def _all(functions):
    for function in functions:
        function()


def split_device():
    """Makes two devices of the CPU."""
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)


def on_cpu(workdir, *before):
    """Starts a run on the CPU of a machine with a GPU."""
    return one(workdir, hide_gpus, *before)


def hide_gpus():
    """Leaves this process no GPU."""
    tf.config.set_visible_devices([], "GPU")


def elastic(folder, stages, limit, _chance):
    """Moves a run from stage to stage, each on other devices; all but the last end after a save."""
    whole, workdir = folder / "whole_elastic", folder / "elastic"
    for directory, starts in ((whole, stages[-1:]), (workdir, stages)):
        shutil.rmtree(directory, ignore_errors=True)
        for number, start in enumerate(starts, 1):
            last = number == len(starts)
            ends = [] if last else [functools.partial(faults.after_save, TERMINATE)]
            for job in start(directory, *ends):
                status, error = job.finish()
                if status != (0 if last else faults.PREEMPTED):
                    yield f"stage {number}: exit status {status}, {error[-200:]}"
    if (apart := jobs.difference(workdir, whole)) > limit:
        yield f"weights differ by {apart:.2g}"


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


def undisturbed(folder, method="avb_ac"):
    """The workdir of a finished run of the method, made once."""
    workdir = folder / f"whole_{method}"
    if not (workdir / results.FILE).exists():
        status, error = Job(workdir, method=method, forked=True).finish()
        assert status == 0, error
    return workdir


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
        method = METHODS[batch % len(METHODS)]
        tables[f"SIGKILL of a run, {batch}"] = functools.partial(kills, folder, method, count)
    few, flips = max(1, options.kills // 15), options.flips
    tables |= {
        "SIGKILL of an export": part(killed_exports, few, whole, few),
        "SIGKILL of a posterior's fit": part(killed_fits, few, few),
        "SIGKILL of an amortised fit": part(killed_amortised_fits, few, few),
        "two commands at once": lambda chance: (1, list(two_at_once(folder, whole)), ""),
        "limits": lambda chance: (
            len(limits), list(limited(folder, whole, limits)), "; ".join(limits)
        ),
        "the clock goes back": lambda chance: (1, list(clock_goes_back(folder, whole)), ""),
        "a worker never comes": lambda chance: (2, list(late_worker(folder)), ""),
        "one device to two to one": part(elastic, 1, (one, two_devices, one), 1e-6),
        "one worker to two to one": part(elastic, 1, (one, two_workers, one), 1e-6),
        "two workers to one to two": part(elastic, 1, (two_workers, one, two_workers), 1e-6),
        "flipped bits in checkpoints": part(flipped_checkpoints, flips, whole, flips),
        "flipped bits in chunks": part(flipped_chunks, flips, whole, flips),
        "flipped bits in config.json": part(flipped_configs, flips, whole, flips),
        "flipped bits in an export": lambda chance: (
            flips, list(flipped_directories(_exported(folder, whole), flips, chance)), "",
        ),
        "flipped bits in a posterior": lambda chance: (
            flips, list(flipped_directories(_fitted(folder), flips, chance)), "",
        ),
        "no more open files": lambda chance: exhausted(folder, whole, "files"),
        "no more memory": lambda chance: exhausted(folder, whole, "memory"),
        "finite explosions": lambda chance: (
            options.explosions,
            list(exhaustion.explosions(
                folder, undisturbed(folder, "vae"), options.explosions, chance, method="vae"
            )), "",
        ),
        "fuzzed requests": lambda chance: fuzzed(_exported(folder, whole), options.fuzz, chance),
        "requests while versions are loaded": lambda chance: (
            options.requests,
            *reloading.reloaded(
                functools.partial(reloading.exported, folder, whole),
                options.requests, options.versions,
            ),
        ),
    }  # fmt: skip
    if tf.config.list_physical_devices("GPU"):
        tables["CPU to GPU to CPU"] = part(elastic, 1, (on_cpu, one, on_cpu), 1e-3)
    return tables


def exhausted(folder, whole, kind):
    """A run, an export and a posterior's fit that may not have more than there is."""
    count = 3 * len(exhaustion.LIMITS[kind])
    workdirs = [folder / f"exhausted_{kind}_{what}" for what in ("run", "export", "fit")]
    run, export, fit = workdirs
    for workdir in workdirs:
        shutil.rmtree(workdir, ignore_errors=True)
    shutil.copytree(whole, export)
    lost = [f"run, {what}" for what in exhaustion.exhausted(run, kind)]
    lost += jobs.losses(run, whole)
    lost += [f"export, {what}" for what in exhaustion.exhausted(export, kind, EXPORT)]
    for version in layout.versions(export / layout.DIRECTORY):
        files.verify(export / layout.DIRECTORY / str(version))
    exhausting = exhaustion.exhausted(fit, kind, posterior=True, method="banana")
    lost += [f"fit, {what}" for what in exhausting]
    return count, lost, "a run, an export and a fit"


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
        except Exception as error:  # whatever a request does not end in an answer or a refusal
            lost.append(f"seed {number}: {type(error).__name__}: {error!s:.200}")
        count += 3 * examples
    return count, lost, f"{seconds} s"


def main():
    """Runs everything that is not finished yet, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    for name, count in {
        "kills": 300,
        "flips": 1000,
        "resumed": 10,
        "fuzz": 600,
        "explosions": 10,
        "requests": 200_000,
        "versions": 10,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--only", nargs="*", help="beginnings of the names of parts")
    options = parser.parse_args()
    folder = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    whole, table = undisturbed(folder), folder / "table.jsonl"
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
