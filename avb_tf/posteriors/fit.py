"""`fit_posterior`: AVB for a fixed model, with an encoder that reads only noise.

The bound, the model class and the training step are those of all other models. Here x is a single
constant example with many samples of z. log p(x, z) is the model's own density, which includes the
prior, so that E_q[log r] is minus the entropy of r. These are the stages of a fit:

    model -> target -> start -> chart -> AVB on the chart -> the best of these -> verdict
"""

import contextlib
import json
import random
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from avb_tf import files
from avb_tf.errors import UserError
from avb_tf.posteriors import building, coordinates, models, training
from avb_tf.posteriors import start as starting
from avb_tf.posteriors import target as targets
from avb_tf.posteriors.result import META, MODEL, START, WEIGHTS, PosteriorFit
from avb_tf.posteriors.sampler import Chart, Plain, log_normal
from avb_tf.posteriors.start import Limits
from avb_tf.posteriors.training import Clock
from avb_tf.settings import fits
from avb_tf.settings.posterior import STEPS, resolved

FAR = 10.0  # nats, see `divergence`
CLOSE, FOLLOWED = 0.3, 3.0  # nats of `divergence`, see `helps`
TIE = 0.02  # total variation: about the error of the difference of two distances
START_SHARE = 0.35  # share of the seconds that the start may take
SPARE_SHARE = 0.35  # share by which its search may go on if the modes found need no network
SHORT = 15.0  # fewer seconds do not suffice to train a network: the start's mixture is the fit
USEFUL = 0.2  # share of the seconds below which training is not worth its tracing
LEAST_START_SHARE = 0.3  # share of so few seconds that the start may take at least
VERDICT_SHARE, VERDICT_SECONDS = 0.1, 1.5  # reserved for the verdict of a long and of a short fit
TRACED = 5.0  # time to trace a model, relative to the time to build it; the density's at least
SLOWER = 1.5  # time to trace AVB, relative to the time to trace the chart's trainer


def fit_posterior(
    model: Any,
    observed: Mapping[str, Any] | Sequence[Any] | None = None,
    *,
    steps: int | None = None,
    seconds: float | None = None,
    seed: int = 0,
    shape: Any = None,
    bijector: Any = None,
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
      model: a TFP joint distribution, either pinned or given with `observed`; or a log density, a
        function of one tensor or of several, which are passed by name or in order as in `shape`.
      observed: observed values of the joint's parts: a dict by name, or a sequence with None for
        unobserved parts.
      steps: number of training steps; 3000 if `seconds` is not given either.
      seconds: time that the whole call may take. The number of training steps then depends on the
        machine, so the fit is not determined by `seed` alone. Below 15 seconds no network is
        trained, and the fit is a mixture of Gaussians.
      seed: seed of the whole fit. TensorFlow's global seed is set.
      shape: shape of the log density's argument, or a dict or sequence of shapes.
      bijector: bijector from R^n to the log density's support, in the structure of `shape`.
      dtype: dtype of the log density's argument.
      batch_size: number of rows of the data in each training step, for large data. `observed` is
        then a dict of arrays [rows, ...], and `model` a function from such rows to the joint
        distribution pinned on them. The start and the verdict use all rows.
      verbose: whether to show a progress bar.
      **settings: changes to `settings.posterior.SETTINGS`; the defaults should suffice.
    Returns:
      The fit; `diagnostics()` has the verdict on it.
    Raises:
      UserError: the model cannot be fitted; the message says what to do about it.
    """
    began = time.monotonic()
    fits.check_effort(steps, seconds, seed)
    if steps is None and seconds is None:
        steps = STEPS
    target = models.make(model, observed, shape, bijector, dtype, batch_size)
    resolved_settings = resolved(target.dim, **settings)
    clock = Clock(steps, seconds, began, verbose)
    limits = _limits(seconds, clock.elapsed()) if seconds else None
    try:
        start = starting.find(target, seed, limits, steps or STEPS)
        clock.start_training(VERDICT_SHARE * (seconds or 0.0))
        with seeded(seed):
            fit = _trained(target, start, seed, resolved_settings, clock)
        if seconds:
            fit.diagnostics()  # the seconds include the verdict
    except tf.errors.InvalidArgumentError as error:
        raise UserError(
            f"the log density fails at some parameters ({_cause(error)}); expected a number or NaN "
            "everywhere: for example, add 1e-6 I to a matrix before its inverse"
        ) from error
    fit.seconds = clock.elapsed()
    return fit


def _cause(error):
    """Returns the line of an error in a graph that says what happened, before the node's name."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    nodes = [i for i, line in enumerate(lines) if i and line.startswith("[[")]
    return lines[nodes[0] - 1][:200] if nodes else targets.first_line(error)


def _limits(seconds, elapsed) -> Limits:
    """Returns the time that the start may take of `seconds` for the whole fit."""
    # Tracing the model for the mixture and the verdict takes about half as long as checking it.
    alone = max(LEAST_START_SHARE * seconds, seconds - 1.5 * elapsed - VERDICT_SECONDS)
    if seconds < SHORT:
        return Limits(alone, 0.0, alone)
    return Limits(START_SHARE * (seconds - elapsed), SPARE_SHARE * seconds, alone)


@contextlib.contextmanager
def seeded(seed: int) -> Generator[None]:
    """Seeds the global generators that Keras draws initial weights from.

    The state of Python's and numpy's generators is restored on exit.
    """
    python, numpy = random.getstate(), np.random.get_state()
    keras.utils.set_random_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _trained(target, start, seed, settings, clock) -> PosteriorFit:
    """Trains the chart, then AVB on the chart, and returns the best of the three fits.

    The other two have a known density: T is exactly 0 for the chart alone, applied to N(0, I), and
    exact for the mixture that the start has found. The chart is better if the adversary cannot
    follow the posterior, and the mixture if the modes lie so far apart that networks do not reach
    them from N(0, I).
    """
    mixed = None
    if start.mixture is not None:
        model = building.mixed(target, start, seed, settings)
        mixed = PosteriorFit(target, start, model, 0.0, seed, settings, {})
        if clock.seconds and (clock.seconds < SHORT or clock.left() < USEFUL * clock.seconds):
            return mixed
    emerged = tf.Variable(0.0, trainable=False)
    chart = _charted(target, start, seed, settings, clock, emerged)
    charted = not isinstance(chart, Plain)
    alone = _fit(target, start, seed, {**settings, "blocks": 0}, chart)
    if mixed is None:  # no adversary can follow in so many dimensions
        return alone
    known = mixed if mixed.overlap() + TIE < alone.overlap() else alone
    began = clock.elapsed()
    fit = _fit(target, start, seed, settings, chart, 1.0 if charted else emerged)
    tracing = SLOWER * clock.traced or max(TRACED * (clock.elapsed() - began), target.traced)
    if clock.left() < tracing:
        return known
    # The chart is frozen: trained together, the chart and the encoder undid each other's scales,
    # and the adversary could follow neither.
    fit.model.decoder.trainable = False
    annealed = None if charted else emerged
    history = training.train(fit.model, settings, clock, 1.0, settings["learning_rate"], annealed)
    known.steps = fit.steps = int(fit.model.step.value)
    known.history = fit.history = history
    return fit if fit.overlap() <= known.overlap() + TIE else known


def _fit(target, start, seed, settings, chart, emerged=1.0) -> PosteriorFit:
    """Returns an untrained fit on a chart, whose input is N(0, I)."""
    model = building.avb(target, start, seed, settings, not isinstance(chart, Plain), emerged)
    for network in (model.decoder, model.averaged_decoder):
        network.set_weights(chart.get_weights())
    return PosteriorFit(target, start, model, 0.0, seed, settings, {})


def _charted(target, start, seed, settings, clock, emerged) -> Chart | Plain:
    """Returns a chart that maps N(0, I) close to the posterior, or the identity if that is better.

    The chart minimises KL(q || p), which may lose modes. The start's chains still have these modes,
    so the symmetrised divergence over q's draws and the chains' states decides between the two.
    """
    wanted = settings["chart_steps"] and settings["chart_share"]
    if not wanted or target.dim > starting.LARGEST:
        return Plain()
    began = clock.elapsed()
    trainer = building.chart_trainer(target, start, seed, settings, emerged)
    if clock.left() < max(TRACED * (clock.elapsed() - began), target.traced):
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
    """Returns whether AVB should be trained on the chart, given the divergence with and without it.

    A posterior that a Gaussian contrast can follow is learned better without a chart than on a bad
    one, such as a flow that has to cut a ring at a seam.

    Args:
      by_chart: `divergence` in nats of the chart applied to N(0, I).
      by_plain: `divergence` in nats of N(0, I) itself.
    """
    return by_chart < by_plain and (by_chart < CLOSE or by_plain > FOLLOWED)


def divergence(at_p: np.ndarray, at_q: np.ndarray) -> float:
    """Returns E_p[log p - log q] + E_q[log q - log p], in which p's normaliser cancels.

    Values are clipped to within `FAR` nats of the median at q's draws. A single draw in a tail,
    where a chart's inverse is unreliable, then has little effect, while a lost mode still counts
    because it holds many draws.

    Args:
      at_p: log p - log q at draws of p, [n].
      at_q: log p - log q at draws of q, [m].
    """
    low, high = np.median(at_q) - FAR, np.median(at_q) + FAR
    return float(np.clip(at_p, low, high).mean() - np.clip(at_q, low, high).mean())


def load_posterior(path: Path | str) -> PosteriorFit:
    """Loads a fit that `PosteriorFit.save` wrote, without the model's own code.

    Load only directories from sources that you trust: the model is stored as a TensorFlow
    SavedModel, a program that may read and write files.

    Raises:
      UserError: the directory is not a saved fit, or it is damaged.
    """
    path = Path(path)
    with files.loading(path, "PosteriorFit.save"):
        meta = json.loads((path / META).read_text())
        target = targets.load(path / MODEL)
        before = "z" in meta  # an earlier version stored the start in the JSON file
        start = coordinates.of_record(meta) if before else coordinates.load(path / START)
        settings = meta["seed"], meta["settings"]
        if meta.get("mixed", False):  # an earlier version had no mixtures
            model = building.mixed(target, start, *settings)
        else:
            model = building.avb(target, start, *settings, meta["charted"])
        model.load_weights(path / WEIGHTS)
        fit = PosteriorFit(
            target, start, model, meta["seconds"], meta["seed"], meta["settings"], meta["history"]
        )
        fit.steps = meta.get("steps", fit.steps)  # earlier versions did not store it
        return fit
