"""`fit_posterior`: AVB where the model is fixed and the encoder has only noise to read.

The same bound, model class and training step as everywhere: x is one example that stays the same,
its many draws are the samples, and log p(x, z) is the model's own density, so that the prior is in
it and E_q[log r] is minus the entropy of r.
"""

import contextlib
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from avb_tf import optimizers
from avb_tf.data import pipeline
from avb_tf.errors import UserError
from avb_tf.likelihoods import Likelihood
from avb_tf.model import AVB
from avb_tf.networks import DenseStack, ResidualAdversary
from avb_tf.posteriors import models, start, target
from avb_tf.posteriors.result import META, MODEL, WEIGHTS, PosteriorFit
from avb_tf.posteriors.sampler import Chart, GatedEncoder, NormalEncoder, Plain, log_normal
from avb_tf.posteriors.settings import STEPS, resolved

CHUNK = 25  # steps between looks at the clock
FAR = 10.0  # nats, see `divergence`
CHOICE = 0.05  # share of `seconds` for the choice of the better fit
CLOSE, FOLLOWED = 0.3, 3.0  # nats of `divergence`, see `helps`
TIE = 0.02  # in total variation, about the error of two distances
NOWHERE = -1e4  # nats, for the average where the density is not finite


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

    Args:
      model: a TFP joint distribution, pinned or with `observed`; or a log density, a function of
        one tensor, or of several by name or in order as `shape` says.
      observed: values of parts of the joint, a dict by name or a sequence with None where unknown.
      steps: of training; 3000 where `seconds` is not given either.
      seconds: that the call may take, all included; how far training comes is then up to the
        machine, and the fit no function of `seed` alone.
      seed: of the whole fit. TensorFlow's global seed is set.
      shape: of the log density's argument, or a dict or sequence of them.
      bijector: from R^n to the log density's support, in the structure of `shape`.
      dtype: of the log density's argument.
      batch_size: for much data: rows of `observed`, a dict of arrays [rows, ...], that a step of
        training sees; `model` is then a function from rows of them to the joint pinned on these.
        The start and the verdict see all.
      verbose: shows a progress bar.
      **settings: changes to `settings.SETTINGS`, none of which should need one.
    Raises:
      UserError: a model that cannot be fitted, and what to do about it.
    """
    began = time.monotonic()
    if (steps is not None and steps < 1) or (seconds is not None and seconds <= 0):
        raise UserError(f"steps is {steps} and seconds {seconds}; expected numbers above 0")
    if steps is None and seconds is None:
        steps = STEPS
    goal = models.make(model, observed, shape, bijector, dtype, batch_size)
    chosen = resolved(goal.dim, **settings)
    clock = _Clock(steps, began, seconds, verbose)
    found = start.find(goal, seed)
    with _seeded(seed):
        fit = _fitted(goal, found, seed, chosen, clock)
    fit.seconds = time.monotonic() - began
    return fit


@contextlib.contextmanager
def _seeded(seed: int):
    """Keras's initial weights come from global generators; a caller's go on as if unused."""
    python, numpy = random.getstate(), np.random.get_state()
    keras.utils.set_random_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _fitted(goal, found, seed, chosen, clock) -> PosteriorFit:
    """The chart, AVB upon it, and the better of both."""
    emerged = tf.Variable(0.0, trainable=False)
    chart = _charted(goal, found, seed, chosen, clock, emerged)
    plain = isinstance(chart, Plain)
    avb = build(goal, found, seed, chosen, not plain, emerged if plain else 1.0)
    before = build(goal, found, seed, chosen, not plain)
    for network in (avb.decoder, avb.averaged_decoder, before.averaged_decoder):
        network.set_weights(chart.get_weights())
    # The chart stays as it is: moving with the encoder, the two undid each other's scales, and
    # the adversary lost both.
    avb.decoder.trainable = False
    history = _train(avb, chosen, clock, 1.0, chosen["learning_rate"], emerged if plain else None)
    # Where the adversary was no match for the posterior, the fit is better off with the chart
    # alone, N(0, I) going in; there T is exactly 0 and the weights are exact.
    before.step.assign(avb.step)
    fits = [PosteriorFit(goal, found, one, 0.0, seed, chosen, history) for one in (avb, before)]
    by_avb, by_chart = (fit.diagnostics().distance for fit in fits)
    return fits[by_avb > by_chart + TIE]


def _charted(goal, found, seed, settings, clock, emerged) -> Chart | Plain:
    """A chart that takes N(0, I) to near the posterior, or a plain one where that is better.

    Trained as a VAE whose decoder it is, with nothing for the encoder to learn. It minimises
    KL(q || p), which may lose modes; the chains of the start have them, so the symmetrised
    divergence over q's draws and the chains' tells which of the two is closer to the posterior.
    """
    if not settings["chart_steps"] or not settings["chart_share"]:
        return Plain()
    chart = Chart(goal.dim, settings["chart_steps"], settings["chart_width"])
    model = _model(goal, found, seed, settings, NormalEncoder(goal.dim), chart, None, emerged)
    rate = settings["chart_learning_rate"]
    _train(model, settings, clock, settings["chart_share"], rate, emerged)
    density = density_of(goal, found, goal.log_density)
    chains = tf.constant(found.z, tf.float32)
    draws = tf.random.stateless_normal(chains.shape, [seed, 0])

    def log_ratio(chart, z):
        outputs = chart(z)
        return density(outputs[:, :-1]) + outputs[:, -1] - log_normal(z)

    def distance(chart):
        at_p, at_q = (np.asarray(log_ratio(chart, z)) for z in (chart.inverse(chains), draws))
        return divergence(at_p, at_q)

    charted: Any = model.averaged_decoder
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


def build(goal, found, seed: int, settings: dict[str, Any], charted: bool, emerged=1.0) -> AVB:
    """The model of z, where u = mean + scale_tril @ chart(z) with the start's moments."""
    s = settings
    encoder = GatedEncoder(goal.dim, s["noise_dim"], s["blocks"], s["width"])
    decoder = Chart(goal.dim, s["chart_steps"], s["chart_width"]) if charted else Plain()
    adversary = ResidualAdversary(DenseStack(1, 1), s["adversary_width"], s["adversary_depth"])
    return _model(goal, found, seed, settings, encoder, decoder, adversary, emerged)


def _model(goal, found, seed, settings, encoder, decoder, adversary, emerged=1.0):
    """The AVB whose log p(x, z) is `emerged` parts the model's and the rest a Gaussian."""
    density = density_of(goal, found, goal.estimator(seed))

    class Joint:
        """p(x, z) as a distribution of x, which is fixed and within the density."""

        def __init__(self, outputs):
            self.outputs = outputs

        def log_prob(self, x):
            del x
            coordinates, volume = self.outputs[:, 0, :-1], self.outputs[:, 0, -1]
            annealed = emerged * density(coordinates) + (1.0 - emerged) * log_normal(coordinates)
            return (annealed + volume)[:, tf.newaxis, tf.newaxis]

    return AVB(
        (1,),
        encoder,
        decoder,
        adversary,
        likelihood=Likelihood(0, Joint, None, False, False),
        prior=False,
        condition="x",
        draws=settings["draws"],
        adversary_draws=settings["draws"],
        adversary_steps=settings["adversary_steps"],
        ema_decay=settings["ema_decay"],
        seed=seed,
    )


def density_of(goal: target.Target, found: start.Start, log_density) -> Callable[[Any], Any]:
    """log p(data, z) in nats, of standardised z [n, dim] -> [n], by that of u [n, dim].

    Where the model's density is not finite, z is drawn towards the centre instead.
    """
    mean, factor = (tf.constant(v, goal.dtype) for v in (found.mean, found.scale_tril))
    volume = float(np.linalg.slogdet(found.scale_tril)[1])

    @tf.custom_gradient
    def standardised(z):
        def of_z(z):
            u = mean + tf.linalg.matvec(factor, tf.cast(z, goal.dtype))
            return tf.cast(log_density(u), tf.float32) + volume

        density, slope = target.value_and_gradient(of_z, z)
        finite = tf.math.is_finite(density) & tf.reduce_all(tf.math.is_finite(slope), -1)
        slope = tf.where(finite[:, tf.newaxis], slope, -z)
        density = tf.where(finite, density, NOWHERE)
        return density, lambda upstream: upstream[:, tf.newaxis] * slope

    return standardised


def _train(model, settings, clock, until, rate, emerged=None) -> dict[str, list[float]]:
    """Trains until a share of the whole fit is over; the terms of the bound as they went."""
    clip = settings["clip_norm"]
    model.compile(
        optimizers.Adam(0.0, global_clipnorm=clip),
        optimizers.Adam(0.0, global_clipnorm=clip),
        steps_per_execution=CHUNK,
    )
    x = pipeline.untuned(tf.data.Dataset.from_tensors(tf.zeros([1, 1])).repeat())
    pace = _Pace(settings, clock, until, rate, emerged)
    endless = {"epochs": 10**6, "steps_per_epoch": CHUNK, "shuffle": False, "verbose": 0}
    return model.fit(x, callbacks=[pace], **endless).history


class _Clock:
    """How much of a fit is over, by steps and by seconds, with its progress bar."""

    def __init__(self, steps, began, seconds, verbose):
        self.steps, self.began = steps, began
        self.seconds = seconds and (1.0 - CHOICE) * seconds
        self.step = 0
        self.bar = keras.utils.Progbar(
            100, verbose=int(verbose), unit_name="percent", stateful_metrics=["elbo"]
        )

    def progress(self) -> float:
        """In [0, 1]."""
        by_steps = self.step / self.steps if self.steps else 0.0
        by_time = (time.monotonic() - self.began) / self.seconds if self.seconds else 0.0
        return min(1.0, max(by_steps, by_time))


class _Pace(keras.callbacks.Callback):
    """Learning rates by the share of this training that is over, its end, and a watch over it."""

    def __init__(self, settings, clock, until, rate, emerged):
        super().__init__()
        self.settings, self.clock, self.until, self.rate = settings, clock, until, rate
        self.emerged = emerged
        self.since = clock.progress()

    def on_epoch_begin(self, epoch, logs=None):
        """Half a cosine; the adversary keeps moving until the encoder rests."""
        share = (self.clock.progress() - self.since) / max(1e-9, self.until - self.since)
        cosine = 0.5 * (1.0 + np.cos(np.pi * min(1.0, share)))
        rate = self.rate * (0.01 + 0.99 * cosine)
        if self.model.adversary is not None:
            highest = self.settings["adversary_learning_rate"]
            self.model.adversary_optimizer.learning_rate = highest * (0.1 + 0.9 * cosine)
            rate *= share >= self.settings["adversary_warmup"]
        if self.emerged is not None:
            self.emerged.assign(min(1.0, share / max(1e-9, self.settings["annealing"])))
        self.model.optimizer.learning_rate = rate

    def on_epoch_end(self, epoch, logs: Any = None):
        """Stops at the end, and where the bound is lost."""
        if int(self.model.skipped_in_a_row.numpy()) >= CHUNK:
            raise UserError(
                f"the bound or its gradient is no number since step {self.clock.step}; expected "
                "finite ones: check the model's density far from its mode, or lower learning_rate"
            )
        self.clock.step += CHUNK
        self.clock.bar.update(int(100 * self.clock.progress()), [("elbo", logs["elbo"])])
        self.model.stop_training = self.clock.progress() >= self.until


def load_posterior(path) -> PosteriorFit:
    """A fit as `PosteriorFit.save` wrote it, without the model's own code.

    The directory holds the model as a TensorFlow SavedModel. As any program it should come from
    somebody you trust.

    Raises:
      UserError: it is not a saved fit, or damaged.
    """
    path = Path(path)
    try:
        meta = json.loads((path / META).read_text())
        goal = target.load(path / MODEL)
        found = start.Start(*(np.array(meta[name]) for name in start.Start._fields))
        avb = build(goal, found, meta["seed"], meta["settings"], meta["charted"])
        avb.load_weights(path / WEIGHTS)
        return PosteriorFit(
            goal, found, avb, meta["seconds"], meta["seed"], meta["settings"], meta["history"]
        )
    except Exception as error:  # whatever JSON, Keras and TensorFlow raise on a damaged file
        raise UserError(
            f"{path} cannot be loaded ({error!s:.200}); expected a directory that "
            "PosteriorFit.save wrote"
        ) from error
