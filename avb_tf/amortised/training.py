"""The training of q(u|y): maximum likelihood with new simulated pairs in each step.

The mean of KL(p(u|y) || q(u|y)) over y is, up to the posterior's entropy, minus the expected log q
of simulated pairs. Every mode is simulated in proportion to its mass, so no mode is lost. No pair
is used twice, so the network cannot overfit.
"""

import math
from typing import Any

import numpy as np
import tensorflow as tf

from avb_tf import optimizers
from avb_tf.amortised.network import ConditionalMixture, scaling
from avb_tf.amortised.simulation import Simulation
from avb_tf.errors import UserError
from avb_tf.posteriors.training import CHUNK, Clock

_SCALING_PAIRS = 10_000  # simulated pairs that set the locations and scales
_WARMUP = 0.02  # share of a stage in which its learning rate rises


def build(simulation: Simulation, settings: dict[str, Any]) -> ConditionalMixture:
    """Returns the network of a model with initial weights, before the scaling is set."""
    q = ConditionalMixture(
        simulation.dim,
        simulation.features,
        settings["components"],
        settings["width"],
        settings["depth"],
        settings["trunk_width"],
    )
    q((tf.zeros([1, simulation.dim]), tf.zeros([1, simulation.features])))
    return q


def train(
    q: ConditionalMixture, simulation: Simulation, settings: dict[str, Any], clock: Clock, seed: int
) -> dict[str, list[float]]:
    """Trains q from its initial weights.

    Args:
      q: network from `build`.
      simulation: the model.
      settings: settings of the fit.
      clock: clock of the fit, which decides when the training ends.
      seed: seed of the pairs, combined with the step.
    Returns:
      "log_q", the mean log q(u|y) in nats over each `CHUNK` steps, after the whitening's stage.
    Raises:
      UserError: the loss is not finite.
    """
    u, y, usable = simulation.simulate(_SCALING_PAIRS, tf.constant([seed, -1]))
    q.standardise(scaling(np.asarray(u)[usable], np.asarray(y)[usable]))
    share = settings["whitening_share"]
    whitening = q.whitening.trainable_variables
    others = [v for v in q.trainable_variables if not any(v is w for w in whitening)]
    _stage(q.log_student, whitening, simulation, settings, clock, seed, share)
    return {"log_q": _stage(q.log_prob, others, simulation, settings, clock, seed, 1.0)}


def _stage(log_density, variables, simulation, settings, clock, seed, until) -> list[float]:
    """Maximises the mean of `log_density` of pairs until a share of the training is over."""
    optimizer = optimizers.Adam(0.0, global_clipnorm=settings["clip_norm"])
    optimizer.build(variables)
    count = settings["batch_size"]

    @tf.function(autograph=False)
    def step(number):
        u, y, usable = simulation.simulate(count, tf.stack([seed, number]))
        with tf.GradientTape() as tape:
            densities = tf.where(usable, log_density(u, y), 0.0)
            loss = -tf.reduce_sum(densities) / tf.reduce_sum(tf.cast(usable, tf.float32))
        gradients = optimizers.gathered(tape.gradient(loss, [v.value for v in variables]))
        finite = tf.math.is_finite(loss) & tf.math.is_finite(tf.linalg.global_norm(gradients))
        optimizer.apply_where(finite, gradients)
        return loss

    @tf.function(autograph=False)
    def steps(first):
        def body(i, total):
            return i + 1, total + step(first + i)

        return tf.while_loop(lambda i, _: i < CHUNK, body, (0, 0.0))[1] / CHUNK

    since, history, lost = clock.progress(), [], 0
    while (progress := clock.progress()) < until:
        share = (progress - since) / max(1e-9, until - since)
        warm = min(1.0, (share + 1e-3) / _WARMUP)
        rate = 0.5 * warm * (1.0 + math.cos(math.pi * share))
        optimizer.learning_rate = settings["learning_rate"] * rate
        loss = float(steps(tf.constant(clock.step)))
        lost = 0 if math.isfinite(loss) else lost + 1
        if lost == 4:
            raise UserError(
                f"the loss has not been finite since step {clock.step - 3 * CHUNK}; expected "
                "finite data: check the model by `sample`, or lower learning_rate"
            )
        clock.step += CHUNK
        history.append(-loss)
        clock.bar.update(int(100 * clock.progress()), [("log_q", -loss)])
    return history
