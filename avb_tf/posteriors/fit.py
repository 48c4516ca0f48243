"""`fit_posterior`: AVB where the model is fixed and the encoder has only noise to read.

The same bound, model class and training step as everywhere: x is one example that stays the same,
its many draws are the samples, and log p(x, z) is the model's own density, so that the prior is in
it and E_q[log r] is minus the entropy of r. A model goes one way:

    model -> target -> start -> chart -> AVB upon the chart -> the better of both -> verdict
"""

import contextlib
import json
import random
import time
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from avb_tf import files
from avb_tf.errors import UserError
from avb_tf.posteriors import building, models, training
from avb_tf.posteriors import start as starting
from avb_tf.posteriors import target as targets
from avb_tf.posteriors.result import META, MODEL, START, WEIGHTS, PosteriorFit
from avb_tf.posteriors.sampler import Chart, Plain, log_normal
from avb_tf.posteriors.training import Clock
from avb_tf.settings.posterior import STEPS, resolved

FAR = 10.0  # nats, see `divergence`
CLOSE, FOLLOWED = 0.3, 3.0  # nats of `divergence`, see `helps`
TIE = 0.02  # in total variation, about the error of two distances
START_SHARE = 0.35  # of the seconds, for the start
SHORT, SHORT_SHARE = 15.0, 0.75  # below so many seconds no network can be built and trained
VERDICT_SHARE = 0.1  # for the verdict
TRACED = 5.0  # how many times as long a model takes to be traced as to be built
SLOWER = 1.5  # how many times as long AVB takes to be traced as the chart's trainer


def fit_posterior(
    model,
    observed=None,
    *,
    steps: int | None = None,
    seconds: float | None = None,
    seed: int = 0,
    shape=None,
    bijector=None,
    dtype: Any = "float32",
    batch_size: int | None = None,
    verbose: bool = True,
    **settings: Any,
) -> PosteriorFit:
    """Fits a neural sampler to the posterior of a model.

        fit = fit_posterior(joint, {"y": y}, seconds=60)
        print(fit.diagnostics())
        fit.sample(1000)

    Args:
      model: a TFP joint distribution, pinned or with `observed`; or a log density, a function of
        one tensor, or of several by name or in order as `shape` says.
      observed: values of parts of the joint, a dict by name or a sequence with None where unknown.
      steps: of training; 3000 where `seconds` is not given either.
      seconds: that the call may take, all included; how far training comes is then up to the
        machine, and the fit no function of `seed` alone. Where they do not suffice to build and
        train networks, the fit is a Gaussian.
      seed: of the whole fit. TensorFlow's global seed is set.
      shape: of the log density's argument, or a dict or sequence of them.
      bijector: from R^n to the log density's support, in the structure of `shape`.
      dtype: of the log density's argument.
      batch_size: for much data: rows of `observed`, a dict of arrays [rows, ...], that a step of
        training sees; `model` is then a function from rows of them to the joint pinned on these.
        The start and the verdict see all.
      verbose: shows a progress bar.
      **settings: changes to `settings.posterior.SETTINGS`, none of which should need one.
    Returns:
      The fit; the verdict on it is `diagnostics()`.
    Raises:
      UserError: a model that cannot be fitted, and what to do about it.
    """
    began = time.monotonic()
    if (steps is not None and steps < 1) or (seconds is not None and seconds <= 0):
        raise UserError(f"steps is {steps} and seconds {seconds}; expected numbers above 0")
    if steps is None and seconds is None:
        steps = STEPS
    target = models.make(model, observed, shape, bijector, dtype, batch_size)
    resolved_settings = resolved(target.dim, **settings)
    clock = Clock(steps, seconds, began, verbose)
    share = SHORT_SHARE if seconds and seconds < SHORT else START_SHARE
    allowed = seconds and share * (seconds - clock.elapsed())
    start = starting.find(target, seed, allowed, steps or STEPS)
    clock.start_training(VERDICT_SHARE * (seconds or 0.0))
    with seeded(seed):
        fit = _trained(target, start, seed, resolved_settings, clock)
    if seconds:
        fit.diagnostics()  # it is part of what the seconds are for
    fit.seconds = clock.elapsed()
    return fit


@contextlib.contextmanager
def seeded(seed: int):
    """Keras's initial weights come from global generators; a caller's go on as if unused."""
    python, numpy = random.getstate(), np.random.get_state()
    keras.utils.set_random_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _trained(target, start, seed, settings, clock) -> PosteriorFit:
    """The chart, AVB upon it, and the better of both."""
    emerged = tf.Variable(0.0, trainable=False)
    chart = _charted(target, start, seed, settings, clock, emerged)
    charted = not isinstance(chart, Plain)
    # Where the adversary was no match for the posterior, the fit is better off with the chart
    # alone, N(0, I) going in; there T is exactly 0 and the weights are exact.
    alone = _fit(target, start, seed, {**settings, "blocks": 0}, chart)
    if target.dim > starting.LARGEST:  # no adversary follows there
        return alone
    began = clock.elapsed()
    fit = _fit(target, start, seed, settings, chart, 1.0 if charted else emerged)
    tracing = SLOWER * clock.traced or TRACED * (clock.elapsed() - began)
    if clock.left() < tracing:
        return alone
    # The chart stays as it is: moving with the encoder, the two undid each other's scales, and
    # the adversary lost both.
    fit.model.decoder.trainable = False
    annealed = None if charted else emerged
    history = training.train(fit.model, settings, clock, 1.0, settings["learning_rate"], annealed)
    alone.steps = fit.steps = int(fit.model.step.value)
    alone.history = fit.history = history
    return fit if fit.overlap() <= alone.overlap() + TIE else alone


def _fit(target, start, seed, settings, chart, emerged=1.0) -> PosteriorFit:
    """An untrained fit upon a chart: N(0, I) goes in."""
    model = building.avb(target, start, seed, settings, not isinstance(chart, Plain), emerged)
    for network in (model.decoder, model.averaged_decoder):
        network.set_weights(chart.get_weights())
    return PosteriorFit(target, start, model, 0.0, seed, settings, {})


def _charted(target, start, seed, settings, clock, emerged) -> Chart | Plain:
    """A chart that takes N(0, I) to near the posterior, or a plain one where that is better.

    It minimises KL(q || p), which may lose modes; the chains of the start have them, so the
    symmetrised divergence over q's draws and the chains' tells which of the two is closer to the
    posterior.
    """
    wanted = settings["chart_steps"] and settings["chart_share"]
    if not wanted or target.dim > starting.LARGEST:
        return Plain()
    began = clock.elapsed()
    trainer = building.chart_trainer(target, start, seed, settings, emerged)
    if clock.left() < TRACED * (clock.elapsed() - began):
        return Plain()
    rate = settings["chart_learning_rate"]
    training.train(trainer, settings, clock, settings["chart_share"], rate, emerged)
    density = building.density_of(target, start, target.log_density)
    chains = tf.constant(start.z, tf.float32)
    draws = tf.random.stateless_normal(chains.shape, [seed, 0])

    def log_ratio(chart, z):
        outputs = chart(z)
        return density(outputs[:, :-1]) + outputs[:, -1] - log_normal(z)

    def distance(chart):
        at_p, at_q = (np.asarray(log_ratio(chart, z)) for z in (chart.inverse(chains), draws))
        return divergence(at_p, at_q)

    charted: Any = trainer.averaged_decoder
    return charted if helps(distance(charted), distance(Plain())) else Plain()


def helps(by_chart: float, by_plain: float) -> bool:
    """Whether AVB is better off upon a chart, by its `divergence` and that of the plain Gaussian.

    What a Gaussian contrast can follow is learned better without a chart than upon a bad one, such
    as a flow's of a ring, which has a seam.
    """
    return by_chart < by_plain and (by_chart < CLOSE or by_plain > FOLLOWED)


def divergence(at_p: np.ndarray, at_q: np.ndarray) -> float:
    """E_p[log p - log q] + E_q[log q - log p], in which p's normaliser cancels.

    No draw counts more than `FAR` nats: a single one in a tail, where a chart's inverse is
    anything, says nothing about modes, of which a lost one is many draws.

    Args:
      at_p: [n], log p - log q at draws of p.
      at_q: [m], the same at draws of q.
    """
    low, high = np.median(at_q) - FAR, np.median(at_q) + FAR
    return float(np.clip(at_p, low, high).mean() - np.clip(at_q, low, high).mean())


def load_posterior(path: Path | str) -> PosteriorFit:
    """A fit as `PosteriorFit.save` wrote it, without the model's own code.

    Load only what comes from somebody you trust: the directory holds the model as a TensorFlow
    SavedModel, a program that may read and write files.

    Raises:
      UserError: it is not a saved fit, or damaged.
    """
    path = Path(path)
    with files.loading(path, "PosteriorFit.save"):
        meta = json.loads((path / META).read_text())
        target = targets.load(path / MODEL)
        before = "z" in meta  # an earlier version kept it there
        start = starting.of_record(meta) if before else starting.load(path / START)
        avb = building.avb(target, start, meta["seed"], meta["settings"], meta["charted"])
        avb.load_weights(path / WEIGHTS)
        return PosteriorFit(
            target, start, avb, meta["seconds"], meta["seed"], meta["settings"], meta["history"]
        )
