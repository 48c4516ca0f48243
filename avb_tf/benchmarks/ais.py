"""Compares annealed importance sampling in one graph with a loop that calls a graph per step.

`make bench-ais` runs this module. Both programs anneal the same model at the sizes of the authors'
protocol: 320 examples, 8 chains, 2000 temperatures and 30 leapfrog steps. The cost of both is
linear in the number of temperatures, so only a few temperatures are timed.
"""

import statistics
import time
from collections.abc import Callable

import numpy as np
import tensorflow as tf
from tensorflow_probability import distributions as tfd

import avb_tf
from avb_tf.likelihood_estimation import ais, joint

EXAMPLES, CHAINS, TEMPERATURES, LEAPFROG_STEPS = 320, 8, 2000, 30
_TIMED = 4  # temperatures
_REPEATS = 5


def stepwise(
    model: avb_tf.AVB, x: tf.Tensor, start: tfd.Distribution, temperatures: int
) -> Callable[[], None]:
    """Returns HMC along the path, with 8 chains per example and a graph call per leapfrog step.

    A leapfrog step is written in the obvious way: it takes the gradient of TFP's densities at both
    ends of the path.

    Args:
      model: an `AVB`.
      x: [batch, *event].
      start: TFP distribution of z at the start of the path, with batch [batch].
      temperatures: number of temperatures.
    """
    betas = [tf.constant(beta) for beta in ais.sigmoid_schedule(temperatures)]
    size = tf.constant(0.1)

    def log_density(z, beta):
        outputs = model.averaged_decoder(z)
        log_likelihood = model.likelihood.distribution(outputs).log_prob(x)
        log_joint = tf.reduce_sum(log_likelihood, [2, 3, 4]) + model.prior.log_prob(z)
        return (1.0 - beta) * start.log_prob(z) + beta * log_joint

    @tf.function
    def energy(z, p, beta):
        return 0.5 * tf.reduce_sum(p**2, -1) - log_density(z, beta)

    @tf.function
    def leapfrog(z, p, beta):
        z += size * p
        with tf.GradientTape() as tape:
            tape.watch(z)
            value = log_density(z, beta)
        return z, p + size * tape.gradient(value, z)

    def run():
        z = start.sample(CHAINS, seed=(0, 0))
        for beta in betas[1:]:
            p = tf.random.normal(z.shape)
            before, moved, q = energy(z, p, beta), z, p
            for _ in range(LEAPFROG_STEPS):
                moved, q = leapfrog(moved, q, beta)
            accepted = tf.math.log(tf.random.uniform(before.shape)) < before - energy(
                moved, q, beta
            )
            z = tf.where(accepted[..., tf.newaxis], moved, z)
        z.numpy()

    return run


def compiled(
    model: avb_tf.AVB, x: tf.Tensor, start: tfd.Distribution, temperatures: int
) -> Callable[[], None]:
    """Returns the same computation by `ais.Annealer`, which is one graph call.

    Args:
      model: an `AVB`.
      x: [batch, *event].
      start: TFP distribution of z at the start of the path, with batch [batch].
      temperatures: number of temperatures.
    """
    anneal = ais.Annealer(lambda x, z: joint.log_joint(model, x, z), LEAPFROG_STEPS)
    betas, sizes = ais.sigmoid_schedule(temperatures), np.full((temperatures, len(x)), 0.1)

    def run():
        anneal(x, start, betas, start.sample(CHAINS, seed=(0, 0)), sizes)

    return run


def measure(examples: int) -> tuple[float, float]:
    """Returns the hours of the authors' protocol, stepwise with `examples` at once and compiled.

    Each is the median of several calls. The calls alternate, so that other load on the machine
    affects both alike.
    """
    model = avb_tf.build("vae", (28, 28, 1), latent_dim=8, width=300)
    images = np.random.default_rng(0).random((EXAMPLES, 28, 28, 1)) < 0.2
    sides = []
    for make, batch in ((stepwise, examples), (compiled, ais.ROWS // CHAINS)):
        x = tf.constant(images[:batch].astype(np.float32))
        zeros, ones = tf.zeros([batch, 8]), tf.ones([batch, 8])
        sides.append((make(model, x, tfd.MultivariateNormalDiag(zeros, ones), _TIMED), batch))
    for run, _ in sides:
        run()  # compiles
    hours = []
    for _ in range(_REPEATS):
        for run, batch in sides:
            began = time.perf_counter()
            run()
            seconds = time.perf_counter() - began
            hours.append(seconds / _TIMED * TEMPERATURES * EXAMPLES / batch / 3600.0)
    return statistics.median(hours[::2]), statistics.median(hours[1::2])


def main() -> None:
    """Prints a table for one example at a time, and for the authors' 16 examples at once."""
    print("| hours of the authors' protocol | a call for each leapfrog step | one call | ratio |")
    print("|---|---|---|---|")
    for examples in (1, 16):
        loop, graph = measure(examples)
        ratio = f"{loop / graph:.1f}"
        print(f"| loop over {examples} x {CHAINS} chains | {loop:.2f} | {graph:.2f} | {ratio} |")


if __name__ == "__main__":
    main()
