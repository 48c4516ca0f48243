"""Runs short jobs as processes, disturbs them, and compares them with undisturbed jobs."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from avb_tf import checkpoints

ROOT = Path(__file__).parents[2]
MAIN = (str(ROOT / "main.py"),)
STEPS, PERIOD, KEPT = 400, 20, 3
FLAGS = [
    f"--config.steps={STEPS}", f"--config.log_every={PERIOD}",
    f"--config.checkpoint_every={PERIOD}", f"--config.figures_every={STEPS // 2}",
    "--config.model.width=16", "--config.model.bases=4", "--config.model.basis_width=8",
    "--config.model.adversary_width=16", "--config.model.adversary_steps=2",
    "--config.eval.grid=40", "--config.eval.posteriors=2", "--config.eval.examples=50",
    "--config.eval.repeats=1", "--config.eval.gap=0", "--config.monitor.samples=16",
    "--config.monitor.examples=16", "--mode=train_and_evaluate",
]  # fmt: skip

POSTERIOR_FLAGS = [
    "--config.steps=20", "--config.fit.draws=64", "--config.fit.width=8",
    "--config.fit.adversary_width=8",
]  # fmt: skip


class Job:
    """A process that runs the command line.

    Args:
      workdir: directory of the run.
      *flags: flags that follow those that make the run small.
      method: a method of the config `digits`, or a model of the config `posteriors` if `posterior`.
      cluster: addresses of all workers.
      task: index of this worker.
      output: file for standard output; by default a file next to the workdir.
      program: arguments of Python that precede the flags.
      under: a command that runs the Python command, such as strace.
      posterior: whether the job fits a posterior.
    """

    def __init__(
        self, workdir, *flags, method="avb_ac", cluster=(), task=0, output=None, program=MAIN,
        under=(), posterior=False,
    ):  # fmt: skip
        self.workdir, self.first = workdir, checkpoints.newest_step(workdir)
        self.output = output or workdir.with_name(f"{workdir.name}-{task}.txt")
        self.told = 0.0  # when the signal was sent
        environment = dict(os.environ, PYTHONUNBUFFERED="1")
        if cluster:
            task = {"type": "worker", "index": task}
            environment["TF_CONFIG"] = json.dumps({"cluster": {"worker": cluster}, "task": task})
        command = [
            *under, sys.executable, *program,
            f"--config={ROOT}/configs/{'posteriors' if posterior else 'digits'}.py:{method}",
            f"--workdir={workdir}", *(POSTERIOR_FLAGS if posterior else FLAGS), *flags,
        ]  # fmt: skip
        with self.output.open("wb") as printed:
            self.process = subprocess.Popen(
                command, env=environment, stdout=printed, stderr=subprocess.PIPE, text=True
            )

    def printed(self, text):
        return text in self.output.read_text(errors="replace")

    def wait_for(self, condition, seconds=300):
        """Waits for `condition()`; returns False if the process ends first or the time is up."""
        end = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < end:
            if condition():
                return True
            time.sleep(0.002)
        return False

    def finish(self, seconds=600):
        """Waits for the end; returns the exit status and the text of standard error."""
        errors = self.process.communicate(timeout=seconds)[1]
        return self.process.returncode, errors


def has_saved(job):
    """Returns whether this process has saved a checkpoint."""
    return checkpoints.newest_step(job.workdir) > max(job.first, 0)


def saved_when_told(job):
    """Returns whether there is a checkpoint newer than the signal."""
    files = (job.workdir / checkpoints.DIRECTORY).glob("*.keras")
    # File times have a resolution of a few milliseconds.
    return any(file.stat().st_mtime > job.told - 0.01 for file in files)


# Phase of a job: how to detect it from outside, and how many seconds it lasts.
MOMENTS = {
    "compile": (lambda job: job.printed("compiling "), 4.0),
    "step": (has_saved, 0.3),
    "save": (lambda job: (job.workdir / checkpoints.DIRECTORY / "partial.keras").exists(), 0.05),
    "prune": (lambda job: len(list(job.workdir.glob("checkpoints/*.keras"))) > KEPT, 0.002),
    "evaluation": (lambda job: _trained(job), 3.0),
    "chunks": (lambda job: any(job.workdir.glob("evaluation/*/chunk_*.npz")), 0.2),
}
AFTER_TRAINING = ("evaluation", "chunks")


def _trained(job):
    return job.printed("trained to step") or job.printed(f"at step {STEPS} of {STEPS}")


def disturb(job, moment, sent, chance):
    """Sends a signal at a random time within a phase.

    Args:
      job: a running `Job`.
      moment: phase, a key of `MOMENTS`.
      sent: number of the signal.
      chance: random generator.
    Returns:
      Whether the job was still in that phase.
    """
    seen, seconds = MOMENTS[moment]
    while job.wait_for(lambda: seen(job)):
        time.sleep(chance.uniform(0.0, seconds))
        if seen(job):  # otherwise the phase, such as a save, is over: wait for the next
            met = job.process.poll() is None and (moment in AFTER_TRAINING) == _trained(job)
            job.told = time.time()
            job.process.send_signal(sent)
            return met
    return False


def variables(model):
    """Returns the weights and optimizer states of a model as arrays."""
    optimizers = [o for o in (model.optimizer, model.adversary_optimizer) if o]
    state = model.weights + [v for o in optimizers for v in o.variables]
    return [v.numpy() for v in state]


def difference(workdir, whole):
    """Returns the largest difference between weights, averages or optimizer states of two runs."""
    expected, actual = (variables(checkpoints.load(folder)) for folder in (whole, workdir))
    return max(float(np.abs(a - b).max()) for a, b in zip(expected, actual, strict=True))


def losses(workdir, whole, logged=True):
    """Yields descriptions of differences between a finished run and the undisturbed one.

    Args:
      workdir: workdir of the finished run.
      whole: workdir of the undisturbed run.
      logged: whether logs have to agree too.
    """
    if apart := difference(workdir, whole):
        yield f"weights differ by {apart:.2g}"
    # Partial files have other names, so a partial file that is left behind shows up here.
    differing = _names(workdir) ^ _names(whole)
    if differing := {name for name in differing if logged or not name.startswith("logs")}:
        yield f"{', '.join(sorted(differing))} in one of them alone"
    if logged:
        yield from _differing_logs(workdir, whole)
    if _means(workdir) != _means(whole):
        yield "results differ"


def _differing_logs(workdir, whole):
    (train, validation), (own_train, own_validation) = (
        [_logged(folder / "logs" / side) for side in ("train", "validation")]
        for folder in (whole, workdir)
    )
    # A run that resumes within an epoch restarts the epoch's means, so training values may differ.
    if train.keys() != own_train.keys() or validation != own_validation:
        yield "logs differ"


def _names(workdir):
    files = (file for file in workdir.rglob("*") if "tfevents" not in file.name)
    return {str(file.relative_to(workdir)) for file in files}


def _logged(directory):
    """Returns {step: ELBO}; a repeated step counts once."""
    events = EventAccumulator(str(directory), {"tensors": 0}).Reload()
    logged = events.Tensors("elbo") if "elbo" in events.Tags()["tensors"] else []
    return {event.step: float(make_ndarray(event.tensor_proto)) for event in logged}


def _means(workdir):
    estimates = json.loads((workdir / "results.json").read_text())["estimates"]
    return {name: estimate["mean"] for name, estimate in estimates.items()}
