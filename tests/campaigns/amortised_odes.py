"""Two benchmark tasks whose data come from ordinary differential equations, with exact draws.

    target = lotka_volterra()
    target.exact(target.observation(0), 1000, np.random.default_rng(0))  # {"alpha": [1000], ...}

Both are integrated in logarithms by the classical Runge-Kutta method. Its fixed step serves
thousands of parameters at once, and the reference has the model's own numbers because numpy and
TensorFlow take the same steps; the solvers of SciPy and TFP adapt theirs.

Source of the definitions: Lueckmann, Boelts, Greenberg, Goncalves and Macke (2021), "Benchmarking
simulation-based inference"; the ten times are evenly spaced.
"""

from collections.abc import Callable

import numpy as np
import tensorflow as tf
from scipy import optimize, stats
from tensorflow_probability import distributions as tfd

from tests.campaigns.amortised_targets import Target

TIMES = 10
_STARTS = 2000  # draws of the prior, the best of which starts the search for the mode
_DEGREES = 4.0  # degrees of freedom of the proposal
_WIDER = 1.2  # the proposal's scale, relative to the Gaussian at the mode
_PROPOSED = 20_000  # points proposed at a time
_ALMOST_ALL = -1e-6  # largest logarithm of a share


def runge_kutta(rates: Callable, state: np.ndarray, interval: float, steps: int) -> np.ndarray:
    """Integrates an autonomous equation.

    Args:
      rates: function from a state [2, n] to its derivative [2, n].
      state: the state at the first of the `TIMES`, [2, n].
      interval: between two of the times.
      steps: of the method in each interval.
    Returns:
      The states at all times, [TIMES, 2, n].
    """
    h, states = interval / steps, [state]
    for _ in range(TIMES - 1):
        for _ in range(steps):
            state = _step(rates, state, h)
        states.append(state)
    return np.stack(states)


def runge_kutta_in_graph(rates: Callable, state: tf.Tensor, interval: float, steps: int):
    """Computes `runge_kutta` for tensors [2, ...] in a graph; it has a gradient."""
    h = interval / steps

    def through(state, _):
        return tf.while_loop(
            lambda *_: True,
            lambda i, state: (i + 1, _step(rates, state, h)),
            (0, state),
            maximum_iterations=steps,
        )[1]

    later = tf.scan(through, tf.range(TIMES - 1), state)
    return tf.concat([state[tf.newaxis], later], 0)


def _step(rates, state, h):
    a = rates(state)
    b = rates(state + 0.5 * h * a)
    c = rates(state + 0.5 * h * b)
    d = rates(state + h * c)
    return state + h / 6.0 * (a + 2.0 * b + 2.0 * c + d)


def _drawn(log_density, prior, count, rng):
    """Draws from a posterior by rejection from a Student t at its mode.

    Args:
      log_density: function from u [n, dim] to log densities [n].
      prior: mean and deviations of the Gaussian prior of u, [dim] each.
      count: number of draws.
      rng: random numbers.
    """
    mean, deviation = prior
    starts = mean + deviation * rng.normal(size=[_STARTS, len(mean)])
    start = starts[np.argmax(log_density(starts))]

    def loss(u):
        return -log_density(u[np.newaxis])[0]

    mode = optimize.minimize(loss, start, method="Nelder-Mead", options={"fatol": 1e-6}).x
    steps = 1e-4 * np.eye(len(mean))
    ends = [mode + i * a + j * b for a in steps for b in steps for i in (1, -1) for j in (1, -1)]
    values = log_density(np.array(ends)).reshape(len(mean), len(mean), 4)
    precision = values @ [-1.0, 1.0, 1.0, -1.0] / 4e-8
    proposal = stats.multivariate_t(mode, _WIDER**2 * np.linalg.inv(precision), _DEGREES, seed=rng)
    points, log_weights = np.empty([0, len(mean)]), np.empty(0)
    while np.exp(log_weights - log_weights.max(initial=-np.inf)).sum() < 1.2 * count:
        u = proposal.rvs(_PROPOSED).reshape(-1, len(mean))
        points = np.concatenate([points, u])
        log_weights = np.concatenate([log_weights, log_density(u) - proposal.logpdf(u)])
    kept = np.log(rng.uniform(size=len(points))) < log_weights - log_weights.max()
    return points[kept][:count]


def _gaussian(u, mean, deviation):
    return -0.5 * (((u - mean) / deviation) ** 2).sum(-1)


def _joint(names, mean, deviation, data):
    pairs = zip(names, np.float32(mean), np.float32(deviation), strict=True)
    priors = {name: tfd.LogNormal(m, s) for name, m, s in pairs}
    return tfd.JointDistributionNamed({**priors, "y": data})


def sir() -> Target:
    """Returns an epidemic: rates of infection and recovery; infected among 1,000 people."""
    names, tested, interval, steps = ("beta", "gamma"), 1000.0, 17.0, 17
    mean, deviation = np.log([0.4, 0.125]), np.array([0.5, 0.2])
    first = np.array([np.log1p(-1e-6), np.log(1e-6)])  # logs of the susceptible and infected share

    def rates(library, beta, gamma):
        return lambda s: library.stack(
            [-beta * library.exp(s[1]), beta * library.exp(s[0]) - gamma]
        )

    def data(gamma, beta):
        start = tf.stack([tf.zeros_like(beta) + part for part in first])
        infected = runge_kutta_in_graph(rates(tf, beta, gamma), start, interval, steps)[:, 1]
        infected = tf.minimum(tf.einsum("t...->...t", infected), _ALMOST_ALL)
        logits = infected - tf.math.log(-tf.math.expm1(infected))
        return tfd.Independent(tfd.Binomial(tested, logits=logits), 1)

    def exact(y, count, rng):
        def log_density(u):
            beta, gamma = np.exp(u.T)
            start = np.repeat(first[:, np.newaxis], len(u), 1)
            infected = runge_kutta(rates(np, beta, gamma), start, interval, steps)[:, 1].T
            infected = np.minimum(infected, _ALMOST_ALL)
            failures = (tested - y) * np.log(-np.expm1(infected))
            return (y * infected + failures).sum(-1) + _gaussian(u, mean, deviation)

        u = _drawn(log_density, (mean, deviation), count, rng)
        return dict(zip(names, np.exp(u.T), strict=True))

    return Target(_joint(names, mean, deviation, data), exact)


def lotka_volterra() -> Target:
    """Returns predators and prey: four rates, and noisy numbers of both at ten times."""
    names, interval, steps, noise = ("alpha", "beta", "gamma", "delta"), 2.1, 40, 0.1
    mean, deviation = np.array([-0.125, -3.0, -0.125, -3.0]), np.full(4, 0.5)
    first = np.log([30.0, 1.0])  # prey and predators

    def rates(library, alpha, beta, gamma, delta):
        return lambda s: library.stack(
            [alpha - beta * library.exp(s[1]), delta * library.exp(s[0]) - gamma]
        )

    def data(delta, gamma, beta, alpha):
        start = tf.stack([tf.zeros_like(alpha) + part for part in first])
        states = runge_kutta_in_graph(rates(tf, alpha, beta, gamma, delta), start, interval, steps)
        return tfd.Independent(tfd.LogNormal(tf.einsum("ts...->...st", states), noise), 2)

    def exact(y, count, rng):
        log_y = np.log(y.astype(np.float64))

        def log_density(u):
            start = np.repeat(first[:, np.newaxis], len(u), 1)
            states = runge_kutta(rates(np, *np.exp(u.T)), start, interval, steps)
            away = (log_y - np.einsum("tsn->nst", states)) / noise
            return -0.5 * (away**2).sum((1, 2)) + _gaussian(u, mean, deviation)

        u = _drawn(log_density, (mean, deviation), count, rng)
        return dict(zip(names, np.exp(u.T), strict=True))

    return Target(_joint(names, mean, deviation, data), exact)


TARGETS: dict[str, Callable[[], Target]] = {
    target.__name__: target for target in (sir, lotka_volterra)
}
