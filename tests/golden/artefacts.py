"""What a release wrote, kept so that later ones load it: `python -m tests.golden.artefacts DIR`.

DIR is named after the release, and holds tiny models of every kind of part with the state of their
optimizers, the workdir of a finished run, a saved posterior, and the values that they give. The
archives are compressed afterwards, which Keras reads as well.
"""

import json
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import tensorflow as tf

import avb_tf
from avb_tf.command_line import main
from avb_tf.training.optimizers import Adam

EVENT, IMAGE = (6,), (4, 4, 1)
SMALL = {
    "latent_dim": 2, "width": 4, "depth": 1, "bases": 2, "basis_width": 3, "adversary_width": 4,
    "adversary_depth": 1, "adversary_draws": 3, "flow_width": 4, "flow_steps": 0, "seed": 3,
}  # fmt: skip
MODELS = {
    "avb_ac": ("avb_ac", EVENT, {}),
    "avb_flow": ("avb_flow", EVENT, {"flow_steps": 2}),
    "avb_ac_paper": ("avb_ac_paper", EVENT, {"products": 5}),
    "iaf": ("iaf", EVENT, {"flow_steps": 2}),
    "auxvae": ("auxvae", EVENT, {}),
    "avb_conv": (
        "avb",
        IMAGE,
        {"network": "conv", "filters": (2,), "residual_blocks": 1, "adversary": "concatenating"},
    ),
}
CONFIG = (
    "--config=configs/four_points.py:avb --config.steps=20 --config.batch_size=8 "
    "--config.log_every=10 --config.checkpoint_every=10 --config.figures_every=0 "
    "--config.monitor.examples=4 --config.monitor.samples=8 --config.model.width=4 "
    "--config.model.depth=1 --config.model.bases=2 --config.model.basis_width=4 "
    "--config.model.noise_dim=2 --config.model.adversary_width=4 --config.model.adversary_depth=1 "
    "--config.eval.grid=40 --config.eval.posteriors=4 --config.eval.budget=quick "
    "--config.eval.subset=0 --config.eval.simulated=0 --config.eval.gap=0"
)
FIT = {"draws": 16, "chart_steps": 1, "chart_width": 4, "blocks": 1, "width": 4}
FIT |= {"adversary_width": 4, "adversary_depth": 1, "steps": 20, "verbose": False}


def examples(event) -> np.ndarray:
    """[8, *event] in [0, 1), by no generator that might change."""
    return (np.arange(8 * np.prod(event)) * 0.618034 % 1.0).reshape(8, *event).astype(np.float32)


def trained(model, x, steps: int = 3) -> None:
    """Some steps of training on the same batch."""
    data = tf.data.Dataset.from_tensors(x).repeat()
    model.fit(data, epochs=1, steps_per_epoch=steps, shuffle=False, verbose=0)


def values(model, x) -> dict:
    """What a model says of x."""
    noise = tf.random.stateless_normal([16, len(x), model.encoder.noise_dim], [5, 0])
    return {
        "step": int(model.step.numpy()),
        "elbo": float(np.mean(model.terms(tf.constant(x), noise).elbo)),
        "means": np.asarray(model.posterior(x, 16).mean).tolist(),
        "reconstructions": np.asarray(model.reconstruct(x)).ravel()[:12].tolist(),
    }


def log_density(u):
    """Of the saved posterior."""
    return -0.5 * tf.reduce_sum(u**2 / [1.0, 4.0], -1)


def of_posterior(fit) -> dict:
    """What a fit says."""
    evidence = fit.log_evidence
    return {"draws": fit.unconstrained(5, 7).tolist(), "log_evidence": float(evidence.value)}


def _compress(file: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def write(directory: Path) -> None:
    """All artefacts and `values.json`."""
    directory.mkdir(parents=True)
    known = {}
    for name, (method, event, changes) in MODELS.items():
        x = examples(event)
        model = avb_tf.build(method, event, **{**SMALL, **changes})
        model.compile(Adam(1e-2, global_clipnorm=100.0), Adam(1e-2, global_clipnorm=100.0))
        trained(model, x)
        file = directory / f"{name}.keras"
        model.save(file)
        _compress(file)
        known[name] = values(model, x)
        trained(model, x, 2)
        known[name]["two steps later"] = values(model, x)
    with tempfile.TemporaryDirectory() as temporary:
        workdir = Path(temporary) / "run"
        main(["avb-tf", *CONFIG.split(), f"--workdir={workdir}", "--mode=train_and_evaluate"])
        for part in ("config.json", "results.json", "checkpoints", "evaluation/per_example.npz"):
            target = directory / "run" / part
            target.parent.mkdir(parents=True, exist_ok=True)
            copy = shutil.copytree if (workdir / part).is_dir() else shutil.copy
            copy(workdir / part, target)
    (directory / "run" / "checkpoints" / "step_000000000.keras").unlink()
    for file in directory.glob("run/checkpoints/*.keras"):
        _compress(file)
    fit = avb_tf.fit_posterior(log_density, shape=[2], seed=1, **FIT)
    fit.save(directory / "posterior")
    known["posterior"] = of_posterior(fit)
    (directory / "values.json").write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
