"""Five benchmark tasks with known densities, as TFP joint distributions, and reference draws.

    task = TASKS["two_moons"]()
    task.model.sample(seed=(0, 0))["y"]
    references("two_moons")["reference"]  # [10, 10000, dim]: draws for each of 10 observations

The parameters are named `theta` and the data `y`. Source: the definitions of Lueckmann, Boelts,
Greenberg, Goncalves and Macke (2021), "Benchmarking simulation-based inference".
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from tensorflow_probability import distributions as tfd

FOLDERS = (os.environ.get("AVB_TF_DATA_DIR"), Path(__file__).parents[3] / "shared/data")


class Task(NamedTuple):
    """A joint distribution of `theta` and `y`.

    Attributes:
      model: the joint distribution.
      exact: (y [event], count, rng) -> exact draws of the posterior [count, dim], or None.
    """

    model: tfd.JointDistribution
    exact: Callable | None = None


class Moon(tfd.Distribution):
    """A crescent of radius 0.1 and width 0.01, shifted by a function of theta [..., 2]."""

    def __init__(self, theta, name="Moon"):
        parameters = dict(locals())
        self.theta = theta
        super().__init__(
            tf.float32, tfd.FULLY_REPARAMETERIZED, False, True, parameters=parameters, name=name
        )

    def _batch_shape(self):
        return self.theta.shape[:-1]

    def _event_shape(self):
        return tf.TensorShape([2])

    def _centre(self):
        a, b = self.theta[..., 0], self.theta[..., 1]
        return tf.stack([0.25 - tf.abs(a + b) / np.sqrt(2.0), (b - a) / np.sqrt(2.0)], -1)

    def _sample_n(self, n, seed=None):
        shape = tf.concat([[n], tf.shape(self.theta)[:-1]], 0)
        seeds = tf.random.split(seed, 2)
        angle = tf.random.stateless_uniform(shape, seeds[0], -0.5 * np.pi, 0.5 * np.pi)
        radius = tf.random.stateless_normal(shape, seeds[1], 0.1, 0.01)
        moon = tf.stack([radius * tf.cos(angle), radius * tf.sin(angle)], -1)
        return self._centre() + moon

    def _log_prob(self, x):
        away = x - self._centre()
        radius = tf.norm(away, axis=-1)
        density = tfd.Normal(0.1, 0.01).log_prob(radius) - tf.math.log(np.pi * radius)
        return tf.where(away[..., 0] > 0.0, density, -np.inf)


class SpikeSums(tfd.Distribution):
    """The distribution of design^T s for spikes s ~ Bernoulli(sigmoid(design theta)).

    This statistic is sufficient for theta. The density omits a factor that does not depend on
    theta.
    """

    def __init__(self, design, theta, name="SpikeSums"):
        parameters = dict(locals())
        self.design, self.theta = design, theta
        super().__init__(
            tf.float32, tfd.NOT_REPARAMETERIZED, False, True, parameters=parameters, name=name
        )

    def _logits(self):
        return tf.linalg.matvec(self.design, self.theta)

    def _batch_shape(self):
        return self.theta.shape[:-1]

    def _event_shape(self):
        return tf.TensorShape([self.design.shape[-1]])

    def _sample_n(self, n, seed=None):
        shape = tf.concat([[n], tf.shape(self._logits())], 0)
        spikes = tf.random.stateless_uniform(shape, seed) < tf.sigmoid(self._logits())
        return tf.linalg.matvec(self.design, tf.cast(spikes, tf.float32), transpose_a=True)

    def _log_prob(self, x):
        return tf.reduce_sum(x * self.theta, -1) - tf.reduce_sum(tf.nn.softplus(self._logits()), -1)


def two_moons() -> Task:
    """Returns the task whose posterior is two crescents, each 0.1 in size, in a square."""
    prior = tfd.Independent(tfd.Uniform(-tf.ones(2), 1.0), 1)

    def exact(y, count, rng):
        angle = rng.uniform(-0.5 * np.pi, 0.5 * np.pi, 40 * count)
        radius = rng.normal(0.1, 0.01, angle.shape)
        along = radius * np.cos(angle) + 0.25 - y[0]
        across = y[1] - radius * np.sin(angle)
        usable = along >= 0.0
        along, across = (along * rng.choice([-1.0, 1.0], along.shape))[usable], across[usable]
        theta = np.stack([along - across, along + across], -1) / np.sqrt(2.0)
        return theta[(np.abs(theta) < 1.0).all(1)][:count]

    return Task(tfd.JointDistributionNamed({"theta": prior, "y": Moon}), exact)


def _truncated(draw, limit, count, rng):
    """Returns `count` draws of `draw(n, rng)` whose coordinates are all below `limit` in size."""
    x = np.zeros([0, 0])
    n = count
    while len(x) < count:
        n *= 2
        x = draw(n, rng)
        x = x[(np.abs(x) < limit).all(1)]
    return x[:count]


def gaussian_mixture() -> Task:
    """Returns the task whose posterior is a wide and a narrow Gaussian around the same point."""
    prior = tfd.Independent(tfd.Uniform(-10.0 * tf.ones(2), 10.0), 1)

    def data(theta):
        scales = tf.constant([1.0, 0.1])
        components = tfd.Independent(
            tfd.Normal(theta[..., tf.newaxis, :], scales[:, tf.newaxis]), 1
        )
        return tfd.MixtureSameFamily(tfd.Categorical(probs=[0.5, 0.5]), components)

    def exact(y, count, rng):
        def draw(n, rng):
            return y + rng.normal(size=[n, 2]) * rng.choice([1.0, 0.1], [n, 1])

        return _truncated(draw, 10.0, count, rng)

    return Task(tfd.JointDistributionNamed({"theta": prior, "y": data}), exact)


def gaussian_linear_uniform() -> Task:
    """Returns the task with ten independent Gaussians, truncated to the prior's support."""
    prior = tfd.Independent(tfd.Uniform(-tf.ones(10), 1.0), 1)

    def data(theta):
        return tfd.Independent(tfd.Normal(theta, np.float32(np.sqrt(0.1))), 1)

    def exact(y, count, rng):
        columns = [
            _truncated(
                lambda n, rng, c=c: c + np.sqrt(0.1) * rng.normal(size=[n, 1]), 1.0, count, rng
            )
            for c in y
        ]
        return np.concatenate(columns, 1)

    return Task(tfd.JointDistributionNamed({"theta": prior, "y": data}), exact)


def slcp() -> Task:
    """Returns the task of four draws from a Gaussian in the plane.

    The data do not determine the signs of two parameters, so the posterior has four modes.
    """
    prior = tfd.Independent(tfd.Uniform(-3.0 * tf.ones(5), 3.0), 1)

    def data(theta):
        a, b = theta[..., 2] ** 2, theta[..., 3] ** 2
        first = tf.sqrt(a**2 + 1e-6)
        below = tf.tanh(theta[..., 4]) * a * b / first
        second = tf.sqrt(b**2 + 1e-6 - below**2)
        rows = [tf.stack([first, tf.zeros_like(first)], -1), tf.stack([below, second], -1)]
        return tfd.Sample(tfd.MultivariateNormalTriL(theta[..., :2], tf.stack(rows, -2)), 4)

    return Task(tfd.JointDistributionNamed({"theta": prior, "y": data}))


def bernoulli_glm() -> Task:
    """Returns the task of a logistic regression of spikes on a stimulus, with a smooth prior."""
    design = tf.constant(references("bernoulli_glm")["design_matrix"])
    differences = np.eye(9) - np.eye(9, k=-1)
    smooth = differences @ differences + np.diag(np.sqrt(np.arange(9) / 9))
    precision = np.zeros([10, 10])
    precision[0, 0], precision[1:, 1:] = 0.5, smooth.T @ smooth
    scale = np.linalg.cholesky(np.linalg.inv(precision)).astype(np.float32)
    prior = tfd.MultivariateNormalTriL(tf.zeros(10), scale)
    model = {"theta": prior, "y": lambda theta: SpikeSums(design, theta)}
    return Task(tfd.JointDistributionNamed(model))


TASKS: dict[str, Callable[[], Task]] = {
    task.__name__: task
    for task in (two_moons, gaussian_mixture, gaussian_linear_uniform, slcp, bernoulli_glm)
}


def path_of(name: str) -> Path | None:
    """Returns the file of a task's references, or None if there is none."""
    files = [Path(folder) / f"sbibm/{name}.npz" for folder in FOLDERS if folder]
    return next((file for file in files if file.is_file()), None)


def references(name: str) -> dict[str, np.ndarray]:
    """Loads observations [10, n], their true parameters [10, dim], and draws [10, 10000, dim]."""
    path = path_of(name)
    if path is None:
        raise FileNotFoundError(f"no sbibm/{name}.npz in $AVB_TF_DATA_DIR or ../shared/data")
    with np.load(path, allow_pickle=False) as file:
        return {key: file[key] for key in file}
