"""The models of a fit: AVB over standardised z, and the model that trains the chart before it."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from avb_tf.adversaries import ResidualAdversary
from avb_tf.likelihoods import Likelihood
from avb_tf.model import AVB
from avb_tf.networks import DenseStack
from avb_tf.posteriors.coordinates import Start
from avb_tf.posteriors.functions import value_and_gradient, with_slope
from avb_tf.posteriors.sampler import (
    Chart,
    GatedEncoder,
    MixtureEncoder,
    NormalEncoder,
    Plain,
    log_normal,
)
from avb_tf.posteriors.target import LogDensity, Target

NOWHERE = -1e4  # nats: the log density where it is not finite, so that averages stay finite


def avb(
    target: Target,
    start: Start,
    seed: int,
    settings: dict[str, Any],
    charted: bool,
    emerged: float | tf.Variable = 1.0,
) -> AVB:
    """Returns the AVB model over z, where u = start.place(chart(z)).

    Args:
      target: the posterior.
      start: coordinates in which the posterior has mean 0 and covariance I.
      seed: seed of the noise and of the minibatches in training.
      settings: settings of the fit.
      charted: whether there is a chart; if not, it is the identity.
      emerged: weight of the posterior in the annealed target, in [0, 1]; N(0, I) has the rest.
    """
    s = settings
    encoder = GatedEncoder(target.dim, s["noise_dim"], s["blocks"], s["width"])
    decoder = Chart(target.dim, s["chart_steps"], s["chart_width"]) if charted else Plain()
    adversary = ResidualAdversary(DenseStack(1, 1), s["adversary_width"], s["adversary_depth"])
    return _model(target, start, seed, settings, encoder, decoder, adversary, emerged)


def chart_trainer(
    target: Target, start: Start, seed: int, settings: dict[str, Any], emerged: float | tf.Variable
) -> AVB:
    """Returns a VAE that trains the chart: the chart is its decoder, and q(z) is fixed to N(0, I).

    Args:
      target: the posterior.
      start: coordinates in which the posterior has mean 0 and covariance I.
      seed: seed of the noise and of the minibatches in training.
      settings: settings of the fit.
      emerged: weight of the posterior in the annealed target, in [0, 1]; N(0, I) has the rest.
    """
    chart = Chart(target.dim, settings["chart_steps"], settings["chart_width"])
    encoder = NormalEncoder(target.dim)
    return _model(target, start, seed, settings, encoder, chart, None, emerged)


def mixed(target: Target, start: Start, seed: int, settings: dict[str, Any]) -> AVB:
    """Returns a model whose q is the mixture that the start has fitted to its chains.

    Args:
      target: the posterior.
      start: coordinates in which the posterior has mean 0 and covariance I, with the mixture.
      seed: seed of the noise.
      settings: settings of the fit.
    """
    of_chains: Any = start.mixture
    encoder = MixtureEncoder(of_chains.standardised(start.mean, start.scale_tril))
    settings = {**settings, "ema_decay": 0.0}  # nothing is trained
    return _model(target, start, seed, settings, encoder, Plain(), None, 1.0)


def _model(target, start, seed, settings, encoder, decoder, adversary, emerged):
    """Returns the AVB with log p(x, z) = emerged * (the model's) + (1 - emerged) * log N(0, I)."""
    density = density_of(target, start, target.estimator(seed))

    class Joint:
        """p(x, z) as a distribution of x: the data are part of the density, so x is ignored."""

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


def density_of(target: Target, start: Start, log_density: LogDensity) -> Callable[[Any], Any]:
    """Returns the function from standardised z [n, dim] to log p(data, z) in nats, [n].

    Where the model's density or its gradient is not finite, the gradient is -z, which pulls z
    towards the centre.

    Args:
      target: the posterior.
      start: coordinates in which the posterior has mean 0 and covariance I.
      log_density: unconstrained u [n, dim] -> log density [n] in nats.
    """

    def of_z(z):
        u, volume = start.place(z, target.dtype)
        return tf.cast(log_density(u) + volume, tf.float32)

    def standardised(z):
        density, slope = value_and_gradient(of_z, z)
        finite = tf.math.is_finite(density) & tf.reduce_all(tf.math.is_finite(slope), -1)
        slope = tf.where(finite[:, tf.newaxis], slope, -z)
        return tf.where(finite, density, NOWHERE), slope

    return with_slope(standardised)
