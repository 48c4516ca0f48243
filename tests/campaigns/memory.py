"""Measures the resident memory of long training and of many evaluations in one process, in MB.

  python -m tests.campaigns.memory WORKDIR EVALUATIONS

This command evaluates the model of a finished run EVALUATIONS times, and prints the memory after
each.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from avb_tf import checkpoints, configuration, data
from avb_tf.data import pipeline
from avb_tf.likelihood_estimation import estimates
from tests.campaigns import jobs

GROWTH = 1.05  # allowed factor after the warm-up, which is the first tenth


def resident(process="self"):
    """Returns the resident memory of a process in MB."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0  # the process has ended


def of_training(folder, steps):
    """Returns the MB after a tenth of the steps, and the maximum over the whole run."""
    every = steps // 10
    flags = {
        "steps": steps, "log_every": every // 4, "checkpoint_every": every, "figures_every": 0
    }  # fmt: skip
    flags = [f"--config.{name}={value}" for name, value in flags.items()]
    job, megabytes = jobs.Job(folder / "long", *flags, "--mode=train"), {}

    def over():
        step = checkpoints.newest_step(job.workdir)
        if step > 0 and step not in megabytes:
            megabytes[step] = resident(job.process.pid)
        return step >= steps

    job.wait_for(over, seconds=1200)
    status, error = job.finish()
    assert status == 0, error
    return megabytes[every], max(megabytes.values())


def of_evaluations(workdir, count):
    """Returns the MB after a tenth of the evaluations, and the maximum over the others."""
    command = [sys.executable, "-m", "tests.campaigns.memory", str(workdir), str(count)]
    done = subprocess.run(command, cwd=jobs.ROOT, capture_output=True, text=True, check=True)
    megabytes = [float(line) for line in done.stdout.split("\n") if line.startswith("  ")]
    assert len(megabytes) == count
    return megabytes[count // 10 - 1], max(megabytes[count // 10 :])


def main(workdir, count):
    """Prints the memory after each evaluation, indented by two spaces."""
    model = checkpoints.load(Path(workdir))
    split = data.load(configuration.load(Path(workdir)).data).test
    for seed in range(int(count)):
        x = pipeline.examples(split, 25, model.likelihood.binary, seed)
        estimates.bound(model, x)
        estimates.exact(model, x, grid=40)
        with tempfile.TemporaryDirectory() as kept:
            estimates.importance_weighted(model, x, 1, Path(kept))
            sizes = {"temperatures": 5, "chains": 4, "leapfrog_steps": 2}
            estimates.annealed(model, x, sizes, Path(kept))
        print(f"\n  {resident():.1f}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
